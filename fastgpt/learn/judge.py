"""Is a learner's function right, and if not, what is wrong with it?

Outputs and gradients are held to the rule of `fastgpt check`: against float64, within what rounding does to the
formula. A wrong result is compared with the known wrong formulas by the same rule: it has the mistake whose results it
has, within that formula's own rounding. If it has none of them, errors.py describes the places and sizes of the errors.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from .. import check
from .errors import describe, first_wrong
from .tasks import EXERCISES
from .wrong import WRONG


@dataclass
class Case:
    title: str
    inputs: dict  # tensors that get gradients
    options: dict = field(default_factory=dict)
    apart: str = ""  # "large": exp overflows where nothing is subtracted; "eps": another eps than GPT-2's


@dataclass
class Result:
    """What became of a case."""

    case: Case
    values: dict = field(default_factory=dict)
    truth: check.Truth | None = None
    rows: list = field(default_factory=list)
    error: str = ""
    request: dict = field(default_factory=dict)  # what was asked, where that may be asked again
    untouched: bool = False  # every number is as it was before the call

    @property
    def wrong(self):
        """The names of the tensors that are wrong."""
        return [row.tensor for row in self.rows if not row.ok]

    @property
    def ok(self):
        return not self.error and not self.wrong


@dataclass
class Verdict:
    name: str
    results: list
    gradients: str = ""  # whose they are: "autograd", "own" or "" for none
    notes: list = field(default_factory=list)
    mistake: list = field(default_factory=list)  # lines
    first: str = ""  # the first wrong value
    todo: bool = False

    @property
    def ok(self):
        return not self.todo and all(result.ok for result in self.results)


# ----------------------------------------------------------------------------------------------------- cases

SHAPES = {  # small enough for a loop in Python; each size once beyond 64, one below, at and above a register
    "linear": [(1, 48, 7), (1, 33, 33), (5, 65, 17), (3, 769, 9), (130, 7, 33), (2, 20, 257), (2, 3, 9, 31), (0, 8, 4)],
    "linear_gelu": [(1, 48, 64), (1, 33, 33), (5, 65, 17), (3, 300, 9), (130, 7, 33), (2, 3, 16, 31), (0, 48, 64)],
    "gelu": [(1,), (2, 64), (65, 48), (2, 3, 97), (0, 48)],
    "layer_norm": [(1, 48), (2, 64), (3, 5, 97), (65, 33), (3, 769), (0, 48)],
    "attention": [
        (1, 1, 1, 64), (3, 2, 2, 8), (2, 3, 3, 5), (1, 17, 4, 4), (1, 65, 2, 16), (1, 130, 1, 20), (1, 257, 1, 8),
        (0, 5, 2, 8),
    ],
    "lm_loss": [(1, 1, 48, 65), (2, 17, 20, 70), (1, 65, 9, 257), (3, 5, 300, 30), (130, 1, 8, 12)],
}  # fmt: skip


@lru_cache
def cases(name):
    """The awkward inputs on which a formula is judged, simple ones first."""
    made = []
    for seed, shape in enumerate(SHAPES[name], 100):  # not 1, the output gradient's: that would be x again
        inputs, options = check.make_inputs(name, shape, seed)
        title = "x".join(map(str, shape)) + (", no rows at all" if 0 in shape else "")
        made.append(Case(title, inputs, options))
    inputs, options = check.make_inputs(name, SHAPES[name][1], 30)
    made.append(Case(f"{made[1].title} again, other numbers", inputs, options))  # nothing is kept from before
    if name in ("linear", "linear_gelu"):
        inputs, _ = check.make_inputs(name, (4, 24, 40), 20)
        made.append(Case("4x24x40, no bias", {n: inputs[n] for n in ("x", "weight")}))
    if name == "gelu":
        inputs, _ = check.make_inputs(name, (5, 40), 20)
        made += [
            Case("5x40, small x", dict(x=inputs["x"] * 0.01)),
            Case("5x40, x of thousands", dict(x=inputs["x"] * 1000), apart="large"),
        ]
    if name == "layer_norm":
        inputs, _ = check.make_inputs(name, (7, 40), 20)
        x = inputs["x"]
        made += [
            Case("7x40, small variance", inputs | dict(x=x * 0.002)),
            Case("7x40, mean of 100", inputs | dict(x=x + 100.0)),
            Case("7x40, eps 0.1", inputs, dict(eps=0.1), "eps"),
        ]
    if name == "attention":
        inputs, options = check.make_inputs(name, (1, 20, 2, 16), 20)
        made.append(Case("1x20x2x16, large scores", {n: x * 20 for n, x in inputs.items()}, options, "large"))
    if name == "lm_loss":
        made = [Case(c.title, c.inputs, dict(targets=with_ignored(c.options["targets"]))) for c in made]
        inputs, options = check.make_inputs(name, (2, 9, 16, 40), 20)
        large = inputs | dict(hidden=inputs["hidden"] * 200)
        made.append(Case("2x9x16x40, large logits", large, dict(targets=with_ignored(options["targets"])), "large"))
    return made


def with_ignored(targets):
    """A third of the targets becomes -1, spread unevenly."""
    targets = targets.clone()
    flat = targets.view(-1)
    flat[2::4], flat[len(flat) // 2 + 1 :: 5] = -1, -1
    return targets


@lru_cache(None)
def truth_of(name, index):
    case = cases(name)[index]
    return check.find_truth(getattr(check.FORMULAS, name), case.inputs, case.options)


# ---------------------------------------------------------------------------------------------------- formulas


def judge_formula(sandbox, name, own_backward):
    """The verdict on linear, gelu, layer_norm, linear_gelu, attention or lm_loss in the sandbox's file."""
    e, native = EXERCISES[name], sandbox.native
    verdict = Verdict(name, [], "own" if own_backward else "" if native else "autograd")
    for index, case in enumerate(cases(name)):
        verdict.results.append(run_case(sandbox, name, index, case, own_backward, verdict))
        if verdict.todo:
            break
    verdict.todo |= all(r.untouched for r in verdict.results if "no rows" not in r.case.title)
    if verdict.todo:
        if own_backward:  # only the forward is written so far
            verdict = judge_formula(sandbox, name, False)
            verdict.notes.append(f"{e.function}_backward is not written yet{LATER[native]}.")
        return verdict
    failed = [result for result in verdict.results if not result.ok]
    if failed:
        verdict.first = first_wrong(failed)
        verdict.mistake = explain(name, verdict.results)
    return verdict


