"""Several processes on gloo: the bits of one, whatever their number, and faults that don't go unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
import gpt
from fastgpt import processes

HERE = Path(__file__).parent
TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --steps 6 --eval-every 3 --sample 1 --warmup 2".split()


@pytest.fixture
def runs(data):
    """A function: [(processes, fault, folder, options ...)] -> [(statuses, what was said)], one after another."""

    def run(*cases):
        cases = [[n, fault, [*TINY, "--data", data, "--out", str(out), *more]] for n, fault, out, *more in cases]
        argv = [sys.executable, HERE / "processes.py", json.dumps(cases)]
        return json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True).stdout)

    return run


def contents(out):
    """Weights and moments of a run, and its rows without times."""
    tensors, _ = gpt.load_tensors(out / "training.safetensors")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "loss", "validation", "rate", "norm")
    return tensors, [{key: row[key] for key in keys} for row in rows]


def assert_same(a, b):
    (tensors, rows), (others, other_rows) = contents(a), contents(b)
    assert rows == other_rows
    different = [name for name, x in tensors.items() if not torch.equal(x, others[name])]
    assert tensors.keys() == others.keys() and not different, different


def test_divided_keeps_the_windows_and_refuses_what_does_not_fit():
    assert processes.divided(12, 4, 2) == (12, 4)
    assert processes.divided(12, 1, 2) == (6, 2)
    assert processes.divided(12, 2, 6) == (4, 6)
    assert processes.divided(12, 3, 2) == (6, 6)
    for B, A, n in ((12, 1, 5), (3, 1, 2), (4, 3, 8)):
        with pytest.raises(
            ValueError, match=f"{n} processes can't share a step of --batch-size {B} x --accumulate {A}"
        ):
            processes.divided(B, A, n)


@pytest.mark.slow
def test_processes_equal_one_with_as_many_batches_bit_for_bit(runs, tmp_path):
    """Two or three processes with one batch each; two that share a batch; dropout; and evaluations."""
    said = runs(
        (1, None, tmp_path / "one", "--accumulate", "2", "--dropout", "0.1"),
        (2, None, tmp_path / "two", "--accumulate", "2", "--dropout", "0.1"),
        (2, None, tmp_path / "cut", "--accumulate", "1", "--dropout", "0.1", "--batch-size", "8"),
        (1, None, tmp_path / "one of three", "--accumulate", "3"),
        (3, None, tmp_path / "three", "--accumulate", "3"),
    )
    assert all(set(statuses) == {0} for statuses, _ in said), said
    assert "2 processes share a step as --batch-size 4 --accumulate 2" in said[2][1]
    assert said[1][1].count("step 6:") == 1  # one talks
    assert_same(tmp_path / "one", tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "cut")
    assert_same(tmp_path / "one of three", tmp_path / "three")


@pytest.mark.slow
def test_processes_on_torchs_functions_equal_one_bit_for_bit(runs, tmp_path):
    more = ("--accumulate", "2", "--ops", "torch", "--dropout", "0.1")
    said = runs((1, None, tmp_path / "one", *more), (2, None, tmp_path / "two", *more))
    assert all(set(statuses) == {0} for statuses, _ in said), said
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_any_number_of_processes_bit_for_bit(runs, tmp_path):
    """Begun by one or by two, with four batches a step; gone on with by others, twice."""
    cases, begins = [], {1: (2, 4), 2: (4, 1)}
    more = ("--accumulate", "4", "--eval-every", "2", "--dropout", "0.1")
    for n, (second, third) in begins.items():
        parts = tmp_path / f"parts{n}"
        cases.append((n, None, tmp_path / f"whole{n}", *more))
        cases.append((n, "killed at 3", parts, *more))
        cases.append((second, "killed at 5", parts, "--resume", *more))
        cases.append((third, None, parts, "--resume", *more))
    said = runs(*cases)
    for (n, fault, *_), (statuses, text) in zip(cases, said, strict=True):
        assert statuses == [9 if fault else 0] * n, text
    for n in begins:
        assert_same(tmp_path / f"whole{n}", tmp_path / f"parts{n}")
    one, two = (contents(tmp_path / f"whole{n}")[0] for n in (1, 2))
    assert any(not torch.equal(x, two[name]) for name, x in one.items())  # else the order of sums would be no matter


@pytest.mark.slow
def test_classic_faults_are_caught(runs, tmp_path):
    """Planted in two processes, with two batches each, of which the first must not be exchanged."""
    good, bypassed, late = runs(
        (2, None, tmp_path / "good", "--accumulate", "4"),
        (2, "bypassed_wrapper", tmp_path / "bypassed", "--accumulate", "4"),
        (2, "late_flag", tmp_path / "late", "--accumulate", "4"),
    )
    assert good[0] == [0, 0], good
    assert bypassed[0] == [1, 1] and "they are not synchronised" in bypassed[1]
    assert late[0] == [0, 0]
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "good", tmp_path / "late")


@pytest.mark.slow
def test_one_process_that_ends_or_is_signalled_stops_all_and_nothing_is_lost(runs, tmp_path):
    more = ("--accumulate", "2", "--eval-every", "2")
    whole, lost, after_lost, signalled, after_signal = runs(
        (2, None, tmp_path / "whole", *more),
        (2, "lost_process", tmp_path / "lost", *more),
        (2, None, tmp_path / "lost", "--resume", *more),
        (2, "signalled_process", tmp_path / "signalled", *more),
        (2, None, tmp_path / "signalled", "--resume", *more),
    )
    assert lost[0] == [1, 9] and "process 0 of 2: another process has gone" in lost[1], lost
    assert "goes on from step 2" in lost[1] and "Traceback" not in lost[1]
    assert signalled[0] == [143, 143] and "stopped after step 4" in signalled[1], signalled
    for text, out in ((after_lost, "lost"), (after_signal, "signalled")):
        assert text[0] == [0, 0], text
        assert_same(tmp_path / "whole", tmp_path / out)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_the_first_step(runs, tmp_path):
    three, diverged = runs(
        (3, None, tmp_path / "three"), (2, None, tmp_path / "diverged", "--accumulate", "2", "--lr", "1e30")
    )
    assert three[0] == [1, 1, 1] and "3 processes can't share a step of --batch-size 4 x --accumulate 1" in three[1]
    assert not [*(tmp_path / "three").glob("*")]
    assert diverged[0] == [1, 1] and "expected finite" in diverged[1] and "windows that start at" in diverged[1]


@pytest.mark.slow
def test_torchrun_trains_with_two_processes(data, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastgpt", "train"]
    run += [*TINY, "--data", data, "--out", str(tmp_path / "out")]
    env = os.environ | dict(PYTHONPATH=str(Path(fastgpt.__file__).parents[1]))  # installed or not
    result = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("step 6:") == 1, result.stdout + result.stderr
    assert len(contents(tmp_path / "out")[1]) == 6
