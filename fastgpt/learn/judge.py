"""Is a learner's function right, and if not, what is wrong with it?

Outputs and gradients are held to the rule of `fastgpt check`: against float64, within what rounding does to the
formula. A wrong result is compared with the known wrong formulas by the same rule: it has the mistake whose results it has,
within that formula's own rounding. If it has none of them, the places and sizes of the errors are described.
"""

import math
import random
from dataclasses import dataclass, field
from functools import lru_cache

import torch

import gpt

from .. import check
from .tasks import EXERCISES
from .wrong import WRONG
from .wrong_generation import KV_CACHE, SAMPLING


@dataclass
class Case:
    title: str
    inputs: dict  # tensors that get gradients
    options: dict = field(default_factory=dict)
    large: bool = False  # numbers so large that exp overflows where nothing is subtracted


@dataclass
class Result:
    """What became of a case."""

    case: Case
    values: dict = field(default_factory=dict)
    truth: check.Truth | None = None
    rows: list = field(default_factory=list)
    error: str = ""
    request: dict = field(default_factory=dict)  # what was asked, where that may be asked again

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
    "linear": [(1, 48, 64), (1, 33, 33), (5, 65, 17), (3, 769, 9), (130, 7, 33), (2, 20, 257), (2, 3, 16, 31), (0, 9, 7)],
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
    if name in ("linear", "linear_gelu"):
        inputs, _ = check.make_inputs(name, (4, 24, 40), 20)
        made.append(Case("4x24x40, no bias", {n: inputs[n] for n in ("x", "weight")}, dict(bias=None)))
    if name == "gelu":
        inputs, _ = check.make_inputs(name, (5, 40), 20)
        made += [
            Case("5x40, small x", dict(x=inputs["x"] * 0.01)),
            Case("5x40, x of thousands", dict(x=inputs["x"] * 1000), large=True),
        ]
    if name == "layer_norm":
        inputs, _ = check.make_inputs(name, (7, 40), 20)
        x = inputs["x"]
        made += [
            Case("7x40, small variance", inputs | dict(x=x * 0.002)),
            Case("7x40, mean of 100", inputs | dict(x=x + 100.0)),
        ]
    if name == "attention":
        inputs, options = check.make_inputs(name, (1, 20, 2, 16), 20)
        made.append(Case("1x20x2x16, large scores", {n: x * 20 for n, x in inputs.items()}, options, True))
    if name == "lm_loss":
        made = [Case(c.title, c.inputs, dict(targets=with_ignored(c.options["targets"]))) for c in made]
        inputs, options = check.make_inputs(name, (2, 9, 16, 40), 20)
        large = inputs | dict(hidden=inputs["hidden"] * 200)
        made.append(Case("2x9x16x40, large logits", large, dict(targets=with_ignored(options["targets"])), True))
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
        result = run_case(sandbox, name, index, case, own_backward, verdict)
        if verdict.todo:
            if own_backward:  # only the forward is written so far
                verdict = judge_formula(sandbox, name, False)
                verdict.notes.append(f"{e.function}_backward is not written yet{LATER[native]}.")
            return verdict
        verdict.results.append(result)
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
        arguments.pop()  # eps: its default
    request = dict(ask="case", name=name, arguments=arguments, own_backward=own_backward)
    request["grad"] = check.output_gradient(out.shape) if own_backward or not native else None
    for at_end in (True, False) if native else (True,):
        answer = sandbox.ask(request | dict(at_end=at_end), case.title)
        if answer.get("todo") or native and nothing_written(answer, e, own_backward):
            verdict.todo = True
            return result
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


# ---------------------------------------------------------------------------------- the first wrong value


def is_wrong(result, name):
    """Which elements of a tensor are wrong."""
    got, exact = result.values[name], result.truth.exact[name]
    expected = exact.float().double()
    finite = expected.isfinite()
    same = (got == expected) | got.isnan() & expected.isnan()
    bound = check.largest_error(result.truth, name)
    return torch.where(finite, ~((got - exact).abs() <= bound), ~same)


