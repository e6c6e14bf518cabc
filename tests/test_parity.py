"""Outputs and gradients of every kernel against float64, by the rule of fastgpt/check.py."""

import itertools

import pytest
import torch

import fastgpt
import gpt
from fastgpt import check, ops
from fastgpt.bench import in_a_fresh_process

T_SIZES = (1, 2, 63, 65, 97, 128, 257)
C_SIZES = (48, 64, 768, 769, 1600)
D_SIZES = (8, 16, 48, 64, 80, 128)


def assert_parity(rows):
    bad = [
        f"{r.tensor} of {r.op} {r.shape}: error {r.kernel:.2e}, expected <= {r.bound:.2e}; rms {r.rms:.2f}, expected <= "
        f"{r.rms_bound:.2f}; {r.wrong}"
        for r in rows
        if not r.ok
    ]
    assert rows and not bad, "\n".join(bad)


@pytest.mark.parametrize("op, shape", [(op, shape) for op in check.CASES for shape in check.CASES[op]], ids=str)
def test_kernel_is_as_exact_as_the_formula(op, shape, isa):
    assert_parity(check.compare(op, shape))


@pytest.mark.parametrize("C", C_SIZES)
@pytest.mark.parametrize("T", T_SIZES)
@pytest.mark.parametrize("B", (0, 1))
def test_layer_norm_at_awkward_shapes(B, T, C):
    assert_parity(check.compare("layer_norm", (B, T, C), seed=T))


@pytest.mark.parametrize("D", D_SIZES)
@pytest.mark.parametrize("T", (*T_SIZES, 1000))
def test_attention_at_awkward_shapes(T, D):
    T = 500 if T == 1000 and D != 64 else T
    B = 3 if T < 128 else 1
    assert_parity(check.compare("attention", (B, T, 2, D), seed=T))


@pytest.mark.parametrize("C", (48, 769))
@pytest.mark.parametrize("V", (65, 257))
@pytest.mark.parametrize("T", (1, 63, 128))
def test_lm_loss_at_awkward_shapes(T, C, V):
    assert_parity(check.compare("lm_loss", (3, T, C, V), seed=T))


@pytest.mark.parametrize("T, D", [(1, 8), (65, 48), (257, 64)])
def test_attention_with_dropout_drops_the_same_weights(T, D, isa):
    assert_parity(check.compare("attention", (2, T, 2, D, 0.3)))


def test_dropout_mask_is_philox4x32_10():
    # the first known answer of Random123's test vectors: key 0, counter 0
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for share in (0.2, 0.4, 0.5, 0.61, 0.75, 0.88, 0.9):
        expected = [word >= round(share * 2**32) for word in words]
        assert gpt.dropout_mask(1, 1, 4, share, seed=0)[0, 0, 0].tolist() == expected


def test_dropout_drops_its_share_and_differs_by_seed():
    masks = [gpt.dropout_mask(2, 3, 64, 0.3, seed) for seed in (1, 2, 1 + 2**32)]
    for mask in masks:
        assert abs(mask.float().mean().item() - 0.7) < 0.02
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


SMALL_SHAPES = dict(
    layer_norm=(3, 11),
    gelu=(3, 5),
    linear=(33, 4, 5),
    linear_gelu=(33, 4, 5),
    attention=(2, 5, 2, 3),
    lm_loss=(2, 3, 4, 5),
)


@pytest.mark.parametrize("op", SMALL_SHAPES)
def test_gradcheck_in_float64(op, isa):
    shape = SMALL_SHAPES[op]
    inputs, options = check.make_inputs(op, shape)
    args = [x.double().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *a: getattr(fastgpt, op)(*a, **options), args)


def test_gradcheck_of_attention_with_dropout():
    qkv = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastgpt.attention(x, 2, 0.4, 7), (qkv,))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize(
    "op, args",
    [
        (ops._gelu.op, ((2, 3, 8),)),
        (ops._layer_norm.op, ((2, 3, 8), (8,), (8,), 1e-5)),
        (ops._linear.op, ((2, 3, 8), (5, 8), (5,))),
        (ops._linear.op, ((2, 3, 8), (5, 8), None)),
        (ops._linear_gelu.op, ((2, 3, 8), (5, 8), (5,), True)),
        (ops._linear_gelu.op, ((2, 3, 8), (5, 8), None, True)),
        (ops._lm_loss.op, ((2, 3, 8), (5, 8), torch.tensor([[0, 4, -1], [2, 2, 1]]), True, True)),
        (ops._attention.op, ((2, 5, 24), 2, 0.0, 0)),
        (ops._attention.op, ((2, 5, 24), 2, 0.25, 9)),
    ],
    ids=str,
)
def test_opcheck(op, args, dtype):
    args = [torch.randn(a, dtype=dtype, requires_grad=True) if isinstance(a, tuple) else a for a in args]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("op", SMALL_SHAPES)
