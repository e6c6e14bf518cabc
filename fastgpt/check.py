"""`fastgpt check`: is every kernel as exact as the formula that it replaces?

Truth is gpt.py's formula in float64. A kernel may be as far from it as the same formula in float32 may be by its own
rounding, element by element for the largest error, and over the whole tensor for the mean square. How far that is, is
sampled (rounding.py), once for each formula and input and the same on every machine; docs/parity.md derives the rule.
"""

import argparse
import math
import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import torch

import gpt

from . import _kernels, bfloat16, ops
from .rounding import FoldedProducts, Rounding

FORMULAS = SimpleNamespace(**{name: getattr(gpt, name) for name in (*gpt.FORMULAS, "linear_gelu")})

FALSE_ALARM = 1e-6  # the chance that a tensor is refused though its errors are as random and as large as the formula's
RUNS = 32  # sampled evaluations of a formula; fewer, at least 12, where it makes more than VALUES / RUNS values
VALUES = 2**28

# Awkward on purpose: one, two, one below and above a block or a register, a prime, a real GPT-2.
CASES = {
    "layer_norm": [(1, 48), (2, 64), (65, 769), (128, 768), (3, 97, 1600), (0, 48), (1000, 5), (4, 1)],
    "gelu": [(1,), (65, 48), (3, 97, 769), (0, 48)],
    "linear": [(1, 48, 64), (65, 769, 48), (97, 64, 257), (0, 48, 64), (128, 768, 2304)],
    "linear_gelu": [(1, 48, 64), (65, 769, 48), (97, 64, 257), (0, 48, 64), (128, 768, 768)],
    "attention": [  # B, T, H, D
        (1, 1, 1, 64),
        (3, 2, 2, 8),
        (1, 63, 2, 16),
        (3, 65, 1, 48),
        (1, 97, 2, 64),
        (1, 128, 3, 80),
        (1, 257, 2, 128),
        (1, 20, 1, 1000),
        (1, 1000, 2, 64),
        (0, 5, 2, 8),
        (2, 3, 3, 5),
    ],
    "lm_loss": [(1, 1, 48, 65), (3, 65, 64, 257), (1, 97, 769, 1000)],  # B, T, C, V
}


@dataclass
class Row:
    """One tensor of one comparison."""

    op: str
    shape: tuple
    tensor: str
    kernel: float  # distance from the truth where it comes nearest to its bound, or goes beyond it
    bound: float  # the bound there
    rms: float  # of all distances, each in units of the standard deviation that the formula's has: below 1 is better
    rms_bound: float
    wrong: str = ""  # an element that is not finite, or should not be

    @property
    def ok(self):
        return not self.wrong and self.kernel <= self.bound and self.rms <= self.rms_bound  # False for NaN


def make_inputs(op, shape, seed=0):
    """Random arguments for an op: ({name: float32 tensor to differentiate}, {name: other argument})."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0, shift=0.0):
        return torch.randn(size, generator=generator) * scale + shift

    if op == "layer_norm":
        C = shape[-1]
        return dict(x=normal(*shape, scale=2.0, shift=0.5), weight=normal(C, shift=1.0), bias=normal(C)), {}
    if op == "gelu":
        return dict(x=normal(*shape, scale=3.0)), {}
    if op in ("linear", "linear_gelu"):
        *n, K, N = shape
        return dict(x=normal(*n, K), weight=normal(N, K, scale=0.2), bias=normal(N)), {}
    if op == "attention":
        B, T, H, D, *dropout = shape
        options = dict(dropout=dropout[0], seed=seed + (1 << 40)) if dropout else {}
        return dict(qkv=normal(B, T, 3 * H * D)), dict(n_head=H, **options)
    if op != "lm_loss":
        raise ValueError(f"check: op is {op!r}, expected one of {', '.join(CASES)}, or inputs=")
    B, T, C, V = shape
    targets = torch.randint(-1, V, (B, T), generator=generator)
    if targets.numel():
        targets[0, 0] = V - 1  # at least one that counts
    return dict(hidden=normal(B, T, C), weight=normal(V, C, scale=0.2)), dict(targets=targets)


def evaluate(function, inputs, options, dtype, wanted=None, seed=1, runs=None, arithmetic=None):
    """Output and gradients of `function` in `dtype`, as float64: {"out": ..., "d<name>": ...}.

    The output's gradient is a normal random tensor. With `runs`, that many evaluations side by side (torch.func.vmap),
    along a new first dimension. `arithmetic`: a context in which function and gradients are computed.
    """
    wanted = list(inputs if wanted is None else wanted)
    args = {name: _to(x, dtype) for name, x in inputs.items()}
    call = lambda a: function(**a, **options)  # noqa: E731
    if runs:
        args = {name: x.expand(runs, *x.shape).clone() for name, x in args.items()}
        call = torch.func.vmap(call)
    for name in wanted:
        args[name].requires_grad_()
    with arithmetic or nullcontext(), FoldedProducts() if runs else nullcontext():
        out = call(args)
    grad = output_gradient(out.shape[1:] if runs else out.shape, seed).to(dtype).expand(out.shape)
    with arithmetic or nullcontext():
        leaves = [args[name] for name in wanted]
        grads = torch.autograd.grad(out, leaves, grad, materialize_grads=True) if wanted else ()
    results = {"out": out.detach()} | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: x.double() for name, x in results.items()}


def output_gradient(shape, seed=1):
    """The gradient of the output that `evaluate` starts from: normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _to(x, dtype):
    """x in dtype, with x's strides."""
    x = x.detach()
    return x if x.dtype is dtype else torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)


