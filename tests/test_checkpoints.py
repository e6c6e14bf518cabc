"""Nothing is lost and nothing is silently other: interrupts, damaged files, full disks, two runs in one folder."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgpt.train
import gpt

HERE = Path(__file__).parent
TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --steps 6 --eval-every 2 --sample 3 --warmup 2".split()
SOURCES = (gpt.__file__, fastgpt.train.__file__)
FILES = ("training.safetensors", "model.safetensors", "config.json")


pytestmark = pytest.mark.usefixtures("one_thread")


def main(argv, ops=None):
    """`fastgpt train`, here on gpt.py's formulas, and gpt.py's other commands."""
    if argv[0] == "train":
        fastgpt.train.main(argv[1:], ops)
    else:
        gpt.main(argv, ops)


def train(out, *more, ops=None):
    main(["train", "--out", str(out), *more], ops)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory, text_in):
    folder = tmp_path_factory.mktemp("run")
    train(folder / "out", "--data", text_in(folder), *TINY)
    return folder / "out"


@pytest.fixture
def trained(a_run, out):
    """A folder with a run that has ended: a copy, to do harm to."""
    return shutil.copytree(a_run, out)


def tensors(out):
    return {name: gpt.load_tensors(Path(out) / name)[0] for name in FILES[:2]}


def contents(out):
    """The bytes of all files, by name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def assert_same(a, b):
    for name in FILES[:2]:
        assert a[name].keys() == b[name].keys()
        for key, x in a[name].items():
            assert torch.equal(x, b[name][key]), (name, key)


def refused(argv, *words, ops=None):
    """One line, status 1, with these words in it."""
    with pytest.raises(SystemExit) as end:
        main(argv, ops)
    message = end.value.code
    assert isinstance(message, str) and "\n" not in message and "error: " in message, message
    for word in words:
        assert word in message, message
    return message


# ------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.slow
@pytest.mark.parametrize("how", (["6", "1"], ["20", "1", "kill"]), ids=("signals", "kill -9"))
def test_runs_interrupted_at_random_end_the_same(how):
    run = subprocess.run([sys.executable, HERE / "interrupts.py", *how], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr


def lines_run(function, names):
    """The (name, line) of every line that the functions of gpt.py called `names` run, in order."""
    seen = {}

    def local(frame, event, _):
        if event == "line":
            seen.setdefault((frame.f_code.co_name, frame.f_lineno))
        return local

    def begin(frame, event, _):
        return local if frame.f_code.co_name in names and frame.f_code.co_filename in SOURCES else None

    sys.settrace(begin)
    try:
        function()
    finally:
        sys.settrace(None)
    return list(seen)


def interrupted_at(place, times, function):
    """Ctrl-C just before a line is run for the nth time."""
    left = [times]

    def local(frame, event, _):
        if event == "line" and (frame.f_code.co_name, frame.f_lineno) == place:
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGINT)
        return local

    def begin(frame, event, _):
        return local if frame.f_code.co_name == place[0] and frame.f_code.co_filename in SOURCES else None

    sys.settrace(begin)
    try:
        function()
    except SystemExit as end:
        assert end.code == 130
    finally:
        sys.settrace(None)
        for fd in os.listdir("/proc/self/fd"):  # a lock, which goes when a process ends
            with contextlib.suppress(OSError):
                if os.path.isdir(f"/proc/self/fd/{fd}"):
                    os.close(int(fd))


@pytest.mark.slow
@pytest.mark.parametrize("times", (1, 2))
def test_interrupt_before_any_line_loses_nothing(data, tmp_path, times, capsys):
    argv = ["--data", data, *TINY, "--steps", "4"]
    names = {
        "run",
        "go",
        "finish",
        "evaluate",
        "evaluated",
        "save",
        "claimed",
        "train",
        "train_step",
        "save_checkpoint",
        "save_tensors",
        "write_whole",
        "run_train",
    }
    places = lines_run(lambda: train(tmp_path / "whole", *argv), names)
    assert len(places) > 80
    expected = tensors(tmp_path / "whole")
    for i, place in enumerate(places):
        out = tmp_path / str(i)
        interrupted_at(place, times, lambda out=out: train(out, *argv))
        assert not list(out.glob("*.tmp")), place
        resume = ["--resume"] if (out / FILES[0]).exists() else []
        train(out, *argv, *resume)
        assert_same(expected, tensors(out))