LATER = {
    True: "; until it is, training takes gpt.py's formula for it",
    False: "; until it is, autograd finds the gradients",
}


def run_case(sandbox, name, index, case, own_backward, verdict):
    e, native = EXERCISES[name], sandbox.native
    truth = truth_of(name, index)
    result = Result(case, truth=truth)
    out = truth.exact["out"]
    arguments = [(case.inputs | case.options).get(n) for n in e.arguments]
    while len(arguments) > 1 and e.arguments[len(arguments) - 1] not in case.inputs | case.options:
        arguments.pop()  # eps, or no bias: the default
    request = dict(ask="case", name=name, arguments=arguments, own_backward=own_backward)
    request["grad"] = check.output_gradient(out.shape) if own_backward or not native else None
    for at_end in (True, False) if native else (True,):
        answer = sandbox.ask(request | dict(at_end=at_end), case.title)
        if answer.get("todo"):
            verdict.todo = True
            return result
        result.untouched = native and nothing_written(answer, e, own_backward)
        wanted = ["out", *(f"d{n}" for n in case.inputs)] if request["grad"] is not None else ["out"]
        read_answer(answer, result, e, wanted)
        if not result.ok:
            break
    if answer.get("borrowed") and not verdict.notes:
        verdict.notes.append(f"It calls {', '.join(answer['borrowed'])}: borrowed. Write the formula itself.")
    if native and adds_to_what_was_there(sandbox, request, result, e, wanted):
        result.error = f"{', '.join(result.wrong)}: it adds to what was in there; set it to 0 before"
    return result


def nothing_written(answer, e, own_backward):
    """Is every number of the outputs as it was before? Then nothing is written yet."""
    sizes = {name: answer[name].numel() for name in ("out", *e.gradients) if name in answer}
    names = [name for name in sizes if (name != "out") == own_backward and sizes[name]]
    unwritten = answer.get("unwritten", {})
    return bool(names) and all(unwritten.get(name) == sizes[name] for name in names)


def read_answer(answer, result, e, wanted):
    """Fill a Result from what the child says."""
    truth = result.truth
    if "error" in answer:
        result.error = answer["error"]
        return
    out, expected = answer["out"], truth.exact["out"]
    if out.dtype is not torch.float32 or out.shape != expected.shape:
        result.error = f"the result is {spell(out.dtype, out.shape)}, expected {spell(torch.float32, expected.shape)}"
    elif answer["changed"]:
        result.error = f"it changes {', '.join(answer['changed'])}, which it was given to read only"
    elif answer.get("detached"):
        result.error = "its result has no gradient: something cuts it off (detach, no_grad, item, numpy, a new tensor)"
    if result.error:
        return
    result.values = {name: answer[name].double() for name in wanted}
    part = check.Truth(*({n: x[n] for n in wanted} for x in (truth.exact, truth.deviation, truth.spread)), truth.runs)
    formula = getattr(check.FORMULAS, e.name)
    case = result.case
    result.rows = check.compare_results(
        e.name,
        expected.shape,
        part,
        result.values,
        formula=lambda: check.evaluate(formula, case.inputs, case.options, torch.float32),
    )
    unwritten = [name for name in wanted if 0 < answer["unwritten"].get(name, 0)]
    if unwritten:
        counts = ", ".join(f"{answer['unwritten'][n]} of {answer[n].numel()} numbers of {n}" for n in unwritten)
        result.error = f"never written: {counts}"


