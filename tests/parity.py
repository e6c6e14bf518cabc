"""What the tests of all kernels share: the verdict of fastgpt check as an assertion, tiny shapes, and random cases."""

import math

import pytest
import torch
from hypothesis import strategies as st

import fastgpt
from fastgpt import check


def assert_parity(rows):
    bad = [
        f"{r.tensor} of {r.op} {r.shape}: error {r.kernel:.2e}, expected <= {r.bound:.2e}; rms {r.rms:.2f}, expected <= "
        f"{r.rms_bound:.2f}; {r.wrong}"
        for r in rows
        if not r.ok
    ]
    assert rows and not bad, "\n".join(bad)


def assert_parity_on_every_isa(op, inputs, options, dtype=torch.float32, layout=lambda dout: dout):
    """The same verdict on each instruction set. `layout` gives the gradient that arrives another place in memory."""

    def kernel(**args):
        out = getattr(fastgpt, op)(**args)
        out.register_hook(layout)
        return out

    formula, before = getattr(check.FORMULAS, op), fastgpt._kernels.isa()
    truth = check.find_truth(formula, inputs, options, dtype)
    shape = tuple(next(iter(inputs.values())).shape)
    try:
        for isa in fastgpt._kernels.isas():
            fastgpt._kernels.set_isa(isa)
            results = check.evaluate(kernel, inputs, options, dtype)
            assert_parity(check.compare_results(f"{op} on {isa}", shape, truth, results, dtype))
    finally:
        fastgpt._kernels.set_isa(before)


def slow(*values):
    """Parameters of a test, or tuples of them, that take seconds."""
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


T_SIZES = (1, 2, 63, 65, 97, 128, *slow(257))  # one, two, one off a block or a register, a prime, whole blocks

TINY_SHAPES = dict(
    layer_norm=(3, 11),
    gelu=(3, 5),
    linear=(33, 4, 5),
    linear_gelu=(33, 4, 5),
    attention=(2, 5, 2, 3),
    lm_loss=(2, 3, 4, 5),
)


# ----------------------------------------------------------------------------------------------- random cases


def sizes(most, least=1):
    """What is one, two, or near a register's or a block's edge comes often."""
    edges = [n for n in (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65) if least <= n <= most]
    return st.sampled_from(edges) | st.integers(least, most)


@st.composite
def layouts(draw, rank):
    """A function that copies a tensor of this rank to other places in memory; its last dimension stays in one piece."""
    order = draw(st.permutations(range(rank - 1)))
    steps = [draw(st.integers(1, 2)) for _ in order]
    before, after = draw(st.sampled_from(((0, 0), (0, 3), (5, 0), (1, 8))))

    def lay_out(x):
        leading = [x.shape[i] * step for i, step in zip(order, steps, strict=True)]
        memory = torch.full((*leading, before + x.shape[-1] + after), math.nan, dtype=x.dtype)  # a stray read shows
        inner = memory[tuple(slice(None, None, step) for step in steps)][..., before : before + x.shape[-1]]
        view = inner.permute(*(order.index(i) for i in range(rank - 1)), rank - 1)
        return view.copy_(x)

    return lay_out


SHAPES = dict(
    layer_norm=st.tuples(sizes(9), sizes(9), sizes(140)) | st.tuples(sizes(100), sizes(140)),
    gelu=st.tuples(sizes(9), sizes(9), sizes(140, 0)) | st.tuples(sizes(3000)),
    linear=st.tuples(sizes(4), sizes(20), sizes(100), sizes(100)) | st.tuples(sizes(70), sizes(70), sizes(70)),
    attention=st.tuples(sizes(3), sizes(70, 0), sizes(3), sizes(40))
    | st.tuples(st.just(1), sizes(40), st.just(1), sizes(600)),
    lm_loss=st.tuples(sizes(3), sizes(20), sizes(100), sizes(150)),
)
SHAPES["linear_gelu"] = SHAPES["linear"]


@st.composite
def cases(draw, op):
    """Arguments of assert_parity_on_every_isa: any shape, strides, dtype, scale and seed."""
    shape = draw(SHAPES[op])
    if len(shape) > 1 and draw(st.integers(0, 19)) == 19:
        shape = (0, *shape[1:])
    if op == "attention" and draw(st.booleans()):
        shape += (draw(st.sampled_from((0.1, 0.5, 0.9))),)
    inputs, options = check.make_inputs(op, shape, draw(st.integers(0, 2**32)))
    first = next(iter(inputs))
    if op in ("layer_norm", "gelu"):
        if draw(st.booleans()):
            inputs[first] = torch.full_like(inputs[first], 0.7)
        inputs[first] += draw(st.sampled_from((0.0, 100.0)))
    inputs[first] *= draw(st.sampled_from((1.0, 1e-3, 30.0)))
    for name in {"x", "qkv", "hidden", "weight"} & inputs.keys():
        if inputs[name].dim() > 1:
            inputs[name] = draw(layouts(inputs[name].dim()))(inputs[name])
    if op == "lm_loss":
        wide = torch.full((shape[0], shape[1] + 3), -1)
        options["targets"] = wide[:, 1 : shape[1] + 1].copy_(options["targets"])
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    dout_layout = (lambda dout: dout) if op == "lm_loss" else draw(layouts(inputs[first].dim()))
    return op, inputs, options, dtype, dout_layout
