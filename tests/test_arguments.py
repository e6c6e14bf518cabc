"""Bad input: an error that names the argument, what came and what was expected. Never a crash, never a copy."""

import numpy as np
import pytest
import torch

import fastgpt
import gpt
from fastgpt import _kernels

x, w, b = torch.randn(4, 8), torch.randn(8), torch.randn(8)
qkv = torch.randn(2, 5, 24)
many = torch.randn(50, 8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fastgpt.layer_norm(x.half(), w, b), TypeError, "layer_norm: x has dtype float16, expected float32"),
        (lambda: fastgpt.layer_norm(x.long(), w, b), TypeError, "layer_norm: x has dtype int64"),
        (lambda: fastgpt.layer_norm(x, w.double(), b), TypeError, "layer_norm: weight has dtype float64, expected float32"),
        (lambda: fastgpt.layer_norm(x.double(), w, b), TypeError, "layer_norm: weight has dtype float32, expected float64"),
        (lambda: fastgpt.layer_norm(x.numpy(), w, b), TypeError, "layer_norm: x is ndarray, expected a tensor"),
        (lambda: fastgpt.layer_norm(x, None, b), TypeError, "layer_norm: weight is NoneType, expected a tensor"),
        (lambda: fastgpt.layer_norm(x.to_sparse(), w, b), ValueError, "layer_norm: x is a torch.sparse_coo tensor"),
        (lambda: fastgpt.layer_norm(torch.tensor(1.0), w, b), ValueError, r"layer_norm: x has shape \(\), expected shape \(..., C\)"),
        (lambda: fastgpt.layer_norm(x, w[:7], b), ValueError, r"layer_norm: weight has shape \(7,\), expected \(8,\)"),
        (lambda: fastgpt.layer_norm(x, w, b[None]), ValueError, r"layer_norm: bias has shape \(1, 8\), expected \(8,\)"),
        (lambda: fastgpt.layer_norm(x[:, :0], w[:0], b[:0]), ValueError, r"layer_norm: x has shape \(4, 0\), expected at least one"),
        (lambda: fastgpt.layer_norm(x.T, w[:4], b[:4]), ValueError, "layer_norm: x has stride 8 in its last dimension, expected stride 1"),
        (lambda: fastgpt.layer_norm(x[:, ::2], w[:4], b[:4]), ValueError, "layer_norm: x has stride 2 in its last"),
        (lambda: fastgpt.layer_norm(x, torch.randn(16)[::2], b), ValueError, "layer_norm: weight is not contiguous"),
        (lambda: fastgpt.layer_norm(x, w, b, eps=-1.0), ValueError, "layer_norm: eps is -1"),
        (lambda: fastgpt.attention(qkv.bfloat16(), 2), TypeError, "attention: qkv has dtype bfloat16"),
        (lambda: fastgpt.attention(qkv[0], 2), ValueError, r"attention: qkv has shape \(5, 24\), expected shape \(B, T, 3C\)"),
        (lambda: fastgpt.attention(torch.randn(1, 2, 2305), 12), ValueError, r"attention: qkv has 2305 channels, not a multiple of 3\*n_head=36"),
        (lambda: fastgpt.attention(qkv, 5), ValueError, r"attention: qkv has 24 channels, not a multiple of 3\*n_head=15"),
        (lambda: fastgpt.attention(qkv, 0), ValueError, "attention: n_head is 0, expected 1 or more"),
        (lambda: fastgpt.attention(qkv, -3), ValueError, "attention: n_head is -3"),
        (lambda: fastgpt.attention(qkv[..., :0], 2), ValueError, r"attention: qkv has shape \(2, 5, 0\), expected at least one channel"),
        (lambda: fastgpt.attention(qkv.transpose(1, 2), 1), ValueError, "attention: qkv has 5 channels"),
        (lambda: fastgpt.attention(torch.randn(2, 24, 5).transpose(1, 2), 2), ValueError, "attention: qkv has stride 5 in its last dimension"),
        (lambda: fastgpt.attention(qkv, 2, dropout=1.0), ValueError, "attention: dropout is 1.0"),
        (lambda: fastgpt.attention(qkv, 2.0), TypeError, "attention: n_head is float, expected an int"),
        (lambda: fastgpt.attention(qkv, 2, 0.1, -1), ValueError, "attention: seed is -1, expected 0 <= seed"),
        (lambda: fastgpt.attention("qkv", 2), TypeError, "attention: qkv is str, expected a tensor"),
        (lambda: fastgpt.gelu([1.0]), TypeError, "gelu: x is list"),
        (lambda: fastgpt.linear(x.half(), w), TypeError, "linear: x has dtype float16"),
        (lambda: fastgpt.linear(x, torch.randn(3, 7)), ValueError, r"linear: weight has shape \(3, 7\), expected \(N, 8\)"),
        (lambda: fastgpt.linear(x, torch.randn(3, 8), b), ValueError, r"linear: bias has shape \(8,\), expected \(3,\)"),
        (lambda: fastgpt.linear(x, torch.randn(3, 8).double()), TypeError, "linear: weight has dtype float64, expected float32"),
        (lambda: fastgpt.linear(many, torch.randn(3, 7)), ValueError, r"linear: weight has shape \(3, 7\), expected \(N, 8\)"),
        (lambda: fastgpt.linear(many, torch.randn(8)), ValueError, r"linear: weight has shape \(8,\), expected \(N, 8\)"),
        (lambda: fastgpt.linear(many, torch.randn(3, 8), b), ValueError, r"linear: bias has shape \(8,\), expected \(3,\)"),
        (lambda: fastgpt.linear(many, torch.randn(3, 8).double()), TypeError, "linear: weight has dtype float64, expected float32"),
        (lambda: fastgpt.linear(many, torch.randn(8, 3).T), ValueError, "linear: weight has stride 3 in its last dimension"),
        (lambda: fastgpt.linear(many.half(), w), TypeError, "linear: x has dtype float16"),
        (lambda: fastgpt.linear_gelu(x, torch.randn(3, 7)), ValueError, r"linear_gelu: weight has shape \(3, 7\), expected \(N, 8\)"),
        (lambda: fastgpt.linear_gelu(many, torch.randn(3, 8), b), ValueError, r"linear_gelu: bias has shape \(8,\), expected \(3,\)"),
        (lambda: fastgpt.linear_gelu(many.half(), w), TypeError, "linear_gelu: x has dtype float16"),
        (lambda: fastgpt.linear_gelu(many, torch.randn(8, 3).T), ValueError, "linear_gelu: weight has stride 3 in its last dimension"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(0, 8), torch.full((1, 4), -1)), ValueError, r"lm_loss: weight has shape \(0, 8\), expected at least one token"),
        (lambda: fastgpt.lm_loss([1.0], torch.randn(9, 8), torch.zeros(1, 4).long()), TypeError, "lm_loss: hidden is list, expected a tensor"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(9, 8), [0]), TypeError, "lm_loss: targets is list, expected a tensor"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(9, 8).double(), torch.zeros(1, 4).long()), TypeError, "lm_loss: weight has dtype float64, expected float32"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(8, 9).T, torch.zeros(1, 4).long()), ValueError, "lm_loss: weight has stride 9 in its last dimension"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(9, 7), torch.zeros(1, 4).long()), ValueError, r"lm_loss: weight has shape \(9, 7\), expected \(V, 8\)"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(9, 8), torch.zeros(4).long()), ValueError, r"lm_loss: targets has shape \(4,\), expected \(1, 4\)"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(9, 8), torch.zeros(1, 4)), TypeError, "lm_loss: targets has dtype float32, expected int64"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(9, 8), torch.full((1, 4), 9)), ValueError, "lm_loss: targets has 9, expected -1 or 0 <= target < V=9"),
        (lambda: fastgpt.lm_loss(x[None], torch.randn(9, 8), torch.full((1, 4), -2)), ValueError, "lm_loss: targets has -2"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_refused_with_a_reason(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_from_numpy_alone_the_checks_hold_too():
    good = [np.ones((4, 8), "f"), np.ones(8, "f"), np.ones(8, "f")]
    out, stats = np.empty((4, 8), "f"), np.empty((2, 4), "f")
    _kernels.layer_norm_forward(*good, 1e-5, out, stats)
    assert np.array_equal(out, np.ones((4, 8)))
    for bad, message in (
        ((good[0].astype(">f4"), *good[1:], 1e-5, out, stats), "x has dtype >f4"),
        ((*good, 1e-5, out[:3], stats), r"out has shape \(3, 8\), expected \(4, 8\)"),
        ((*good, 1e-5, out, stats.astype("d")), "stats has dtype float64, expected float32"),
        ((*good, 1e-5, np.empty((8, 4), "f").T, stats), "out is not contiguous"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            _kernels.layer_norm_forward(*bad)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        _kernels.layer_norm_forward(*good, 1e-5, out, stats)
    with pytest.raises(TypeError):  # a list would have to be converted
        _kernels.layer_norm_forward([[1.0]], *good[1:], 1e-5, out, stats)


ARRAYS = {
    "layer_norm_forward": lambda a: (a(4, 8), a(8), a(8), 1e-5, a(4, 8), a(2, 4)),
    "layer_norm_backward": lambda a: (a(4, 8), a(4, 8), a(8), a(2, 4), a(4, 8), a(8), a(8)),
    "gelu_forward": lambda a: (a(4, 8), a(4, 8)),
    "gelu_backward": lambda a: (a(4, 8), a(4, 8), a(4, 8)),
    "linear_forward": lambda a: (a(4, 8), a(3, 8), a(3), a(4, 3)),
    "linear_gelu_forward": lambda a: (a(4, 8), a(3, 8), a(3), a(4, 3), a(4, 3)),
    "linear_backward": lambda a: (a(4, 3), a(4, 8), a(3, 8), a(4, 8), a(3, 8)),
    "lm_loss_forward": lambda a: (a(2, 4, 8), a(5, 8), np.ones((2, 4), np.int64), a(), a(2, 4, 8), a(5, 8)),
    "attention_forward": lambda a: (a(2, 5, 24), 2, 0.0, 0, a(2, 5, 8), a(2, 2, 2, 5)),
    "attention_backward": lambda a: (
        a(2, 5, 8), a(2, 5, 24), a(2, 5, 8), a(2, 2, 2, 5), 2, 0.0, 0, a(2, 5, 24)
    ),
}  # fmt: skip


def spoiled(x):
    """x in every wrong shape, size, layout and dtype."""
    yield from (
        np.zeros(shape, x.dtype) for shape in {(), (0,), (1,), (x.size,), (*x.shape, 1), (1, *x.shape)} - {x.shape}
    )
    for axis in range(x.ndim):
        for change in (-1, 1, -x.shape[axis]):
            yield np.zeros([n + change * (i == axis) for i, n in enumerate(x.shape)], x.dtype)
    yield from (x.astype(dtype) for dtype in ("f8", "f2", "i4", ">f4", "c8", "?"))
    if x.ndim > 1:
        yield np.zeros(x.shape[::-1], x.dtype).T
    if x.ndim:
        yield np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2]
    yield np.lib.stride_tricks.as_strided(np.zeros(1, x.dtype), x.shape, (0,) * x.ndim)
    yield np.frombuffer(bytes(x.nbytes + 1), np.uint8)[1:].view(x.dtype).reshape(x.shape)  # not aligned


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_another_shape_is_refused_or_leaves_memory_alone(name):
    """Under the address sanitizer (tests/native/sanitizers.sh) an access beyond an array ends the process."""
    function, good = getattr(_kernels, name), ARRAYS[name](lambda *shape: np.ones(shape, "f"))
    function(*good)
    refused = 0
    for i, x in enumerate(good):
        for bad in spoiled(x) if isinstance(x, np.ndarray) else ():
            try:
                function(*good[:i], bad, *good[i + 1 :])
            except (TypeError, ValueError) as error:
                refused += 1
                words = ("expected", "not a multiple of", "incompatible function arguments")
                assert any(word in str(error) for word in words), error
    assert refused > 10 * sum(isinstance(x, np.ndarray) for x in good)


def test_zero_rows_and_one_position_work():
    assert fastgpt.layer_norm(x[:0], w, b).shape == (0, 8)
    assert fastgpt.attention(qkv[:0], 2).shape == (0, 5, 8)
    assert fastgpt.attention(qkv[:, :0], 2).shape == (2, 0, 8)
    assert torch.equal(fastgpt.attention(qkv[:, :1], 2), qkv[:, :1, 16:])
    empty = x[:0].requires_grad_()
    weight = w.clone().requires_grad_()
    fastgpt.layer_norm(empty, weight, b).sum().backward()
    assert empty.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(8))


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="FASTGPT_ISA is 'sse9', expected one of: "):
        _kernels.set_isa("sse9")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gpt.GPTConfig(n_head=5), "n_embd=768 is not a multiple of n_head=5"),
        (lambda: gpt.GPTConfig(n_layer=0), "n_layer is 0, expected a positive integer"),
        (lambda: gpt.GPTConfig(dropout=1.0), "dropout is 1.0"),
        (lambda: gpt.GPT(gpt.GPTConfig(n_layer=1), ops=object()), "ops has no layer_norm, gelu, linear, attention, lm_loss"),
        (lambda: gpt.get_tokenizer("bpe"), "tokenizer is 'bpe', expected 'gpt2' or 'bytes'"),
        (lambda: gpt.load_text("/nowhere"), "--data is '/nowhere'"),
        (lambda: gpt.GPT.from_pretrained("gtp2"), "'gtp2' is no folder and no model"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)  # fmt: skip
