"""layer_norm (csrc/layer_norm.h): what holds for it alone. What holds for every op: test_ops.py."""

import pytest
import torch
from parity import T_SIZES, assert_parity, slow

import fastgpt
from fastgpt import check


@pytest.mark.parametrize("C", (48, 769, *slow(64, 768, 1600)))
@pytest.mark.parametrize("T", T_SIZES)
@pytest.mark.parametrize("B", (0, 1))
def test_layer_norm_at_awkward_shapes(B, T, C):
    assert_parity(check.compare("layer_norm", (B, T, C), seed=T))


def test_layer_norm_reads_strided_views_in_place():
    buffer = torch.randn(5, 7, 3, 64, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.ones(48), torch.zeros(48)
    for x in (buffer[:, :, 1, 8:56], buffer.transpose(0, 2)[..., :48], buffer[::2, 1:, :, 3:51], buffer[:, :1, 0, :48]):
        assert not x.is_contiguous()
        inputs = dict(x=x, weight=weight, bias=bias)
        assert_parity(check.compare("layer_norm", tuple(x.shape), inputs=inputs, options={}))
        out = fastgpt.layer_norm(**inputs)
        assert out.is_contiguous() and torch.equal(out, fastgpt.layer_norm(x.contiguous(), weight, bias))


def test_layer_norm_does_not_overflow_where_the_formula_does(isa):
    for size in (1e19, 1e25, 1e36):
        inputs = dict(x=torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * size)
        inputs |= dict(weight=torch.ones(40), bias=torch.zeros(40))
        assert_parity(check.compare("layer_norm", inputs=inputs, wanted=()))
        assert abs(fastgpt.layer_norm(**inputs).var(unbiased=False).item() - 1) < 1e-5


def test_layer_norm_of_a_large_mean_keeps_its_digits(isa):
    x = torch.randn(9, 769, generator=torch.Generator().manual_seed(0)) + 1e4
    inputs = dict(x=x, weight=torch.ones(769), bias=torch.zeros(769))
    assert_parity(check.compare("layer_norm", (9, 769), inputs=inputs, options={}))


def test_layer_norm_of_one_channel_is_its_bias(isa):
    x, weight, bias = torch.randn(7, 1), torch.randn(1), torch.randn(1)
    assert torch.equal(fastgpt.layer_norm(x, weight, bias), bias.expand(7, 1))