def first_wrong(failed):
    """A sentence on the first wrong value, or the first error."""
    result = failed[0]
    if result.error:
        return f"In {result.case.title}: {result.error}."
    name = result.wrong[0]
    got, exact, wrong = result.values[name], result.truth.exact[name], is_wrong(result, name)
    if not wrong.any():
        row = next(row for row in result.rows if row.tensor == name)
        return (
            f"{name} in {result.case.title}: no number is far off, all together are: their errors are {row.rms:.2f} "
            f"times as large as the formula's own, expected at most {row.rms_bound:.2f}."
        )
    at = tuple(wrong.nonzero()[0].tolist())
    place = f"{name}[{', '.join(map(str, at))}]" if at else name
    bound = check.largest_error(result.truth, name)[at].item()
    return (
        f"First wrong value: {place} is {digits(got[at].item(), exact[at].item())}, expected "
        f"{digits(exact[at].item(), got[at].item())}, at most {bound:.1e} off, in {result.case.title}."
    )


def digits(x, other):
    """x with as many digits as tell it from the other."""
    for n in range(4, 10):
        if f"{x:.{n}g}" != f"{other:.{n}g}":
            return f"{x:.{n + 1}g}"
    return f"{x:.10g}"


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
    if all(r.case.large for r in failed) and name in OVERFLOW:
        finite = [r.values[n].isfinite() | ~r.truth.exact[n].isfinite() for r in failed for n in r.wrong]
        if not all(x.all() for x in finite):
            return [f"The mistake: {OVERFLOW[name]}."]
    if named := name_mistake(name, tuple(failed)):
        return named
    return ["It is none of the mistakes that are known here. What is seen of it:", *describe(failed, results)]


def name_mistake(name, failed):
    failed = sorted(failed, key=lambda r: sum(x.numel() for x in r.values.values()))
    failed = failed[:3] + failed[3:][-1:]  # the smallest, and the largest
    whole, in_failed, in_out, single = [], [], [], {}
    for title, formula in WRONG[name].items():
        matched = [matching(formula, result) for result in failed]
        if not any(matched):
            continue
        if all(set(r.values) <= m for r, m in zip(failed, matched, strict=True)):
            whole.append(title)
        elif all(set(r.wrong) <= m for r, m in zip(failed, matched, strict=True)):
            in_failed.append(title)
        elif all("out" in r.wrong and "out" in m for r, m in zip(failed, matched, strict=True)):
            in_out.append(title)
        for tensor in {n for r in failed for n in r.wrong}:
            if all(tensor in m for r, m in zip(failed, matched, strict=True) if tensor in r.wrong):
                single.setdefault(tensor, []).append(title)
    for titles in (whole, in_failed, in_out):
        if titles:
            return [f"The mistake: {titles[0]}."]
    tensors = {n: None for r in failed for n in r.wrong}
    if single and "out" not in tensors:
        known = [f"The mistake in {n}: {single[n][0]}." for n in tensors if n in single]
        rest = [n for n in tensors if n not in single]
        return known + ([f"In {', '.join(rest)} it is none of those that are known here."] if rest else [])
    return []


def matching(formula, result):
    """The names of the tensors in which a result is that of a wrong formula, within that formula's rounding."""
    case, wanted = result.case, [n for n in result.case.inputs if f"d{n}" in result.values]
    try:
        exact = check.evaluate(formula, case.inputs, case.options, torch.float64, wanted)
    except (RuntimeError, IndexError, ValueError):
        return set()
    near = {n for n, x in exact.items() if is_near(result.values[n], x)}
    if not near & set(result.wrong):
        return set()
    try:
        truth = check.find_truth(formula, case.inputs, case.options, wanted=wanted)
    except (RuntimeError, IndexError, ValueError):
        return set()
    rows = check.compare_results("", (), truth, result.values)
    return {row.tensor for row in rows if row.ok}


def is_near(got, exact):
    """A first look, without the cost of sampling what rounding may do."""
    if got.shape != exact.shape:
        return False
    exact = exact.float().double()
    same = (got == exact) | got.isnan() & exact.isnan()
    size = exact.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt() if exact.numel() else 0.0
    return bool((same | ((got - exact).abs() <= 1e-2 * (exact.abs() + size))).all())


# ------------------------------------------------------------------------------------- the pattern of the errors


