"""attention (csrc/attention*.h) and dropout's mask: what holds for it alone. What holds for every op: test_ops.py."""

import pytest
import torch
from parity import T_SIZES, assert_parity, slow

import fastgpt
import gpt
from fastgpt import check
from fastgpt.bench import in_a_fresh_process


@pytest.mark.parametrize("D", (8, 64, *slow(16, 48, 80, 128)))
@pytest.mark.parametrize("T", (*T_SIZES, *slow(1000)))
def test_attention_at_awkward_shapes(T, D):
    T = 500 if T == 1000 and D != 64 else T
    B = 3 if T < 128 else 1
    assert_parity(check.compare("attention", (B, T, 2, D), seed=T))


def test_attention_reads_strided_views_in_place():
    buffer = torch.randn(4, 33, 200, generator=torch.Generator().manual_seed(0))
    for qkv in (buffer[::2, :, 5:149], buffer[:, 1::2, :144], buffer.transpose(0, 1)[:, :, 8:152]):
        args = dict(inputs=dict(qkv=qkv), options=dict(n_head=3))
        assert_parity(check.compare("attention", tuple(qkv.shape), **args))
        assert torch.equal(fastgpt.attention(qkv, 3), fastgpt.attention(qkv.contiguous(), 3))


def test_attention_never_sees_the_future(isa):
    qkv = torch.randn(2, 200, 96, generator=torch.Generator().manual_seed(0))
    out = fastgpt.attention(qkv, 2)
    for t in (0, 63, 64, 95, 96, 150):
        changed = qkv.clone()
        changed[:, t + 1 :] *= 1e6
        assert torch.equal(fastgpt.attention(changed, 2)[:, : t + 1], out[:, : t + 1])


def test_attention_of_equal_scores_is_the_mean_so_far(isa):
    T, C = 150, 16
    v = torch.randn(1, T, C, generator=torch.Generator().manual_seed(0))
    inputs = dict(qkv=torch.cat((torch.zeros(1, T, 2 * C), v), -1))
    mean = v.double().cumsum(1) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(fastgpt.attention(**inputs, n_head=2).double(), mean, rtol=1e-5, atol=1e-5)
    assert_parity(check.compare("attention", inputs=inputs, options=dict(n_head=2)))


def test_attention_does_not_overflow_with_large_scores(isa):
    generator = torch.Generator().manual_seed(0)
    for scale in (30.0, 1e4, 1e8):
        qkv = torch.randn(1, 130, 3 * 64, generator=generator)
        qkv[..., :128] *= scale  # scores up to scale^2: softmax picks one key
        args = dict(inputs=dict(qkv=qkv), options=dict(n_head=2))
        assert_parity(check.compare("attention", **args))
        results = check.evaluate(fastgpt.attention, args["inputs"], args["options"], torch.float32)
        assert all(x.isfinite().all() for x in results.values())


def test_nan_and_infinities_in_two_heads_of_three(isa):
    inputs, options = check.make_inputs("attention", (2, 130, 3, 16, 0.2))
    inputs["qkv"][0, 120, 20], inputs["qkv"][1, 5, 130] = float("inf"), float("nan")
    assert_parity(check.compare("attention", inputs=inputs, options=options))


@pytest.mark.slow
def test_attention_memory_grows_with_T_and_not_with_its_square():
    code = "from fastgpt.bench import attention_memory; print(attention_memory('kernel', {}))"
    short, long = (float(in_a_fresh_process(code.format(T))) for T in (2048, 8192))
    assert long < 5 * short


# ---------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("T, D", [(1, 8), (65, 48), *slow((257, 64))])
def test_attention_with_dropout_drops_the_same_weights(T, D, isa):
    assert_parity(check.compare("attention", (2, T, 2, D, 0.3)))


def test_gradcheck_of_attention_with_dropout():
    qkv = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastgpt.attention(x, 2, 0.4, 7), (qkv,))


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
