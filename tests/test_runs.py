"""What a run leaves in its folder beside the checkpoint, and what it says: metrics, the best weights, changes, errors."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

import fastgpt.__main__
import fastgpt.train
import gpt
from fastgpt import metrics

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --steps 9 --eval-every 3 --sample 1 --warmup 2".split()
CHECKPOINT = "training.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def train(data):
    def run(out, *more, ops=None):
        fastgpt.train.main(["--out", str(out), "--data", data, *TINY, *more], ops)

    return run


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(out):
    timed = ("tokens_per_second", "mfu", "seconds")
    return [{key: x for key, x in row.items() if key not in timed} for row in rows(out)]


def assert_same_tensors(a, b):
    a, b = gpt.load_tensors(a)[0], gpt.load_tensors(b)[0]
    assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("more", ((), ("--dropout", "0.2", "--accumulate", "3")), ids=("plain", "dropout"))
def test_the_guarded_loop_and_the_plain_one_give_the_same_bits(train, data, out, tmp_path, ops, more, monkeypatch):
    losses, real = [], gpt.train_step

    def recorded(*args):
        losses.append(real(*args))
        return losses[-1]

    monkeypatch.setattr(gpt, "train_step", recorded)
    train(tmp_path / "guarded", *more, ops=ops)
    gpt.main(["train", "--out", str(tmp_path / "plain"), "--data", data, *TINY, *more], ops)
    assert losses[9:] == losses[:9] == [row["loss"] for row in rows(tmp_path / "guarded")]
    for file in (CHECKPOINT, "model.safetensors"):
        assert_same_tensors(tmp_path / "plain" / file, tmp_path / "guarded" / file)


def test_metrics_say_what_each_step_did(train, data, out):
    train(out, "--accumulate", "2", "--clip", "1e9")
    log = rows(out)
    assert [row["step"] for row in log] == list(range(1, 10))
    assert [row["tokens"] for row in log] == [row["step"] * 4 * 2 * 16 for row in log]
    assert [row["step"] for row in log if row["validation"] is not None] == [3, 6, 9]
    assert [row["rate"] for row in log] == [gpt.learning_rate(step, 9, 2, 1e-3) for step in range(9)]
    model = gpt.GPT.from_pretrained(str(out))
    _, val = fastgpt.data.load_tokens(data, gpt.get_tokenizer("bytes"), 16)
    assert log[-1]["validation"] == gpt.evaluate(model, val, 4, 256)
    assert all(a["seconds"] < b["seconds"] for a, b in zip(log, log[1:], strict=False))
    for row in log:
        assert row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1 and row["norm"] > 0


def test_the_norm_is_that_of_the_gradient_before_clipping(small):
    tokens, norms = torch.randint(97, (500,), generator=torch.Generator().manual_seed(0)), []
    for clip in (1e9, 0.01):
        torch.manual_seed(0)
        model = gpt.GPT(small)
        optimizer = gpt.make_optimizer(model, 1e-3, 0.99, 0.1)
        gpt.train_step(model, optimizer, tokens, 0, gpt.TrainConfig(batch_size=2, clip=clip))
        norms.append(optimizer.norm)
        length = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert length == pytest.approx(min(norms[-1], clip), rel=1e-3)
    assert norms[0] == norms[1] > 0.01


def test_utilisation_counts_the_products_of_forward_and_backward():
    config = gpt.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)
    products = 2 * 12 * 32 * 32 + 100 * 32  # weights that a token meets
    assert metrics.flops(config, 10) == 10 * 3 * (2 * products + 2 * 2 * 2 * 16 * 32)
    assert metrics.limit() > 1e9


def killed_at(monkeypatch, function, step):
    """From the nth call of a function of gpt.py on, nothing more of the run happens."""
    real, calls = getattr(gpt, function), []

    def killed(*args, **options):
        calls.append(0)
        if len(calls) == step:
            raise KilledError
        return real(*args, **options)

    monkeypatch.setattr(gpt, function, killed)


class KilledError(Exception):
    """Ends a run as kill -9 would: nobody catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("function, nth", [("train_step", 6), ("save_checkpoint", 2), ("evaluate", 2), ("write_pretrained", 4), ("evaluate", 3)])  # fmt: skip
