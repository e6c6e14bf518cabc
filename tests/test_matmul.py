"""linear and linear_gelu (csrc/matmul*.h): what holds for them alone. What holds for every op: test_ops.py."""

import pytest
import torch
from parity import assert_parity, slow

import fastgpt
import gpt
from fastgpt import check


@pytest.mark.parametrize("K, N", [(1, 1), (48, 769), (191, 383), (193, 385), (769, 48), *slow((400, 1000))])
@pytest.mark.parametrize("rows", (32, 33, 65, *slow(385)))
def test_linear_at_awkward_shapes(rows, K, N):
    assert_parity(check.compare("linear", (rows, K, N)))


@pytest.mark.parametrize("seed", (0, *slow(*range(1, 8))))
def test_linear_over_seeds(seed, isa):
    assert_parity(check.compare("linear", (128, 768, 192), seed=seed))


def test_linear_reads_strided_views_in_place():
    generator = torch.Generator().manual_seed(0)
    wide, weights = torch.randn(9, 7, 3, 64, generator=generator), torch.randn(30, 3, 64, generator=generator)
    for x in (wide[:, :, 1, 8:56], wide.transpose(0, 2)[..., :48], wide[::2, 1:, :, 3:51]):
        inputs = dict(x=x, weight=weights[:, 1, 5:53], bias=torch.ones(30))
        assert_parity(check.compare("linear", tuple(x.shape), inputs=inputs, options={}))


def test_linear_without_bias():
    inputs, options = check.make_inputs("linear", (65, 48, 97))
    del inputs["bias"]
    assert_parity(check.compare("linear", (65, 48, 97), inputs=inputs, options=options))


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -3.4e38))
@pytest.mark.parametrize("which, column", [("x", 440), ("weight", 440), ("weight", 100)])
def test_linear_with_one_value_that_has_no_bfloat16_parts(bad, which, column, isa):
    inputs, _ = check.make_inputs("linear", (512, 450, 100))  # several blocks, of which one holds the value
    inputs[which][33, column] = bad
    expected, out = gpt.linear(**inputs), fastgpt.linear(**inputs)
    assert torch.equal(expected.isnan(), out.isnan()) and torch.equal(expected.isinf(), out.isinf())
    same = expected.isfinite() & (expected.abs() < 1e30)
    torch.testing.assert_close(out[same], expected[same])


@pytest.mark.parametrize("scale", (1e-38, 1e-30, 1e18))
def test_linear_of_values_of_very_different_size(scale, isa):
    inputs, options = check.make_inputs("linear", (65, 97, 48))
    inputs["x"][::3] *= scale
    inputs["x"][:, ::5] *= -scale
    assert_parity(check.compare("linear", (65, 97, 48), inputs=inputs, options=options))


def test_linear_gelu_is_the_same_with_and_without_gradients(isa):
    for rows in (5, 40):
        inputs, _ = check.make_inputs("linear_gelu", (rows, 48, 100))
        with torch.no_grad():
            plain = fastgpt.linear_gelu(**inputs)
        for x in inputs.values():
            x.requires_grad_()
        assert torch.equal(plain, fastgpt.linear_gelu(**inputs))


def test_linear_gelu_without_bias_and_of_strided_views():
    wide = torch.randn(9, 7, 3, 64, generator=torch.Generator().manual_seed(0))
    inputs = dict(x=wide[:, :, 1, 8:56], weight=torch.randn(30, 48, generator=torch.Generator().manual_seed(1)))
    assert_parity(check.compare("linear_gelu", (9, 7, 48), inputs=inputs, options={}))
