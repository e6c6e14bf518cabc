"""metrics.jsonl: a line of JSON a step, in the run's folder, which a checkpoint knows to the byte.

step, tokens   so far, of the whole run
loss           of the step's batches, in nats; validation: after the step, where it was measured, else null
rate, norm     learning rate; norm of the gradient before clipping
tokens_per_second, mfu, seconds    of this step; model flops utilisation; of all steps so far, without evaluations

Model flops utilisation: the flops of the model's products, attention's full square among them (Chowdhery et al. 2022,
"PaLM", appendix B; fastgpt.learn.cost counts), over those that the multiply-adds in registers reach in the same time.
"""

import json
import os
import time
import zlib

import torch

import gpt

from . import _kernels
from .learn import cost

NAME = "metrics.jsonl"


class Log:
    """Lines are added one by one; a checkpoint keeps `size` and `crc`, and cut() goes back to there."""

    def __init__(self, folder, held=False):
        """held: keep lines in memory until release(), because the file is still another run's."""
        self.path, self.held, self.text, self.size, self.crc = os.path.join(folder, NAME), held, b"", 0, 0
        self.empty = True  # so that the first line makes the file, and what stood there goes

    def add(self, row):
        line = json.dumps(row).encode() + b"\n"
        self.size, self.crc = self.size + len(line), zlib.crc32(line, self.crc)
        self.text += line
        if not self.held:
            self.write()

    def write(self):
        with open(self.path, "wb" if self.empty else "ab") as file:
            file.write(self.text)
        self.empty, self.text = False, b""

    def sync(self):
        """On the disk, before a checkpoint that counts on it is."""
        if not self.empty:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def release(self):
        """The folder is this run's now, so its lines may stand there."""
        if self.held:
            self.held = False
            self.write()

    def cut(self, size, crc):
        """Back to the first `size` bytes. -> rows that stood behind them, or None if the file is another than then"""
        try:
            with open(self.path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            content = b""
        if len(content) < size or zlib.crc32(content[:size]) != crc:
            return None
        gpt.write_whole(self.path, lambda name: write_bytes(name, content[:size]))
        self.size, self.crc, self.empty = size, crc, False
        return list(whole_rows(content[size:]))


def write_bytes(name, content):
    with open(name, "wb") as file:
        file.write(content)


def whole_rows(content):
    """The rows of a log up to the first that is cut off."""
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row


def read(folder):
    """The rows of the run in this folder, or of a file of such lines."""
    path = os.path.join(folder, NAME) if os.path.isdir(folder) else folder
    with gpt.reported_as(f"{path} is no log of a run"), open(path, "rb") as file:
        rows = list(whole_rows(file.read()))
        needed = ("step", "tokens", "loss", "validation", "seconds")
        gpt.expect(rows and all(row.keys() >= {*needed} for row in rows), f"expected rows with {', '.join(needed)}")
    return rows


def limit(in_bfloat16=False):
    """Multiply-adds that the threads in use can do, in flops a second: the best of 30 short turns, in some 20 ms."""
    best = 0.0
    for _ in range(30):
        start = time.perf_counter()
        flops = _kernels.multiply_add_work(200_000, in_bfloat16)
        best = max(best, flops / (time.perf_counter() - start))
    return best


def matmul_limit(device, dtype, n=4096):
    """What torch's matrix products reach on a GPU, in flops a second: the best of 10 of n x n matrices."""
    a, best = torch.ones(n, n, dtype=dtype, device=device), 0.0
    for _ in range(10):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        a @ a
        torch.accelerator.synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def flops(config, tokens):
    """Of a training step on so many tokens."""
    return cost.training_flops(cost.gpt2_like("the model", config), tokens, "square")
