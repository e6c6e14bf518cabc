"""fastgpt compare: the same text and budget for all ways, figures that are the runs' own, and nothing lost."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastgpt
import fastgpt.train
import gpt
from fastgpt import bench, compare, metrics
from fastgpt.__main__ import main

SIZES = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16".split()
QUICK = "--batch-size 4 --steps 6 --eval-every 3 --lora 2 --sample 5".split()

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(data, tmp_path):
    """A pretrained model: twenty steps."""
    folder = str(tmp_path / "base")
    fastgpt.train.main(["--out", folder, "--data", data, *SIZES, "--steps", "20", "--sample", "0"])
    return folder


@pytest.fixture
def text(tmp_path, text_in):
    """Another text than the base's."""
    return text_in(tmp_path, "other.txt", "pack my box with five dozen liquor jugs; ")


@pytest.fixture
def in_this_process(monkeypatch):
    """Train here: to start Python three times takes seconds. -> the arguments of each training"""
    seen = []

    def run(argv):
        seen.append(argv)
        try:
            fastgpt.train.main(argv)
        except SystemExit as end:
            raise ValueError(end.code) from end
        return 100.0

    monkeypatch.setattr(compare, "in_own_process", run)
    return seen


@pytest.fixture
def run(base, text, out, in_this_process):
    """The command. -> its status, or what it exits with"""

    def command(*more):
        return main(["compare", "--init", base, "--data", text, "--out", str(out), *QUICK, *more])

    return command


def results(out):
    return json.loads((Path(out) / "compare.json").read_text())


def test_all_ways_have_one_text_one_seed_and_the_models_sizes(run, out, base, in_this_process):
    assert run() == 0
    scratch, finetuned, adapters = ({x for x in argv if x.startswith("--")} for argv in in_this_process)
    same = {"--batch-size=4", "--steps=6", "--seed=1337", "--tokenizer=bytes", "--eval-every=3", "--warmup=0"}
    assert same <= scratch & finetuned & adapters
    assert {"--n-layer=1", "--n-embd=16", "--block-size=16", "--lr=0.001"} <= scratch
    assert {f"--init={base}", "--lr=0.0003"} <= finetuned and not any("lora" in x for x in finetuned)
    assert {f"--init={base}", "--lr=0.003", "--lora=2", "--lora-alpha=2.0"} <= adapters
    logs = [metrics.read(out / way) for way in compare.TRAINED]
    assert [[row["step"] for row in rows] for rows in logs] == [[1, 2, 3, 4, 5, 6]] * 3
    assert logs[1][0]["loss"] == pytest.approx(logs[2][0]["loss"], rel=1e-6)  # the first batch, before any change
    assert logs[0][0]["loss"] > logs[1][0]["loss"] + 0.1


def test_the_figures_are_those_that_eval_and_the_runs_give(run, out, base, text, capsys):
    assert run() == 0
    printed, ways = capsys.readouterr().out, results(out)["ways"]
    _, val = fastgpt.data.load_tokens(text, gpt.get_tokenizer("bytes"), 16)
    for way, folder in (("as it is", base), *((way, str(out / way)) for way in compare.TRAINED)):
        model, figures = gpt.GPT.from_pretrained(folder, fastgpt).eval(), ways[way]
        assert figures["loss"] == pytest.approx(gpt.evaluate(model, val, 4), rel=1e-6), way
        assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2))  # a token is a byte
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert len(figures["sample"]) <= 6 and f"| {figures['sample']}" in printed
        if way != "as it is":
            rows = metrics.read(folder)
            assert (figures["steps"], figures["seconds"]) == (6, rows[-1]["seconds"])
            assert figures["tokens_per_second"] == pytest.approx(6 * 4 * 16 / rows[-1]["seconds"])
            assert figures["validation"] == rows[-1]["validation"]
    everything = sum(p.numel() for p in gpt.GPT.from_pretrained(base).parameters())
    assert [ways[way]["trained"] for way in compare.TRAINED] == [
        everything,
        everything,
        2 * ((16 + 16 + 16 + 64) + (48 + 16 + 64 + 16)),
    ]
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert ways["lora"]["keep_bytes"] == sum((out / "lora" / name).stat().st_size for name in files)
    assert "from scratch" in printed and "LoRA, rank 2" in printed and "A step of LoRA takes" in printed


