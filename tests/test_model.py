"""Whole models: both paths give the same logits, loss, gradients and training; and the model is GPT-2."""

import contextlib
import copy
import functools
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from parity import assert_parity, slow

import fastgpt
import gpt
from fastgpt import check
from fastgpt.rounding import Rounding


def batch(config, B=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (B, config.block_size + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def twins(config, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    reference, kernel = gpt.GPT(config).to(dtype), gpt.GPT(config, ops=fastgpt).to(dtype)
    kernel.load_state_dict(reference.state_dict())
    return reference, kernel


@pytest.mark.parametrize("seed", (0, *slow(1, 2)))
def test_logits_loss_and_every_gradient(small, seed):
    assert_parity(check.compare_models(small, seed))


def test_float64_models_agree_to_the_last_digits(small):
    results = []
    for model in twins(small, torch.float64):
        idx, targets = batch(small)
        loss = model.loss(idx, targets)
        loss.backward()
        results.append([model(idx).detach(), loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def losses_of_steps(config, ops, dtype, seed, arithmetic=None):
    """20 steps of AdamW from the same weights on the same batch. -> {"losses": (20,)}"""
    torch.manual_seed(seed)
    model = gpt.GPT(config, ops).to(dtype)
    groups = gpt.make_optimizer(model, 1e-3, 0.99, 0.1).param_groups
    groups = [dict(params=group["params"], weight_decay=group["weight_decay"]) for group in groups]
    optimizer, losses = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), foreach=False, fused=False), []
    with arithmetic or contextlib.nullcontext():
        for _ in range(20):
            loss = model.loss(*batch(config, seed=seed))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


@pytest.mark.slow
def test_losses_of_20_optimizer_steps(small, seed=0):
    """The kernels' losses stay as near to float64's as rounding lets the formulas' stay."""
    exact, runs = losses_of_steps(small, None, torch.float64, seed), 12
    errors = [
        losses_of_steps(small, None, torch.float64, seed, Rounding(first=run))["losses"] - exact["losses"]
        for run in range(runs)
    ]
    assert exact["losses"][-1] < exact["losses"][0]
    truth = check.truth_from_errors(exact, {"losses": torch.stack(errors)})
    kernel = losses_of_steps(small, fastgpt, torch.float32, seed)
    assert_parity(check.compare_results("model", (20,), truth, kernel))


def test_training_with_dropout_agrees(small):
    config = gpt.GPTConfig(**{**vars(small), "dropout": 0.2})
    losses = []
    for model in twins(config, torch.float64):
        torch.manual_seed(5)
        loss = model.loss(*batch(config))
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.eval()
        assert torch.equal(model(batch(config)[0]), model(batch(config)[0]))
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_bits_of_a_model_do_not_depend_on_threads_or_runs(small, threads):
    _, model = twins(small)
    results = []
    for n in (1, 2, 2):
        threads(n)
        model.zero_grad()
        loss = model.loss(*batch(small))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("aot_eager", *slow("inductor")))
def test_compiled_model_gives_the_same_loss(small, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _, model = twins(small)
    idx, targets = batch(small)
    expected = model.loss(idx, targets)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(model.loss, backend=backend, fullgraph=True)(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_parameter_counts_are_gpt2s():
    counts = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    with torch.device("meta"):
        for name, expected in counts.items():
            assert sum(p.numel() for p in gpt.GPT(gpt.SIZES[name]).parameters()) == expected


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=500, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / 4 if "c_proj" in name else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name


def test_model_can_be_copied(small, ops):
    model = gpt.GPT(small, ops)
    idx, _ = batch(small)
    assert torch.equal(copy.deepcopy(model)(idx), model(idx))


# ------------------------------------------------------------------------------------------------- generation


@pytest.fixture
def trained(small, ops):
    """A model whose next tokens differ: large weights instead of training."""
    torch.manual_seed(3)
    model = gpt.GPT(small, ops)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    return model


def recomputed(model, idx, n):
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :])[:, -1]
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), 1)
    return idx


def test_cached_generation_equals_recomputation_id_by_id(trained):
    start = torch.tensor([[5, 17, 60], [1, 2, 3]])
    out = trained.generate(start, 60, temperature=0)  # past block_size = 40: the window slides
    assert torch.equal(out, recomputed(trained, start, 60))
    assert len(set(out[0].tolist())) > 5


def test_generation_from_a_prompt_longer_than_the_window(trained):
    start = torch.arange(55)[None]
    assert torch.equal(trained.generate(start, 5, temperature=0), recomputed(trained, start, 5))


