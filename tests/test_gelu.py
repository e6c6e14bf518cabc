"""gelu (csrc/gelu.h): what holds for it alone. What holds for every op: test_ops.py."""

import torch
from parity import assert_parity

import fastgpt
import gpt
from fastgpt import check


def test_gelu_far_out(isa):
    x = torch.tensor([-1e30, -1e4, -88.0, -12.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 12.0, 88.0, 1e4, 1e30])
    assert_parity(check.compare("gelu", (13,), inputs=dict(x=x[1:-1]), options={}))
    assert fastgpt.gelu(x)[-1] == x[-1] and fastgpt.gelu(x)[0] == 0


def test_gelu_reads_strided_views_in_place(isa):
    wide = torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(0))
    for view in (wide[::2, :, 3:36], wide.transpose(0, 1), wide[0, 0, 0]):
        assert_parity(check.compare("gelu", tuple(view.shape), inputs=dict(x=view), options={}))


def test_gradient_of_gelu_does_not_overflow_where_the_formula_does(isa):
    x = torch.tensor([1e20, -1e20, 3e38, -3e38, 1e19, 3.0], requires_grad=True)
    fastgpt.gelu(x).sum().backward()
    three = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gpt.gelu(three), three)
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, expected.item()]), rtol=1e-6, atol=1e-30)