def test_second_derivative_is_refused(op):
    inputs, options = check.make_inputs(op, SMALL_SHAPES[op])
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


@pytest.mark.parametrize("op", SMALL_SHAPES)
def test_backward_without_a_gradient_gives_none(op):
    inputs, options = check.make_inputs(op, SMALL_SHAPES[op])
    x = next(iter(inputs.values())).requires_grad_()
    out = NoGradient.apply(getattr(fastgpt, op)(**inputs, **options))
    (out.sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("op", SMALL_SHAPES)
def test_backward_makes_no_zeros(op):
    """What an op saves for its backward is an output of it, but gets no gradient of its own."""
    inputs, options = check.make_inputs(op, SMALL_SHAPES[op])
    next(iter(inputs.values())).requires_grad_()
    out = getattr(fastgpt, op)(**inputs, **options)
    with torch.profiler.profile() as profile:
        out.backward(torch.ones_like(out))
    assert not [event.key for event in profile.key_averages() if "zero" in event.key]


@pytest.mark.parametrize(
    "wanted", [c for n in (1, 2) for c in itertools.combinations(("x", "weight", "bias"), n)], ids=str
)
@pytest.mark.parametrize("op, shape", [("layer_norm", (5, 48)), ("linear", (40, 48, 7)), ("linear_gelu", (40, 48, 7))])
def test_gradients_of_some_inputs_only(op, shape, wanted):
    assert_parity(check.compare(op, shape, wanted=wanted))


def test_layer_norm_reads_strided_views_in_place():
    buffer = torch.randn(5, 7, 3, 64, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.ones(48), torch.zeros(48)
    for x in (buffer[:, :, 1, 8:56], buffer.transpose(0, 2)[..., :48], buffer[::2, 1:, :, 3:51], buffer[:, :1, 0, :48]):
        assert not x.is_contiguous()
        inputs = dict(x=x, weight=weight, bias=bias)
        assert_parity(check.compare("layer_norm", tuple(x.shape), inputs=inputs, options={}))
        out = fastgpt.layer_norm(**inputs)
        assert out.is_contiguous() and torch.equal(out, fastgpt.layer_norm(x.contiguous(), weight, bias))


def test_attention_reads_strided_views_in_place():
    buffer = torch.randn(4, 33, 200, generator=torch.Generator().manual_seed(0))
    for qkv in (buffer[::2, :, 5:149], buffer[:, 1::2, :144], buffer.transpose(0, 1)[:, :, 8:152]):
        args = dict(inputs=dict(qkv=qkv), options=dict(n_head=3))
        assert_parity(check.compare("attention", tuple(qkv.shape), **args))
        assert torch.equal(fastgpt.attention(qkv, 3), fastgpt.attention(qkv.contiguous(), 3))


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


def test_attention_does_not_overflow_with_large_scores(isa):
    generator = torch.Generator().manual_seed(0)
    for scale in (30.0, 1e4, 1e8):
        qkv = torch.randn(1, 130, 3 * 64, generator=generator)
        qkv[..., :128] *= scale  # scores up to scale^2: softmax picks one key
        args = dict(inputs=dict(qkv=qkv), options=dict(n_head=2))
        assert_parity(check.compare("attention", **args))
        results = check.evaluate(fastgpt.attention, args["inputs"], args["options"], torch.float32)
        assert all(x.isfinite().all() for x in results.values())


def test_attention_of_equal_scores_is_the_mean_so_far(isa):
    T, C = 150, 16
    v = torch.randn(1, T, C, generator=torch.Generator().manual_seed(0))
    inputs = dict(qkv=torch.cat((torch.zeros(1, T, 2 * C), v), -1))
    mean = v.double().cumsum(1) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(fastgpt.attention(**inputs, n_head=2).double(), mean, rtol=1e-5, atol=1e-5)
    assert_parity(check.compare("attention", inputs=inputs, options=dict(n_head=2)))


def test_attention_never_sees_the_future(isa):
    qkv = torch.randn(2, 200, 96, generator=torch.Generator().manual_seed(0))
    out = fastgpt.attention(qkv, 2)
    for t in (0, 63, 64, 95, 96, 150):
        changed = qkv.clone()
        changed[:, t + 1 :] *= 1e6
        assert torch.equal(fastgpt.attention(changed, 2)[:, : t + 1], out[:, : t + 1])


INF = float("inf")
NOT_FINITE = [
    (op, shape, name)
    for op, shape in dict(
        layer_norm=(3, 21), gelu=(3, 21), linear=(40, 21, 5), linear_gelu=(40, 21, 5), attention=(1, 70, 1, 8),
        lm_loss=(1, 7, 8, 11),
    ).items()
    for name in check.make_inputs(op, shape)[0]
]  # fmt: skip


@pytest.mark.parametrize("bad", (float("nan"), INF, -INF, 1e20, -1e20, 3e38, 1e-40))
@pytest.mark.parametrize("op, shape, name", NOT_FINITE, ids=str)
def test_nan_and_infinities_are_the_formulas_and_what_is_finite_is_true(op, shape, name, bad, isa):
    inputs, options = check.make_inputs(op, shape)
    x = inputs[name].view(-1)
    x[min(30, x.numel() - 3)] = bad
    assert_parity(check.compare(op, shape, inputs=inputs, options=options))


def test_nan_and_infinities_in_two_heads_of_three(isa):
    inputs, options = check.make_inputs("attention", (2, 130, 3, 16, 0.2))
    inputs["qkv"][0, 120, 20], inputs["qkv"][1, 5, 130] = INF, float("nan")
    assert_parity(check.compare("attention", inputs=inputs, options=options))


def test_gelu_and_layer_norm_do_not_overflow_where_the_formula_does(isa):
    x = torch.tensor([1e20, -1e20, 3e38, -3e38, 1e19, 3.0], requires_grad=True)
    fastgpt.gelu(x).sum().backward()
    three = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gpt.gelu(three), three)
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, expected.item()]), rtol=1e-6, atol=1e-30)
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