def test_a_budget_of_seconds_gives_a_cheaper_step_more_of_them(
    run, out, base, text, in_this_process, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "time_steps", lambda config, tokens: dict(finetuned=0.5, lora=0.25))
    argv = ["compare", "--init", base, "--data", text, "--out", str(out), *QUICK[:2], *QUICK[4:], "--budget", "4"]
    assert main(argv) == 0
    assert results(out)["steps"] == dict(scratch=8, finetuned=8, lora=16)
    assert "takes 0.50 of fine-tuning's time (250.0 and 500.0 ms, timed in turns)" in capsys.readouterr().out


def test_steps_are_timed_on_all_weights_and_on_adapters(base, data, monkeypatch):
    trained = {}

    def interleaved(steps, seconds, least):
        trained.update({way: len(gpt.trained(step.args[0])) for way, step in steps.items()})
        return {way: [step() and 3.0, 1.0, 2.0] for way, step in steps.items()}

    monkeypatch.setattr(bench, "interleaved", interleaved)
    config = compare.CompareConfig(init=base, batch_size=2, lora=2)
    tokens, _ = fastgpt.data.load_tokens(data, gpt.get_tokenizer("bytes"), 16)
    assert compare.time_steps(config, tokens) == dict(finetuned=2.0, lora=2.0)
    assert trained == dict(finetuned=16, lora=8)


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_with_what_is_missing(run, out, in_this_process, monkeypatch, capsys):
    assert run() == 0
    whole = results(out)["ways"]
    for way in ("finetuned", "lora"):
        assert run("--again", way) == 0
    again = results(out)["ways"]
    assert {way: x["loss"] for way, x in again.items()} == {way: x["loss"] for way, x in whole.items()}

    real = gpt.train_step

    def interrupted(*args):
        if args[3] == 4:
            raise KeyboardInterrupt
        return real(*args)

    def stopped(argv):
        with pytest.raises(SystemExit):
            fastgpt.train.main(argv)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(gpt, "train_step", interrupted)
        patch.setattr(compare, "in_own_process", stopped)
        run("--again", "lora")
    assert end.value.code == 128 + signal.SIGINT
    assert f"`fastgpt compare --out {out}` goes on" in capsys.readouterr().out
    assert results(out)["ways"].keys() == {"as it is", "scratch", "finetuned"}
    del in_this_process[:]
    assert main(["compare", "--out", str(out)]) == 0
    assert len(in_this_process) == 1 and "--resume" in in_this_process[0]
    done = results(out)["ways"]
    assert done["lora"]["loss"] == whole["lora"]["loss"] and done["lora"]["resumed"]
    del in_this_process[:]
    assert main(["compare", "--out", str(out)]) == 0 and not in_this_process


def test_another_rate_trains_that_way_alone(run, out, in_this_process, capsys):
    assert run() == 0
    before = results(out)["ways"]
    assert run("--lr-lora", "0.1") == 1
    assert "--lr-lora is 0.1, but was 0.003: --again lora trains that way anew" in capsys.readouterr().err
    assert run("--lr-lora", "0.1", "--again", "lora") == 0
    after = results(out)["ways"]
    assert len(in_this_process) == 4 and "--lr=0.1" in in_this_process[3]
    assert after["lora"]["loss"] != before["lora"]["loss"] and after["finetuned"] == before["finetuned"]


def test_the_picture_and_the_markdown_table(run, out, tmp_path):
    pytest.importorskip("matplotlib")
    picture, report = tmp_path / "loss.svg", tmp_path / "report.md"
    assert run("--plot", str(picture), "--markdown", str(report)) == 0
    assert "<svg" in picture.read_text()
    lines, ways = report.read_text().splitlines(), results(out)["ways"]
    rows = [line for line in lines if line.startswith(("| as", "| from", "| fine", "| LoRA"))]
    assert [f"{ways[way]['loss']:.4f}" in row for way, row in zip(ways, rows[:4], strict=True)] == [True] * 4


def test_a_run_that_fails_says_why_and_what_is_done_stays(run, out, monkeypatch, capsys):
    def failing(argv):
        if "--lora=2" in argv:
            raise ValueError("step 3: loss nan")
        fastgpt.train.main(argv)
        return 1.0

    monkeypatch.setattr(compare, "in_own_process", failing)
    assert run() == 1
    error = capsys.readouterr().err
    assert "compare: error: LoRA, rank 2: step 3: loss nan; what is done is kept" in error and error.count("\n") == 1
    assert results(out)["ways"].keys() == {"as it is", "scratch", "finetuned"}


