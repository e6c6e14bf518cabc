"""fastgpt.bfloat16: as exact as the formula whose products round their operands to bfloat16, and refused elsewhere."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import T_SIZES, TINY_SHAPES, assert_parity, cases, slow
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt.train
import gpt
from fastgpt import _kernels, bfloat16, check
from fastgpt.rounding import PRODUCTS

OPS = ("linear", "linear_gelu", "attention", "lm_loss")


def isas_with_bfloat16():
    before, found = _kernels.isa(), {True: [], False: []}
    for isa in _kernels.isas():
        _kernels.set_isa(isa)
        found[_kernels.has_bfloat16()].append(isa)
    _kernels.set_isa(before)
    return found[True], found[False]


WITH, WITHOUT = isas_with_bfloat16()
NONE_HERE = pytest.param(None, marks=pytest.mark.skip("this processor has no AVX-512 BF16, AMX or ARM BF16"))


def set_isa_for_a_test(request):
    before = _kernels.isa()
    _kernels.set_isa(request.param)
    yield request.param
    _kernels.set_isa(before)


@pytest.fixture(params=WITH or [NONE_HERE])
def isa(request):
    """Each instruction set with bfloat16 products."""
    yield from set_isa_for_a_test(request)


@pytest.fixture(params=WITHOUT or [pytest.param(None, marks=pytest.mark.skip("every instruction set has bfloat16"))])
def isa_without(request):
    yield from set_isa_for_a_test(request)


class InBFloat16(TorchDispatchMode):
    """Inside it, matrix products see their operands rounded to bfloat16; sums and results stay as they are."""

    def __init__(self, rounded=lambda x: x.bfloat16().to(x.dtype), result=lambda x: x):
        super().__init__()
        self.rounded, self.result = rounded, result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        return self.result(func(*map(self.rounded, args[:2]), *args[2:], **(kwargs or {})))


def formula_in_bfloat16(op, inputs, options, mode=None, seed=1):
    formula = getattr(check.FORMULAS, op)
    return check.evaluate(formula, inputs, options, torch.float32, arithmetic=mode or InBFloat16())


def compare(op, shape=None, **args):
    return check.compare(op, shape, in_bfloat16=True, **args)


def caught(rows):
    return [r.tensor for r in rows if not r.ok]


# ----------------------------------------------------------------------------------------------------- parity


CASES = [(op, shape) for op in OPS for shape in check.CASES[op] if shape != (128, 768, 2304)]
QUICK = [case for case in CASES if math.prod(case[1]) < 100_000]


@pytest.mark.parametrize("op, shape", [*QUICK, *slow(*(case for case in CASES if case not in QUICK))], ids=str)
def test_kernel_is_as_exact_as_the_formula_with_rounded_operands(op, shape, isa):
    assert_parity(compare(op, shape))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_parity_of_any_shape_strides_and_seed(op, data):
    op, inputs, options, _, layout = data.draw(cases(op))
    truth = check.find_truth(getattr(check.FORMULAS, op), inputs, options, in_bfloat16=True)
    before = _kernels.isa()

    def kernel(**args):
        out = getattr(bfloat16, op)(**args)
        out.register_hook(layout)
        return out

    for isa in WITH:
        _kernels.set_isa(isa)
        results = check.evaluate(kernel, inputs, options, torch.float32)
        formula = lambda: formula_in_bfloat16(op, inputs, options)  # noqa: E731
        rows = check.compare_results(f"{op} on {isa}", (), truth, results, formula=formula)
        _kernels.set_isa(before)
        assert_parity(rows)


@pytest.mark.parametrize("D", (5, 64, *slow(16, 80)))
@pytest.mark.parametrize("T", T_SIZES)
def test_attention_at_awkward_shapes(T, D, isa):
    assert_parity(compare("attention", (2, T, 2, D), seed=T))


@pytest.mark.parametrize("T, D", [(1, 8), (65, 48), (130, 64)])
def test_attention_with_dropout_drops_the_same_weights(T, D, isa):
    assert_parity(compare("attention", (2, T, 2, D, 0.3)))


@pytest.mark.parametrize("scale", (30.0, 1e4))
def test_gradients_vanish_where_softmax_picks_one_key(scale, isa):
    """There dP and delta are equal, and large beside dS: they must err alike."""
    qkv = torch.randn(1, 130, 3 * 64, generator=torch.Generator().manual_seed(0))
    qkv[..., :128] *= scale
    assert_parity(compare("attention", inputs=dict(qkv=qkv), options=dict(n_head=2)))


@pytest.mark.parametrize("rows", (1, 5, 31, 33))
@pytest.mark.parametrize("K, N", [(1, 1), (47, 50), *slow((1025, 97))])
def test_linear_of_few_rows_and_odd_sizes(rows, K, N, isa):
    assert_parity(compare("linear", (rows, K, N)))


def test_linear_without_bias_and_of_strided_views(isa):
    generator = torch.Generator().manual_seed(0)
    wide, weights = torch.randn(9, 7, 3, 64, generator=generator), torch.randn(30, 3, 64, generator=generator)
    for x in (wide[:, :, 1, 8:55], wide.transpose(0, 2)[..., :47], wide[::2, 1:, :, 3:50]):
        inputs = dict(x=x, weight=weights[:, 1, 5:52])
        assert_parity(compare("linear", inputs=inputs, options={}))
        assert_parity(compare("linear_gelu", inputs=inputs, options={}))


def test_lm_loss_in_several_pieces(isa):
    """580 positions in two, their halves in one piece each. Twice the targets halve a gradient: rounding is the same."""
    inputs, _ = check.make_inputs("lm_loss", (2, 290, 8, 50257))
    targets = torch.randint(50257, (2, 290), generator=torch.Generator().manual_seed(0))
    whole = check.evaluate(bfloat16.lm_loss, inputs, dict(targets=targets), torch.float32)
    halves = [
        check.evaluate(
            bfloat16.lm_loss, inputs | dict(hidden=inputs["hidden"][i]), dict(targets=targets[i]), torch.float32
        )
        for i in range(2)
    ]
    torch.testing.assert_close(whole["out"], (halves[0]["out"] + halves[1]["out"]) / 2, rtol=1e-6, atol=0)
    for name, join in (("dhidden", torch.stack), ("dweight", sum)):
        torch.testing.assert_close(whole[name], join([half[name] for half in halves]) / 2, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_the_formula_with_rounded_operands_is_not_caught(op):
    """Without the kernel, on every processor: the bound holds what it speaks of."""
    for shape in check.CASES[op][:5]:
        inputs, options = check.make_inputs(op, shape)
        truth = check.find_truth(getattr(check.FORMULAS, op), inputs, options, in_bfloat16=True)
        assert_parity(check.compare_results(op, shape, truth, formula_in_bfloat16(op, inputs, options)))


@pytest.mark.slow
def test_model_is_as_exact_as_the_formulas_with_rounded_operands(isa, small):
    assert_parity(check.compare_models(small, in_bfloat16=True))


# --------------------------------------------------------------------------------------------- NaN, infinities


NOT_FINITE = [
    (op, shape, name)
    for op, shape in dict(linear=(40, 21, 5), linear_gelu=(40, 21, 5), attention=(1, 70, 1, 8), lm_loss=(1, 7, 8, 11)).items()
    for name in check.make_inputs(op, shape)[0]
]  # fmt: skip


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf"), 1e20, 3.3e38, 1e-40))
@pytest.mark.parametrize("op, shape, name", NOT_FINITE, ids=str)
def test_nan_and_infinities_are_the_formulas_and_what_is_finite_is_true(op, shape, name, bad, isa):
    inputs, options = check.make_inputs(op, shape)
    x = inputs[name].view(-1)
    x[min(30, x.numel() - 3)] = bad
    truth = check.find_truth(getattr(check.FORMULAS, op), inputs, options, in_bfloat16=True)
    formula = formula_in_bfloat16(op, inputs, options)
    kernel = check.evaluate(getattr(bfloat16, op), inputs, options, torch.float32)
    assert_parity(check.compare_results(op, shape, truth, kernel, formula=lambda: formula))


def test_rounding_is_to_nearest_and_to_even_for_every_exponent(isa):
    """Products with 1 show what the kernel made of a value: all 2^16 bfloat16, halves between them, their neighbours."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    x = torch.cat([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    expected = x.bfloat16().float()
    expected[expected.abs() < 2.0**-126] = 0.0
    x[x.isfinite() & expected.isinf()] = 1.0  # beyond the largest bfloat16: AMX leaves those to float32
    expected[x == 1.0] = 1.0
    for got in (
        bfloat16.linear(x[:, None], torch.ones(1, 1)),
        bfloat16.linear(torch.ones(1, 1), x[:, None]).T,
        bfloat16.linear(torch.stack((torch.zeros_like(x), x), 1), torch.ones(1, 2)),
    ):
        torch.testing.assert_close(got[:, 0] + 0.0, expected + 0.0, rtol=0, atol=2.0**-126, equal_nan=True)


