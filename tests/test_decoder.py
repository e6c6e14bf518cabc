"""fastgpt.Decoder against gpt.py: the same logits by the rule of fastgpt/check.py, the same tokens, the same files."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from parity import slow

import fastgpt
import gpt
from fastgpt import _kernels, check, packed
from fastgpt.decoder import Sequences
from fastgpt.packed import Packed

DTYPES = packed.DTYPES
ODD = gpt.GPTConfig(n_layer=2, n_head=3, n_embd=39, block_size=40, vocab_size=97)  # heads of 13 channels
CONFIGS = {"small": gpt.GPTConfig(n_layer=2, n_head=4, n_embd=48, block_size=40, vocab_size=97), "odd": ODD}


def make_model(config, seed=0):
    """Weights larger than at the start of training, and biases that count."""
    torch.manual_seed(seed)
    model = gpt.GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 3 if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    return model


def tokens(config, B, T, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def stepwise(decoder, idx, first):
    """Logits of positions first - 1 and on, token by token after a prompt of `first`."""
    rows = idx.numpy()
    with decoder.sequences(rows[:, :first], idx.shape[1] - first) as sequences:
        steps = [torch.from_numpy(sequences.start().copy())]
        steps += [torch.from_numpy(sequences.append(rows[:, t]).copy()) for t in range(first, idx.shape[1])]
    return torch.stack(steps, dim=1)


def rounded_linear(x, weight, bias=None, size=32):
    """linear on activations in int8, with a scale for each 32 channels: what int4's products are made of."""
    K = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -K % size)).unflatten(-1, (-1, size))
    largest = groups.abs().amax(-1, keepdim=True)
    whole = torch.round(groups * (127 / largest.clamp(min=1e-30)))
    return gpt.linear((whole * (largest / 127)).flatten(-2)[..., :K], weight, bias)


class Int4Ops:
    layer_norm, gelu, attention, lm_loss = map(staticmethod, (gpt.layer_norm, gpt.gelu, gpt.attention, gpt.lm_loss))
    linear = staticmethod(rounded_linear)


class FastInt8Ops(Int4Ops):
    """What int8 weights meet in prompts with fast_prompts: a scale for each 256 channels."""

    linear = staticmethod(lambda x, weight, bias=None: rounded_linear(x, weight, bias, 256))


def formula_logits(config, idx, ops):
    with torch.device("meta"):
        model = gpt.GPT(config, ops)

    def logits(**params):
        hidden = torch.func.functional_call(Hidden(model), {f"model.{k}": p for k, p in params.items()}, (idx,))
        return gpt.linear(hidden, params["wte.weight"])

    return logits


class Hidden(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx):
        return self.model.hidden(idx)


def assert_as_exact(decoder, logits, idx, take=slice(None), ops=None, in_bfloat16=False):
    """`logits` by the rule of fastgpt check: as near to gpt.py's on the rounded weights as float32 may be.

    in_bfloat16: as near as bfloat16 products may be.
    """
    model = decoder.packed.to_model()
    params = {name: p.detach() for name, p in model.named_parameters()}
    formula = formula_logits(model.config, idx, Int4Ops if decoder.dtype == "int4" else ops)
    taken = lambda **p: formula(**p)[:, take]  # noqa: E731
    kernel = lambda **_: logits  # noqa: E731
    rows = check.compare("decoder", None, 0, kernel, params, {}, (), taken, in_bfloat16=in_bfloat16)
    assert [r for r in rows if not r.ok] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_prompts_logits_are_as_exact_as_the_formula(config, dtype, isa):
    decoder, idx = fastgpt.Decoder(make_model(config), dtype), tokens(config, 2, 37)
    assert_as_exact(decoder, decoder.logits(idx), idx)