def test_gpt_py_refuses_with_a_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_model_refuses_bad_tokens(small, ops):
    model = gpt.GPT(small, ops)
    for idx, message in (
        (torch.zeros(3, dtype=torch.int64), r"idx is torch.int64 of shape \(3,\), expected int64 of shape \(B, T\)"),
        (torch.zeros(1, 3), "idx is torch.float32"),
        (torch.zeros(1, 41, dtype=torch.int64), "idx has 41 positions, expected at most 40"),
        (torch.full((1, 3), 97), "idx has 97, expected 0 <= idx < vocab_size=97"),
        (torch.full((1, 3), -1), "idx has -1"),
    ):
        with pytest.raises(ValueError, match=message):
            model(idx)


def test_generate_refuses_bad_options(small):
    model, idx = gpt.GPT(small), torch.zeros(1, 1, dtype=torch.int64)
    for options, message in (
        (dict(max_new_tokens=-1), "max_new_tokens is -1, expected 0 or more"),
        (dict(max_new_tokens=1, temperature=-0.5), "temperature is -0.5"),
        (dict(max_new_tokens=1, top_k=0), "top_k is 0"),
        (dict(max_new_tokens=1, top_p=1.5), "top_p is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(idx, **options)
    with pytest.raises(ValueError, match=r"idx is \(1, 0\), expected \(B, T\) with T >= 1"):
        model.generate(idx[:, :0], 1)
