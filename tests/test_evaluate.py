"""fastgpt eval --against: a dtype's distance from float32, on a model that has learnt something."""

import pytest
import torch

import fastgpt
import gpt
from fastgpt import __main__ as front
from fastgpt import _kernels, evaluate, packed

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
    base, results = evaluate.compare(fastgpt.Decoder(str(folder)), others, tokens, T)
    return base, dict(zip(packed.DTYPES, results, strict=True))


def test_a_model_is_at_no_distance_from_itself(distances, trained):
    base, results = distances
    assert len(base) == len(trained[1]) - 1
    assert torch.equal(results["float32"]["nll"], base)
    assert results["float32"]["kl"].max() == 0 and results["float32"]["same"].all()


def test_loss_is_gpt_pys(distances, trained):
    folder, tokens = trained
    model = gpt.GPT.from_pretrained(str(folder))
    loss = gpt.evaluate(model, tokens, 4)
    assert loss < 3.0  # it has learnt something
    assert float(distances[0].mean()) == pytest.approx(loss, rel=1e-5)


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


# KL divergence in nats, change of the loss, share of the same most likely tokens; measured: see docs/generation.md
BOUNDS = {"bfloat16": (5e-5, 1e-3, 0.99), "int8": (5e-4, 2e-3, 0.98), "int4": (2e-2, 2e-2, 0.90)}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_dtype_loses_no_more_than_it_should(distances, dtype):
    base, results = distances
    kl, loss, same = BOUNDS[dtype]
    assert 0 < results[dtype]["kl"].mean() < kl
    assert abs(float(results[dtype]["nll"].mean() - base.mean())) < loss
    assert results[dtype]["same"].double().mean() > same


@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
def test_fast_prompts_cost_little_more_than_their_dtype(distances, trained, dtype):
    """Measured: twice."""
    if not _kernels.rounds_prompts(dtype):
        pytest.skip(f"no instruction for prompts in {dtype} here")
    folder, tokens = trained
    fast = fastgpt.Decoder(str(folder), dtype, fast_prompts=True)
    _, (result,) = evaluate.compare(fastgpt.Decoder(str(folder)), [fast], tokens, T)
    assert 1 < result["kl"].mean() / distances[1][dtype]["kl"].mean() < 4


def test_smaller_dtypes_are_farther_away(distances):
    bfloat16, int8, int4 = (float(distances[1][dtype]["kl"].mean()) for dtype in packed.DTYPES[1:])
    assert bfloat16 < int8 < int4


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(gpt.load_text()[:20_000])
    return str(path)


def test_the_command_prints_a_line_for_each_form(trained, text, tmp_path, capsys):
    folder = str(trained[0])
    front.main(["quantize", folder, "--dtype", "int4", "--out", str(tmp_path / "small")])
    capsys.readouterr()
    assert front.main(["eval", folder, "--data", text, "--against", "int4", str(tmp_path / "small")]) == 0
    first, titles, base, int4, small = capsys.readouterr().out.splitlines()
    assert first.startswith("2,002 tokens in windows of 64; KL divergence from ") and "KL mean" in titles
    assert base.startswith(f"{folder} float32") and int4.split()[1:] == small.split()[1:]


def test_without_against_it_is_gpt_pys(trained, text, capsys):
    folder = str(trained[0])
    for argv in (["--model", folder], [folder]):
        front.main(["eval", *argv, "--data", text])
    gpt.main(["eval", "--model", folder, "--data", text], fastgpt)
    one, other, expected = capsys.readouterr().out.splitlines()
    assert one == other == expected


@pytest.mark.parametrize(
    "argv, message",
    [
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
    assert front.main(["eval", str(trained[0]), *(word.format(other=other) for word in argv)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("fastgpt eval: error: ") and error.count("\n") == 1