@pytest.mark.parametrize("first", (9, *slow(8)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokens_logits_are_as_exact_as_the_formula(config, dtype, first, isa):
    decoder, idx = fastgpt.Decoder(make_model(config), dtype), tokens(config, 2, 40)
    assert_as_exact(decoder, stepwise(decoder, idx, first), idx, slice(first - 1, None))


WIDE = gpt.GPTConfig(n_layer=1, n_head=3, n_embd=300, block_size=70, vocab_size=97)  # more than 256 channels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
@pytest.mark.parametrize("config", [ODD, WIDE], ids=["odd", "wide"])
def test_fast_prompts_are_as_exact_as_the_formula_on_rounded_activations(config, dtype, isa, threads):
    """And a row's bits are its own. bfloat16 is held to gpt.py in bfloat16 products."""
    model = make_model(config)
    if not _kernels.rounds_prompts(dtype):
        with pytest.raises(ValueError, match=f"fast_prompts with {dtype} weights on {isa}, expected"):
            fastgpt.Decoder(model, dtype, fast_prompts=True)
        return
    decoder, idx = fastgpt.Decoder(model, dtype, fast_prompts=True), tokens(config, 3, 37)
    logits = decoder.logits(idx)
    how = dict(in_bfloat16=True) if dtype == "bfloat16" else dict(ops=FastInt8Ops)
    assert_as_exact(decoder, logits, idx, **how)
    assert not torch.equal(logits, fastgpt.Decoder(model, dtype).logits(idx))
    together = stepwise(decoder, idx, 37)  # three prompts at once
    assert torch.equal(together[:, 0], torch.cat([stepwise(decoder, row[None], 37)[:, 0] for row in idx]))
    threads(1)
    assert torch.equal(decoder.logits(idx), logits)


@pytest.mark.parametrize("dtype", ("float32", "int4"))
def test_fast_prompts_of_a_dtype_that_has_none_are_refused(dtype):
    with pytest.raises(ValueError, match=f"fast_prompts with {dtype} weights on .*, expected bfloat16 with AVX-512"):
        fastgpt.Decoder(make_model(ODD), dtype, fast_prompts=True)


@pytest.mark.parametrize("config", [ODD, WIDE], ids=["odd", "wide"])
def test_fast_prompts_in_bfloat16_are_near_the_kernels_that_train(config, isa):
    """fastgpt.bfloat16 on the rounded weights differs only where it rounds wte's products, too, and in orders of sums."""
    if not _kernels.rounds_prompts("bfloat16"):
        pytest.skip(f"{isa} has no bfloat16 products here")
    decoder, idx = fastgpt.Decoder(make_model(config), "bfloat16", fast_prompts=True), tokens(config, 2, 37)
    exact = fastgpt.Decoder(make_model(config), "bfloat16").logits(idx)
    model = decoder.packed.to_model(fastgpt.bfloat16)
    with torch.no_grad():
        trained = gpt.linear(model.hidden(idx), model.wte.weight)
    distance = (decoder.logits(idx) - exact).norm()
    assert (decoder.logits(idx) - trained).norm() < 0.5 * distance


def test_int4_is_the_same_without_the_dot_product_instruction(isa):
    decoder, idx = fastgpt.Decoder(make_model(ODD), "int4"), tokens(ODD, 1, 20)
    before = _kernels.use_dot_products(False)
    try:
        plain = stepwise(decoder, idx, 1)
    finally:
        _kernels.use_dot_products(before)
    assert torch.equal(plain, stepwise(decoder, idx, 1))  # both sum whole numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", (3, 12))
def test_a_rows_bits_depend_on_neither_batch_nor_neighbours_nor_threads(dtype, first, isa, threads):
    config = CONFIGS["small"]
    decoder, idx = fastgpt.Decoder(make_model(config), dtype, "bfloat16"), tokens(config, 11, 20)
    threads(2)
    together = stepwise(decoder, idx, first)
    threads(1)
    assert torch.equal(together, stepwise(decoder, idx, first))
    for b in (0, 7, 10):
        assert torch.equal(together[b : b + 1], stepwise(decoder, idx[b : b + 1], first))
    same = idx[4:5].expand(3, -1)  # one prompt's keys and values are copied
    assert torch.equal(stepwise(decoder, same, first), together[4:5].expand(3, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_one_text_at_once_give_the_same_bits(dtype):
    """Several rows of one slot: what a short prompt takes, and a draft that is verified."""
    config = CONFIGS["small"]
    decoder, idx = fastgpt.Decoder(make_model(config), dtype), tokens(config, 1, 8)
    assert torch.equal(stepwise(decoder, idx, 1)[:, -1], stepwise(decoder, idx, 8)[:, -1])


HOW = [
    dict(temperature=0),
    dict(temperature=0.8, top_k=20, seed=3),
    dict(seed=4),
    dict(seed=5, top_p=0.7),
    dict(seed=6, top_p=0.9, top_k=30, temperature=1.3),
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokens_are_gpt_pys_even_when_the_window_slides(config, how):
    model, idx = make_model(config), tokens(config, 3, 12)
    expected = model.generate(idx, 40, **how)
    decoder = fastgpt.Decoder(model)
    assert torch.equal(decoder.generate(idx, 40, **how), expected)
    assert torch.equal(torch.stack(list(decoder.stream(idx, 40, **how)), dim=1), expected[:, 12:])


@pytest.mark.parametrize("kv_dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_lookup_gives_the_same_tokens_in_fewer_passes(dtype, kv_dtype, monkeypatch):
    """To the bit, whether drafts are right or wrong; and past the window, where there is no room for them."""
    config, passes = CONFIGS["small"], []
    decoder = fastgpt.Decoder(make_model(config), dtype, kv_dtype)
    extend = Sequences.extend
    monkeypatch.setattr(Sequences, "extend", lambda self, new: passes.append(len(new)) or extend(self, new))
    prompt = torch.tensor([[5, 6, 7, 8] * 3])
    for how in (dict(temperature=0), dict(temperature=1.0, seed=3), dict(temperature=0.5, top_k=3, seed=4)):
        expected, logits = decoder.generate(prompt, 35, **how), []
        for lookup in (1, 4, 64):
            assert torch.equal(decoder.generate(prompt, 35, lookup=lookup, **how), expected)
        list(decoder.stream(prompt, 20, lookup=4, each=lambda x, _, logits=logits: logits.append(x.copy()), **how))
        again = []
        list(decoder.stream(prompt, 20, each=lambda x, _, again=again: again.append(x.copy()), **how))
        assert all((x == y).all() for x, y in zip(logits, again, strict=True))
    assert max(passes) > 5 and min(passes) == 2


def test_lookup_drafts_what_followed_the_last_time():
    decoder = fastgpt.Decoder(make_model(ODD))
    text = [1, 2, 3, 9, 8, 1, 2, 3, 7, 6, 5, 1, 2]
    with decoder.sequences(torch.tensor([text]).numpy(), 20) as sequences:
        assert list(sequences._draft([3], 2)) == [7, 6]
        assert list(sequences._draft([3], 4)) == [7, 6, 5, 1]
        assert list(sequences._draft([4], 4)) == []
        assert list(sequences._draft([3], 0)) == []
        sequences.window[0, :13] = [1, 2, 1, 2] * 3 + [1]
        assert list(sequences._draft([2], 5)) == [1, 2, 1, 2, 1]  # not from the last time, after which comes the end


LONG = {
    "1000 tokens": gpt.GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=1010, vocab_size=311),
    "deep": gpt.GPTConfig(n_layer=8, n_head=1, n_embd=40, block_size=300, vocab_size=1000),
    "odd": gpt.GPTConfig(n_layer=3, n_head=3, n_embd=39, block_size=300, vocab_size=97),
    "wide": gpt.GPTConfig(n_layer=2, n_head=12, n_embd=768, block_size=200, vocab_size=5003),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", *slow("bfloat16", "int8")))
@pytest.mark.parametrize("config", LONG.values(), ids=LONG)
def test_greedy_tokens_are_transformers_except_at_near_ties(config, dtype, tmp_path):
    """On the rounded weights. A tie is near where the best logits are closer than 2e-5 of the largest logit."""
    transformers = pytest.importorskip("transformers")
    idx = tokens(config, 1, 5)
    decoder = fastgpt.Decoder(make_model(config), dtype)
    decoder.packed.to_model().save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ours = decoder.generate(idx, config.block_size - 5, temperature=0)
    with torch.no_grad():
        logits = theirs(ours).logits[0, idx.shape[1] - 1 : -1]
    best, chosen = logits.max(-1).values, logits.gather(-1, ours[0, idx.shape[1] :, None])[:, 0]
    assert (best - chosen).max() < 2e-5 * logits.abs().max()
    assert ((best - chosen) > 0).double().mean() < 0.02  # nearly always it is the very token


def test_sampling_follows_gpt_pys_rules_with_ties_and_a_large_vocabulary():
    import random

    import numpy as np

    generator = torch.Generator().manual_seed(0)
    for V, kind in ((1, "normal"), (50, "ties"), (5000, "normal"), (5000, "ties"), (20000, "flat")):
        x = torch.randn(4, V, generator=generator) * (0.01 if kind == "flat" else 3)
        x = x.round() if kind == "ties" else x
        for temperature, top_k, top_p in ((1.0, None, None), (0.7, 5, None), (1.5, 300, 0.8), (1.0, None, 0.95)):
            for seed in range(5):
                expected = gpt.sample(x, temperature, top_k, top_p, random.Random(seed))[:, 0]
                rng, got = random.Random(seed), np.empty(4, np.int64)
                u = np.array([rng.random() for _ in range(4)])
                _kernels.sample(x.numpy(), temperature, top_k or 0, top_p or 2.0, u, got)
                assert got.tolist() == expected.tolist(), (V, kind, temperature, top_k, top_p, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_file_gives_the_same_weights_back(dtype, tmp_path):
    model = make_model(ODD)
    Packed.from_model(model, dtype).save(tmp_path / packed.FILE)
    decoder, idx = fastgpt.Decoder(str(tmp_path)), tokens(ODD, 1, 20)
    assert decoder.dtype == dtype
    assert torch.equal(decoder.logits(idx), fastgpt.Decoder(model, dtype).logits(idx))
    again = Packed.from_model(decoder.packed.to_model(), dtype)
    assert (again.memory == decoder.packed.memory).all()  # rounding what is rounded changes nothing
    if dtype == "float32":
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.to_model().parameters(), strict=True))


def damage(path, how):
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if how == "truncated":
        data = data[:-100]
    elif how == "a bit":
        data[length + 5000] ^= 4
    elif how == "empty":
        data = b""
    elif how == "foreign":
        path.unlink()
        gpt.save_tensors(str(path), {"x": torch.zeros(3)})
        return
    elif how == "older":
        data[8 : 8 + length] = data[8 : 8 + length].replace(b'"version": "1"', b'"version": "0"')
    else:
        data[8 : 8 + length] = data[8 : 8 + length].replace(b'n_head\\": 3', b'n_head\\": 1')
    path.write_bytes(data)


@pytest.mark.parametrize("how", ("truncated", "a bit", "empty", "foreign", "older", "config"))
def test_a_damaged_or_foreign_file_is_refused_in_one_line_that_names_it(how, tmp_path):
    path = tmp_path / packed.FILE
    Packed.from_model(make_model(ODD), "int8").save(path)
    damage(path, how)
    with pytest.raises(ValueError) as error:
        fastgpt.Decoder(str(tmp_path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_does_not_match_is_refused(tmp_path):
    model = make_model(ODD)
    Packed.from_model(model, "int8").save(tmp_path / packed.FILE)
    (tmp_path / "config.json").write_text(json.dumps(dict(n_layer=5)))
    with pytest.raises(ValueError, match="n_layer is 5, but 2 in"):
        fastgpt.Decoder(str(tmp_path))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: d.generate(torch.zeros(1, 0, dtype=torch.int64), 1), "expected .B, T. with T >= 1"),
        (lambda d: d.generate(torch.full((1, 2), 97), 1), "idx has 97, expected 0 <= idx < vocab_size=97"),
        (lambda d: d.generate(torch.full((1, 2), -1), 1), "idx has -1"),
        (
            lambda d: d.generate(torch.zeros(1, 41, dtype=torch.int64), 1),
            "41 positions, expected at most block_size=40",
        ),
        (lambda d: d.generate(torch.zeros(1, 2), 1), "torch.float32 of shape"),
        (lambda d: d.generate([[1]], 1), "idx is list"),
        (lambda d: d.stream(torch.zeros(1, 2, dtype=torch.int64), -1), "max_new_tokens is -1"),
        (lambda d: d.generate(torch.zeros(1, 2, dtype=torch.int64), 1, temperature=-1), "temperature is -1"),
        (lambda d: d.generate(torch.zeros(1, 2, dtype=torch.int64), 1, top_k=0), "top_k is 0"),
        (lambda d: d.generate(torch.zeros(1, 2, dtype=torch.int64), 1, top_p=2), "top_p is 2"),
        (lambda d: d.generate(torch.zeros(1, 2, dtype=torch.int64), 1, lookup=-1), "lookup is -1 for 1 texts"),
        (lambda d: d.generate(torch.zeros(2, 2, dtype=torch.int64), 1, lookup=2), "lookup is 2 for 2 texts"),
        (lambda d: fastgpt.Decoder(make_model(ODD), "int3"), "dtype is 'int3', expected one of float32"),
        (lambda d: fastgpt.Decoder(make_model(ODD), kv_dtype="int8"), "kv_dtype is 'int8'"),
        (lambda d: fastgpt.Decoder(3), "model is 3"),
    ],
)
def test_bad_arguments_are_refused_and_the_decoder_lives_on(call, message):
    decoder, idx = fastgpt.Decoder(make_model(ODD)), tokens(ODD, 1, 5)
    with pytest.raises(ValueError, match=message):
        call(decoder)
    assert decoder.generate(idx, 3, temperature=0).shape == (1, 8)


def test_another_thread_is_refused_and_the_decoder_lives_on():
    decoder, idx, errors = fastgpt.Decoder(make_model(ODD)), tokens(ODD, 1, 5), []

    def other():
        try:
            decoder.generate(idx, 3)
        except ValueError as error:
            errors.append(str(error))

    with decoder.alone():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "another thread" in errors[0]
    assert decoder.generate(idx, 3).shape == (1, 8)


def test_a_model_larger_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(packed, "free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="GB are needed, but 0.0 GB of memory are free"):
        fastgpt.Decoder(make_model(ODD))


def test_other_formulas_are_refused():
    class Own(Int4Ops):
        pass

    with pytest.raises(ValueError, match="linear of its own"):
        fastgpt.Decoder(gpt.GPT(ODD, Own))


@pytest.mark.slow
def test_streams_left_in_the_middle_and_many_generations_leak_nothing():
    """10,000 generations of a tiny model, some left in the middle: the process grows by less than 8 MiB."""
    code = """
import torch, fastgpt, gpt
from fastgpt.bench import peak_memory
d = fastgpt.Decoder(gpt.GPT(gpt.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=32, vocab_size=11)))
idx = torch.zeros(1, 3, dtype=torch.int64)
def some(n):
    for i in range(n):
        if i % 3:
            d.generate(idx, 3, temperature=i % 2)
        else:
            next(d.stream(idx, 20))
some(1000)
before = peak_memory()
some(10000)
print(peak_memory() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 8