def spell(dtype, shape):
    return f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"


def adds_to_what_was_there(sandbox, request, result, e, wanted):
    """Is a result right as soon as its memory is full of zeros before the call?"""
    if not result.wrong or result.error or all(result.values[n].isfinite().all() for n in result.wrong):
        return False
    zeros = Result(result.case, truth=result.truth)
    read_answer(sandbox.ask(request | dict(fill=0.0), result.case.title), zeros, e, wanted)
    return zeros.ok


# ------------------------------------------------------------------------------------------ naming the mistake

OVERFLOW = {
    "attention": "exp overflows: the largest score of a row is not subtracted before exp (max-subtraction)",
    "lm_loss": "exp overflows: the largest logit is not subtracted before exp (max-subtraction, logsumexp)",
    "gelu": "exp overflows for large x: write tanh so that exp's argument is never large (torch.tanh, std::tanh)",
    "linear_gelu": "exp overflows for large numbers: write tanh so that exp's argument is never large",
}


def explain(name, results):
    """Sentences that name the mistake; or, if it is none that is known, what its errors have in common."""
    failed = [r for r in results if r.wrong]
    if not failed:
        return []
    if all(r.case.apart == "eps" for r in failed):
        return ["The mistake: eps is the argument of this name; here a number of its own stands in its place."]
    if all(r.case.apart == "large" for r in failed) and name in OVERFLOW:
        finite = [r.values[n].isfinite() | ~r.truth.exact[n].isfinite() for r in failed for n in r.wrong]
        if not all(x.all() for x in finite):
            return [f"The mistake: {OVERFLOW[name]}."]
    if named := name_mistake(name, tuple(failed)):
        return named
    return ["It is none of the mistakes that are known here. What is seen of it:", *describe(failed, results)]


def name_mistake(name, failed):
    """Sentences that name a known mistake that explains these results, or none."""
    failed = telling(failed)
    wrong = list(dict.fromkeys(n for r in failed for n in r.wrong))
    matches = {title: all_matching(formula, failed, set(wrong)) for title, formula in WRONG[name].items()}

    def first(holds):  # the first title that holds in all these results
        for title, found in matches.items():
            if found and all(holds(r, x) for r, x in zip(failed, found, strict=True)):
                return title
        return None

    title = first(lambda r, x: set(r.values) <= x)
    if not title and (title := first(lambda r, x: set(r.wrong) <= x)) and "out" not in wrong:
        are = "are the gradients" if len(wrong) > 1 else "is the gradient"
        return [f"The mistake is in the backward alone: {', '.join(wrong)} {are} of another formula ({title})."]
    if title := title or first(lambda r, x: "out" in r.wrong and "out" in x):
        return [f"The mistake: {title}."]
    known = {n: first(lambda r, x, n=n: n in x or n not in r.wrong) for n in wrong}
    if "out" in wrong or not any(known.values()):
        return []
    rest = [n for n in wrong if not known[n]]
    lines = [f"The mistake in {n}: {known[n]}." for n in wrong if known[n]]
    return lines + ([f"In {', '.join(rest)} it is none of those that are known here."] if rest else [])


def telling(failed):
    """The results that tell most: of ordinary numbers, with rows, at most five, the smallest."""
    failed = [r for r in failed if r.values["out"].numel()] or failed
    failed = [r for r in failed if not r.case.apart] or failed  # a wrong formula may overflow, too, and has its own eps
    return sorted(failed, key=lambda r: sum(x.numel() for x in r.values.values()))[:5]


def all_matching(formula, failed, wrong):
    """For each result the names in which it is that of a wrong formula; [] if that explains none of `wrong`."""
    found = []
    for result in failed:
        found.append(matching(formula, result))
        if not found[-1] and wrong <= set(result.wrong):
            return []
    return found if any(found) else []


def matching(formula, result):
    """The names of the tensors in which a result is that of a wrong formula, within about its rounding."""
    case, wanted = result.case, [n for n in result.case.inputs if f"d{n}" in result.values]
    try:
        exact = check.evaluate(formula, case.inputs, case.options, torch.float64, wanted)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return set()
    near = {n for n, x in exact.items() if is_near(result.values[n], x)}
    if not near & set(result.wrong):
        return set()
    try:
        truth = check.find_truth(formula, case.inputs, case.options, wanted=wanted)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return set()
    rows = check.compare_results("", (), truth, result.values)
    return {r.tensor for r in rows if not r.wrong and r.kernel <= LOOSE * r.bound and r.rms <= LOOSE * r.rms_bound}


LOOSE = 8  # times a wrong formula's rounding: a learner may write it in another order, with other functions


def is_near(got, exact):
    """A first look, without the cost of sampling what rounding may do."""
    if got.shape != exact.shape:
        return False
    exact = exact.float().double()
    same = (got == exact) | got.isnan() & exact.isnan()
    size = exact.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt() if exact.numel() else 0.0
    return bool((same | ((got - exact).abs() <= 1e-2 * (exact.abs() + size))).all())