def test_an_interrupt_inside_the_optimizer_waits_for_its_end(data, out, monkeypatch, capsys):
    """Between AdamW's two groups of parameters: the step is finished and saved, and training goes on from it."""
    train(out.with_name("whole"), "--data", data, *TINY)
    module = sys.modules["torch.optim.adam"]
    real, calls = module.adam, []

    def adam(*args, **options):
        calls.append(0)
        if len(calls) == 2 * 2 + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "adam", adam)
        train(out, "--data", data, *TINY)
    assert "stopped after step 3; `fastgpt train --resume" in capsys.readouterr().out
    assert gpt.load_tensors(out / FILES[0])[1]["step"] == "3"
    train(out, "--resume")
    assert_same(tensors(out.with_name("whole")), tensors(out))


@pytest.mark.parametrize("where", ("evaluate", "generate", "load_pretrained", "GPT"))
def test_interrupt_elsewhere_is_quiet(data, out, where, monkeypatch, capsys):
    train(out, "--data", data, *TINY)
    capsys.readouterr()
    real = getattr(gpt, where)
    number = signal.SIGTERM if where == "GPT" else signal.SIGINT

    def interrupted(*args, **options):
        os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(gpt, where, interrupted)
    argv = {
        "evaluate": ["eval", "--model", str(out), "--data", data],
        "generate": ["generate", "--model", str(out)],
        "load_pretrained": ["generate", "--model", str(out)],
        "GPT": ["train", "--out", str(out), "--data", data, "--overwrite"],
    }[where]
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 128 + number and capsys.readouterr() == ("", "")
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(1, 4))
def test_killed_between_two_files_each_still_loads(data, out, nth, monkeypatch):
    """--overwrite by a model of another size, cut off at each os.replace: one run's or the other's, no mixture."""
    train(out, "--data", data, *TINY)
    real, calls = os.replace, []

    def replace(a, b):
        calls.append(0)
        if len(calls) == nth:
            os._exit(9)
        real(a, b)

    if not (pid := os.fork()):
        monkeypatch.setattr(gpt.os, "replace", replace)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        train(out, "--data", data, *TINY, "--n-embd", "32", "--n-layer", "2", "--overwrite")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    model = gpt.GPT.from_pretrained(str(out))
    assert model.config.n_embd == (16 if nth < 3 else 32)
    checkpoint = gpt.load_tensors(out / FILES[0])
    assert checkpoint[0]["wte.weight"].shape[1] == (16 if nth < 2 else 32)
    gpt.main(["generate", "--model", str(out), "--max-new-tokens", "3"])
    train(out, "--resume")
    assert not list(out.glob("*.tmp"))
    assert gpt.GPT.from_pretrained(str(out)).config.n_embd == (16 if nth < 2 else 32)


# ------------------------------------------------------------------------------------------------------ damage