def describe(failed, results):
    """What the errors have in common, as lines."""
    lines = []
    names = list(dict.fromkeys(n for r in failed for n in r.wrong))
    if "out" not in names:
        grads = [n for n in failed[0].values if n != "out"]
        right = [n for n in grads if n not in names]
        lines.append(
            f"out is right; {', '.join(names)} {'is' if len(names) == 1 else 'are'} wrong"
            + (
                f", {', '.join(right)} right: the mistake is in the backward."
                if right
                else ": the mistake is in the backward."
            )
        )
    good = [r.case.title for r in results if r.ok and "no rows" not in r.case.title]
    if good:
        lines.append(f"Right in {'; '.join(good[:4])}; wrong in {'; '.join(r.case.title for r in failed[:4])}.")
    result = max(failed, key=lambda r: r.values[names[0]].numel() if names[0] in r.wrong else 0)
    lines += [f"{names[0]} in {result.case.title}: {line}." for line in patterns(result, names[0])]
    return lines


def patterns(result, name):
    """How the wrong values of a tensor differ from the right ones, in words."""
    got, exact, wrong = result.values[name], result.truth.exact[name], is_wrong(result, name)
    if not wrong.any():
        return ["every number is nearly right, but the sum of the errors is too large: a sum of lower precision?"]
    if got.isnan().all():
        return ["all numbers are NaN"]
    if not got.any():
        return ["all numbers are zero"]
    if got.numel() > 1 and (got == got.flatten()[0]).all():
        return ["all numbers are the same"]
    for what, x in result.case.inputs.items():
        if x.shape == got.shape and torch.equal(x.double(), got):
            return [f"it is {what} itself, a copy"]
    found = place(wrong)
    if (~got.isfinite() & exact.isfinite()).any():
        count = int((~got.isfinite() & exact.isfinite()).sum())
        return [*found, f"{count} of {got.numel()} numbers are not finite"]
    at = wrong & exact.isfinite() & got.isfinite()
    if sentence := relation(got[at], exact[at], sizes(result), check.largest_error(result.truth, name)[at]):
        return [*found, sentence]
    if got.numel() > 1 and torch.allclose(got.flatten().sort()[0], exact.flatten().sort()[0], rtol=1e-5, atol=1e-6):
        found.append("the right numbers, in other places" + moved(got, exact))
    else:
        distance = ((got - exact)[at].abs() / (exact[at].abs() + exact[at].square().mean().sqrt())).max().item()
        if distance < 1e-3:
            found.append(f"nearly right, {distance:.0e} off: numbers of lower precision, or an approximation?")
        elif per := by_dimension(got, exact):
            found.append(per)
        else:
            found.append(
                f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong, with no simple relation to the right ones"
            )
    return found


def dimension_names(n):
    return ["column", "row", "batch", "block"][:n][::-1]


def place(wrong):
    """In which rows and columns the wrong values are, if not in all."""
    found = []
    for d, what in enumerate(dimension_names(wrong.dim())):
        n = wrong.shape[d]
        bad = wrong.movedim(d, 0).reshape(n, -1).any(1).nonzero().flatten().tolist()
        if len(bad) == n:
            continue
        first, last = bad[0], bad[-1]
        if len(bad) == 1:
            which = "the last" if first == n - 1 else "the first" if first == 0 else "only one"
            found.append(f"only {which.removeprefix('only ')} {what} is wrong ({what} {first} of {n}, counted from 0)")
        elif bad == list(range(first, n)):
            found.append(f"wrong from {what} {first} on, of {n}, counted from 0; right before")
        elif bad == list(range(last + 1)):
            found.append(f"wrong up to {what} {last}, of {n}, counted from 0; right after")
        elif len({b - a for a, b in zip(bad, bad[1:], strict=False)}) == 1:
            found.append(f"every {bad[1] - bad[0]}th {what} is wrong, from {what} {first} on, counted from 0")
        else:
            found.append(f"{len(bad)} of {n} {what}s have wrong values, the first is {what} {first}, counted from 0")
    return found


