"""Known wrong formulas: a learner's result that equals one of them, within its own rounding, has that mistake.

WRONG[exercise] is {the mistake, and what is right: the wrong formula}. A mistake in the forward is written as it would
be made; autograd finds the gradients that go with it. A mistake in the backward alone is a formula with the right
values and a wrong gradient: x.detach() stops a gradient, `slope` changes one.
"""

import math

import torch

import gpt

from .gradients import change, slope, takes_gradient_of, without_dout
from .wrong_attention import ATTENTION
from .wrong_loss import LM_LOSS

EPS = 1e-5


def rows(x):
    return max(x.numel() // x.shape[-1], 1)


# ------------------------------------------------------------------------------------------------------ linear


def linear_with(x_way=lambda x: x, weight_way=lambda w: w, bias_way=lambda b: b):
    """linear with something done to one of its inputs; without a bias, only to the others."""

    def linear(x, weight, bias=None):
        return gpt.linear(x_way(x), weight_way(weight), None if bias is None else bias_way(bias, x))

    return linear


def plain(b, x):
    return b


def first_row_only(b, x):
    """The bias, whose gradient comes from the first row alone."""
    leading = (1,) * (x.dim() - 1)
    others = torch.ones(x.shape[:-1], dtype=torch.bool).flatten()
    others[0] = False
    shape = (*x.shape[:-1], 1)
    return torch.where(others.view(shape), b.detach().view(*leading, -1), b.view(*leading, -1))


def square(weight):
    return weight.T if weight.shape[0] == weight.shape[1] else weight


def square_gradient(weight):
    return takes_gradient_of(weight, weight.T) if weight.shape[0] == weight.shape[1] else weight


def square_dx(x, weight, bias=None):
    """The right values; dx = dout @ weight.T."""
    if weight.shape[0] != weight.shape[1]:
        return gpt.linear(x, weight, bias)
    other = (x - x.detach()) @ weight.detach()
    return gpt.linear(x.detach(), weight, bias) + other


LINEAR = {
    "the weight is used as it is, not transposed: out is x @ weight.T (a square weight hides it from every shape)": (
        linear_with(weight_way=square, bias_way=plain)
    ),
    "the bias is not added": linear_with(bias_way=lambda b, x: 0 * b),
    "the bias is added twice": linear_with(bias_way=lambda b, x: 2 * b),
    "the bias is subtracted": linear_with(bias_way=lambda b, x: -b),
    "only the first number of the bias is used, for all outputs": linear_with(bias_way=lambda b, x: b[:1].expand_as(b)),
    "dbias is zero: the gradient of the bias was dropped; it is the sum of dout over all rows": (
        linear_with(bias_way=lambda b, x: b.detach())
    ),
    "dbias is the mean of dout over the rows; it is the sum": linear_with(bias_way=lambda b, x: slope(b, 1 / rows(x))),
    "dbias is dout's first row; it is the sum over all rows": linear_with(bias_way=first_row_only),
    "dbias has the wrong sign": linear_with(bias_way=lambda b, x: slope(b, -1)),
    "dx is dout @ weight.T; it is dout @ weight (a square weight hides it from every shape)": square_dx,
    "dweight is transposed: it is dout.T @ x, not x.T @ dout (a square weight hides it from every shape)": (
        linear_with(weight_way=square_gradient, bias_way=plain)
    ),
    "dweight is zero: the gradient of the weight was dropped": (
        linear_with(weight_way=lambda w: w.detach(), bias_way=plain)
    ),
    "dx is zero: no gradient goes back to x": linear_with(x_way=lambda x: x.detach(), bias_way=plain),
    "dweight is the mean over the rows; it is the sum": (
        lambda x, weight, bias=None: gpt.linear(x, slope(weight, 1 / rows(x)), bias)
    ),
    "dweight has the wrong sign": linear_with(weight_way=lambda w: slope(w, -1), bias_way=plain),
    "dx has the wrong sign": linear_with(x_way=lambda x: slope(x, -1), bias_way=plain),
}

# -------------------------------------------------------------------------------------------------------- gelu

A, B = math.sqrt(2 / math.pi), 0.044715


def tanh_gelu(inner, half=0.5, one=1.0):
    return lambda x: half * x * (one + torch.tanh(inner(x)))


def one_sided(first, second):
    """x/2 (1 + t), with the gradient through only one of the two factors."""

    def gelu(x):
        t = torch.tanh(A * (x + B * x**3))
        return 0.5 * (x if first else x.detach()) * (1.0 + (t if second else t.detach()))

    return gelu


def tanh_without_slope(x):
    """tanh whose slope is taken to be 1."""
    return takes_gradient_of(torch.tanh(x), x)


def tanh_slope_not_squared(x):
    t = torch.tanh(x).detach()
    return t + (1 - t) * (x - x.detach())


GELU = {
    "this is the exact GELU, with erf; GPT-2's weights were trained with the tanh form": (
        lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2)))
    ),
    "this is x * sigmoid(1.702 x), a coarser approximation; GPT-2 takes the tanh form": (
        lambda x: x * torch.sigmoid(1.702 * x)
    ),
    "this is SiLU, x * sigmoid(x), not GELU": lambda x: x * torch.sigmoid(x),
    "this is ReLU, not GELU": lambda x: torch.relu(x),
    "x is squared inside tanh; it is cubed": tanh_gelu(lambda x: A * (x + B * x**2)),
    "the cubic term inside tanh is missing": tanh_gelu(lambda x: A * x),
    "the cubic term is subtracted inside tanh; it is added": tanh_gelu(lambda x: A * (x - B * x**3)),
    "0.44715 stands for 0.044715": tanh_gelu(lambda x: A * (x + 0.44715 * x**3)),
    "0.0044715 stands for 0.044715": tanh_gelu(lambda x: A * (x + 0.0044715 * x**3)),
    "0.04715 stands for 0.044715": tanh_gelu(lambda x: A * (x + 0.04715 * x**3)),
    "0.44 is taken where 0.044715 is meant": tanh_gelu(lambda x: A * (x + 0.44 * x**3)),
    "2 / pi without its square root": tanh_gelu(lambda x: 2 / math.pi * (x + B * x**3)),
    "sqrt(2) / pi stands for sqrt(2 / pi): the root is of the whole quotient": (
        tanh_gelu(lambda x: math.sqrt(2) / math.pi * (x + B * x**3))
    ),
    "sqrt(pi / 2) stands for sqrt(2 / pi)": tanh_gelu(lambda x: math.sqrt(math.pi / 2) * (x + B * x**3)),
    "the factor sqrt(2 / pi) is missing": tanh_gelu(lambda x: x + B * x**3),
    "sqrt(2 / pi) multiplies x alone; it multiplies the sum": tanh_gelu(lambda x: A * x + B * x**3),
    "the factor 1/2 is missing": tanh_gelu(lambda x: A * (x + B * x**3), half=1.0),
    "1 is not added to tanh": tanh_gelu(lambda x: A * (x + B * x**3), one=0.0),
    "1 is added inside tanh, not to it": tanh_gelu(lambda x: A * (x + B * x**3) + 1.0, one=0.0),
    "sigmoid stands where tanh should": lambda x: 0.5 * x * (1 + torch.sigmoid(A * (x + B * x**3))),
    "x is not multiplied: this is only the gate, (1 + tanh(...)) / 2": (
        lambda x: 0.5 * (1 + torch.tanh(A * (x + B * x**3)))
    ),
    "dx lacks the slope of tanh: out is a product, and both of its factors depend on x": one_sided(True, False),
    "dx lacks the term (1 + tanh) / 2: out is a product, and both of its factors depend on x": one_sided(False, True),
    "dx lacks the inner slope of x + 0.044715 x^3, which is 1 + 3 * 0.044715 x^2": (
        tanh_gelu(lambda x: A * (x + B * (x**3).detach()))
    ),
    "dx has x^2 without its factor 3 in the inner slope: the slope of x^3 is 3 x^2": (
        tanh_gelu(lambda x: A * (x + B * slope(x**3, 1 / 3)))
    ),
    "dx lacks the factor sqrt(2 / pi) in the inner slope": tanh_gelu(lambda x: slope(A * (x + B * x**3), 1 / A)),
    "dx takes the slope of tanh(u) to be 1; it is 1 - tanh(u)^2": (
        lambda x: 0.5 * x * (1.0 + tanh_without_slope(A * (x + B * x**3)))
    ),
    "dx takes the slope of tanh(u) to be 1 - tanh(u); it is 1 - tanh(u)^2": (
        lambda x: 0.5 * x * (1.0 + tanh_slope_not_squared(A * (x + B * x**3)))
    ),
    "dx is the slope of the exact GELU, with erf; the forward has tanh": (
        lambda x: gpt.gelu(x).detach() + erf_gelu_change(x)
    ),
    "dx is zero: no gradient goes back to x": lambda x: gpt.gelu(x).detach() + 0 * x,
    "dx has the wrong sign": lambda x: gpt.gelu(slope(x, -1)),
}


