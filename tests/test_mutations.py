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


@pytest.mark.parametrize("fault", MUTANTS)
def test_fault_in_an_op_is_caught(fault):
    op, shape, mutant = MUTANTS[fault]
    assert caught(check.compare(op, shape, kernel=mutant)), f"{fault} passed the parity check"


@pytest.mark.parametrize("op", gpt.FORMULAS)
def test_the_formula_itself_is_not_caught(op):
    shape = check.CASES[op][2]
    assert not caught(check.compare(op, shape, kernel=getattr(gpt, op)))


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