def sizes(result):
    """The sizes that a wrong factor may be made of."""
    case, name = result.case, next(iter(result.case.inputs))
    x = case.inputs[name]
    if name == "qkv":
        (B, T, width), H = x.shape, case.options["n_head"]
        return dict(B=B, T=T, C=width // 3, n_head=H, D=width // 3 // H)
    found = {"rows": x.numel() // x.shape[-1] if x.numel() else 0, "C" if name == "hidden" else "K": x.shape[-1]}
    if name == "hidden":
        count = int((case.options["targets"] != -1).sum())
        return found | dict(V=case.inputs["weight"].shape[0], count=count)
    if case.inputs.get("weight", x).dim() == 2 and "weight" in case.inputs:
        return found | dict(N=case.inputs["weight"].shape[0])
    return {"rows" if k == "rows" else "C": v for k, v in found.items()}


def relation(got, exact, known, bound):
    """One factor or one difference between all wrong values and the right ones."""
    middle = exact.abs() >= exact.abs().median()
    factor = (got[middle] * exact[middle]).sum() / exact[middle].square().sum()
    allowed = 8 * bound + 1e-5 * exact.abs()
    if (
        factor.isfinite()
        and ((got - factor * exact).abs() <= allowed * factor.abs().clamp(min=1)).all()
        and len(got) > 2
    ):
        return f"every wrong number is {spell_factor(factor.item(), known)} times the right one"
    difference = (got - exact).median()
    if len(got) > 2 and ((got - exact - difference).abs() <= allowed).all():
        return f"every wrong number is the right one {'+' if difference > 0 else '-'} {abs(difference.item()):.5g}"
    if len(got) <= 2 and got.numel():
        ratio = (got / exact)[0].item()
        return f"it is {spell_factor(ratio, known)} times the right one"
    return ""


def spell_factor(factor, known):
    text = f"{factor:.5g}"
    if abs(factor + 1) < 1e-4:
        return "-1 (the sign)"
    candidates = {"2": 2, "1/2": 0.5, "sqrt(2)": math.sqrt(2), "1/sqrt(2)": math.sqrt(0.5)}
    for name, n in known.items():
        if n > 1:
            candidates |= {
                name: n,
                f"1/{name}": 1 / n,
                f"sqrt({name})": math.sqrt(n),
                f"1/sqrt({name})": 1 / math.sqrt(n),
            }
            candidates |= {f"({name} - 1)/{name}": (n - 1) / n, f"{name}/({name} - 1)": n / (n - 1)}
    hits = [
        f"{name} = {n}" if (n := known.get(name)) else name
        for name, value in candidates.items()
        if abs(abs(factor) / value - 1) < 1e-4
    ]
    return f"{text} ({'-' if factor < 0 else ''}{' or '.join(hits[:3])})" if hits else text


def moved(got, exact):
    """To where the right numbers went."""
    if got.dim() >= 2 and got.shape[-1] == got.shape[-2] and torch.allclose(got.transpose(-1, -2), exact, 1e-5, 1e-6):
        return ": transposed"
    for d, what in enumerate(dimension_names(got.dim())):
        for by in (1, -1, 2, -2, got.shape[d] // 2):
            if torch.allclose(got.roll(by, d), exact, 1e-5, 1e-6):
                return f": {what} by {what}, shifted by {-by}"
        if torch.allclose(got.flip(d), exact, 1e-5, 1e-6):
            return f": {what}s in the opposite order"
    return ""


def by_dimension(got, exact):
    """A factor or a difference of its own for each row or each column."""
    for d, what in enumerate(dimension_names(got.dim())):
        g, x = (t.movedim(d, 0).flatten(1) if t.dim() > 1 else t[:, None] for t in (got, exact))
        if g.shape[1] < 3:
            continue
        factor = (g * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
        if ((g - factor * x).abs() <= 1e-4 * (x.abs() + x.square().mean().sqrt())).all():
            return f"each {what} is the right one times a factor of its own ({factor[0].item():.4g} for the first)"
        difference = (g - x).mean(1, keepdim=True)
        if ((g - x - difference).abs() <= 1e-4 * (x.abs() + x.square().mean().sqrt())).all():
            return f"each {what} is the right one plus a number of its own ({difference[0].item():.4g} for the first)"
    return ""


# ---------------------------------------------------------------------------------------------------- sampling


@dataclass
class Draws:
    """One use of `sample`: these logits, drawn from `times` times."""

    title: str
    logits: torch.Tensor
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    times: int = 60

    def options(self):
        return dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@lru_cache
def draws():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, generator=generator) * 2
    ties = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, -1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    four = torch.tensor([[-90.0, 3.0, 3.0, -90.0, 3.0, 3.0]])
    return [
        Draws("temperature 1", x[:1]),
        Draws("4 rows", x),
        Draws("temperature 0", x, 0.0, times=3),
        Draws("temperature 0, equal logits", ties, 0.0, times=3),
        Draws("temperature 0.5", x, 0.5),
        Draws("temperature 2", x, 2.0),
        Draws("equal logits", ties),
        Draws("top_k 5", x, top_k=5),
        Draws("top_k 1", x, top_k=1, times=5),
        Draws("top_k 500, more than there are", x, top_k=500),
        Draws("top_k 2, four equal logits", ties, top_k=2),
        Draws("top_p 0.9", x, top_p=0.9),
        Draws("top_p 0.3, temperature 1.5", x, 1.5, top_p=0.3),
        Draws("top_p 0.5, four equal probabilities", four, top_p=0.5),
        Draws("top_p 0.01", x, top_p=0.01, times=5),
        Draws("top_p 1", x, top_p=1.0),
        Draws("temperature 0.7, top_k 20, top_p 0.8", x, 0.7, 20, 0.8),
        Draws("large logits", x * 500, 0.9, 40, 0.95, times=5),
    ]


def drawn_by(sample, case, seed):
    """The tokens, and the random number that comes next."""
    rng = random.Random(seed)
    tokens = [sample(case.logits.clone(), case.temperature, case.top_k, case.top_p, rng) for _ in range(case.times)]
    return torch.cat(tokens, 1), rng.random()


def judge_sampling(sandbox):
    verdict = Verdict("sampling", [])
    answers = []
    for seed, case in enumerate(draws()):
        request = dict(ask="sample", logits=case.logits, seed=seed, times=case.times, **case.options())
        answer = sandbox.ask(request, case.title)
        if answer.get("todo") or answer.get("out") is not None and (answer["out"] == -1).all():
            verdict.todo = True
            return verdict
        answers.append(answer)
        result = Result(Case(case.title, {}), error=answer.get("error", ""))
        tokens, following = drawn_by(gpt.sample, case, seed)
        if not result.error:
            result.values = dict(out=answer["out"])
            if not torch.equal(answer["out"], tokens):
                b, i = (answer["out"] != tokens).nonzero()[0].tolist()
                result.error = f"draw {i} of row {b} is token {answer['out'][b, i]}, expected {tokens[b, i]}"
            elif answer["drawn"] != following:
                result.error = "the tokens are right, but not one random number a row is used (none at temperature 0)"
        verdict.results.append(result)
    if not verdict.ok:
        verdict.first = first_wrong([r for r in verdict.results if not r.ok])
        verdict.mistake = explain_sampling(answers, verdict.results)
    return verdict


def explain_sampling(answers, results):
    if any("out" not in answer for answer in answers):
        return []
    for title, wrong in SAMPLING.items():
        try:
            same = all(
                torch.equal(tokens, answer["out"]) and following == answer["drawn"]
                for seed, (case, answer) in enumerate(zip(draws(), answers, strict=True))
                for tokens, following in [drawn_by(wrong, case, seed)]
            )
        except (RuntimeError, IndexError, ValueError):
            continue
        if same:
            return [f"The mistake: {title}."]
    unused = [
        seed
        for seed, case in enumerate(draws())
        if case.temperature and answers[seed]["drawn"] == random.Random(seed).random()
    ]
    if len(unused) > len(draws()) // 2:
        return [
            "The mistake: rng is not used; the random numbers come from elsewhere (torch.multinomial, random.random)."
        ]
    traits = {
        "temperature is 0": lambda c: c.temperature == 0,
        "temperature is not 1": lambda c: c.temperature not in (0, 1),
        "top_k is given": lambda c: c.top_k is not None,
        "top_p is given": lambda c: c.top_p is not None,
        "there are several rows": lambda c: len(c.logits) > 1,
        "logits are equal": lambda c: "equal" in c.title,
        "logits are large": lambda c: "large" in c.title,
    }
    bad = {seed for seed, result in enumerate(results) if not result.ok}
    for trait, has in traits.items():
        with_it = {seed for seed, case in enumerate(draws()) if has(case)}
        if bad <= with_it:
            every = "always" if bad == with_it else "not always"
            return [f"None of the mistakes that are known here. It is wrong only where {trait}, there {every}."]
    return ["None of the mistakes that are known here."]


# ---------------------------------------------------------------------------------------------------- KV cache


def cuts_of(T):
    """All ways of cutting T positions into pieces, coarse ones first."""
    ways = []
    for bits in range(2 ** (T - 1)):
        pieces = [1]
        for i in range(T - 1):
            if bits >> i & 1:
                pieces.append(1)
            else:
                pieces[-1] += 1
        ways.append(tuple(pieces))
    return sorted(ways, key=lambda pieces: (len(pieces), pieces))


@lru_cache
def sequences():
    """(title, qkv, n_head, ways of cutting it)."""
    made = []
    for seed, (title, B, T, H, D, ways) in enumerate((
        ("6 positions", 2, 6, 2, 8, cuts_of(6)),
        ("70 positions", 1, 70, 3, 5, [(70,), (64, 6), (1,) * 70, (33, 1, 1, 30, 5), (2, 66, 1, 1)]),
    )):  # fmt: skip
        inputs, options = check.make_inputs("attention", (B, T, H, D), seed)
        made.append((title, inputs["qkv"], options["n_head"], ways))
    return made


@lru_cache
def sequence_truth(index):
    _, qkv, n_head, _ = sequences()[index]
    return check.find_truth(check.FORMULAS.attention, dict(qkv=qkv), dict(n_head=n_head), wanted=())


def judge_cache(sandbox):
    verdict = Verdict("kv-cache", [])
    for index, (title, qkv, n_head, ways) in enumerate(sequences()):
        truth = sequence_truth(index)
        for cuts in ways:
            what = f"{title} in pieces of {'+'.join(map(str, cuts)) if len(cuts) < 10 else f'1, {len(cuts)} times'}"
            request = dict(ask="cache", qkv=qkv, n_head=n_head, cuts=list(cuts))
            answer = sandbox.ask(request, what)
            if answer.get("todo"):
                verdict.todo = True
                return verdict
            case = Case(what, dict(qkv=qkv), dict(n_head=n_head))
            result = Result(case, truth=truth, error=answer.get("error", ""), request=request)
            if not result.error:
                result.values = dict(out=answer["out"].double())
                result.rows = check.compare_results("kv-cache", qkv.shape, truth, result.values)
            verdict.results.append(result)
    failed = [r for r in verdict.results if not r.ok]
    if failed:
        verdict.first = first_wrong(failed)
        verdict.mistake = explain_cache(sandbox, failed, verdict.results)
    return verdict


def explain_cache(sandbox, failed, results):
    failed = [r for r in failed if r.wrong]
    if not failed:
        return []
    shared = "two caches share what they keep (an attribute of the class, or a global); each has its own"
    if is_right(sandbox, failed[0], alone=True) or results[0].ok and not is_right(sandbox, results[0]):
        return [f"The mistake: {shared}."]
    few = failed[:6] + failed[6:][-1:]
    for title, wrong in KV_CACHE.items():
        if all("out" in matching(with_cuts(wrong, r.request["cuts"]), r) for r in few):
            return [f"The mistake: {title}."]
    named = name_mistake("attention", failed[:1]) if len(failed[0].request["cuts"]) == 1 else []
    if named:
        return [named[0].replace("The mistake:", "The mistake, in one piece already:")]
    return ["It is none of the mistakes that are known here. What is seen of it:", *describe(failed, results)]


def is_right(sandbox, result, **change):
    """Is a case right if it is asked again, with a change?"""
    answer = sandbox.ask(result.request | change, result.case.title)
    return "out" in answer and all(
        row.ok for row in check.compare_results("", (), result.truth, dict(out=answer["out"].double()))
    )


def with_cuts(wrong, cuts):
    return lambda qkv, n_head: wrong(qkv, n_head, cuts)
