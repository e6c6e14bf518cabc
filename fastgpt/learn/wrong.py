"""Known wrong formulas: a learner's result that equals one of them, within its own rounding, has that mistake.

WRONG[exercise] is {the mistake, and what is right: the wrong formula}. A mistake in the forward is written as it would
be made; autograd finds the gradients that go with it. A mistake in the backward alone is a formula with the right values
and a wrong gradient: x.detach() stops a gradient, `slope` changes one.
"""

import math

import torch

import gpt

EPS = 1e-5


def slope(x, factor):
    """x, but its gradient comes out `factor` times as large."""
    return x.detach() + factor * (x - x.detach())


def takes_gradient_of(x, other):
    """x, but the gradient that belongs to it goes to `other`."""
    return x.detach() + (other - other.detach())


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


def change(x):
    """0, with the gradient of x."""
    return x - x.detach()


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

# --------------------------------------------------------------------------------------------------- attention


def softmax_over(dim):
    return lambda scores, hidden: torch.softmax(scores.masked_fill(hidden, -math.inf), dim)


keys_softmax = softmax_over(-1)


def filled(value):
    return lambda scores, hidden: torch.softmax(scores.masked_fill(hidden, value), -1)


def attention_with(
    split=gpt.split_heads,
    scale=lambda D, C: math.sqrt(D),
    hidden=lambda query, key: key > query,
    weigh=keys_softmax,
    merge=gpt.merge_heads,
    mean=lambda weights, v: weights @ v,
):
    """attention with one of its steps made in another way."""

    def attention(qkv, n_head):
        q, k, v = split(qkv, n_head)
        T, D = q.shape[-2:]
        position = torch.arange(T)
        scores = q @ k.transpose(-2, -1) / scale(D, D * n_head)
        return merge(mean(weigh(scores, hidden(position[:, None], position)), v))

    return attention


def softmax_then_mask(scores, hidden):
    return torch.softmax(scores, -1).masked_fill(hidden, 0.0)


def interleaved_heads(qkv, n_head):  # channel c belongs to head c % H
    return [x.unflatten(-1, (-1, n_head)).permute(0, 3, 1, 2) for x in qkv.chunk(3, dim=-1)]


def interleave_back(y):
    return y.permute(0, 2, 3, 1).flatten(2)


def heads_of_positions(qkv, n_head):  # view(B, H, T, D) without the transpose
    return [x.contiguous().view(x.shape[0], n_head, x.shape[1], -1) for x in qkv.chunk(3, dim=-1)]


def not_transposed_back(y):
    return y.reshape(y.shape[0], y.shape[2], -1)


def threes_in_each_head(qkv, n_head):  # head by head q, k, v: GPT-NeoX's order
    return [x.squeeze(-2).transpose(1, 2) for x in qkv.unflatten(-1, (n_head, 3, -1)).chunk(3, dim=-2)]


def threes_in_each_channel(qkv, n_head):
    return [x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.unflatten(-1, (-1, 3)).unbind(-1)]


def in_order(*order):
    return lambda qkv, n_head: [gpt.split_heads(qkv, n_head)[i] for i in order]


def one_head(qkv, n_head):
    return gpt.split_heads(qkv, 1)


def without_row_sum(scores, hidden):
    """Softmax, whose gradient takes the sum below the line as a constant: dS = P * dP."""
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True).detach())


def gradients_of(q_way=lambda q: q, k_way=lambda k: k, v_way=lambda v: v):
    """The right values; the gradients of q, k or v in another way."""

    def split(qkv, n_head):
        q, k, v = gpt.split_heads(qkv, n_head)
        return q_way(q), k_way(k), v_way(v)

    return attention_with(split)


def scaled_gradient(x):
    return slope(x, math.sqrt(x.shape[-1]))


def exchanged(qkv, n_head):
    q, k, v = gpt.split_heads(qkv, n_head)
    return takes_gradient_of(q, k), takes_gradient_of(k, q), v