# -------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    "op, shape",
    [
        ("linear", (700, 300, 500)),
        ("linear_gelu", (300, 1100, 200)),
        ("lm_loss", (2, 90, 32, 5025)),
        ("attention", (2, 300, 3, 64, 0.1)),
        ("attention", (1, 600, 1, 64)),
    ],
)
def test_bits_do_not_depend_on_threads_or_runs(op, shape, threads, isa):
    inputs, options = check.make_inputs(op, shape)
    results = []
    for n in (1, 2, 2, 3):
        threads(n)
        results.append(check.evaluate(getattr(bfloat16, op), inputs, options, torch.float32))
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


def test_lm_loss_in_two_pieces_is_the_mean_of_both(isa):
    """112 MiB hold the logits of 584 positions. The same 384 twice: half the gradients, which rounds nothing."""
    inputs, _ = check.make_inputs("lm_loss", (1, 384, 8, 50257))
    targets = torch.arange(384)[None]
    once = check.evaluate(bfloat16.lm_loss, inputs, dict(targets=targets), torch.float32)
    twice = inputs | dict(hidden=torch.cat([inputs["hidden"]] * 2, 1))
    both = check.evaluate(bfloat16.lm_loss, twice, dict(targets=torch.cat([targets] * 2, 1)), torch.float32)
    assert torch.equal(both["out"], once["out"]) and torch.equal(both["dweight"], once["dweight"])
    assert torch.equal(both["dhidden"], torch.cat([once["dhidden"]] * 2, 1) / 2)