def test_lm_loss_skips_the_targets_that_are_minus_one():
    inputs, options = check.make_inputs("lm_loss", (2, 9, 16, 11))
    keep = options["targets"] != -1
    assert 0 < keep.sum() < keep.numel()
    some = {"hidden": inputs["hidden"][keep][None], "weight": inputs["weight"]}
    torch.testing.assert_close(
        fastgpt.lm_loss(**inputs, **options), gpt.lm_loss(**some, targets=options["targets"][keep][None])
    )


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


def test_gelu_far_out_and_in_strided_views(isa):
    x = torch.tensor([-1e30, -1e4, -88.0, -12.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 12.0, 88.0, 1e4, 1e30])
    assert_parity(check.compare("gelu", (13,), inputs=dict(x=x[1:-1]), options={}))
    assert fastgpt.gelu(x)[-1] == x[-1] and fastgpt.gelu(x)[0] == 0
    wide = torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(0))
    for view in (wide[::2, :, 3:36], wide.transpose(0, 1), wide[0, 0, 0]):
        assert_parity(check.compare("gelu", tuple(view.shape), inputs=dict(x=view), options={}))


def test_lm_loss_of_large_and_of_equal_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 9, 16, generator=generator) * 1e4, torch.randn(11, 16, generator=generator) * 1e4
    options = dict(targets=torch.randint(11, (1, 9), generator=generator))
    rows = check.compare("lm_loss", (1, 9, 16, 11), inputs=dict(hidden=hidden, weight=weight), options=options)
    assert_parity(rows)
    equal = fastgpt.lm_loss(torch.zeros(1, 9, 16), weight, **options)
    torch.testing.assert_close(equal, torch.tensor(11.0).log())


def test_lm_loss_reads_strided_targets():
    inputs, options = check.make_inputs("lm_loss", (2, 9, 16, 11))
    wide = torch.full((2, 12), -1)
    wide[:, 1:10] = options["targets"]
    assert torch.equal(fastgpt.lm_loss(**inputs, targets=wide[:, 1:10]), fastgpt.lm_loss(**inputs, **options))