def erf_gelu_change(x):
    """0, with the gradient of the exact GELU."""
    y = 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2)))
    return y - y.detach()


# -------------------------------------------------------------------------------------------------- layer_norm


def norm(normalize, dims=(-1,)):
    """layer_norm whose normalized x is normalize(centered, variance)."""

    def layer_norm(x, weight, bias):
        axes = tuple(range(-x.dim(), 0)) if dims is None else dims
        centered = x - x.mean(axes, keepdim=True)
        return normalize(centered, centered.square().mean(axes, keepdim=True)) * weight + bias

    return layer_norm


def right(centered, variance):
    return centered / torch.sqrt(variance + EPS)


def with_eps(eps):
    return norm(lambda c, v: c / torch.sqrt(v + eps))


def affine(finish):
    """layer_norm with another last step: finish(xhat, weight, bias)."""

    def layer_norm(x, weight, bias):
        centered = x - x.mean(-1, keepdim=True)
        return finish(right(centered, centered.square().mean(-1, keepdim=True)), weight, bias)

    return layer_norm


def unbiased(c, v):
    C = c.shape[-1]
    return c / torch.sqrt(v * (C / (C - 1) if C > 1 else math.nan) + EPS)


def unbiased_outside(c, v):
    C = c.shape[-1]
    return c / (torch.sqrt(v * (C / (C - 1) if C > 1 else math.nan)) + EPS)