@dataclass
class Truth:
    """What a formula's results are, and how far from them its own rounding may lead; by name, in float64."""

    exact: dict
    deviation: dict  # standard deviation of each element
    spread: dict  # variance over the runs of the mean square of the errors, each in units of its deviation
    runs: int


def find_truth(formula, inputs, options, dtype=torch.float32, wanted=None, seed=1, in_bfloat16=False):
    """A formula's results and what rounding to `dtype` may do to them; of products' operands, to bfloat16."""
    count = Rounding(unit=0.0)
    exact = evaluate(formula, inputs, options, torch.float64, wanted, seed, 1, count)
    exact = {name: x[0] for name, x in exact.items()}
    runs = max(12, min(RUNS, VALUES // max(count.values, 1)))
    at_once = max(1, min(runs, 2**25 // max(count.values, 1)))
    errors = {name: [] for name in exact}
    for first in range(0, runs, at_once):
        n = min(at_once, runs - first)
        rounding = Rounding(n, first, bfloat16=in_bfloat16)
        sample = evaluate(formula, inputs, options, torch.float64, wanted, seed, n, rounding)
        for name, x in sample.items():
            errors[name].append(x - exact[name])
    return truth_from_errors(exact, {name: torch.cat(parts) for name, parts in errors.items()}, dtype)


def truth_from_errors(exact, errors, dtype=torch.float32):
    """Truth from exact results and, by name, the sampled errors of each: (runs, ...).

    An element's deviation is at least the tensor's average: where rounding happens to spare one, others may lose more.
    """
    # float64's own results are no truth for float64: they err like the kernel itself, hence sqrt(2)
    scale = 1.0 if dtype is torch.float32 else math.sqrt(2.0) * 2.0**-29
    smallest = torch.finfo(dtype).tiny  # results below may have lost all digits
    deviation, spread, runs = {}, {}, len(next(iter(errors.values())))
    for name, e in errors.items():
        variance = (e * scale).square().mean(0).nan_to_num_(math.inf)
        average = torch.where(variance.isfinite(), variance, 0.0).mean().item() if variance.numel() else 0.0
        deviation[name] = variance.clamp_(min=average).sqrt_().clamp_(min=smallest)
        squares = (e * scale / deviation[name]).square_().nan_to_num_(0.0).reshape(runs, exact[name].numel())
        spread[name] = squares.mean(1).var().item() if exact[name].numel() else 0.0
    return Truth(exact, deviation, spread, runs)


def largest_error(truth, name):
    """How far each element of a result may be from the truth: a tensor of its shape.

    With R runs, a deviation is known as the root of a chi-square of R degrees of freedom over R; a normal error e of
    that deviation s exceeds t s with a chance below 2 (1 + t^2 / R)^(-R/2) (Chernoff's bound on both), which for N
    elements and a chance p of one false alarm among them gives t.
    """
    R, N = truth.runs, truth.exact[name].numel()
    return math.sqrt(R * ((4 * max(N, 1) / FALSE_ALARM) ** (2 / R) - 1)) * truth.deviation[name]


def compare_results(op, shape, truth, kernel, dtype=torch.float32, formula=None):
    """A Row for each tensor. `formula()` gives the formula's own results in dtype, for where the kernel's are infinite.

    Single elements are held to `largest_error`, mean squares to a bound of Laurent and Massart (2000), Lemma 1, for as
    many independent squares as have the spread that the runs' mean squares have.
    """
    R, x = truth.runs, math.log(2 / FALSE_ALARM)
    rows = []
    for name, exact in truth.exact.items():
        expected, got = exact.to(dtype).double(), kernel[name]
        finite, N = expected.isfinite(), exact.numel()
        wrong = ~finite & ~((got == expected) | got.isnan() & expected.isnan())
        lost = finite & ~got.isfinite()
        if lost.any():  # no shame where the formula's own arithmetic overflows
            wrong |= lost & formula()[name].isfinite() if formula else lost
        limit = R / (R - 2) * (1 + math.sqrt(2 * truth.spread[name] * x) + truth.spread[name] * x)
        row = Row(op, tuple(shape), name, 0.0, 0.0, 0.0, math.sqrt(limit), _describe(wrong, got, expected))
        if N:
            error = torch.where(finite & got.isfinite(), got - exact, 0.0).abs().flatten()
            deviation = truth.deviation[name].flatten()
            units = error / deviation
            nearest = units.argmax()
            row.kernel, row.bound = error[nearest].item(), largest_error(truth, name).flatten()[nearest].item()
            row.rms = units.square().mean().sqrt().item()
        rows.append(row)
    return rows


def _describe(wrong, got, expected):
    if not wrong.any():
        return ""
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{wrong.sum().item()} elements, the first {list(at)}: {got[at].item()}, expected {expected[at].item()}"


@lru_cache(maxsize=64)
def _known_truth(op, shape, seed, wanted, dtype, in_bfloat16):
    inputs, options = make_inputs(op, shape, seed)
    return find_truth(getattr(FORMULAS, op), inputs, options, dtype, wanted, in_bfloat16=in_bfloat16)


def compare(
    op,
    shape=None,
    seed=0,
    kernel=None,
    inputs=None,
    options=None,
    wanted=None,
    formula=None,
    dtype=torch.float32,
    in_bfloat16=False,
):
    """Hold a kernel against the formula that it replaces: outputs and gradients. -> a Row for each tensor

    op           name of one of gpt.py's formulas; or any name, with formula=, kernel= and inputs=
    shape        of the random inputs that are made (see CASES), if none are given
    kernel       function to check instead of fastgpt's, or fastgpt.bfloat16's, of that name
    inputs       {argument: tensor}, differentiated; options: {argument: anything else}
    wanted       names of the inputs whose gradients are compared; all, if None
    formula      function that says what is right, in operations of torch; gpt.py's of that name, if None
    dtype        torch.float32 or torch.float64
    in_bfloat16  may operands of matrix products be rounded to bfloat16, and all else to float32?
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"check: dtype is {dtype}, expected torch.float32 or torch.float64")
    for what, given in (("formula", formula), ("kernel", kernel), ("inputs", inputs)):
        if given is None and not hasattr(FORMULAS, op):
            raise ValueError(f"check: op is {op!r} without {what}=, expected one of {', '.join(CASES)}, or {what}=")
    wanted = None if wanted is None else tuple(wanted)
    kernel = kernel or getattr(bfloat16 if in_bfloat16 else ops, op)
    random_inputs = inputs is None
    if random_inputs:
        if shape is None:
            raise ValueError(f"check: neither shape= nor inputs= is given for {op}, expected one of them")
        inputs, options = make_inputs(op, tuple(shape), seed)
    if random_inputs and formula is None:
        truth = _known_truth(op, tuple(shape), seed, wanted, dtype, in_bfloat16)
    else:
        formula = formula or getattr(FORMULAS, op)
        truth = find_truth(formula, inputs, options or {}, dtype, wanted, in_bfloat16=in_bfloat16)
    options, formula = options or {}, formula or getattr(FORMULAS, op)
    shape = tuple(next(iter(inputs.values())).shape) if shape is None else shape
    results = evaluate(kernel, inputs, options, dtype, wanted)
    return compare_results(op, shape, truth, results, dtype, lambda: evaluate(formula, inputs, options, dtype, wanted))


class _Loss(torch.nn.Module):
    """A model whose forward is its loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model.loss(idx, targets)


def compare_models(config, seed=0, kernels=None, in_bfloat16=False):
    """The same comparison for a whole model: logits, loss and every parameter's gradient."""
    torch.manual_seed(seed)
    kernels = kernels or (bfloat16 if in_bfloat16 else ops)
    params = {name: p.detach() for name, p in gpt.GPT(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, config.block_size + 1), generator=generator)
    idx, targets = tokens[:, :-1], tokens[:, 1:]

    def logits(ops):
        with torch.device("meta"):
            model = gpt.GPT(config, ops)
        return lambda **params: torch.func.functional_call(model, params, (idx,))

    def loss(ops):
        with torch.device("meta"):
            model = _Loss(gpt.GPT(config, ops))
        return lambda **params: torch.func.functional_call(
            model, {f"model.{name}": p for name, p in params.items()}, (idx, targets)
        )

    rows = []
    for function, wanted in ((logits, ()), (loss, tuple(params))):
        shape = (config.n_layer, config.n_head, config.n_embd)
        formula = function(None)
        made = compare("model", shape, 0, function(kernels), params, {}, wanted, formula, in_bfloat16=in_bfloat16)
        made[0].tensor = function.__name__
        rows += made
    for row in rows:
        row.tensor = row.tensor.replace("d", "d ", 1) if row.tensor[1:] in params else row.tensor
    return rows


def report(rows, file=None):
    """Print rows as a table of at most 100 columns. -> how many failed"""
    names = [(r.op, "x".join(map(str, r.shape)), r.tensor) for r in rows]
    widths = [max([len(name[i]) for name in names] + [len(title)]) for i, title in enumerate(("op", "shape", "tensor"))]
    cells = "  ".join(f"{{:<{width}}}" for width in widths)
    print(cells.format("op", "shape", "tensor"), "   error   bound     rms  bound  verdict", file=file)
    for r, name in zip(rows, names, strict=True):
        figures = f"{r.kernel:8.1e} {r.bound:7.1e} {r.rms:7.2f} {r.rms_bound:6.2f}"
        print(cells.format(*name), figures, "", "ok" if r.ok else f"FAILED {r.wrong}".rstrip(), file=file)
    failed = sum(not r.ok for r in rows)
    print(f"{len(rows) - failed} of {len(rows)} tensors are as exact as rounding lets the formula be", file=file)
    return failed


def random_case(seed):
    """One of endlessly many: (op, shape, inputs, options, dtype) with a random op, size, layout, scale and dtype."""
    draw = random.Random(seed)

    def size(most):  # often small, now and then zero or around a register's or a block's edge
        return draw.choice(
            (draw.randint(0, 4), draw.randint(1, most), draw.choice((1, 2, 15, 16, 17, 31, 33, 63, 64, 65)))
        )

    op = draw.choice(list(CASES))
    channels = max(1, size(100))
    if op in ("layer_norm", "gelu"):
        shape = (*(size(12) for _ in range(draw.randint(0, 2))), channels)
    elif op in ("linear", "linear_gelu"):
        shape = (*(size(20) for _ in range(draw.randint(1, 2))), channels, max(1, size(100)))
    elif op == "attention":
        D = draw.choice((1, 2, 3, 8, 16, 20, 64, draw.randint(1, 130), draw.choice((257, 512, 1000))))
        T = size(130) if D <= 64 else size(40)
        shape = (draw.randint(0, 2) if T < 80 else 1, T, draw.randint(1, 3) if D <= 64 else 1, D)
        shape += (draw.choice((0.1, 0.5, 0.9)),) if draw.random() < 0.2 else ()
    else:
        shape = (draw.randint(0, 3), size(20), channels, max(1, size(150)))
    inputs, options = make_inputs(op, shape, seed % 2**48)
    scale = draw.choice((1e-3, 1.0, 30.0))
    inputs = {name: x * scale for name, x in inputs.items()}
    dtype = draw.choice((torch.float32, torch.float32, torch.float64))
    laid_out = ("x", "qkv", "hidden", "weight") if op != "layer_norm" else ("x",)
    return op, shape, {n: _scattered(x, draw) if n in laid_out else x for n, x in inputs.items()}, options, dtype


def _scattered(x, draw):
    """x in memory of another layout: rows apart, or dimensions in another order; the last one stays in one piece."""
    if x.dim() < 2 or draw.random() < 0.5:
        return x
    if x.dim() == 3 and draw.random() < 0.5:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((*x.shape[:-1], x.shape[-1] + draw.randint(1, 9)), math.nan)
    view = wide[..., 1 : 1 + x.shape[-1]] if draw.random() < 0.5 else wide[..., : x.shape[-1]]
    return view.copy_(x)


def run_random(number, seed=0, say=None):
    """`number` random cases on each instruction set. -> (the rows that failed, how many there were)

    `say`, if given, is called after each case with the number of cases done and of rows that failed.
    """
    isas, before, failed, tensors = _kernels.isas(), _kernels.isa(), [], 0
    try:
        for i in range(number):
            op, shape, inputs, options, dtype = random_case(seed * 1_000_003 + i)
            formula = getattr(FORMULAS, op)
            truth = find_truth(formula, inputs, options, dtype)
            rounded = None  # the truth for bfloat16 products
            for isa in isas:
                _kernels.set_isa(isa)
                results = evaluate(getattr(ops, op), inputs, options, dtype)
                rows = compare_results(f"{op} {isa} {str(dtype)[6:]} #{i}", shape, truth, results, dtype)
                if op in IN_BFLOAT16 and dtype is torch.float32 and _kernels.has_bfloat16():
                    rounded = rounded or find_truth(formula, inputs, options, in_bfloat16=True)
                    results = evaluate(getattr(bfloat16, op), inputs, options, dtype)
                    rows += compare_results(f"{op} {isa} bfloat16 #{i}", shape, rounded, results)
                tensors += len(rows)
                failed += [row for row in rows if not row.ok]
            if say:
                say(i + 1, len(failed))
    finally:
        _kernels.set_isa(before)
    return failed, tensors


IN_BFLOAT16 = ("linear", "linear_gelu", "attention", "lm_loss")  # the ops that are matrix products, or made of them


def bfloat16_products():
    """Whether the instruction set in use has them, in words."""
    here = f"on {_kernels.isa()}"
    return here if _kernels.has_bfloat16() else f"none {here}; they need AVX-512 BF16, AMX or ARM's BF16"


def run(quick=False):
    """The report, of fewer shapes with `quick`. -> how many tensors failed"""
    failed = report(_rows(CASES, quick))
    print(f"\nbfloat16 products: {bfloat16_products()}")
    if not _kernels.has_bfloat16():
        return failed
    print("the bound is that of the formula whose matrix products round their operands to bfloat16:")
    return failed + report(_rows([op for op in CASES if op in IN_BFLOAT16], quick, in_bfloat16=True))


def _rows(names, quick, in_bfloat16=False):
    rows = []
    for op in names:
        for shape in CASES[op][:3] if quick else CASES[op]:
            rows += compare(op, shape, in_bfloat16=in_bfloat16)
    rows += compare("attention", (1, 97, 2, 64, 0.1), in_bfloat16=in_bfloat16)
    config = gpt.GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=48, vocab_size=257)
    model = compare_models(config, in_bfloat16=in_bfloat16)
    return rows + (sorted(model, key=lambda r: -r.rms / r.rms_bound)[:4] if quick else model)


def _at_least(least):
    def number(text):
        if int(text) < least:
            raise ValueError
        return int(text)

    number.__name__ = f"integer of {least} or more"  # argparse names it in its error
    return number


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="fastgpt check",
        description="Hold every kernel's outputs and gradients against float64. A kernel may be as far off as rounding "
        "to float32 lets gpt.py's formula be: `error` is the distance that comes nearest to its `bound`, `rms` the "
        "root mean square of all distances in units of the formula's own. Status 1 if any is beyond its bound.",
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument(
        "--random", type=_at_least(1), metavar="N", help="N random cases on each instruction set instead"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="S", help="which random cases (default: 0)")
    args = parser.parse_args(argv)
    if not args.random:
        sys.exit(1 if run(args.quick) else 0)

    def say(done, failed):
        if sys.stderr.isatty():
            print(f"\r{done} of {args.random} cases, {failed} tensors failed", end="", file=sys.stderr, flush=True)

    failed, tensors = run_random(args.random, args.seed, say)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if failed:
        report(failed)
    print(f"{args.random} random cases on {', '.join(_kernels.isas())}: {len(failed)} of {tensors} tensors failed")
    sys.exit(1 if failed else 0)