def test_a_log_is_cut_back_to_the_step_that_a_run_goes_on_from(train, out, tmp_path, monkeypatch, function, nth):
    """Killed during a step, a checkpoint, an evaluation (of two), while the best weights are written."""
    train(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_at(patch, function, nth)
        train(out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 77, "lo')  # half a line
    train(out, "--resume")
    assert untimed(out) == untimed(tmp_path / "whole")
    for name in (CHECKPOINT, "model.safetensors", "best/model.safetensors"):
        assert_same_tensors(tmp_path / "whole" / name, out / name)
    seconds = [row["seconds"] for row in rows(out)]
    assert seconds == sorted(seconds)


def test_a_log_that_is_not_the_runs_own_is_said_and_begun_again(train, out, capsys):
    train(out)
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    train(out, "--resume", "--steps", "12")
    assert "metrics.jsonl is not as this run left it, so it begins again" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == [9, 10, 11, 12]
    assert rows(out)[0]["tokens"] == 9 * 64


def test_the_log_of_another_run_stays_until_its_checkpoint_is_replaced(train, out, monkeypatch):
    train(out)
    before = (out / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_at(patch, "train_step", 3)
        train(out, "--overwrite", "--seed", "5")
    assert before == (out / "metrics.jsonl").read_bytes()
    train(out, "--overwrite", "--seed", "5")
    assert len(rows(out)) == 9 and before != (out / "metrics.jsonl").read_bytes()


def test_the_best_weights_stay_where_later_ones_are_worse(train, data, out, monkeypatch, capsys):
    """Validation losses made up: the second is the best, also for a run that is resumed after the third."""
    losses, real = [5.0, 3.0, 4.0], gpt.evaluate

    def evaluate(model, *args, **options):
        real(model, *args, **options)
        return losses.pop(0) if losses else 9.0  # run_train measures once more

    monkeypatch.setattr(gpt, "evaluate", evaluate)
    train(out, "--steps", "9")
    best = gpt.load_tensors(out / "best" / "model.safetensors")
    about = json.loads(best[1]["about"])
    assert (about["step"], about["val_loss"], about["tokenizer"]) == (6, 3.0, "bytes")
    losses[:] = [3.5, 3.2]
    train(out, "--resume", "--steps", "15")
    assert gpt.load_tensors(out / "best" / "model.safetensors")[1] == best[1]
    losses[:] = [2.5]
    train(out, "--resume", "--steps", "18")
    assert json.loads(gpt.load_tensors(out / "best" / "model.safetensors")[1]["about"])["step"] == 18
    monkeypatch.undo()
    gpt.main(["generate", "--model", str(out / "best"), "--max-new-tokens", "3"])


def test_the_best_weights_of_a_run_that_was_replaced_do_not_stay(train, out, monkeypatch):
    """Ctrl-C between the first checkpoint and the first evaluation."""
    train(out)
    real = gpt.train_step

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(gpt, "train_step", interrupted)
    with pytest.raises(SystemExit):
        train(out, "--overwrite", "--seed", "5")
    assert (out / CHECKPOINT).exists() and not (out / "best" / "model.safetensors").exists()


def test_what_is_not_finite_stops_before_the_optimizer_and_is_named(train, data, out, monkeypatch):
    train(out)
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    tokens, _ = fastgpt.data.load_tokens(data, gpt.get_tokenizer("bytes"), 16)
    config = gpt.TrainConfig(batch_size=4)
    windows = [idx for idx, _ in gpt.step_batches(tokens, 16, 9, config)][0]
    real = gpt.GPT.loss

    def loss(model, idx, targets):  # the third window of the next step is what does it
        infinite = torch.stack([(window == windows[2]).all() for window in idx]).any()
        return real(model, idx, targets) * (float("inf") if infinite else 1.0)

    monkeypatch.setattr(gpt.GPT, "loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    with pytest.raises(SystemExit) as end:
        train(out, "--resume", "--steps", "12", "--lr", "0.003", "--weight-decay", "0")
    message = end.value.code
    rate = gpt.learning_rate(9, 12, 2, 0.003)
    assert "\n" not in message and "step 10: loss inf" in message and f"learning rate {rate:.4g}" in message
    starts = [int(text) for text in message.split("windows that start at tokens ")[1].split(";")[0].split(", ")]
    assert all(
        torch.equal(torch.from_numpy(tokens[start : start + 16].astype("int64")), windows[2]) for start in starts
    )
    assert f"`--resume` goes on from step 9, {str(out / CHECKPOINT)!r}" in message
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupt_during_an_evaluation_keeps_its_step(train, out, tmp_path, number, monkeypatch, capsys):
    train(tmp_path / "whole")
    real, calls = gpt.lm_loss, []

    def lm_loss(*args):
        if not torch.is_grad_enabled():
            calls.append(0)
            if len(calls) == 5:  # in the middle of the first evaluation
                os.kill(os.getpid(), number)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(gpt, "lm_loss", lm_loss)
        train(out)
    assert end.value.code == 128 + number
    assert "stopped after step 3; `fastgpt train --resume" in capsys.readouterr().out
    assert gpt.load_tensors(out / CHECKPOINT)[1]["step"] == "3" and len(rows(out)) == 2
    train(out, "--resume")
    assert untimed(out) == untimed(tmp_path / "whole")
    assert_same_tensors(tmp_path / "whole" / CHECKPOINT, out / CHECKPOINT)


def test_another_machine_or_text_than_before_is_said(train, data, out, monkeypatch, capsys):
    train(out)
    monkeypatch.setattr(fastgpt.train, "machine", lambda *_: "torch 9.9, abacus")
    Path(data).write_text("a text of another kind, " * 100)
    capsys.readouterr()
    train(out, "--resume", "--steps", "10")
    said = capsys.readouterr().out
    assert "last digits may differ: torch 9.9, abacus, it was torch" in said
    assert "the text has changed" in said
    assert json.loads(gpt.load_tensors(out / "best" / "model.safetensors")[1]["about"])["step"] == 10


@pytest.mark.parametrize("damage", ("{}", "[]", "nonsense", '{"size": "x"}'))
def test_a_checkpoint_whose_own_words_are_odd_is_refused(train, out, damage):
    train(out)
    tensors, about = gpt.load_tensors(out / CHECKPOINT)
    gpt.save_tensors(out / CHECKPOINT, tensors, about | {"run": damage})
    with pytest.raises(SystemExit, match=f"{CHECKPOINT} is damaged"):
        train(out, "--resume")


def test_plot_draws_runs_together(train, out, tmp_path, capsys):
    train(out)
    train(tmp_path / "other", "--seed", "5")
    for name, begin in (("loss.png", b"\x89PNG"), ("loss.svg", b"<?xml")):
        path = tmp_path / name
        assert fastgpt.__main__.run(["plot", str(out), str(tmp_path / "other"), "--out", str(path)]) == 0
        assert path.read_bytes().startswith(begin)
    last = rows(out)[-1]
    assert f"out: 9 steps, best validation {last['validation']:.4f} at step 9" in capsys.readouterr().out


def test_plot_refuses_what_it_cannot_draw(out, tmp_path, capsys):
    out.mkdir()
    for content, argv in (
        (None, [str(out)]),
        ("nonsense\n", [str(out)]),
        ('{"step": 1}\n', [str(out)]),
        (
            '{"step": 1, "tokens": 9, "loss": 2.0, "validation": null, "seconds": 1}\n',
            [str(out), "--out", str(tmp_path / "x.doc")],
        ),
    ):
        if content:
            (out / "metrics.jsonl").write_text(content)
        assert fastgpt.__main__.main(["plot", *argv]) == 1
        said = capsys.readouterr().err
        assert said.startswith("fastgpt plot: error: ") and said.count("\n") == 1
        assert not (tmp_path / "x.doc").exists()
