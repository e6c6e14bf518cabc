"""The fastgpt command, as a user calls it."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastgpt
import gpt
from fastgpt import __main__ as front
from fastgpt import bench, bench_step, check

COMMANDS = ("info", "check", "bench", "demo", "train", "compare", "generate", "quantize", "dequantize", "eval")
VERSION = f"fastgpt {importlib.metadata.version('fastgpt')}"


def fastgpt_command(*argv, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "fastgpt", *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=300,
    )


@pytest.mark.slow
def test_info_tells_versions_instruction_set_and_threads(tmp_path):
    run = fastgpt_command("info", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(VERSION) and f"torch {torch.__version__}" in run.stdout
    assert f"processor: {bench.processor()}" in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 100
    assert f"in use: {fastgpt._kernels.isas()[-1]}" in run.stdout
    assert "torch's own pool" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", fastgpt._kernels.isas())
def test_environment_forces_an_instruction_set(name, tmp_path):
    run = fastgpt_command("info", cwd=tmp_path, FASTGPT_ISA=name)
    assert f"in use: {name}" in run.stdout, run.stderr


@pytest.mark.slow
def test_unknown_instruction_set_is_an_error(tmp_path):
    run = fastgpt_command("info", cwd=tmp_path, FASTGPT_ISA="mmx")
    assert run.returncode != 0 and "FASTGPT_ISA is 'mmx', expected one of: " in run.stderr


@pytest.mark.slow
def test_check_prints_a_table_and_succeeds(tmp_path):
    run = fastgpt_command("check", "--quick", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "bound" in run.stdout and "FAILED" not in run.stdout


@pytest.mark.slow
def test_check_fails_where_a_kernel_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(check, "CASES", {"gelu": check.CASES["gelu"]})
    monkeypatch.setattr(check.ops, "gelu", torch.nn.functional.gelu)  # the erf form
    with pytest.raises(SystemExit) as status:
        check.main(["--quick"])
    assert status.value.code == 1 and "FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_writes_its_figures(tmp_path, capsys):
    json_file, report = tmp_path / "figures.json", tmp_path / "report.md"
    bench.main(["--quick", "--seconds", "0.001", "--json", str(json_file), "--markdown", str(report)])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["op"] for row in figures["rows"]} >= {
        "layer_norm",
        "gelu",
        "linear",
        "attention",
        "lm_loss",
        "train step",
        "generate",
    }
    for row in figures["rows"]:
        assert row["kernel"]["ms"] > 0 and row["ratio"] == pytest.approx(row[row["best"]]["ms"] / row["kernel"]["ms"])
        assert row[row["best"]]["ms"] <= row["torch"]["ms"]
    assert figures["limits"]["gflops"] > 1 and figures["limits"]["gbs"] > 0.1
    printed = capsys.readouterr()
    assert "best of torch" in printed.out and printed.err == ""  # progress is for terminals
    assert max(map(len, printed.out.splitlines())) <= 100
    section = report.read_text()
    assert f"## {bench.processor()}, {fastgpt._kernels.isa()}" in section and "fastgpt bench --quick" in section
    tables = [figures[name] for name in ("rows", "in_bfloat16") if name in figures]
    assert len(tables) == 1 + fastgpt._kernels.has_bfloat16()
    assert section.count("\n| ") == sum(1 + len(rows) for rows in tables)


def test_bench_of_a_step(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_step, "CASES", {"tiny": (gpt.GPTConfig(1, 1, 8, 8, 11), 2)})
    monkeypatch.setattr(bench, "limits", lambda: dict(gflops=1.0, gbs=1.0, bfloat16_gflops=1.0))
    files = ["--json", str(tmp_path / "step.json"), "--markdown", str(tmp_path / "step.md")]
    bench.main(["--step", "--case", "tiny", "--no-compile", "--seconds", "0.001", *files])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads((tmp_path / "step.json").read_text())
    dtypes = ("float32", "bfloat16") if fastgpt._kernels.has_bfloat16() else ("float32",)
    names = [f"{who} {dtype}" for dtype in dtypes for who in ("torch", "fastgpt")]
    assert [row["name"] for row in figures["rows"]] == names
    assert [bool(row["ratio"]) for row in figures["rows"]] == [name.startswith("fastgpt") for name in names]
    assert {"linear", "linearBackward", "lm_loss"} <= {r["name"] for r in figures["operations"] if r["share"]}
    assert any(line.startswith("Where a step of fastgpt") for line in lines) and max(map(len, lines)) <= 100
    text = (tmp_path / "step.md").read_text()
    assert text.count("\n| tiny ") == len(figures["rows"]) + len(figures["operations"])
    model = gpt.GPT(gpt.GPTConfig(1, 1, 8, 8, 11))
    assert all(a is b for a, b in zip(model.parameters(), bench_step.sharing(model, fastgpt).parameters(), strict=True))


def row(**other):
    times = dict(formula=dict(ms=1234.5, spread=0.1), torch=dict(ms=0.1234, spread=0.1))
    times |= dict(compile=dict(ms=12345.6, spread=0.1), kernel=dict(ms=0.1234, spread=0.1))
    rest = dict(best="compile", ratio=12.3, rate=1234.5, unit="GFLOP/s", share=0.5, beside="formula")
    return dict(op="linear_gelu", case="1024x768 -> 3072", part="forward+backward") | times | rest | other


def test_bench_has_a_title_and_a_gap_for_each_column(capsys):
    bench.show()
    bench.show(row())
    titles, values = capsys.readouterr().out.splitlines()
    assert max(len(titles), len(values)) <= 100
    assert values.split() == [*"linear_gelu 1024x768 -> 3072 fwd+bwd 1234 compile 12346 ±10%".split()] + [
        *"0.123 ±10% 12.30x 1234 GFLOP/s 50%".split()
    ]


@pytest.mark.parametrize("unit, isa, why", [("GB/s", "sse2", "cache"), ("GFLOP/s", "amx", "AMX")])
def test_bench_explains_a_share_above_the_limit(unit, isa, why):
    assert not any("Above" in line for line in bench.notes([row(share=1.0), row(share=None)], isa))
    notes = bench.notes([row(unit=unit, share=1.01)], isa)
    assert any("Above 100 %" in line and why in line for line in notes) and max(map(len, notes)) <= 100


def results(cpu, ratio):
    about = bench.about() | dict(cpu=cpu)
    return dict(about=about, limits=dict(gflops=1.0, gbs=1.0), rows=[row(ratio=ratio)])


def test_markdown_replaces_the_section_of_the_same_machine_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # it would stand before the command
    path = tmp_path / "benchmarks.md"
    for cpu, ratio in (("first", 1.11), ("second", 2.22), ("first", 3.33)):
        bench.write_markdown(path, results(cpu, ratio), ["--seconds", "1"])
    text = path.read_text()
    assert text.count("\n# ") + text.startswith("# ") == 1
    assert text.index("## first") < text.index("3.33x") < text.index("## second") < text.index("2.22x")
    assert text.count("## ") == 2 and "1.11x" not in text and "`fastgpt bench --seconds 1`" in text


@pytest.mark.parametrize("seconds", ("nan", "-1", "0", "inf", "soon"))
def test_bench_refuses_bad_seconds(seconds, capsys):
    with pytest.raises(SystemExit) as status:
        bench.main(["--seconds", seconds])
    assert status.value.code == 2
    assert f"argument --seconds: invalid positive number value: '{seconds}'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ("--json", "--markdown", "--plot"))
def test_bench_tries_its_files_before_it_measures(option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured before the file was tried"))
    path = str(tmp_path / "nowhere" / "file.png")
    assert front.main(["bench", option, path]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastgpt bench: error: ") and path in err and err.count("\n") == 1


def test_bench_refuses_a_plot_that_it_cannot_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured before the name was looked at"))
    assert front.main(["bench", "--plot", str(tmp_path / "plot.doc")]) == 1
    assert "plot.doc', expected a name that ends in one of" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_bench_draws_a_plot(tmp_path):
    bench.plot([row(ratio=2.0)], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_knows_help_and_version(command, capsys):
    with pytest.raises(SystemExit) as status:
        front.main([command, "--help"])
    assert not status.value.code and f"usage: fastgpt {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as status:
        front.main([command, "--version"])
    assert not status.value.code and capsys.readouterr().out == f"{VERSION}\n"


@pytest.mark.parametrize(
    "argv", [["teach"], ["info", "extra"], ["demo", "extra"], ["check", "--teach"], ["train", "--teach"]]
)
def test_what_is_not_known_is_refused_with_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as status:
        front.main(argv)
    err = capsys.readouterr().err
    assert status.value.code == 2 and "usage: fastgpt" in err and argv[-1] in err


def test_without_a_command_the_help_lists_them_all(capsys):
    assert front.main([]) == 2
    err = capsys.readouterr().err
    assert all(f"\n  {command} " in err for command in COMMANDS)


def test_ctrl_c_leaves_no_traceback(monkeypatch, capsys):
    for name in ("check", "bench"):

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(getattr(front, name), "main", interrupted)
        assert front.main([name]) == 130
        assert capsys.readouterr().err.split() == ["fastgpt", f"{name}:", "stopped"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("after", (0.1, 0.4, 0.8))
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(after, tmp_path):
    code = (  # as the script that pip installs
        "import sys; sys.argv[0] = 'bin/fastgpt'; print('begun', flush=True)\n"
        "from fastgpt.__main__ import main; sys.exit(main())"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, "check"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
    )
    assert run.stdout.readline() == "begun\n"
    time.sleep(after)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode in (130, -signal.SIGINT) and "Traceback" not in err


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_ends_in_silence(tmp_path):
    code = "import sys; from fastgpt.__main__ import main; sys.exit(main(['info']))"
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert run.returncode == 1 and run.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        code = "import sys; from fastgpt.__main__ import main; sys.exit(main(['info']))"
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "No space left" in run.stderr


@pytest.fixture
def quick_demo(monkeypatch, tmp_path):
    """The demo in an empty folder, of three steps and without the two reports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(front.check, "run", lambda quick: 0)
    monkeypatch.setattr(front.bench, "run", lambda quick, seconds: None)
    sizes = ["--n-layer", "1", "--n-embd", "16", "--batch-size", "2"]
    monkeypatch.setattr(front, "DEMO", [*sizes, "--steps", "3", "--eval-every", "3", "--sample", "5"])
    return lambda: front.main(["demo"])