def transposed_weights(weights, v):
    """The right values; dv = P dout instead of P^T dout."""
    return weights @ v.detach() + weights.detach().transpose(-2, -1) @ change(v)


ATTENTION = {
    "the mask hides the position itself; a position sees itself and all before: triu(1), not triu(0) (NaN)": (
        attention_with(hidden=lambda query, key: key >= query)
    ),
    "the mask hides the position itself; a position sees itself and all before: triu(1), not triu(0)": (
        attention_with(hidden=lambda query, key: key >= query, weigh=filled(-1e30))
    ),
    "the mask shows one position of the future: triu(2) instead of triu(1)": (
        attention_with(hidden=lambda query, key: key > query + 1)
    ),
    "there is no mask: positions see the future": attention_with(hidden=lambda query, key: key > query + 10**9),
    "the mask is turned around: positions see the future and not the past": (
        attention_with(hidden=lambda query, key: key < query)
    ),
    "hidden scores are set to 0 or multiplied by 0; exp(0) = 1 still counts: set them to -inf before the softmax": (
        attention_with(weigh=filled(0.0))
    ),
    "hidden scores are set to -1, which still counts: set them to -inf before the softmax": (
        attention_with(weigh=filled(-1.0))
    ),
    "hidden scores are set to -10, which still counts: set them to -inf before the softmax": (
        attention_with(weigh=filled(-10.0))
    ),
    "the mask comes after the softmax: the rows no longer sum to 1; set scores to -inf before": (
        attention_with(weigh=softmax_then_mask)
    ),
    "the softmax runs over the queries (dim=-2); each query's weights sum to 1 over the keys (dim=-1)": (
        attention_with(weigh=softmax_over(-2))
    ),
    "the softmax runs over the heads (dim=1); it runs over the keys (dim=-1)": attention_with(weigh=softmax_over(-3)),
    "there is no softmax: the masked scores themselves are the weights": (
        attention_with(weigh=lambda scores, hidden: scores.masked_fill(hidden, 0.0))
    ),
    "exp(score) is not divided by its sum": (
        attention_with(weigh=lambda scores, hidden: torch.exp(scores.masked_fill(hidden, -math.inf)))
    ),
    "the softmax is applied twice": (
        attention_with(weigh=lambda scores, hidden: torch.softmax(softmax_over(-1)(scores, hidden), -1))
    ),
    "the heads are interleaved, channel c to head c % n_head; a head has D neighbouring channels": (
        attention_with(interleaved_heads, merge=interleave_back)
    ),
    "the heads are split as interleaved (channel c to head c % n_head); a head has D neighbouring channels": (
        attention_with(interleaved_heads)
    ),
    "the heads' results are put together interleaved; they stand one after another": (
        attention_with(merge=interleave_back)
    ),
    "view(B, n_head, T, D) mixes positions and heads: view(B, T, n_head, D), then transpose(1, 2)": (
        attention_with(heads_of_positions)
    ),
    "view(B, n_head, T, D) and back mixes positions and heads: view(B, T, n_head, D), then transpose(1, 2)": (
        attention_with(heads_of_positions, merge=not_transposed_back)
    ),
    "the heads are not transposed back before they are put together: transpose(1, 2), then flatten": (
        attention_with(merge=not_transposed_back)
    ),
    "qkv is read as q, k, v within each head; it holds all queries, then all keys, then all values": (
        attention_with(threes_in_each_head)
    ),
    "qkv is read as q, k, v within each channel; it holds all queries, then all keys, then all values": (
        attention_with(threes_in_each_channel)
    ),
    "all channels are taken as one head": attention_with(one_head),
    "queries and keys are exchanged: qkv holds q, then k, then v": attention_with(in_order(1, 0, 2)),
    "keys and values are exchanged: qkv holds q, then k, then v": attention_with(in_order(0, 2, 1)),
    "queries and values are exchanged: qkv holds q, then k, then v": attention_with(in_order(2, 1, 0)),
    "qkv is taken as k, v, q; it holds q, then k, then v": attention_with(in_order(2, 0, 1)),
    "qkv is taken as v, q, k; it holds q, then k, then v": attention_with(in_order(1, 2, 0)),
    "the queries stand for the keys, too: the scores are q @ q.T": attention_with(in_order(0, 0, 2)),
    "the keys stand for the values, too": attention_with(in_order(0, 1, 1)),
    "the scores are divided by D; it is sqrt(D)": attention_with(scale=lambda D, C: D),
    "the scores are not divided by sqrt(D)": attention_with(scale=lambda D, C: 1.0),
    "the scores are divided by sqrt(C); it is sqrt(D), D = C / n_head the size of a head": (
        attention_with(scale=lambda D, C: math.sqrt(C))
    ),
    "the scores are multiplied by sqrt(D); they are divided": attention_with(scale=lambda D, C: 1 / math.sqrt(D)),
    "the scores are divided by sqrt(3C); it is sqrt(D)": attention_with(scale=lambda D, C: math.sqrt(3 * C)),
    "the scores are divided by D^(1/4); it is sqrt(D)": attention_with(scale=lambda D, C: D**0.25),
    "the scores are divided by sqrt(n_head); it is sqrt(D)": attention_with(scale=lambda D, C: math.sqrt(C // D)),
    "the weights are divided by sqrt(D) after the softmax; the scores are, before": (
        lambda qkv, n_head: (
            attention_with(scale=lambda D, C: 1.0)(qkv, n_head) / math.sqrt(qkv.shape[-1] // 3 // n_head)
        )
    ),
    "the weights are transposed when they meet the values": (
        attention_with(mean=lambda weights, v: weights.transpose(-2, -1) @ v)
    ),
    "the backward of the softmax lacks a term: dS = P * (dP - sum(P * dP)), not P * dP": (
        attention_with(weigh=without_row_sum)
    ),
    "dq lacks the factor 1 / sqrt(D)": gradients_of(q_way=scaled_gradient),
    "dk lacks the factor 1 / sqrt(D)": gradients_of(k_way=scaled_gradient),
    "dq and dk lack the factor 1 / sqrt(D)": gradients_of(q_way=scaled_gradient, k_way=scaled_gradient),
    "dq and dk are exchanged": attention_with(exchanged),
    "dv is P @ dout; it is P^T @ dout: what key j gets from the queries i": attention_with(mean=transposed_weights),
    "dq is zero": gradients_of(q_way=lambda q: q.detach()),
    "dk is zero": gradients_of(k_way=lambda k: k.detach()),
    "dv is zero": gradients_of(v_way=lambda v: v.detach()),
    "dq and dk are zero: no gradient goes through the softmax": (
        gradients_of(q_way=lambda q: q.detach(), k_way=lambda k: k.detach())
    ),
    "dqkv has the wrong sign": lambda qkv, n_head: gpt.attention(slope(qkv, -1), n_head),
}

# ----------------------------------------------------------------------------------------------------- lm_loss


def losses(hidden, weight, targets, last=False):
    """nll at each position, and which positions count."""
    keep = targets != -1
    logits = hidden @ weight.T
    index = torch.where(keep, targets, weight.shape[0] - 1 if last else 0)
    nll = logits.logsumexp(-1) - logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return nll, keep


def mean_with(divide, last=False):
    """The loss whose mean is divide(nll, keep). A target of -1 is taken for token 0, or for the last one."""
    return lambda hidden, weight, targets: divide(*losses(hidden, weight, targets, last))


def kept(nll, keep):
    return torch.where(keep, nll, 0.0)


def of_logits(change_logits):
    """The loss of other logits."""

    def lm_loss(hidden, weight, targets):
        keep = targets != -1
        logits = change_logits(hidden @ weight.T)
        target = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
        return kept(logits.logsumexp(-1) - target, keep).sum() / keep.sum()

    return lm_loss


def of_targets(change_targets):
    return lambda hidden, weight, targets: gpt.lm_loss(hidden, weight, change_targets(targets))


def shifted(by):
    def shift(targets):
        rolled = targets.roll(by, -1)
        rolled[..., -1 if by < 0 else 0] = -1
        return rolled

    return shift


def times(factor):
    return lambda hidden, weight, targets: factor(hidden, weight, targets) * gpt.lm_loss(hidden, weight, targets)


def backward_times(factor):
    """The right value; the gradient comes out times factor(targets)."""
    return lambda hidden, weight, targets: slope(gpt.lm_loss(hidden, weight, targets), factor(targets))


def softmax_alone(hidden, weight, targets):
    """The right value; dlogits = softmax(logits) / count, without the 1 at the target."""
    keep = targets != -1
    total = kept((hidden @ weight.T).logsumexp(-1), keep).sum() / keep.sum()
    return gpt.lm_loss(hidden, weight, targets).detach() + change(total)


def softmax_nowhere(hidden, weight, targets):
    """The right value; dlogits = -1 at the target / count, without the softmax."""
    keep = targets != -1
    logits = hidden @ weight.T
    target = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    return gpt.lm_loss(hidden, weight, targets).detach() - change(kept(target, keep).sum() / keep.sum())


def gradients_at_ignored(hidden, weight, targets):
    """The right value; positions with -1 get a gradient as if their target were token 0."""
    nll, keep = losses(hidden, weight, targets)
    return gpt.lm_loss(hidden, weight, targets).detach() + change(nll.sum() / keep.sum())


def gradients_at_ignored_softmax(hidden, weight, targets):
    """The right value; positions with -1 get the softmax as their gradient, no 1 being subtracted anywhere."""
    nll, keep = losses(hidden, weight, targets)
    lse = (hidden @ weight.T).logsumexp(-1)
    return gpt.lm_loss(hidden, weight, targets).detach() + change(torch.where(keep, nll, lse).sum() / keep.sum())


LM_LOSS = {
    "the mean is over all positions; those with target -1 don't count: divide by (targets != -1).sum()": (
        mean_with(lambda nll, keep: kept(nll, keep).sum() / keep.numel())
    ),
    "the losses are summed; it is their mean": mean_with(lambda nll, keep: kept(nll, keep).sum()),
    "the sum is divided by B; it is divided by the number of targets that count": (
        mean_with(lambda nll, keep: kept(nll, keep).sum() / keep.shape[0])
    ),
    "the sum is divided by T; it is divided by the number of targets that count": (
        mean_with(lambda nll, keep: kept(nll, keep).sum() / keep.shape[-1])
    ),
    "this is the mean of each sequence's mean; it is the mean over all targets that count": (
        mean_with(lambda nll, keep: (kept(nll, keep).sum(-1) / keep.sum(-1)).mean())
    ),
    "a target of -1 is taken for the last token (a negative index counts from the end); it does not count": (
        mean_with(lambda nll, keep: nll.mean(), last=True)
    ),
    "a target of -1 is taken for the last token in the sum; it does not count": (
        mean_with(lambda nll, keep: nll.sum() / keep.sum(), last=True)
    ),
    "a target of -1 is taken for token 0; it does not count": mean_with(lambda nll, keep: nll.mean()),
    "a target of -1 is taken for token 0 in the sum; it does not count": (
        mean_with(lambda nll, keep: nll.sum() / keep.sum())
    ),
    "the loss is in bits (log2); it is in nats (log)": times(lambda *_: 1 / math.log(2)),
    "the loss is in powers of ten (log10); it is in nats (log)": times(lambda *_: 1 / math.log(10)),
    "the sign is wrong: the loss is -log p": times(lambda *_: -1.0),
    "the loss is divided by V, too": times(lambda hidden, weight, targets: 1 / weight.shape[0]),
    "the softmax is applied twice: the loss takes logits, not probabilities": (
        of_logits(lambda logits: torch.softmax(logits, -1))
    ),
    "the logits are divided by sqrt(C)": lambda hidden, weight, targets: gpt.lm_loss(
        hidden / math.sqrt(hidden.shape[-1]), weight, targets
    ),
    "the softmax runs over the positions; it runs over the tokens": (
        lambda hidden, weight, targets: loss_over_positions(hidden, weight, targets)
    ),
    "the softmax runs over the positions (dim=1); it runs over the tokens (dim=-1)": (
        lambda hidden, weight, targets: loss_over_positions(hidden, weight, targets, False)
    ),
    "targets are shifted by one to the left: they come shifted already": of_targets(shifted(-1)),
    "targets are shifted by one to the right: they come shifted already": of_targets(shifted(1)),
    "the log of the sum is missing: the loss is -logit[target]": (
        lambda hidden, weight, targets: target_alone(hidden, weight, targets)
    ),
    "the largest logit stands for log(sum(exp(logit)))": (
        lambda hidden, weight, targets: target_alone(hidden, weight, targets) + largest_alone(hidden, weight, targets)
    ),
    "the largest logit is subtracted and not added again": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden, weight, targets) - largest_alone(hidden, weight, targets)
    ),
    "this is the mean of p(target); it is the mean of -log p(target)": (
        mean_with(lambda nll, keep: kept(torch.exp(-nll), keep).sum() / keep.sum())
    ),
    "this is -log of the mean probability; it is the mean of -log p": (
        mean_with(lambda nll, keep: -torch.log(kept(torch.exp(-nll), keep).sum() / keep.sum()))
    ),
    "this is the perplexity, exp(loss); it is the loss itself": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden, weight, targets).exp()
    ),
    "the gradients are those of the sum; the loss is a mean: divide by the number of targets that count": (
        backward_times(lambda targets: (targets != -1).sum())
    ),
    "the gradients are divided by all positions; those with target -1 don't count": (
        backward_times(lambda targets: (targets != -1).sum() / targets.numel())
    ),
    "the gradients have the wrong sign": backward_times(lambda targets: -1.0),
    "dlogits lacks the 1 that is subtracted at the target: it is softmax - one-hot": softmax_alone,
    "dlogits lacks the softmax: it is softmax - one-hot": softmax_nowhere,
    "positions with target -1 get a gradient, as if it were token 0; theirs is zero": gradients_at_ignored,
    "positions with target -1 get a gradient, the softmax; theirs is zero": gradients_at_ignored_softmax,
    "dweight is zero: no gradient goes back to the weight": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden, weight.detach(), targets)
    ),
    "dhidden is zero: no gradient goes back to hidden": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden.detach(), weight, targets)
    ),
}


def loss_over_positions(hidden, weight, targets, all_rows=True):
    keep = targets != -1
    logits = hidden @ weight.T
    rows = logits.flatten(0, -2) if all_rows else logits
    target = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    sums = rows.logsumexp(-2, keepdim=True)
    sums = sums.expand(rows.shape).reshape(logits.shape)
    sums = sums.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    return kept(sums - target, keep).sum() / keep.sum()


def target_alone(hidden, weight, targets):
    keep = targets != -1
    target = (hidden @ weight.T).gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    return -kept(target, keep).sum() / keep.sum()


def largest_alone(hidden, weight, targets):
    keep = targets != -1
    return kept((hidden @ weight.T).amax(-1), keep).sum() / keep.sum()


WRONG = {
    "linear": LINEAR,
    "gelu": GELU,
    "layer_norm": LAYER_NORM,
    "linear_gelu": LINEAR_GELU,
    "attention": ATTENTION,
    "lm_loss": LM_LOSS,
}
