"""lm_loss (csrc/loss.h): what holds for it alone. What holds for every op: test_ops.py."""

import pytest
import torch
from parity import assert_parity, slow

import fastgpt
import gpt
from fastgpt import check
from fastgpt.bench import in_a_fresh_process


@pytest.mark.parametrize("C", (48, *slow(769)))
@pytest.mark.parametrize("V", (65, 257))
@pytest.mark.parametrize("T", (1, 63, 128))
def test_lm_loss_at_awkward_shapes(T, C, V):
    assert_parity(check.compare("lm_loss", (3, T, C, V), seed=T))


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


def test_lm_loss_skips_the_targets_that_are_minus_one():
    inputs, options = check.make_inputs("lm_loss", (2, 9, 16, 11))
    keep = options["targets"] != -1
    assert 0 < keep.sum() < keep.numel()
    some = {"hidden": inputs["hidden"][keep][None], "weight": inputs["weight"]}
    torch.testing.assert_close(
        fastgpt.lm_loss(**inputs, **options), gpt.lm_loss(**some, targets=options["targets"][keep][None])
    )


def test_lm_loss_where_no_target_counts_is_nan_like_the_formula():
    inputs, options = check.make_inputs("lm_loss", (2, 9, 16, 11))
    none = torch.full_like(options["targets"], -1)
    assert fastgpt.lm_loss(**inputs, targets=none).isnan() and gpt.lm_loss(**inputs, targets=none).isnan()
    assert fastgpt.lm_loss(inputs["hidden"][:0], inputs["weight"], none[:0]).isnan()


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


@pytest.mark.slow
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