def test_demo_keeps_its_model_where_generate_looks(quick_demo, capsys):
    assert quick_demo() == 0
    out = capsys.readouterr().out
    assert "at most 256 windows" in out
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [
        ["fastgpt", x] for x in ("generate", "train", "train")
    ]
    assert front.main(["generate", "--max-new-tokens", "3"]) == 0
    assert quick_demo() == 0 and os.listdir() == ["out"]  # its own model it replaces


def test_demo_leaves_the_models_of_others_alone(quick_demo, capsys):
    assert front.main(["train", *front.DEMO, "--out", "out"]) == 0
    Path("out-demo").write_text("a file")
    theirs = Path("out/model.safetensors").read_bytes()
    capsys.readouterr()
    assert quick_demo() == 0
    assert Path("out/model.safetensors").read_bytes() == theirs
    assert "fastgpt generate --model out-demo-2 " in capsys.readouterr().out
    assert front.main(["generate", "--model", "out-demo-2", "--max-new-tokens", "3"]) == 0


@pytest.mark.slow
def test_demo_leaves_its_own_model_alone_once_somebody_trains_it_on(quick_demo, capsys):
    assert quick_demo() == 0
    assert front.main(["train", "--resume", "--steps", "5", "--out", "out"]) == 0
    theirs = Path("out/model.safetensors").read_bytes()
    assert quick_demo() == 0 and Path("out/model.safetensors").read_bytes() == theirs
    assert Path("out-demo/model.safetensors").exists()


def test_demo_says_first_that_it_cannot_write(quick_demo, tmp_path, capsys):
    tmp_path.rmdir()
    assert quick_demo() == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "out" in printed.err


def test_the_command_is_installed():
    command = shutil.which("fastgpt", path=os.path.dirname(sys.executable))
    assert command, "no `fastgpt` beside this Python"
    run = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout == f"{VERSION}\n"


def test_too_little_memory_is_one_line_for_every_command_and_a_fault_is_a_traceback(monkeypatch, capsys):
    """torch's message has several lines; other RuntimeErrors are faults of the program."""

    def fail(message):
        raise RuntimeError(message)

    torchs = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator:\n can't allocate memory: 9 bytes"
    monkeypatch.setitem(front.COMMANDS, "eval", ("", lambda argv: fail(torchs)))
    assert front.main(["eval"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastgpt eval: error: ") and said.count("\n") == 1 and "can't allocate memory" in said
    monkeypatch.setitem(front.COMMANDS, "eval", ("", lambda argv: fail("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        front.main(["eval"])