def test_seed_decides_the_sample(trained):
    start = torch.tensor([[7]])
    a, b, c = (trained.generate(start, 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_top_k_and_top_p_draw_only_from_the_likeliest():
    logits = torch.log(torch.tensor([[0.4, 0.05, 0.3, 0.2, 0.05]])).expand(4000, 5)
    rng = random.Random(0)

    def drawn(**options):
        options = dict(temperature=1.0, top_k=None, top_p=None) | options
        tokens = gpt.sample(logits, **options, rng=rng)
        return torch.bincount(tokens.flatten(), minlength=5) / len(tokens)

    assert (drawn() > 0).tolist() == [True] * 5
    assert (drawn(top_k=1) > 0).tolist() == [True, False, False, False, False]
    assert (drawn(top_k=3) > 0).tolist() == [True, False, True, True, False]
    assert (drawn(top_p=0.5) > 0).tolist() == [True, False, True, False, False]  # 0.4 is less than 0.5, so 0.3 too
    assert (drawn(top_p=0.3) > 0).tolist() == [True, False, False, False, False]
    assert (drawn(top_k=2, top_p=0.9) > 0).tolist() == [True, False, True, False, False]
    assert abs(drawn(top_k=2)[0] - 4 / 7) < 0.03
    assert drawn(temperature=0.3)[0] > 0.6
    assert (drawn(temperature=0) > 0).tolist() == [True, False, False, False, False]


def test_generate_leaves_the_mode_as_it_was(trained):
    for mode in (True, False):
        trained.train(mode)
        trained.generate(torch.tensor([[7]]), 2)
        assert trained.training is mode


# -------------------------------------------------------------------------- generation with other attentions


def rotate(x):  # (B, H, T, D): each pair of channels turned by its position, as in RoFormer (Su et al. 2021)
    T, D = x.shape[-2:]
    angles = torch.arange(T)[:, None] * 100.0 ** (-torch.arange(D // 2) / (D // 2))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


def rotary(qkv, n_head, dropout=0.0, seed=0):
    q, k, v = gpt.split_heads(qkv, n_head)
    return gpt.merge_heads(gpt.attend(rotate(q), rotate(k), v))


def biased(qkv, n_head, bias):
    q, k, v = gpt.split_heads(qkv, n_head)
    T, D = q.shape[-2:]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    scores = q @ k.transpose(-2, -1) / D**0.5 + bias(distance, n_head)
    return gpt.merge_heads(torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1) @ v)


def window_of_4(qkv, n_head, dropout=0.0, seed=0):
    return biased(qkv, n_head, lambda distance, _: torch.where(distance < 4, 0.0, -torch.inf))


def alibi(qkv, n_head, dropout=0.0, seed=0):  # Press et al. 2021
    return biased(qkv, n_head, lambda distance, H: -distance * 2.0 ** -torch.arange(1, H + 1).view(-1, 1, 1))


@functools.wraps(gpt.attention)
def wrapped(qkv, n_head, dropout=0.0, seed=0):  # carries gpt.attention's attributes, but does something else
    return rotary(qkv, n_head)


@pytest.mark.slow
@pytest.mark.parametrize("attention", (gpt.attention, rotary, window_of_4, alibi, wrapped, fastgpt.attention))
def test_any_attention_generates_the_same_ids_with_the_cache(small, attention):
    formulas = {name: getattr(gpt, name) for name in gpt.FORMULAS}
    torch.manual_seed(3)
    model = gpt.GPT(small, SimpleNamespace(**formulas | {"attention": attention}))
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    start = torch.tensor([[5, 17, 60], [1, 2, 3]])
    assert torch.equal(model.generate(start, 60, temperature=0), recomputed(model, start, 60))

    idx = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = model.hidden(idx)
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 7), n) for n in range(7)):
        caches = [gpt.KVCache(2, small, torch.float32) for _ in model.h]
        pieces = [model.hidden(idx[:, a:b], caches) for a, b in zip((0, *cuts), (*cuts, 7), strict=True)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-5)


def test_attend_is_attention_cut_into_heads():
    qkv = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = gpt.split_heads(qkv, 2)
    for Tq in (0, 1, 4, 9):
        torch.testing.assert_close(
            gpt.merge_heads(gpt.attend(q[:, :, 9 - Tq :], k, v)), gpt.attention(qkv, 2)[:, 9 - Tq :]
        )


# --------------------------------------------------------------------------------------------------- sampling


def drawn_by_hand(logits, temperature, top_k, top_p, rng):
    """sample() again, from its docstring, in plain Python."""
    out = []
    for row in logits.tolist():
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
        probs = [math.exp((row[i] - row[order[0]]) / temperature) for i in order]
        total = sum(probs)
        probs, kept, before = [p / total for p in probs], [], 0.0
        for p in probs:
            if top_p is not None and before >= top_p:
                break
            kept.append(p)
            before += p
        u = rng.random() * before
        out.append([next(i for i, running in zip(order, itertools.accumulate(kept), strict=False) if running > u)])
    return torch.tensor(out)


@pytest.mark.parametrize("top_k, top_p", [(None, None), (5, None), (None, 0.7), (20, 0.9), (1000, 1.0), (1, 1e-9)])
def test_sample_does_what_its_docstring_says(top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        logits = torch.randn(3, 40, generator=generator) * 3
        logits[0, 7] = logits[0].max()  # equals: by id
        args = logits, (0.7, 1.0, 3.0)[seed % 3], top_k, top_p
        assert torch.equal(gpt.sample(*args, random.Random(seed)), drawn_by_hand(*args, random.Random(seed)))


def test_known_samples_of_a_seed():
    """If these change, a seed no longer gives the text that it gave before."""
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    rng = random.Random(1337)
    assert [int(gpt.sample(logits, 1.0, None, None, rng)) for _ in range(12)] == [2, 2, 3, 2, 3, 1, 3, 1, 0, 3, 0, 3]


def test_logits_that_are_not_finite_are_refused(trained):
    trained.ln_f.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        trained.generate(torch.tensor([[7]]), 2)