def test_float32_products_stay_float32_beside_them(isa):
    inputs, options = check.make_inputs("linear", (65, 64, 48))
    before = fastgpt.linear(**inputs)
    rounded = bfloat16.linear(**inputs)
    assert torch.equal(fastgpt.linear(**inputs), before) and not torch.equal(rounded, before)
    assert rounded.dtype is torch.float32


# ------------------------------------------------------------------------------------------- what torch does


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, isa):
    inputs, options = check.make_inputs(op, TINY_SHAPES[op])
    args = [*(x.requires_grad_() for x in inputs.values()), *options.values()]
    args += [0.0, 0] if op == "attention" else []
    args += [True] + [True] * dict(linear_gelu=1, lm_loss=2).get(op, 0)
    torch.library.opcheck(getattr(torch.ops.fastgpt, op).default, args)


@pytest.mark.slow
def test_torch_compile_gives_the_same_loss_and_gradients(isa, small):
    model = gpt.GPT(small, bfloat16)
    tokens = torch.randint(small.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for loss in (model.loss, torch.compile(model.loss)):
        model.zero_grad()
        value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_model_learns_and_generates_with_it(isa, small):
    torch.manual_seed(0)
    model = gpt.GPT(small, bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    tokens = torch.arange(41)[None] % 7
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    assert model.generate(tokens[:, :8], 6, temperature=0)[0, 8:].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_keeps_its_dtype_unless_another_is_typed(isa, data, tmp_path, capsys):
    def resumed(out, *more):
        out = str(tmp_path / out)
        size = ["--n-layer", "1", "--n-embd", "32", "--block-size", "16"]
        fastgpt.train.main(
            ["--out", out, "--data", data, *size, "--steps", "2", "--sample", "1", "--dtype", "bfloat16"]
        )
        capsys.readouterr()
        fastgpt.train.main(["--out", out, "--resume", "--steps", "4", *more])
        return gpt.load_tensors(os.path.join(out, "model.safetensors"))[0], capsys.readouterr().out

    (silent, said), (typed, _), (other, said_of_other) = (
        resumed("silent"),
        resumed("typed", "--dtype", "bfloat16"),
        resumed("other", "--dtype", "float32"),
    )
    assert "may differ" not in said and "may differ" in said_of_other
    assert all(torch.equal(x, typed[name]) for name, x in silent.items())
    assert any(not torch.equal(x, other[name]) for name, x in silent.items())


def test_a_second_derivative_and_float64_are_refused(isa):
    x = torch.randn(40, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(bfloat16.linear(x, torch.randn(3, 8)).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastgpt.linear has no second derivative"):
        grad.sum().backward()
    with pytest.raises(TypeError, match=r"linear: x has dtype float64, expected float32 \(bfloat16 products\)"):
        bfloat16.linear(x.double(), torch.randn(3, 8).double())


# ----------------------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize("rows", (1, 40))
@pytest.mark.parametrize("op", OPS)
def test_refused_in_words_where_there_is_no_instruction_for_it(op, rows, isa_without):
    shape = dict(linear=(rows, 4, 5), linear_gelu=(rows, 4, 5), attention=(1, rows, 2, 3), lm_loss=(1, rows, 4, 5))[op]
    inputs, options = check.make_inputs(op, shape)
    for want in (False, True):
        args = {name: x.requires_grad_(want) for name, x in inputs.items()}
        message = f"{op}: bfloat16 products need AVX-512 BF16, AMX or ARM's BF16; in use is {isa_without}, and this"
        with pytest.raises(ValueError, match=message):
            getattr(bfloat16, op)(**args, **options)


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in _kernels.isas(), reason="no second instruction set that lacks bfloat16")
@pytest.mark.parametrize(
    "command", (["train", "--dtype", "bfloat16", "--steps", "1"], *slow(["info"], ["check", "--quick"]))
)
def test_commands_say_that_there_are_none(command, tmp_path):
    if command[0] == "train":
        command = [*command, "--out", str(tmp_path / "out")]
    run = [sys.executable, "-m", "fastgpt", *command]
    environment = os.environ | {"FASTGPT_ISA": "avx2", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    if command[0] == "train":
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
        assert done.stderr.startswith("fastgpt train: error: --dtype bfloat16: bfloat16 products need AVX-512 BF16")
    else:
        assert done.returncode == 0 and "bfloat16 products: none on avx2" in done.stdout


# ---------------------------------------------------------------------------------------------- planted faults


def truncated(x):
    return (x.view(torch.int32) & -65536).view(torch.float32)


def one_element_off(x):
    flat = x.view(-1)
    flat[flat.abs().argsort()[flat.numel() * 3 // 4]] *= 1.1
    return x


def kernel_in(mode):
    """gpt.py's formula in that arithmetic, in the kernel's place."""

    def kernel(op):
        return lambda **args: _Within.apply(mode, op, list(args), *args.values())

    return kernel


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode, op, names, *values):
        ctx.mode, ctx.op, ctx.names, ctx.values = mode, op, names, values
        with mode():
            return getattr(check.FORMULAS, op)(**dict(zip(names, values, strict=True)))

    @staticmethod
    def backward(ctx, dout):
        values = [x.detach().requires_grad_() if _is_float(x) else x for x in ctx.values]
        with torch.enable_grad(), ctx.mode():
            out = getattr(check.FORMULAS, ctx.op)(**dict(zip(ctx.names, values, strict=True)))
            grads = iter(torch.autograd.grad(out, [x for x in values if _is_float(x)], dout))
        return None, None, None, *(next(grads) if _is_float(x) else None for x in values)


def _is_float(x):
    return torch.is_tensor(x) and x.is_floating_point()


SHAPES = dict(linear=(65, 97, 48), linear_gelu=(65, 97, 48), attention=(1, 97, 2, 64), lm_loss=(2, 65, 64, 257))
FAULTS = {
    "operands cut off instead of rounded": lambda: InBFloat16(rounded=truncated),
    "a bit of mantissa less": lambda: InBFloat16(rounded=lambda x: ((x.view(torch.int32) + 0x10000) & -131072).view(torch.float32)),
    "one element of each product off by a tenth": lambda: InBFloat16(result=one_element_off),
    "the last k, alone in its pair, is lost": lambda: InBFloat16(rounded=lambda x: x * (torch.arange(x.shape[-1]) != 96)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", OPS)
def test_fault_in_an_op_is_caught(op, fault):
    assert caught(compare(op, SHAPES[op], kernel=kernel_in(FAULTS[fault])(op)))


@pytest.mark.parametrize("op", OPS)
def test_without_its_fault_a_mutant_is_not_caught(op):
    assert not caught(compare(op, SHAPES[op], kernel=kernel_in(InBFloat16)(op)))


def test_sums_carried_in_bfloat16_are_caught():
    def linear(x, weight, bias):
        y = torch.zeros(x.shape[0], weight.shape[0])
        for k in range(0, x.shape[1], 2):
            y = (y + x[:, k : k + 2] @ weight[:, k : k + 2].T).bfloat16().float()
        return y + bias

    assert "out" in caught(compare("linear", (65, 97, 48), kernel=linear))


@pytest.mark.parametrize("op", ("layer_norm", "gelu"))
def test_what_is_no_product_is_held_to_float32(op):
    kernel = lambda **args: getattr(gpt, op)(**{name: x.bfloat16() for name, x in args.items()}).float()  # noqa: E731
    assert caught(compare(op, (65, 48), kernel=kernel))
    assert getattr(bfloat16, op) is getattr(fastgpt, op)
