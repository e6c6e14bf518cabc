"""The verdict on sampling and on the KV cache: the same tokens as gpt.py's, and the same results for every cut."""

import random
from dataclasses import dataclass
from functools import lru_cache

import torch

import gpt

from .. import check
from .errors import describe, first_wrong
from .judge import Case, Result, Verdict, matching, name_mistake
from .wrong_generation import KV_CACHE, SAMPLING

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
        ("260 positions", 1, 260, 1, 4, [(130, 130), (259, 1)]),
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