@pytest.mark.parametrize(
    "more, words",
    [
        (["--budget", "0"], "--budget is 0.0, expected 0 < budget < inf"),
        (["--budget", "nan"], "--budget is nan"),
        (["--budget", "5"], "--budget is 5.0 and --steps 6, expected one of them"),
        (["--init", "nothing"], "'nothing' is no folder"),
        (["--init", "{empty}"], "model.safetensors"),
        (["--data", "nothing"], "--data is 'nothing'"),
        (["--data", "{short}"], "--data gives a part of 1 tokens, expected more than 16"),
        (["--lora", "17"], "--lora is 17, expected 1 <= lora <= 16"),
        (["--lora-alpha", "0"], "--lora-alpha is 0.0"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--tokenizer", "{empty}"], "tokenizer is"),
        (["--plot", "loss.nothing"], "expected a name that ends in"),
        (["--markdown", "no/such/folder.md"], "no/such/folder.md"),
        (["--out", "{base}"], "which holds best, config.json, metrics.jsonl, ... and no compare.json"),
        (["--out", "{short}"], "short.txt"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(x),
)
def test_bad_input_is_one_line_and_leaves_nothing(run, out, base, tmp_path, capsys, more, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    places = dict(empty=tmp_path / "empty", short=tmp_path / "short.txt", base=base)
    before = sorted(os.listdir(base))
    assert run(*(word.format(**places) for word in more)) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("fastgpt compare: error: ") and error.count("\n") == 1
    assert not out.exists() and sorted(os.listdir(base)) == before


def test_no_init_is_said(out, capsys):
    assert main(["compare", "--out", str(out)]) == 1
    assert "--init is missing, expected the pretrained model" in capsys.readouterr().err


def test_a_tokenizer_that_the_model_was_not_trained_with_is_refused(text, out, tmp_path, capsys):
    model = gpt.GPT(gpt.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=50257))
    model.save_pretrained(str(tmp_path / "wide"), tokenizer="gpt2")
    argv = ["compare", "--init", str(tmp_path / "wide"), "--data", text, "--out", str(out), "--tokenizer", "bytes"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("expected 'gpt2', with which --init was trained" in error or "TIKTOKEN" in error)


def test_other_weights_another_text_or_a_damaged_file_are_refused(run, out, base, text, data, capsys):
    assert run() == 0
    content = Path(text).read_text()
    Path(text).write_text(content + "more")
    assert run() == 1 and "the text of --data has changed" in capsys.readouterr().err
    Path(text).write_text(content)
    argv = ["--out", base, "--data", data, *SIZES, "--steps", "2", "--sample", "0", "--seed", "5", "--overwrite"]
    fastgpt.train.main(argv)
    assert run() == 1 and "the weights of --init have changed" in capsys.readouterr().err
    assert results(out)["ways"].keys() == {"as it is", *compare.TRAINED}
    (out / "compare.json").write_text('{"settings": {}}')
    assert run() == 1 and "whose compare.json is damaged" in capsys.readouterr().err


def test_a_loss_is_reached_at_the_first_evaluation_below_it():
    rows = [dict(seconds=s, validation=v) for s, v in ((1, None), (2, 3.0), (3, 2.0), (4, 2.5))]
    assert [compare.first_below(rows, loss) for loss in (3.5, 3.0, 2.1, 1.9)] == [2, 2, 3, None]


@pytest.mark.slow
def test_each_training_has_a_process_whose_peak_memory_is_its_own(base, text, tmp_path):
    ballast = torch.ones(100_000_000)  # 400 MB of this process
    argv = [f"--data={text}", f"--init={base}", f"--out={tmp_path / 'out'}", "--steps=3", "--sample=0"]
    peak = compare.in_own_process(argv)
    assert 50 < peak < bench.peak_memory() - 200 and len(ballast)
    assert metrics.read(tmp_path / "out")[-1]["step"] == 3
    with pytest.raises(ValueError, match="^--out is .*, which holds a checkpoint"):
        compare.in_own_process(argv)


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGKILL))
def test_a_signal_to_the_command_ends_the_training_with_a_checkpoint(base, text, tmp_path, number):
    out = tmp_path / "out"
    argv = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = {sys.path!r}; from fastgpt.__main__ import main; sys.exit(main())",
    ]
    argv += [
        "compare",
        "--init",
        base,
        "--data",
        text,
        "--out",
        str(out),
        "--steps",
        "1000000",
        "--eval-every",
        "1000000",
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        log, end = out / "scratch" / "metrics.jsonl", time.monotonic() + 60
        while not (log.exists() and log.stat().st_size > 1000) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert f"`fastgpt compare --out {out}` goes on" in said
    while not (out / "scratch" / "model.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.05)
    with fastgpt.train.claimed(str(out / "scratch")) if number != signal.SIGKILL else open(os.devnull):
        assert (out / "scratch" / "training.safetensors").exists()
