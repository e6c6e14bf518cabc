"""The parity check catches faults: each is planted in a copy of a formula and put in the kernel's place."""

import math
from types import SimpleNamespace

import pytest
import torch

import gpt
from fastgpt import check


def caught(rows):
    return [r.tensor for r in rows if not r.ok]


def attention_variant(scale=lambda D: math.sqrt(D), diagonal=1):
    def attention(qkv, n_head, dropout=0.0, seed=0):
        B, T, C3 = qkv.shape
        q, k, v = (x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.split(C3 // 3, dim=-1))
        scores = q @ k.transpose(-2, -1) / scale(q.shape[-1])
        hidden = torch.ones(T, T, dtype=torch.bool).triu(diagonal)
        weights = torch.softmax(scores.masked_fill(hidden, -1e30), dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    return attention


class NoBiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return gpt.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, -2).T @ x.flatten(0, -2), torch.zeros(weight.shape[0])


MUTANTS = {
    "erf GELU": ("gelu", (65, 48), lambda x: torch.nn.functional.gelu(x)),
    "eps 1e-6": ("layer_norm", (65, 48), lambda x, weight, bias: gpt.layer_norm(x, weight, bias, 1e-6)),
    "variance divided by C - 1": (
        "layer_norm",
        (65, 769),
        lambda x, weight, bias: (
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
        ),
    ),
    "mask hides the position itself": ("attention", (1, 65, 2, 16), attention_variant(diagonal=0)),
    "mask shows one future position": ("attention", (1, 65, 2, 16), attention_variant(diagonal=2)),
    "1/D instead of 1/sqrt(D)": ("attention", (1, 65, 2, 16), attention_variant(scale=lambda D: D)),
    "square weight not transposed": ("linear", (65, 64, 64), lambda x, weight, bias: x @ weight + bias),
    "bias gradient dropped": ("linear", (65, 48, 64), NoBiasGradient.apply),
    "-1 targets counted in the mean": (
        "lm_loss",
        (3, 65, 48, 65),
        lambda hidden, weight, targets: gpt.lm_loss(hidden, weight, targets) * (targets != -1).float().mean(),
    ),
}


# --------------------------------------------------------------------------------- finer faults, a few digits each


def with_gradient(forward, gradients):
    """A function of tensors whose gradients are what `gradients(dout, *inputs)` says."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, dout):
            return gradients(dout, *ctx.saved_tensors)

    return Op.apply


def spoiled(op, spoil, what="out"):
    """gpt.py's formula, with spoil(tensor) done to its output or to one of its gradients."""

    def function(**args):
        options = {name: x for name, x in args.items() if not (torch.is_tensor(x) and x.is_floating_point())}
        names = [name for name in args if name not in options]
        formula = lambda *inputs: getattr(check.FORMULAS, op)(**dict(zip(names, inputs, strict=True)), **options)  # noqa: E731

        def forward(*inputs):
            out = formula(*inputs)
            return spoil(out.clone()) if what == "out" else out

        def gradients(dout, *inputs):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in inputs]
                grads = torch.autograd.grad(formula(*inputs), inputs, dout)
            return tuple(spoil(g.clone()) if what == f"d{n}" else g for n, g in zip(names, grads, strict=True))

        return with_gradient(forward, gradients)(*(args[name] for name in names))

    return function


def one_element_off(x):
    flat = x.view(-1)
    flat[flat.abs().argsort()[flat.numel() * 3 // 4]] *= 1 + 1e-5  # an element of ordinary size
    return x


def last_column_twice(x):
    x[..., -1] = x[..., -2]
    return x


def a_row_missing(x):
    x[-1] = 0
    return x


def bfloat16_sum(x, weight, bias):
    y = torch.zeros(x.shape[0], weight.shape[0])
    for k in range(0, x.shape[1], 16):
        y = (y + x[:, k : k + 16] @ weight[:, k : k + 16].T).bfloat16().float()
    return y + bias


def attention_with(P_of, causal_keys=lambda T: torch.ones(T, T, dtype=torch.bool).tril()):
    """Attention with P_of(scores, log-sum-exp) for the weights, in the backward as in the forward."""

    def parts(qkv, n_head):
        return [x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.split(qkv.shape[-1] // 3, dim=-1)]

    def weights(q, k):
        T, D = q.shape[-2:]
        scores = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(~causal_keys(T), -math.inf)
        return P_of(scores, scores.logsumexp(-1, keepdim=True))

    def merge(x):
        return x.transpose(1, 2).flatten(2)

    def attention(qkv, n_head, dropout=0.0, seed=0):
        def forward(qkv):
            q, k, v = parts(qkv, n_head)
            return merge(weights(q, k) @ v)

        def gradients(dout, qkv):
            q, k, v = parts(qkv, n_head)
            do, P = dout.unflatten(-1, (n_head, -1)).transpose(1, 2), weights(q, k)
            dP = do @ v.transpose(-2, -1)
            dS = P * (dP - (P * dP).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
            return torch.cat([merge(dS @ k), merge(dS.transpose(-2, -1) @ q), merge(P.transpose(-2, -1) @ do)], -1)

        return with_gradient(forward, gradients)(qkv)

    return attention


def polynomial_exp2(x, degree):
    """2^x = 2^z 2^f with a polynomial of csrc/simd.h's coefficients for 2^f, its highest terms left out."""
    z = x.round()
    f, p = x - z, torch.zeros_like(x)
    for c in (1.53533620e-4, 1.33988739e-3, 9.61843692e-3, 5.55033237e-2, 2.40226477e-1, 6.93147182e-1, 1.0)[
        6 - degree :
    ]:
        p = p * f + c
    return torch.ldexp(p, z.int())


def softmax_by(degree):
    def P(scores, lse):
        p = polynomial_exp2(((scores - scores.amax(-1, keepdim=True)) * math.log2(math.e)).clamp(min=-126), degree)
        p = torch.where(scores == -math.inf, 0.0, p)
        return p / p.sum(-1, keepdim=True)

    return P


def gelu_by(degree):
    """gelu by that polynomial, its gradient by the formula."""

    def gelu(x):
        v = (2 * math.log2(math.e) * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).clamp(-126, 126)
        e = polynomial_exp2(v, degree)
        return x * (e / (1 + e))

    def gradient(dout, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(gpt.gelu(x), x, dout)

    return lambda x: with_gradient(gelu, gradient)(x)


def no_last_key(T):
    """The last block of 64 keys lacks its last key, for queries past it."""
    keys = torch.ones(T, T, dtype=torch.bool).tril()
    keys[-1, -2] = False
    return keys


def softmax(scores, lse):
    return torch.exp(scores - lse)


FINE = {
    "one element of gelu off by 1e-5": ("gelu", (65, 48), spoiled("gelu", one_element_off)),
    "one element of layer_norm's dx off by 1e-5": (
        "layer_norm",
        (65, 769),
        spoiled("layer_norm", one_element_off, "dx"),
    ),
    "one element of a product off by 1e-5": ("linear", (65, 64, 48), spoiled("linear", one_element_off)),
    "one element of dweight off by 1e-5": ("linear", (65, 64, 48), spoiled("linear", one_element_off, "dweight")),
    "one element of dhidden off by 1e-5": ("lm_loss", (3, 65, 64, 257), spoiled("lm_loss", one_element_off, "dhidden")),
    "one row of dweight missing": ("lm_loss", (3, 65, 64, 257), spoiled("lm_loss", a_row_missing, "dweight")),
    "one row of linear's dweight missing": ("linear", (65, 769, 48), spoiled("linear", a_row_missing, "dweight")),
    "last column computed twice": ("linear", (97, 64, 257), spoiled("linear", last_column_twice)),
    "last column of dx computed twice": ("layer_norm", (65, 769), spoiled("layer_norm", last_column_twice, "dx")),
    "a sum carried in bfloat16": ("linear", (65, 769, 48), bfloat16_sum),
    "a loss carried in bfloat16": ("lm_loss", (3, 65, 64, 257), spoiled("lm_loss", lambda x: x.bfloat16().float())),
    "one key too few in the last block": ("attention", (1, 97, 2, 64), attention_with(softmax, no_last_key)),
    "lse off by 1e-6": ("attention", (1, 97, 2, 64), attention_with(lambda s, lse: torch.exp(s - (lse + 1e-6)))),
    "exp2 one degree lower in attention": ("attention", (1, 65, 2, 16), attention_with(softmax_by(5))),
}


@pytest.mark.parametrize("fault", MUTANTS | FINE)
def test_fault_in_an_op_is_caught(fault):
    op, shape, mutant = (MUTANTS | FINE)[fault]
    assert caught(check.compare(op, shape, kernel=mutant)), f"{fault} passed the parity check"


@pytest.mark.parametrize(
    "op, shape, twin",
    [
        ("attention", (1, 97, 2, 64), attention_with(softmax)),
        ("attention", (1, 97, 2, 64), attention_with(softmax_by(6))),
        ("gelu", (65, 48), gelu_by(6)),
        ("lm_loss", (3, 65, 64, 257), spoiled("lm_loss", lambda x: x)),
    ],
)
def test_without_its_fault_a_mutant_is_not_caught(op, shape, twin):
    assert not caught(check.compare(op, shape, kernel=twin))


@pytest.mark.slow
@pytest.mark.parametrize("op", check.CASES)
def test_the_formula_itself_is_not_caught(op):
    for shape in check.CASES[op][:5]:
        assert not caught(check.compare(op, shape, kernel=getattr(check.FORMULAS, op)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [name for name in MUTANTS if name != "square weight not transposed"])
def test_fault_in_a_model_is_caught(small, fault):
    op, _, mutant = MUTANTS[fault]
    if op == "linear":
        linear = mutant
        mutant = lambda x, weight, bias=None: gpt.linear(x, weight) if bias is None else linear(x, weight, bias)  # noqa: E731
    formulas = {name: getattr(gpt, name) for name in gpt.FORMULAS}
    targets_count = fault == "-1 targets counted in the mean"
    rows = check.compare_models(small, kernels=SimpleNamespace(**formulas | {op: mutant}))
    assert bool(caught(rows)) is not targets_count  # a model's batch here has no -1: only the op's own check can tell


def test_forgotten_transpose_of_a_square_projection_is_caught(small):
    def linear(x, weight, bias=None):
        square = weight.shape[0] == weight.shape[1]
        return gpt.linear(x, weight.T if square else weight, bias)

    formulas = {name: getattr(gpt, name) for name in gpt.FORMULAS} | {"linear": linear}
    assert "logits" in caught(check.compare_models(small, kernels=SimpleNamespace(**formulas)))
