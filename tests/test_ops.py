"""What holds for every op: parity, bits, NaN and infinities, and that torch can do with it what torch does with ops."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import TINY_SHAPES, assert_parity, assert_parity_on_every_isa, cases, slow

import fastgpt
import gpt
from fastgpt import check

# ----------------------------------------------------------------------------------------------------- parity


LARGEST = {op: max(shapes, key=math.prod) for op, shapes in check.CASES.items()}
EACH_CASE = [
    case
    for op, shapes in check.CASES.items()
    for shape in shapes
    for case in (slow((op, shape)) if shape == LARGEST[op] else [(op, shape)])
]


@pytest.mark.parametrize("op, shape", EACH_CASE, ids=str)
def test_kernel_is_as_exact_as_the_formula(op, shape, isa):
    assert_parity(check.compare(op, shape))


@pytest.mark.parametrize("op", check.CASES)
@given(data=st.data())
def test_parity_of_any_shape_strides_dtype_and_seed_on_every_isa(op, data):
    assert_parity_on_every_isa(*data.draw(cases(op)))


@pytest.mark.parametrize("op", TINY_SHAPES)
def test_gradcheck_in_float64(op, isa):
    inputs, options = check.make_inputs(op, TINY_SHAPES[op])
    args = [x.double().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *a: getattr(fastgpt, op)(*a, **options), args)


SOME_INPUTS = [
    (op, shape, wanted)
    for op, shape in dict(
        layer_norm=(5, 48), linear=(40, 48, 7), linear_gelu=(40, 48, 7), lm_loss=(2, 9, 16, 11)
    ).items()
    for names in [tuple(check.make_inputs(op, shape)[0])]
    for n in range(len(names))
    for wanted in itertools.combinations(names, n)
]  # fmt: skip


@pytest.mark.parametrize("op, shape, wanted", SOME_INPUTS, ids=str)
def test_gradients_of_some_inputs_only(op, shape, wanted):
    assert_parity(check.compare(op, shape, wanted=wanted))


NOT_FINITE = [
    (op, shape, name)
    for op, shape in dict(
        layer_norm=(3, 21), gelu=(3, 21), linear=(40, 21, 5), linear_gelu=(40, 21, 5), attention=(1, 70, 1, 8),
        lm_loss=(1, 7, 8, 11),
    ).items()
    for name in check.make_inputs(op, shape)[0]
]  # fmt: skip


@lru_cache(maxsize=len(NOT_FINITE) * 7)
def one_bad_value(op, shape, name, bad):
    inputs, options = check.make_inputs(op, shape)
    x = inputs[name].view(-1)
    x[min(30, x.numel() - 3)] = bad
    return inputs, options, check.find_truth(getattr(check.FORMULAS, op), inputs, options)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf"), 1e20, -1e20, 3e38, 1e-40))
@pytest.mark.parametrize("op, shape, name", NOT_FINITE, ids=str)
def test_nan_and_infinities_are_the_formulas_and_what_is_finite_is_true(op, shape, name, bad, isa):
    inputs, options, truth = one_bad_value(op, shape, name, bad)
    kernel, formula = (check.evaluate(getattr(ops, op), inputs, options, torch.float32) for ops in (fastgpt, gpt))
    assert_parity(check.compare_results(op, shape, truth, kernel, formula=lambda: formula))


# ------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    "op, shape",
    [
        ("layer_norm", (999, 768)),
        ("linear", (700, 300, 500)),
        ("linear_gelu", (700, 300, 500)),
        ("lm_loss", (2, 90, 32, 50257)),
        ("gelu", (99, 768)),
        ("attention", (2, 300, 3, 64)),
        ("attention", (1, 1100, 1, 64)),
    ],
)
def test_bits_do_not_depend_on_threads_or_runs(op, shape, threads, isa):
    inputs, options = check.make_inputs(op, shape)
    results = []
    for n in (1, 2, 2, 3, 5):
        threads(n)
        results.append(check.evaluate(getattr(fastgpt, op), inputs, options, torch.float32))
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("op, shape", [("linear", (700, 300, 500)), ("attention", (2, 300, 3, 64))])
def test_bits_do_not_depend_on_threads_where_a_value_is_infinite(op, shape, threads, isa):
    inputs, options = check.make_inputs(op, shape)
    x = next(iter(inputs.values()))
    x.view(-1)[x.numel() // 2] = float("inf")
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(getattr(fastgpt, op)(**inputs, **options).nan_to_num(1.0, 2.0, 3.0))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("n", (1, 2))
def test_two_python_threads_at_once_get_the_bits_of_one(n, threads, isa):
    """Every op meets itself and every other. What one call kept for itself in a place of the process would be mixed."""
    threads(n)
    work = [
        (op, *check.make_inputs(op, shape))
        for op, shape in (
            ("layer_norm", (300, 769)), ("gelu", (300, 769)), ("linear", (300, 200, 129)), ("lm_loss", (1, 200, 32, 1009)),
            ("linear_gelu", (300, 200, 129)), ("attention", (2, 200, 3, 48, 0.2)), ("attention", (1, 270, 2, 64)),
        )
    ]  # fmt: skip

    def results(op, inputs, options):
        return check.evaluate(getattr(fastgpt, op), inputs, options, torch.float32)

    expected = [results(*case) for case in work]
    barrier = threading.Barrier(2, timeout=60)

    def run(shift):
        assert torch.get_num_threads() == n
        different = set()
        for turn, i in itertools.product(range(2 * len(work)), range(len(work))):
            case = (i + shift * turn) % len(work)
            barrier.wait()
            got = results(*work[case])
            different |= {f"{work[case][0]}: {x}" for x in got if not torch.equal(got[x], expected[case][x])}
        return different

    with ThreadPoolExecutor(2) as pool:
        assert not set().union(*pool.map(run, (0, 1)))


# -------------------------------------------------------------------------------------------- autograd, torch


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize(
    "op, args",
    [
        ("gelu", ((2, 3, 8),)),
        ("layer_norm", ((2, 3, 8), (8,), (8,), 1e-5)),
        ("linear", ((2, 3, 8), (5, 8), (5,), False)),
        ("linear", ((2, 3, 8), (5, 8), None, False)),
        ("linear_gelu", ((2, 3, 8), (5, 8), (5,), False, True)),
        ("linear_gelu", ((2, 3, 8), (5, 8), None, False, True)),
        ("lm_loss", ((2, 3, 8), (5, 8), torch.tensor([[0, 4, -1], [2, 2, 1]]), False, True, True)),
        ("attention", ((2, 5, 24), 2, 0.0, 0, False)),
        ("attention", ((2, 5, 24), 2, 0.25, 9, False)),
    ],
    ids=str,
)
def test_opcheck(op, args, dtype):
    args = [torch.randn(a, dtype=dtype, requires_grad=True) if isinstance(a, tuple) else a for a in args]
    torch.library.opcheck(getattr(torch.ops.fastgpt, op).default, args)


@pytest.mark.parametrize("op", TINY_SHAPES)
def test_second_derivative_is_refused(op):
    inputs, options = check.make_inputs(op, TINY_SHAPES[op])
    x = next(iter(inputs.values()))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(getattr(fastgpt, op)(**inputs, **options).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastgpt.[a-z_]* has no second derivative"):
        grad.sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("op", TINY_SHAPES)
def test_backward_without_a_gradient_gives_none(op):
    inputs, options = check.make_inputs(op, TINY_SHAPES[op])
    x = next(iter(inputs.values())).requires_grad_()
    out = NoGradient.apply(getattr(fastgpt, op)(**inputs, **options))
    (out.sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("op", TINY_SHAPES)
def test_backward_makes_no_zeros(op):
    """What an op saves for its backward is an output of it, but gets no gradient of its own."""
    inputs, options = check.make_inputs(op, TINY_SHAPES[op])
    next(iter(inputs.values())).requires_grad_()
    out = getattr(fastgpt, op)(**inputs, **options)
    with torch.profiler.profile() as profile:
        out.backward(torch.ones_like(out))
    assert not [event.key for event in profile.key_averages() if "zero" in event.key]


def test_gradient_of_a_plain_sum_arrives_expanded():
    for op, shape in (("layer_norm", (6, 48)), ("gelu", (6, 48)), ("attention", (2, 7, 2, 8))):
        inputs, options = check.make_inputs(op, shape)
        grads = []
        for function in (getattr(gpt, op), getattr(fastgpt, op)):
            args = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            function(**args, **options).sum().backward()
            grads.append([x.grad for x in args.values()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", TINY_SHAPES)
@pytest.mark.parametrize("transform", (torch.func.grad, torch.func.vmap))
def test_torch_func_is_refused_in_a_sentence(op, transform):
    inputs, options = check.make_inputs(op, TINY_SHAPES[op])
    first, *others = inputs.values()
    first = first[None] if transform is torch.func.vmap else first
    with pytest.raises(NotImplementedError, match=f"fastgpt.{op} does not run inside torch.func's transforms"):
        transform(lambda x: getattr(fastgpt, op)(x, *others, **options).sum())(first)


@pytest.mark.parametrize("rows", (1, 5, 40))
def test_autocast_changes_nothing(rows):
    model = gpt.GPT(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=20), fastgpt)
    idx = torch.arange(rows)[None] % 20
    expected = model(idx), model.generate(idx, 3, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(idx), expected[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(model.generate(idx, 3, temperature=0), expected[1])
        loss = model.loss(idx, idx)
    loss.backward()
    assert loss.dtype is torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
