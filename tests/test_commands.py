"""The fastgpt command, as a user calls it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fastgpt
from fastgpt import bench, check


def fastgpt_command(*argv, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "fastgpt", *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=300,
    )


def test_info_tells_versions_instruction_set_and_threads(tmp_path):
    run = fastgpt_command("info", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"torch {torch.__version__}" in run.stdout
    assert f"in use: {fastgpt._kernels.isas()[-1]}" in run.stdout
    assert "torch's own pool" in run.stdout


@pytest.mark.parametrize("name", fastgpt._kernels.isas())
def test_environment_forces_an_instruction_set(name, tmp_path):
    run = fastgpt_command("info", cwd=tmp_path, FASTGPT_ISA=name)
    assert f"in use: {name}" in run.stdout, run.stderr


def test_unknown_instruction_set_is_an_error(tmp_path):
    run = fastgpt_command("info", cwd=tmp_path, FASTGPT_ISA="mmx")
    assert run.returncode != 0 and "FASTGPT_ISA is 'mmx', expected one of: " in run.stderr


def test_check_prints_a_table_and_succeeds(tmp_path):
    run = fastgpt_command("check", "--quick", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "kernel err" in run.stdout and "FAILED" not in run.stdout


def test_check_fails_where_a_kernel_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(check.ops, "gelu", torch.nn.functional.gelu)  # the erf form
    with pytest.raises(SystemExit) as status:
        check.main(["--quick"])
    assert status.value.code == 1 and "FAILED, expected <=" in capsys.readouterr().out


def test_bench_writes_its_figures(tmp_path, capsys):
    bench.main(["--quick", "--seconds", "0.001", "--json", str(tmp_path / "figures.json")])
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
    assert "best of torch ms" in capsys.readouterr().out


def test_bench_draws_a_plot(tmp_path):
    row = dict(op="gelu", case="1024x3072", part="forward", ratio=2.0)
    bench.plot([row], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_command_shows_the_usage(tmp_path):
    run = fastgpt_command("teach", cwd=tmp_path)
    assert run.returncode == 1 and "unknown command 'teach'" in run.stderr and "usage: fastgpt" in run.stderr
