"""fastgpt eval: sliding windows; a dtype's distance from float32, on a model that has learnt something."""

import math

import numpy as np
import pytest
import torch

import fastgpt
import gpt
from fastgpt import __main__ as front
from fastgpt import _kernels, data, likelihood, packed

SHAPE = dict(n_layer=2, n_head=2, n_embd=64, block_size=64)
T = SHAPE["block_size"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> the folder of a model that was trained for some seconds, and 20 windows of text that it has not seen"""
    torch.manual_seed(0)
    tokens, val = gpt.load_tokens(None, gpt.get_tokenizer("bytes"), T)
    config = gpt.TrainConfig(steps=250, warmup=25, lr=3e-3, **SHAPE)
    model = gpt.GPT(gpt.GPTConfig(vocab_size=257, **SHAPE), fastgpt)
    optimizer = gpt.make_optimizer(model, config.lr, config.beta2, config.weight_decay)
    for step in range(config.steps):
        gpt.train_step(model, optimizer, tokens, step, config)
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(str(folder), tokenizer="bytes")
    return folder, val[: 20 * T + 30]


@pytest.fixture(scope="module")
def distances(trained):
    """nll of the base, and for each dtype nll, kl and same."""
    folder, tokens = trained
    others = [fastgpt.Decoder(str(folder), dtype) for dtype in packed.DTYPES]
    base, results = likelihood.compare(fastgpt.Decoder(str(folder)), others, tokens, T)
    return base, dict(zip(packed.DTYPES, results, strict=True))


@pytest.mark.slow
def test_a_model_is_at_no_distance_from_itself(distances, trained):
    base, results = distances
    assert len(base) == len(trained[1]) - 1
    assert torch.equal(results["float32"]["nll"], base)
    assert results["float32"]["kl"].max() == 0 and results["float32"]["same"].all()


@pytest.mark.slow
def test_loss_is_gpt_pys(distances, trained):
    folder, tokens = trained
    model = gpt.GPT.from_pretrained(str(folder))
    loss = gpt.evaluate(model, tokens, 4)
    assert loss < 3.0  # it has learnt something
    assert float(distances[0].mean()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
def test_kl_divergence_is_that_of_gpt_py_on_the_rounded_weights(distances, trained, dtype):
    folder, tokens = trained
    model = gpt.GPT.from_pretrained(str(folder))
    rounded = packed.Packed.from_model(model, dtype).to_model()
    idx = torch.from_numpy(tokens[: 4 * T].astype("int64")).view(4, T)
    with torch.no_grad():
        log_p, log_q = (m(idx).double().log_softmax(-1).flatten(0, 1) for m in (model, rounded))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(distances[1][dtype]["kl"][: 4 * T], kl, rtol=0.02, atol=2e-8)


# ------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("T", (1, 2, 5))
def test_every_token_but_the_first_counts_once_and_sees_enough(T):
    for stride in range(1, T + 1):
        for last, batch_size in ((last, size) for last in range(1, 18) for size in (1, 2, 7)):
            found = []
            for idx, targets in likelihood.windows(np.arange(last + 1, dtype=np.uint16), T, stride, batch_size):
                assert idx.shape == targets.shape == (len(idx), T) and len(idx) <= batch_size
                for row, wanted in zip(idx.tolist(), targets.tolist(), strict=True):
                    for at, target in ((at, target) for at, target in enumerate(wanted) if target != -1):
                        assert row[: at + 1] == list(
                            range(target - at - 1, target)
                        )  # what it sees: just what is before
                        assert at + 1 == target or at + 1 >= T - stride + 1
                        found.append(target)
            assert found == list(range(1, last + 1))


@pytest.fixture(scope="module")
def tiny():
    """In float64, with logits that differ by several nats."""
    torch.manual_seed(3)
    model = gpt.GPT(gpt.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=5, vocab_size=11)).double()
    for p in model.parameters():
        p.data += 0.5 * torch.randn(p.shape)
    return model.eval()


def plain_loss(model, tokens, T, stride):
    """One token after another: those of the first window see all before them, later ones the start of their window."""
    total, last = 0.0, len(tokens) - 1
    for at in range(1, last + 1):
        start = 0 if at <= T else math.ceil((at - T) / stride) * stride
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, start:at].astype(np.int64)))[0, -1]
        total -= float(logits.log_softmax(-1)[int(tokens[at])])
    return total / last


@pytest.mark.parametrize("stride", range(1, 6))
def test_loss_over_sliding_windows_is_the_plain_one(tiny, stride):
    tokens = np.random.default_rng(0).integers(0, 11, 24).astype(np.uint16)
    for n in (2, 3, 5, 6, 7, 10, 11, 12, 16, 23, 24):
        expected = plain_loss(tiny, tokens[:n], 5, stride)
        for batch_size in (1, 3, 100):
            assert likelihood.mean_loss(tiny, tokens[:n], stride, batch_size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_without_overlap_the_loss_is_gpt_pys_to_the_bit(trained, ops):
    folder, tokens = trained
    model = gpt.GPT.from_pretrained(str(folder), ops)
    for n, batch_size in ((len(tokens), 8), (6 * T + 1, 4), (T, 3), (2, 1)):
        assert likelihood.mean_loss(model, tokens[:n], T, batch_size) == gpt.evaluate(model, tokens[:n], batch_size)


@pytest.mark.slow
def test_decoders_see_the_same_windows(trained):
    folder, tokens = trained
    model, decoder = gpt.GPT.from_pretrained(str(folder), fastgpt), fastgpt.Decoder(str(folder))
    for stride in (64, 20):
        nll, (other,) = likelihood.compare(decoder, [decoder], tokens, T, stride)
        assert len(nll) == len(tokens) - 1 and torch.equal(nll, other["nll"])
        assert float(nll.mean()) == pytest.approx(likelihood.mean_loss(model, tokens, stride, 8), rel=1e-6)
    assert torch.equal(nll[:T], likelihood.compare(decoder, [], tokens[: T + 1], T)[0])


# ----------------------------------------------------------------------------------------------------- distance

# KL divergence in nats, change of the loss, share of the same most likely tokens; measured: see docs/generation.md
BOUNDS = {"bfloat16": (5e-5, 1e-3, 0.99), "int8": (5e-4, 2e-3, 0.98), "int4": (2e-2, 2e-2, 0.90)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_dtype_loses_no_more_than_it_should(distances, dtype):
    base, results = distances
    kl, loss, same = BOUNDS[dtype]
    assert 0 < results[dtype]["kl"].mean() < kl
    assert abs(float(results[dtype]["nll"].mean() - base.mean())) < loss
    assert results[dtype]["same"].double().mean() > same


@pytest.mark.slow
@pytest.mark.parametrize("dtype, most", (("bfloat16", 4), ("int8", 3)))
def test_fast_prompts_cost_little_more_than_their_dtype(distances, trained, dtype, most):
    """Measured: 2.7 and 2 times."""
    if not _kernels.rounds_prompts(dtype):
        pytest.skip(f"no instruction for prompts in {dtype} here")
    folder, tokens = trained
    fast = fastgpt.Decoder(str(folder), dtype, fast_prompts=True)
    _, (result,) = likelihood.compare(fastgpt.Decoder(str(folder)), [fast], tokens, T)
    assert 1 < result["kl"].mean() / distances[1][dtype]["kl"].mean() < most


@pytest.mark.slow
def test_smaller_dtypes_are_farther_away(distances):
    bfloat16, int8, int4 = (float(distances[1][dtype]["kl"].mean()) for dtype in packed.DTYPES[1:])
    assert bfloat16 < int8 < int4


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(gpt.load_text()[:20_000])
    return str(path)


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_form(trained, text, tmp_path, capsys):
    folder = str(trained[0])
    front.main(["quantize", folder, "--dtype", "int4", "--out", str(tmp_path / "small")])
    capsys.readouterr()
    assert front.main(["eval", folder, "--data", text, "--against", "int4", str(tmp_path / "small")]) == 0
    first, titles, base, int4, small = capsys.readouterr().out.splitlines()
    assert first.startswith("2,002 tokens in windows of 64; KL divergence from ") and "KL mean" in titles
    assert base.startswith(f"{folder} float32") and int4.split()[1:] == small.split()[1:]


@pytest.mark.slow
def test_without_against_it_is_gpt_pys(trained, text, capsys):
    folder = str(trained[0])
    for argv in (["--model", folder], [folder]):
        front.main(["eval", *argv, "--data", text])
    gpt.main(["eval", "--model", folder, "--data", text], fastgpt)
    one, other, expected = (line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert one == other == ["2,002 tokens in windows of 64", expected[1]] and expected[0] == "2,002 tokens"


@pytest.mark.slow
def test_the_line_says_what_was_measured(trained, text, capsys):
    folder = str(trained[0])
    losses = []
    for argv, what in (
        (["--stride", "64"], "2,002 tokens in windows of 64"),
        (["--stride", "16"], "2,002 tokens in windows of 64, stride 16, each after 49 to 64 others"),
        (["--all"], "20,029 tokens in windows of 64"),
    ):
        assert front.main(["eval", folder, "--data", text, *argv]) == 0
        line = capsys.readouterr().out
        assert line.startswith(f"{what}: loss ")
        losses.append(float(line.split("loss ")[1].split()[0]))
    assert len(set(losses)) == 3
    front.main(["eval", folder, "--data", text, "--stride", "16", "--against", "int8"])
    first, _, base, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("2,002 tokens in windows of 64, stride 16, each after 49 to 64 others; KL divergence from ")
    assert float(base.split()[3]) == pytest.approx(losses[1], abs=2e-4)


def test_all_of_a_text_are_its_tokens_as_one_row_and_all_of_shards_are_each_once(tmp_path, text):
    tokenizer = gpt.get_tokenizer("bytes")
    whole = data.load_all(text, tokenizer)
    with open(text, encoding="utf-8") as file:
        assert bytes(whole.tolist()).decode() == file.read()
    for val, names in (("0.2", 2), ("0", 1)):
        out = tmp_path / f"shards-{val}"
        front.main(["prepare", text, "--tokenizer", "bytes", "--out", str(out), "--val", val])
        row = data.load_all(str(out), tokenizer)
        assert len(list(out.glob("*.bin"))) == names
        assert sorted(row[np.arange(len(row))].tolist()) == sorted([256, *whole.tolist()])
    assert row[np.arange(len(row))].tolist() == [256, *whole.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stride", "0"], "--stride is 0, expected stride >= 1"),
        (["--stride", "65"], "--stride is 65, expected 1 <= stride <= 64, the model's block_size"),
        (["--stride", "65", "--against", "int8"], "--stride is 65, expected 1 <= stride <= 64, the model's block_size"),
        (["--all", "--data", "{small}"], "--data gives 1 tokens, expected 2 or more"),
        (["--data", "{small}"], "--data gives a part of 0 tokens, expected more than 1 in each"),
        (["{other}", "--tokenizer", "bytes"], "--tokenizer bytes has 257 ids, the model only 97"),
        (["--against", "int3"], "int3"),
        (["--against", "{other}"], "vocab_size is 97, expected 257 as"),
        (["--model", "x", "--against", "int8"], "expected one of them"),
        (["--against", "int4", "--fast-prompts"], "fast_prompts with int4 weights"),
        (["--against", "int8", "--batch-size", "0"], "--batch-size is 0"),
        (["--against", "int8", "--data", "nothing.txt"], "--data is 'nothing.txt'"),
    ],
)
def test_bad_input_is_one_line_and_status_1(trained, tmp_path, capsys, argv, message):
    other = tmp_path / "other"
    gpt.GPT(gpt.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=97)).save_pretrained(str(other))
    small = tmp_path / "small"
    small.write_text("a")
    argv = [word.format(other=other, small=small) for word in argv]
    assert front.main(["eval", *([] if str(other) in argv[:1] else [str(trained[0])]), *argv]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("fastgpt eval: error: ") and error.count("\n") == 1
