"""`fastgpt check`: both paths against float64, op by op and tensor by tensor.

Truth is gpt.py's formula evaluated in float64. The same formula in float32 has an error against it, from rounding
alone; the kernel's error may be at most twice that, plus a floor of FLOOR roundings of the largest value there is.
So no tolerance is chosen for an op or a shape: it follows from the arithmetic (the rule is FlashAttention's tests').
"""

import argparse
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import gpt

from . import ops

# gpt.py's formulas, and the pair that fastgpt computes in one pass.
FORMULAS = SimpleNamespace(
    **{name: getattr(gpt, name) for name in gpt.FORMULAS},
    linear_gelu=lambda x, weight, bias=None: gpt.gelu(gpt.linear(x, weight, bias)),
)

FLOOR = 2.0  # roundings (of 2^-23) of the largest true value: for results that the reference happens to hit exactly

# Awkward on purpose: one, two, one below and above a tile or a register, a prime, a real GPT-2.
CASES = {
    "layer_norm": [(1, 48), (2, 64), (65, 769), (128, 768), (3, 97, 1600), (0, 48), (1000, 5)],
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
        (1, 1000, 2, 64),
        (0, 5, 2, 8),
        (2, 3, 3, 5),
    ],
    "lm_loss": [(1, 1, 48, 65), (3, 65, 64, 257), (1, 97, 769, 1000)],  # B, T, C, V
}


@dataclass
class Row:
    """One tensor of one comparison: the largest errors against float64 of the formula and of the kernel."""

    op: str
    shape: tuple
    tensor: str
    reference: float
    kernel: float
    floor: float

    @property
    def bound(self):
        return 2.0 * self.reference + self.floor

    @property
    def ok(self):
        return self.kernel <= self.bound  # False for NaN

    @property
    def ratio(self):
        return self.kernel / self.reference if self.reference else math.nan


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
        n, K, N = shape
        return dict(x=normal(n, K), weight=normal(N, K, scale=0.2), bias=normal(N)), {}
    if op == "attention":
        B, T, H, D, *dropout = shape
        options = dict(dropout=dropout[0], seed=seed + (1 << 40)) if dropout else {}
        return dict(qkv=normal(B, T, 3 * H * D)), dict(n_head=H, **options)
    B, T, C, V = shape
    targets = torch.randint(-1, V, (B, T), generator=generator)
    targets[0, 0] = V - 1  # at least one that counts
    return dict(hidden=normal(B, T, C), weight=normal(V, C, scale=0.2)), dict(targets=targets)


def evaluate(function, inputs, options, dtype, wanted=None, seed=1):
    """Output and gradients of `function` in `dtype`, all as float64: {"out": ..., "d<name>": ...}."""
    wanted = inputs if wanted is None else wanted
    args = {name: x.detach().to(dtype).requires_grad_(name in wanted) for name, x in inputs.items()}
    out = function(**args, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    grads = torch.autograd.grad(out, [args[name] for name in wanted], grad) if wanted else ()
    results = {"out": out.detach()} | {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: x.double() for name, x in results.items()}


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def compare_results(op, shape, truth, reference, kernel):
    """Rows for every tensor of three dictionaries of float64 tensors."""
    roundings = FLOOR * torch.finfo(torch.float32).eps
    return [
        Row(op, shape, name, largest(reference[name] - t), largest(kernel[name] - t), roundings * largest(t))
        for name, t in truth.items()
    ]


def compare(op, shape, seed=0, kernel=None, inputs=None, options=None, wanted=None):
    """Compare one op's kernel (or another function in its place) with gpt.py's formula. -> a Row for each tensor"""
    if inputs is None:
        inputs, options = make_inputs(op, shape, seed)
    formula, kernel = getattr(FORMULAS, op), kernel or getattr(ops, op)
    return compare_results(
        op,
        shape,
        evaluate(formula, inputs, options, torch.float64, wanted),
        evaluate(formula, inputs, options, torch.float32, wanted),
        evaluate(kernel, inputs, options, torch.float32, wanted),
    )


def model_results(config, state, ops, dtype, seed=0):
    """Logits, loss and the gradient of each parameter by name, of one model on one batch, as float64."""
    model = gpt.GPT(config, ops)
    model.load_state_dict(state)
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, config.block_size + 1), generator=generator)
    results = {"logits": model(tokens[:, :-1]).detach()}
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    results["loss"] = loss.detach()
    results |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    return {name: x.double() for name, x in results.items()}


def compare_models(config, seed=0, kernels=ops):
    """The same comparison for a whole model: logits, loss and every parameter's gradient."""
    torch.manual_seed(seed)
    state = gpt.GPT(config).state_dict()
    truth = model_results(config, state, None, torch.float64, seed)
    reference = model_results(config, state, None, torch.float32, seed)
    kernel = model_results(config, state, kernels, torch.float32, seed)
    return compare_results("model", (config.n_layer, config.n_head, config.n_embd), truth, reference, kernel)


def report(rows, file=None):
    """Print rows as a table. -> how many failed"""
    print(f"{'op':<12}{'shape':<20}{'tensor':<24}{'formula err':>12}{'kernel err':>12}{'ratio':>7}  verdict", file=file)
    for r in rows:
        ratio = "-" if math.isnan(r.ratio) else f"{r.ratio:.2f}"
        shape = "x".join(map(str, r.shape))
        verdict = "ok" if r.ok else f"FAILED, expected <= {r.bound:.1e}"
        print(f"{r.op:<12}{shape:<20}{r.tensor:<24}{r.reference:12.1e}{r.kernel:12.1e}{ratio:>7}  {verdict}", file=file)
    failed = sum(not r.ok for r in rows)
    print(f"{len(rows) - failed} of {len(rows)} tensors agree with float64 as well as the formula does", file=file)
    return failed


def run(quick=False):
    """The report, of fewer shapes with `quick`. -> how many tensors failed"""
    rows = []
    for op, shapes in CASES.items():
        for shape in shapes[-3:] if quick else shapes:
            rows += compare(op, shape)
    rows += compare("attention", (1, 97, 2, 64, 0.1))
    model = compare_models(gpt.GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=48, vocab_size=257))
    rows += sorted(model, key=lambda r: -r.kernel / (r.bound or 1))[:4] if quick else model
    return report(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt check", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    sys.exit(1 if run(parser.parse_args(argv).quick) else 0)