@pytest.mark.parametrize("K, N", [(1, 1), (48, 769), (191, 383), (193, 385), (769, 48), (400, 1000)])
@pytest.mark.parametrize("rows", (32, 33, 65, 385))
def test_linear_at_awkward_shapes(rows, K, N):
    assert_parity(check.compare("linear", (rows, K, N)))


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


@pytest.mark.parametrize("seed", range(8))
def test_linear_over_seeds(seed, isa):
    assert_parity(check.compare("linear", (128, 768, 192), seed=seed))


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


def test_lm_loss_in_several_pieces(isa):
    """56 MiB hold the logits of 292 positions: of 580 in two pieces, and of their halves in one piece each."""
    inputs, options = check.make_inputs("lm_loss", (2, 290, 8, 50257))
    whole = check.evaluate(fastgpt.lm_loss, inputs, options, torch.float32)
    halves, counts = [], []
    for i in range(2):
        half = dict(hidden=inputs["hidden"][i : i + 1], weight=inputs["weight"])
        targets = options["targets"][i : i + 1]
        counts.append((targets != -1).sum() / (options["targets"] != -1).sum())
        halves.append(check.evaluate(fastgpt.lm_loss, half, dict(targets=targets), torch.float32))
    shares = [{name: x * n for name, x in half.items()} for half, n in zip(halves, counts, strict=True)]
    torch.testing.assert_close(whole["out"], shares[0]["out"] + shares[1]["out"], rtol=1e-6, atol=0)
    torch.testing.assert_close(whole["dweight"], shares[0]["dweight"] + shares[1]["dweight"], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(whole["dhidden"], torch.cat([x["dhidden"] for x in shares]), rtol=1e-5, atol=1e-9)


def test_lm_loss_of_a_scaled_loss_and_of_two_backwards():
    inputs, options = check.make_inputs("lm_loss", (2, 9, 16, 11))
    args = [x.requires_grad_() for x in inputs.values()]
    loss = fastgpt.lm_loss(*args, **options)
    once = torch.autograd.grad(loss, args, retain_graph=True)
    again = torch.autograd.grad(loss, args, retain_graph=True)
    (loss / 3).backward()
    for x, a, b in zip(args, once, again, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(x.grad, a / 3)


@pytest.mark.parametrize("op", SMALL_SHAPES)
@pytest.mark.parametrize("transform", (torch.func.grad, torch.func.vmap))
def test_torch_func_is_refused_in_a_sentence(op, transform):
    inputs, options = check.make_inputs(op, SMALL_SHAPES[op])
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


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",)], ids=str)
def test_lm_loss_gradients_of_some_inputs_only(wanted):
    assert_parity(check.compare("lm_loss", (2, 9, 16, 11), wanted=wanted))


def test_lm_loss_where_no_target_counts_is_nan_like_the_formula():
    inputs, options = check.make_inputs("lm_loss", (2, 9, 16, 11))
    none = torch.full_like(options["targets"], -1)
    assert fastgpt.lm_loss(**inputs, targets=none).isnan() and gpt.lm_loss(**inputs, targets=none).isnan()
    assert fastgpt.lm_loss(inputs["hidden"][:0], inputs["weight"], none[:0]).isnan()


def test_lm_loss_never_holds_all_logits():
    code = """
import torch, fastgpt
from fastgpt.bench import peak_memory
hidden, weight = torch.randn(1, 1024, 16, requires_grad=True), torch.randn(50257, 16, requires_grad=True)
fastgpt.lm_loss(hidden[:, :32], weight, torch.zeros(1, 32, dtype=torch.int64)).backward()
before = peak_memory()
fastgpt.lm_loss(hidden, weight, torch.zeros(1, 1024, dtype=torch.int64)).backward()
print(peak_memory() - before)
"""
    grown = float(in_a_fresh_process(code))
    assert 32 < grown < 64  # MiB; whole, the logits are 196


def test_attention_memory_grows_with_T_and_not_with_its_square():
    code = "from fastgpt.bench import attention_memory; print(attention_memory('kernel', {}))"
    short, long = (float(in_a_fresh_process(code.format(T))) for T in (2048, 8192))
    assert long < 5 * short
