"""Training from the command line: it learns, its checkpoints go on exactly, and nothing is lost."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
import gpt

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --steps 12 --eval-every 4 --sample 5 --warmup 2".split()


def train(out, data, *more, ops=None):
    gpt.main(["train", "--out", str(out), "--data", data, *TINY, *more], ops)


def weights(out):
    return gpt.load_tensors(Path(out) / "training.safetensors")[0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_train_generate_eval(data, tmp_path, ops, capsys):
    out = str(tmp_path / "out")
    train(out, data, ops=ops)
    gpt.main(["generate", "--model", out, "--prompt", "the ", "--max-new-tokens", "20", "--seed", "1"], ops)
    shown = capsys.readouterr().out
    assert "val loss" in shown and "\nthe " in shown
    gpt.main(["eval", "--model", out, "--data", data], ops)
    shown = capsys.readouterr().out
    loss, perplexity = (float(shown.split(word)[1].split()[0].rstrip(",")) for word in ("loss ", "perplexity "))
    assert perplexity == pytest.approx(math.exp(loss), abs=0.02)
    assert float(shown.split(" bits per byte")[0].split()[-1]) == pytest.approx(loss / math.log(2), abs=1e-3)


def test_training_learns(data, tmp_path, ops, capsys):
    train(tmp_path / "out", data, "--steps", "150", "--lr", "1e-2", "--eval-every", "150", ops=ops)
    losses = [
        float(line.split("val loss ")[1].split()[0].rstrip(","))
        for line in capsys.readouterr().out.splitlines()
        if "val loss" in line
    ]
    assert losses[-1] < 1.5 < math.log(257)


@pytest.mark.parametrize("more", ((), ("--dropout", "0.2", "--accumulate", "2")), ids=("plain", "dropout"))
def test_resumed_training_equals_training_in_one_go(data, tmp_path, more, monkeypatch):
    train(tmp_path / "whole", data, *more)
    step, real = [], gpt.train_step

    def interrupted(*args):
        step.append(args[3])
        if len(step) == 8:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gpt, "train_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "parts", data, *more)
        assert stopped.value.code == 130
    assert gpt.load_tensors(tmp_path / "parts" / "training.safetensors")[1]["step"] == str(4)
    gpt.main(["train", "--out", str(tmp_path / "parts"), "--resume"])
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_checkpoint_is_not_overwritten_unasked(data, tmp_path):
    out = tmp_path / "out"
    train(out, data)
    before = weights(out)
    with pytest.raises(SystemExit, match="holds a checkpoint: add --resume or --overwrite"):
        train(out, data)
    assert_same(before, weights(out))
    train(out, data, "--overwrite", "--seed", "5")
    assert any(not torch.equal(before[name], x) for name, x in weights(out).items())


def test_a_crash_while_writing_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    train(tmp_path / "out", data)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def crash(fd):
        raise OSError("disk full")

    monkeypatch.setattr(gpt.os, "fsync", crash)
    with pytest.raises(SystemExit, match="error: .*disk full"):
        train(tmp_path / "out", data, "--overwrite", "--seed", "5")
    for name, content in before.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_fine_tuning_starts_from_the_given_weights(data, tmp_path):
    train(tmp_path / "base", data)
    train(tmp_path / "tuned", data, "--init", str(tmp_path / "base"), "--lr", "1e-12", "--weight-decay", "0")
    tuned = weights(tmp_path / "tuned")
    for name, p in gpt.GPT.from_pretrained(str(tmp_path / "base")).named_parameters():
        torch.testing.assert_close(tuned[name], p.data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", (0.5, 2.0))
def test_gradients_longer_than_the_limit_are_scaled_and_others_are_not_touched(small, share):
    model, reference = (gpt.GPT(small) for _ in range(2))
    for i, (p, its) in enumerate(zip(model.parameters(), reference.parameters(), strict=True)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) if i != 3 else None
        its.grad = p.grad if p.grad is None else p.grad.clone()
    before = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    limit = share * float(before.norm())
    assert gpt.clip_gradients(model, limit) == pytest.approx(float(before.norm()), rel=1e-6)
    if share < 1:
        torch.nn.utils.clip_grad_norm_(reference.parameters(), limit)
    for p, its in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad is None and its.grad is None or torch.equal(p.grad, its.grad)


def test_accumulated_batches_give_the_gradient_of_their_mean(small):
    tokens = torch.randint(small.vocab_size, (500,), generator=torch.Generator().manual_seed(0))
    states = []
    for accumulate, B in ((1, 6), (3, 2)):
        torch.manual_seed(0)
        model = gpt.GPT(small).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config = gpt.TrainConfig(seed=1, steps=10, warmup=1, lr=1.0, accumulate=accumulate, batch_size=B, clip=1e9)
        gpt.train_step(model, optimizer, tokens, 0, config)
        states.append(model.state_dict())
    for name, x in states[0].items():
        torch.testing.assert_close(x, states[1][name], rtol=1e-9, atol=1e-12)


def test_evaluate_is_the_mean_over_every_token(small, ops):
    model = gpt.GPT(small, ops)
    tokens = torch.randint(small.vocab_size, (2 * small.block_size + 18,), generator=torch.Generator().manual_seed(0))
    losses = []
    for begin in range(0, len(tokens) - 1, small.block_size):
        idx = tokens[begin : begin + small.block_size + 1][None]
        losses += [float(model.loss(idx[:, :-1], idx[:, 1:]).detach())] * (idx.shape[1] - 1)
    assert len(losses) == len(tokens) - 1
    assert gpt.evaluate(model, tokens, 2) == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [gpt.learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_only_matrices_decay(small):
    decaying, others = gpt.make_optimizer(gpt.GPT(small), 1e-3, 0.99, 0.1).param_groups
    assert decaying["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decaying["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() == 1 for p in others["params"])


def test_built_in_text_is_english_and_large():
    text = gpt.load_text()
    assert len(text) > 300_000 and "The " in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "--data", "/nowhere"], "error: --data is '/nowhere', expected a readable text file"),
        (["train", "--n-head", "3"], "error: GPTConfig: n_embd=128 is not a multiple of n_head=3"),
        (["train", "--block-size", "100000"], "expected more than 100000 in each"),
        (["train", "--resume"], "training.safetensors can't be read as safetensors (it does not exist"),
        (["generate", "--model", "nothing"], "'nothing' is no folder and no model"),
    ],
)
def test_errors_of_use_are_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        gpt.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_gpt_py_alone_trains_and_generates(tmp_path):
    """In an empty folder, with torch, numpy, tiktoken and safetensors: any other import that pip brought fails."""
    (tmp_path / "gpt.py").write_bytes(Path(gpt.__file__).read_bytes())
    code = (
        "import sys, runpy\n"
        "for name in ('fastgpt', 'huggingface_hub', 'tqdm', 'transformers'): sys.modules[name] = None\n"
        "sys.argv = ['gpt.py'] + sys.argv[1:]\n"
        "runpy.run_path('gpt.py', run_name='__main__')\n"
    )
    for argv in (
        ["train", *TINY, "--steps", "3"],
        ["generate", "--prompt", "The ", "--max-new-tokens", "5"],
        ["eval", "--batch-size", "512"],
    ):
        run = subprocess.run(
            [sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
    assert "bits per byte" in run.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tokenizer"] == "bytes"


def test_a_checkpoint_of_one_path_serves_the_other(data, tmp_path):
    train(tmp_path / "out", data, ops=fastgpt)
    idx = torch.tensor([[116, 104, 101]])
    models = [gpt.GPT.from_pretrained(str(tmp_path / "out"), ops) for ops in (None, fastgpt)]
    assert torch.equal(*(model.generate(idx, 20, temperature=0) for model in models))