def damaged(content, rng):
    """Flips, cuts, overwritten pieces, and headers that say something else."""
    kind = rng.choice(("flip", "flips", "cut", "piece", "header", "empty", "longer"))
    content = bytearray(content)
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "flips":
        for _ in range(rng.randint(2, 50)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "piece":
        begin = rng.randrange(len(content))
        content[begin : begin + rng.randint(1, 100)] = rng.randbytes(rng.randint(0, 100))
    elif kind == "header":
        begin = rng.randrange(min(len(content), 3000))
        digits = [i for i in range(begin, len(content)) if chr(content[i]).isdigit()]
        content[digits[0] if digits else begin] = ord(str(rng.randrange(10)))
    elif kind == "empty":
        content = bytearray()
    else:
        content += rng.randbytes(rng.randint(1, 1000))
    return bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_one_line_with_its_name(data, out, name, capsys):
    n = int(os.environ.get("DAMAGES", "60"))
    train(out, "--data", data, *TINY)
    original = {file: (out / file).read_bytes() for file in FILES}
    expected = tensors(out)
    rng, harmless = random.Random(0), 0
    for i in range(n):
        content = damaged(original[name], rng)
        if content == original[name]:
            continue
        (out / name).write_bytes(content)
        argv = ["train", "--resume", "--out", str(out), "--steps", "7"]
        if name != FILES[0]:
            argv = ["generate", "--model", str(out), "--max-new-tokens", "2"]
        try:
            gpt.main(argv)
        except SystemExit as end:
            assert isinstance(end.code, str) and "\n" not in end.code and name in end.code, (i, end.code)
        else:  # only what decides nothing: config.json's sizes stand beside the weights as well
            assert name == "config.json", i
            harmless += 1
            for key, p in gpt.GPT.from_pretrained(str(out)).named_parameters():
                assert torch.equal(p.data, expected[FILES[0]][key]), key
        for file, content in original.items():
            (out / file).write_bytes(content)
    assert harmless < 0.8 * n


@pytest.mark.parametrize("name", FILES[:2])
def test_a_checksum_whose_name_is_damaged_is_missed(trained, name):
    path = trained / name
    path.write_bytes(path.read_bytes().replace(b"crc32", b"crc72", 1))
    with pytest.raises(ValueError, match=f"{name}.*CRC-32 does not match"):
        gpt.load_tensors(path)


def rewritten(path, change):
    """A file with a right checksum and wrong contents."""
    tensors, metadata = gpt.load_tensors(path)
    change(tensors, metadata)
    gpt.save_tensors(path, tensors, metadata)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, m: t.update({"exp_avg_sq.wte.weight": t["exp_avg_sq.wte.weight"][:-4]}), "exp_avg_sq.wte.weight is torch.float32 (253, 16), expected finite floats of shape (257, 16)"),
        (lambda t, m: t.update({"exp_avg.ln_f.bias": torch.zeros(3)}), "exp_avg.ln_f.bias is"),
        (lambda t, m: t.pop("exp_avg.h.0.ln_1.weight"), "has no exp_avg.h.0.ln_1.weight"),
        (lambda t, m: t.update({"wpe.weight": t["wpe.weight"][:9]}), "wpe"),
        (lambda t, m: t.update({"h.0.mlp.c_fc.weight": t["h.0.mlp.c_fc.weight"].long()}), "h.0.mlp.c_fc.weight is torch.int64"),
        (lambda t, m: t["h.0.ln_1.bias"].fill_(float("nan")), "h.0.ln_1.bias is torch.float32 (16,), expected finite floats"),
        (lambda t, m: t["exp_avg.ln_f.bias"].fill_(float("inf")), "exp_avg.ln_f.bias is torch.float32 (16,), expected finite floats"),
        (lambda t, m: t.update({"stranger": torch.zeros(3)}), "stranger"),
        (lambda t, m: m.update(step="-1"), "step is -1"),
        (lambda t, m: m.update(step="1e3"), "invalid literal"),
        (lambda t, m: m.pop("config"), "config"),
        (lambda t, m: m.update(config="[" * 100_000), "recursion"),
        (lambda t, m: m.update(config=json.dumps(dict(n_layer=999, n_head=1, n_embd=16, block_size=16, vocab_size=257))), "layers, wpe's shape, wte's shape are (999,"),
        (lambda t, m: m.update(config=json.dumps(dict(n_layer=1, n_head=1, n_embd=10**9, block_size=16, vocab_size=257))), "(1, 16, 1000000000, 257, 1000000000) by the config"),
        (lambda t, m: m.update(options=m["options"].replace('"steps": 6', '"steps": "many"')), "--steps is 'many'"),
        (lambda t, m: m.update(options=m["options"].replace("{", '{"color": 1, ')), "color"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_contents_of_a_whole_checkpoint_are_refused(trained, change, words):
    rewritten(trained / FILES[0], change)
    refused(["train", "--resume", "--out", str(trained)], FILES[0], words)


@pytest.mark.parametrize(
    "config, words",
    [
        ("[]", "config.json"), ("null", "config.json"), ("3", "config.json"), ('"x"', "config.json"), ("{", "config.json"), ("\xff\xfe", "config.json"),
        ({"n_layer": 10**12}, "layers"), ({"n_embd": 10**9}, "wte's"), ({"n_positions": 10**12}, "wpe's"), ({"vocab_size": 10**12}, "wte's"),
        ({"n_layer": 1.0}, "n_layer is 1.0"), ({"n_layer": True}, "n_layer is True"), ({"n_head": 0}, "n_head is 0"), ({"n_head": None}, "n_head is None"),
        ({"n_head": 3}, "not a multiple"), ({"n_embd": "16"}, "n_embd is '16'"), ({"tokenizer": 5}, "tokenizer is 5"), ({"n_inner": 17}, "n_inner is 17"),
        ({"layer_norm_epsilon": [1]}, "layer_norm_epsilon is [1]"), ("[" * 100_000, "config.json"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_odd_config_json_of_anothers_weights_is_refused(trained, config, words):
    theirs, _ = gpt.load_tensors(trained / "model.safetensors")
    gpt.save_tensors(trained / "model.safetensors", theirs)  # as another program writes it: no configuration in it
    if isinstance(config, dict):
        config = json.dumps(json.loads((trained / "config.json").read_text()) | config)
    (trained / "config.json").write_text(config, encoding="latin-1")
    refused(["generate", "--model", str(trained)], str(trained), words)


@pytest.mark.parametrize("offsets", ([-8, 56], [0, 128], [64, 64], [10**18, 10**18 + 64], [1, 65], [0, 63]))
def test_offsets_that_overlap_or_leave_the_file_are_refused(tmp_path, offsets):
    path = tmp_path / "x.safetensors"
    header = {
        "a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
        "b": {"dtype": "F32", "shape": [16], "data_offsets": offsets},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(128))
    with pytest.raises(ValueError, match="x.safetensors can't be read"):
        gpt.load_tensors(path)


def test_what_is_no_file_is_refused(tmp_path, data, out):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder.safetensors", "pipe", "missing"):
        with pytest.raises(ValueError, match=f"{name} can't be read.*does not exist or is no file"):
            gpt.load_tensors(tmp_path / name)
    train(out, "--data", data, *TINY)
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").mkdir()
    refused(["generate", "--model", str(out)], "model.safetensors")


# ----------------------------------------------------------------------------------------------- files, folders


@pytest.mark.parametrize("call", range(3))
def test_full_disk_is_one_line_and_keeps_the_old_checkpoint(data, out, call, monkeypatch):
    train(out, "--data", data, *TINY)
    before = contents(out)
    with monkeypatch.context() as patch:
        if call == 0:
            patch.setattr(gpt.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            refused(["train", "--out", str(out), "--data", data, *TINY, "--overwrite"], "No space left on device")
        elif call == 1:
            patch.setattr(
                gpt.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded", "a file"))
            )
            refused(["train", "--out", str(out), "--data", data, *TINY, "--overwrite"], "Disk quota exceeded: 'a file'")
        else:
            import resource

            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            try:
                refused(
                    ["train", "--out", str(out), "--data", data, *TINY, "--overwrite"], FILES[0], "could not be written"
                )
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == contents(out)


def test_second_run_in_the_same_folder_is_refused(data, out):
    with fastgpt.train.claimed(str(out)):
        (out / "model.safetensors.tmp").write_bytes(b"being written")
        refused(["train", "--out", str(out), "--data", data, *TINY], "another run is at work")
        assert (out / "model.safetensors.tmp").exists()
    train(out, "--data", data, *TINY)


def test_out_is_tried_before_the_first_step(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(gpt, "train_step", None)
    refused(["train", "--out", str(tmp_path / "file"), "--data", data, *TINY], str(tmp_path / "file"))
    refused(["train", "--out", "/proc/nowhere", "--data", data, *TINY], "/proc/nowhere")


def test_leftovers_of_a_killed_run_are_removed(data, out):
    out.mkdir()
    (out / "best").mkdir()
    for name in (*FILES, *fastgpt.train.BEST, "metrics.jsonl"):
        (out / f"{name}.tmp").write_bytes(b"half")
    (out / "notes.tmp").write_text("somebody's")
    train(out, "--data", data, *TINY)
    assert contents(out).keys() == {*FILES, *fastgpt.train.BEST, "metrics.jsonl", "notes.tmp"}


def test_anothers_weights_are_not_overwritten_unasked(data, out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"somebody's")
    refused(["train", "--out", str(out), "--data", data, *TINY], "model.safetensors", "--overwrite")
    assert (out / "model.safetensors").read_bytes() == b"somebody's"


def test_a_checkpoint_is_written_before_its_line_is_printed(data, out, monkeypatch, capsys):
    steps = []

    def spy(*words, **options):
        if words and str(words[0]).startswith("step "):
            steps.append((words[0].split(":")[0], gpt.load_tensors(out / FILES[0])[1]["step"]))

    monkeypatch.setattr("builtins.print", spy)
    train(out, "--data", data, *TINY)
    assert steps == [("step 2", "2"), ("step 4", "4"), ("step 6", "6")]


@pytest.mark.parametrize("lr", ("1e30", "1e300"))
def test_divergence_stops_before_the_checkpoint_is_touched(data, out, lr):
    train(out, "--data", data, *TINY)
    before = (out / FILES[0]).read_bytes()
    message = refused(
        ["train", "--resume", "--out", str(out), "--steps", "40", "--eval-every", "40", "--lr", lr], "step ", "--lr"
    )
    assert "goes on from step 6" in message and before == (out / FILES[0]).read_bytes()
    refused(["train", "--overwrite", "--out", str(out), "--data", data, *TINY, "--lr", lr], "nothing was saved")
    assert before == (out / FILES[0]).read_bytes()


@pytest.mark.parametrize("what", ("loss", "gradient", "parameter"))
def test_what_is_not_finite_is_named(small, what, monkeypatch, tmp_path):
    model = gpt.GPT(small)
    optimizer = gpt.make_optimizer(model, 1e-3, 0.99, 0.1)
    tokens, config = torch.randint(97, (500,)), gpt.TrainConfig(batch_size=2, out=str(tmp_path / "out"))
    if what == "loss":
        model.wte.weight.data[5] = float("nan")
    elif what == "gradient":
        model.h[0].attn.c_proj.bias.register_hook(lambda grad: grad * float("inf"))
    else:
        optimizer.register_step_post_hook(lambda *_: model.h[1].mlp.c_fc.bias.data.fill_(float("inf")))
    expected = {
        "loss": "loss nan",
        "gradient": "norm of its gradient inf",
        "parameter": "h.1.mlp.c_fc.bias is not finite",
    }
    before = model.wpe.weight.detach().clone()
    with pytest.raises(ValueError, match=f"step 8: .*{expected[what]}"):
        gpt.train_step(model, optimizer, tokens, 7, config)
        assert not torch.equal(before, model.wpe.weight)
        before = model.wpe.weight.detach().clone()
        gpt.save_checkpoint(model, optimizer, 8, config)
    assert torch.equal(before, model.wpe.weight) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("option, value", [("n-layer", "2"), ("n-head", "4"), ("n-embd", "32"), ("block-size", "8"), ("tokenizer", "gpt2"), ("init", "gpt2")])  # fmt: skip
def test_resume_refuses_what_cannot_change(data, out, option, value):
    train(out, "--data", data, *TINY)
    refused(["train", "--resume", "--out", str(out), f"--{option}", value], f"--{option} is", "cannot change")


def test_resume_says_aloud_what_changes(data, out, capsys):
    train(out, "--data", data, *TINY)
    capsys.readouterr()
    train(out, "--resume")
    assert "nothing to do" in capsys.readouterr().out
    train(out, "--resume", "--steps", "8", "--lr", "0.01", "--dropout", "0.1")
    said = capsys.readouterr().out
    assert "--steps 8 instead of 6, --lr 0.01 instead of 0.001, --dropout 0.1 instead of 0.0" in said
    assert "text has changed" not in said and "step 8: loss" in said
    Path(data).write_text("another text altogether, " * 100)
    train(out, "--resume", "--steps", "9")
    assert "the text has changed" in capsys.readouterr().out


def test_final_evaluation_of_a_large_text_is_bounded_and_says_so(tmp_path, out, capsys):
    path = tmp_path / "large.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60_000)
    train(out, "--data", str(path), *TINY, "--steps", "1", "--batch-size", "512")
    assert "on 16,384 windows of 16 from all over 270,000 tokens; saved" in capsys.readouterr().out


def test_resume_works_where_the_folder_was_moved(data, out, tmp_path):
    train(out, "--data", data, *TINY)
    out.rename(tmp_path / "moved")
    train(tmp_path / "moved", "--resume", "--steps", "8")
    assert not out.exists() and gpt.load_tensors(tmp_path / "moved" / FILES[0])[1]["step"] == "8"


def test_warmup_longer_than_the_run_is_said_and_cut(data, out, capsys):
    train(out, "--data", data, *TINY, "--warmup", "50")
    assert "--warmup 50 is longer than the run" in capsys.readouterr().out
    assert gpt.learning_rate(5, 6, 50, 1.0) == 1.0


def test_init_with_other_sizes_is_refused(data, out, tmp_path):
    train(out, "--data", data, *TINY)
    argv = [
        "train",
        "--out",
        str(tmp_path / "tuned"),
        "--data",
        data,
        "--init",
        str(out),
        "--steps",
        "2",
        "--sample",
        "1",
    ]
    refused([*argv, "--n-layer", "3"], "--n-layer is 3")
    gpt.main(argv)
    gpt.main([*argv[:3], "--resume", "--steps", "3"])
    assert gpt.GPT.from_pretrained(str(tmp_path / "tuned")).config.n_embd == 16


# --------------------------------------------------------------------------------------------------------- ops


def loud_gelu(x):
    return 1.1 * gpt.gelu(x)


def test_other_ops_than_those_of_training_are_named(data, out, capsys, monkeypatch):
    ops = SimpleNamespace(**{name: getattr(gpt, name) for name in gpt.FORMULAS} | {"gelu": loud_gelu})
    train(out, "--data", data, *TINY, ops=ops)
    assert json.loads((out / "config.json").read_text())["fastgpt_ops"] == {"gelu": f"{__name__}.loud_gelu"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt.GPT.from_pretrained(str(out), ops)
    with pytest.warns(UserWarning, match=r"was trained with .*loud_gelu.* not with"):
        gpt.GPT.from_pretrained(str(out))
    capsys.readouterr()
    gpt.main(["generate", "--model", str(out), "--max-new-tokens", "2"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "loud_gelu" in said[0]
    train(out, "--resume", "--steps", "7")
    assert "loud_gelu" in capsys.readouterr().err


def test_own_gelu_is_used_though_linear_gelu_stands_beside_it(small):
    formulas = {name: getattr(gpt, name) for name in (*gpt.FORMULAS, "linear_gelu")}
    torch.manual_seed(0)
    plain = gpt.GPT(small, SimpleNamespace(**formulas))
    idx = torch.arange(10)[None]
    for changed in ({"gelu": loud_gelu}, {"linear": lambda x, w, b=None: gpt.linear(x, w, b) * 1.1}):
        other = gpt.GPT(small, SimpleNamespace(**formulas | changed))
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(other(idx), plain(idx))
        composed = gpt.GPT(small, SimpleNamespace(**{name: (formulas | changed)[name] for name in gpt.FORMULAS}))
        composed.load_state_dict(plain.state_dict())
        assert torch.equal(other(idx), composed(idx))


# ------------------------------------------------------------------------------------------------ command line


BAD = [
    "", "teach", "train extra", "--nothing", "train --nothing", "train --steps", "train --steps x", "train --steps 2.5", "train --steps 0",
    "train --steps -1", "train --steps 99999999999999999999", "train --n-layer 0", "train --n-layer 100000", "train --n-head -2", "train --n-head 3",
    "train --n-embd 0", "train --n-embd 1000000000", "train --block-size 0", "train --block-size 900000", "train --batch-size 0",
    "train --batch-size 1000000000", "train --accumulate 0", "train --eval-every 0", "train --sample -1", "train --warmup -1", "train --lr nan",
    "train --lr inf", "train --lr -1", "train --lr 0", "train --lr x", "train --beta2 1", "train --beta2 -0.1", "train --beta2 nan",
    "train --weight-decay -1", "train --weight-decay inf", "train --clip 0", "train --clip nan", "train --clip -3", "train --dropout 1",
    "train --dropout -0.5", "train --dropout nan", "train --seed -1", "train --seed 1e3", "train --seed 99999999999999999999",
    "train --tokenizer bpe", "train --data /nowhere", "train --data /", "train --data /proc/self/mem", "train --init nothing", "train --resume",
    "train --out /proc/x", "generate", "generate --model nothing", "generate --model /", "generate --temperature -1", "generate --temperature nan",
    "generate --top-k 0", "generate --top-k 1.5", "generate --top-p 0", "generate --top-p 2", "generate --top-p nan", "generate --seed x",
    "generate --max-new-tokens 0", "generate --samples 0", "generate --tokenizer x", "eval", "eval --batch-size 0", "eval --model ./nothing",
    "generate --max-new-tokens 999999999999999999999", "eval --data", "train --lr 1e999", "generate --model ../x/y/z",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_odd_command_lines_end_with_one_or_two(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        gpt.main(line.split(), prog="gpt.py")
    if isinstance(end.value.code, str):
        assert end.value.code.startswith("gpt.py: error: ") and "\n" not in end.value.code
    else:
        assert end.value.code == 2 and "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_shows_defaults_and_version_is_there(capsys):
    for argv, words in (
        (
            ["train", "--help"],
            ("--n-layer INT", "blocks (default: 4)", "highest learning rate (default: 0.001)", "--resume"),
        ),
        (["generate", "--help"], ("--temperature FLOAT", "(default: 0.8)")),
        (["eval", "--help"], ("--batch-size INT",)),
        (["--version"], ("gpt.py 0.2",)),
        (["--help"], ("train a model on a text", "continue a prompt")),
    ):
        with pytest.raises(SystemExit) as end:
            gpt.main(argv)
        said = capsys.readouterr().out
        assert end.value.code == 0
        for word in words:
            assert word in said, said


def test_negative_seed_and_extreme_temperatures_generate(data, out, capsys):
    train(out, "--data", data, *TINY)
    for more in (("--seed", "-5"), ("--temperature", "1e-300"), ("--temperature", "1e300"), ("--top-k", "1000000000")):
        gpt.main(["generate", "--model", str(out), "--max-new-tokens", "3", "--prompt", "a", *more])
    gpt.main(["generate", "--model", str(out), "--max-new-tokens", "3", "--prompt", "\udcff"])  # bytes that are no text


@pytest.mark.slow
def test_pipe_that_nobody_reads_is_silent(data, out):
    train(out, "--data", data, *TINY)
    command = f"{sys.executable} {gpt.__file__} generate --model {out} --samples 3000 --max-new-tokens 4 | head -n 1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert [line for line in run.stderr.splitlines() if "tokens/s" not in line] == []