def of_x(normalize):
    """layer_norm whose normalized x is normalize(x): the mean is treated in another way."""
    return lambda x, weight, bias: normalize(x) * weight + bias


def difference_of_squares(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(x.square().mean(-1, keepdim=True) - mean.square() + EPS)


def second_moment(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)


def root_mean_square(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)


def not_centered(x):
    return x / torch.sqrt((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + EPS)


def constant_mean(x):
    """The gradient takes the mean above the line as a constant."""
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True).detach()) / torch.sqrt(variance + EPS)


LAYER_NORM = {
    "eps stands outside the root, sqrt(variance) + eps; it is sqrt(variance + eps)": (
        norm(lambda c, v: c / (torch.sqrt(v) + EPS))
    ),
    "the variance is divided by C - 1; it is divided by C (torch.var: unbiased=False)": norm(unbiased),
    "the variance is divided by C - 1, and eps stands outside the root; it is C, and sqrt(variance + eps)": (
        norm(unbiased_outside)
    ),
    "eps is missing, or so small that it does nothing; it is sqrt(variance + eps)": norm(
        lambda c, v: c / torch.sqrt(v)
    ),
    "eps is 1e-6; GPT-2's is 1e-5": with_eps(1e-6),
    "eps is 1e-8; GPT-2's is 1e-5": with_eps(1e-8),
    "eps is 1e-4; GPT-2's is 1e-5": with_eps(1e-4),
    "eps is 1e-3; GPT-2's is 1e-5": with_eps(1e-3),
    "eps is squared under the root": with_eps(1e-10),
    "the root is missing: x - mean is divided by variance + eps": norm(lambda c, v: c / (v + EPS)),
    "the variance is not divided by C: it is the sum of the squares": (
        norm(lambda c, v: c / torch.sqrt(v * c.shape[-1] + EPS))
    ),
    "x - mean is multiplied by the root; it is divided": norm(lambda c, v: c * torch.sqrt(v + EPS)),
    "x - mean is not divided by anything: the variance is not used": norm(lambda c, v: c),
    "the mean of |x - mean| stands for the deviation; it is the root of the mean square": (
        norm(lambda c, v: c / (c.abs().mean(-1, keepdim=True) + EPS))
    ),
    "the mean is not subtracted: this is RMSNorm, x / sqrt(mean(x^2) + eps)": of_x(root_mean_square),
    "the mean is not subtracted above the line: it is (x - mean) / sqrt(variance + eps)": of_x(not_centered),
    "the variance is the mean of x^2; it is the mean of (x - mean)^2": of_x(second_moment),
    "the variance is mean(x^2) - mean^2: beside a large mean its digits cancel; take the mean of (x - mean)^2": (
        of_x(difference_of_squares)
    ),
    "mean and variance are taken over all positions together; each position has its own": norm(right, None),
    "mean and variance are taken down the positions, not across the channels": norm(right, (-2,)),
    "the weight is not used": affine(lambda xhat, weight, bias: xhat + bias + 0 * weight),
    "the bias is not added": affine(lambda xhat, weight, bias: xhat * weight),
    "weight and bias are not used": affine(lambda xhat, weight, bias: xhat),
    "the weight is added to 1; it is the factor itself": affine(lambda xhat, weight, bias: xhat * (1 + weight) + bias),
    "the bias is added before the weight multiplies; it comes last": (
        affine(lambda xhat, weight, bias: (xhat + bias) * weight)
    ),
    "weight and bias are exchanged": affine(lambda xhat, weight, bias: xhat * bias + weight),
    "the bias is subtracted": affine(lambda xhat, weight, bias: xhat * weight - bias),
    "dx takes mean and variance as constants; they depend on x, which gives two more terms": (
        lambda x, weight, bias: gpt.layer_norm(x.detach(), weight, bias) + direct_way(x, weight)
    ),
    "dx takes the variance as a constant; it depends on x: the term with xhat * mean(g * xhat) is missing": (
        norm(lambda c, v: c / torch.sqrt(v.detach() + EPS))
    ),
    "dx takes the mean as a constant; it depends on x: the term with mean(g) is missing": of_x(constant_mean),
    "dx is not divided by sqrt(variance + eps)": (
        lambda x, weight, bias: gpt.layer_norm(slope(x, deviation(x)), weight, bias)
    ),
    "dx lacks the weight: g is dout * weight, not dout": (
        lambda x, weight, bias: (
            gpt.layer_norm(x.detach(), weight, bias)
            + change(gpt.layer_norm(x, torch.ones_like(weight), torch.zeros_like(bias)))
        )
    ),
    "dweight lacks xhat: it is the sum of dout * xhat, not of dout": (
        lambda x, weight, bias: gpt.layer_norm(x, weight.detach(), bias) + change(weight)
    ),
    "dweight is the sum of dout * x; it is that of dout * xhat": (
        lambda x, weight, bias: gpt.layer_norm(x, weight.detach(), bias) + x.detach() * change(weight)
    ),
    "dweight is the sum of dout * (x - mean); it is that of dout * xhat": (
        lambda x, weight, bias: (
            gpt.layer_norm(x, weight.detach(), bias) + (x - x.mean(-1, keepdim=True)).detach() * change(weight)
        )
    ),
    "dweight is the mean over the positions; it is the sum": (
        lambda x, weight, bias: gpt.layer_norm(x, slope(weight, 1 / rows(x)), bias)
    ),
    "dbias is the mean over the positions; it is the sum": (
        lambda x, weight, bias: gpt.layer_norm(x, weight, slope(bias, 1 / rows(x)))
    ),
    "dbias is zero: the gradient of the bias was dropped; it is the sum of dout over all positions": (
        lambda x, weight, bias: gpt.layer_norm(x, weight, bias.detach())
    ),
    "dweight is zero: the gradient of the weight was dropped": (
        lambda x, weight, bias: gpt.layer_norm(x, weight.detach(), bias)
    ),
    "dweight and dbias are exchanged": (
        lambda x, weight, bias: (
            gpt.layer_norm(x, weight.detach(), bias.detach())
            + change(weight)
            + gpt.layer_norm(x, torch.ones_like(weight), 0 * bias).detach() * change(bias)
        )
    ),
    "dx has the wrong sign": lambda x, weight, bias: gpt.layer_norm(slope(x, -1), weight, bias),
    "dx is zero: no gradient goes back to x": lambda x, weight, bias: gpt.layer_norm(x.detach(), weight, bias),
}


