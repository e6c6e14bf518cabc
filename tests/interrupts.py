"""Training, interrupted at random times by real signals, then resumed: the same run as without, bit for bit.

    python tests/interrupts.py 100 1          # a hundred runs, seed 1
    python tests/interrupts.py 100 1 kill     # the same with kill -9 alone

Each run is a fork of this process, which has imported everything and computed nothing yet.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgpt.train
import gpt

OPTIONS = (
    "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --steps 40 --eval-every 7 --sample 20 --warmup 2"
    " --dropout 0.1 --accumulate 2"
).split()


def start(argv, log):
    """Run the command line in a fork. -> its process id"""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        fastgpt.train.main(argv[1:], gpt)
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:  # before main() took the signals over, or after it gave them back
        code = 130
    finally:
        sys.stdout.flush()
        os._exit(code)


WEIGHTS = ("training.safetensors", "model.safetensors", "best/model.safetensors")


def files(out):
    # --out is in the options, and differs; so compare tensors, not bytes
    return {name: gpt.load_tensors(Path(out) / name)[0] for name in WEIGHTS}


def rows(out):
    """The lines of the log, but for what the clock said."""
    timed = ("tokens_per_second", "mfu", "seconds")
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [{key: x for key, x in row.items() if key not in timed} for row in lines]


def differences(a, b):
    return [f"{name} {key}" for name in a for key in a[name] if not torch.equal(a[name][key], b[name][key])]


def run(n, seed, kill=False):
    """-> what went wrong, one line each"""
    rng, folder, wrong, codes = random.Random(seed), Path(tempfile.mkdtemp()), [], {}
    data, log = folder / "text.txt", folder / "log"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    argv = ["train", "--data", str(data), *OPTIONS]
    started = time.perf_counter()
    os.waitpid(start([*argv, "--out", str(folder / "whole")], log), 0)
    seconds = time.perf_counter() - started
    expected = None
    for i in range(n):
        out, interrupts = folder / f"out{i}", rng.randint(1, 3)
        while True:
            resume = (out / "training.safetensors").exists()
            pid = start([*argv, "--out", str(out), *(["--resume"] if resume else ["--overwrite"])], log)
            number = signal.SIGKILL if kill else rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
            if interrupts:
                time.sleep(rng.uniform(0, seconds))
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    os.kill(pid, number)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                else:
                    status = 0
            else:
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            codes[status] = codes.get(status, 0) + 1
            said, allowed = log.read_text(), (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM)  # SIGTERM: before main()
            if "Traceback" in said or "ignored" in said or "error" in said or status not in allowed:
                wrong.append(f"run {i}: status {status}: {said}")
            if not interrupts:
                break
            interrupts -= 1
        expected = expected or files(folder / "whole")
        wrong += [f"run {i}: the log differs"] if rows(folder / "whole") != rows(out) else []
        wrong += [f"run {i}: {d} differs" for d in differences(expected, files(out))]
        known = {*WEIGHTS, "config.json", "best", "best/config.json", "metrics.jsonl"}
        left = {str(p.relative_to(out)) for p in out.rglob("*")} - known
        wrong += [f"run {i}: {left} stayed"] if left else []
        shutil.rmtree(out)
    shutil.rmtree(folder)
    print(f"{n} runs of {seconds:.1f} s, exit statuses {codes}, {len(wrong)} things wrong")
    return wrong


if __name__ == "__main__":
    failed = run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["kill"])
    print("\n".join(failed))
    sys.exit(bool(failed))