def deviation(x):
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return torch.sqrt(variance + EPS).detach()


def direct_way(x, weight):
    """0, with the gradient that x has above the line alone."""
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return change(x) / torch.sqrt(variance.detach() + EPS) * weight.detach()


# ------------------------------------------------------------------------------------------------- linear_gelu


def fused(linear, gelu):
    return lambda x, weight, bias=None: gelu(linear(x, weight, bias))


def slope_at_result(x, weight, bias=None):
    """The right values; gelu' is taken at gelu's result."""
    u = gpt.linear(x, weight, bias)
    y = gpt.gelu(u).detach()
    t = torch.tanh(A * (y + B * y**3))
    derivative = 0.5 * (1 + t) + 0.5 * y * (1 - t.square()) * A * (1 + 3 * B * y.square())
    return y + derivative * change(u)


LINEAR_GELU = {
    "the bias is added after gelu; it is added before": (
        lambda x, weight, bias=None: gpt.gelu(x @ weight.T) + (0 if bias is None else bias)
    ),
    "gelu is applied to x, before the product; it is applied to the product": (
        lambda x, weight, bias=None: gpt.linear(gpt.gelu(x), weight, bias)
    ),
    "gelu is not applied": gpt.linear,
    "gelu is applied twice": lambda x, weight, bias=None: gpt.gelu(gpt.linear_gelu(x, weight, bias)),
    "the slope of gelu is taken at its result; it is taken at its input, linear's result": slope_at_result,
    "the backward lacks the slope of gelu: it is that of linear alone": (
        lambda x, weight, bias=None: gpt.linear_gelu(x, weight, bias).detach() + change(gpt.linear(x, weight, bias))
    ),
    **{what: fused(linear, gpt.gelu) for what, linear in LINEAR.items()},
    **{
        what: fused(gpt.linear, gelu)
        for what, gelu in GELU.items()
        if not what.startswith("dx has the wrong sign") and not what.startswith("dx is zero")
    },
}

UNUSED = "dout is not used: these are the gradients where it is 1 everywhere; each is multiplied by dout"
WRONG = {
    name: {**mistakes, UNUSED: without_dout(getattr(gpt, name))}
    for name, mistakes in dict(
        linear=LINEAR,
        gelu=GELU,
        layer_norm=LAYER_NORM,
        linear_gelu=LINEAR_GELU,
        attention=ATTENTION,
        lm_loss=LM_LOSS,
    ).items()
}
