"""What the experiments share: training without a checkpoint, a loss to compare, files that are whole or not there."""

import argparse
import ast
import inspect
import json
import math
import os
import random
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import gpt

from .. import bench


def at_least(low, high=10**9):
    """An argparse type: an integer between two bounds."""

    def integer(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value}, expected {low} to {high:,}")
        return value

    return integer


def train(model, tokens, config, title, steps=None):
    """The first `steps` of a run, or all, as `fastgpt train` takes them. -> seconds

    ValueError, as gpt.train_step says it, where a loss, gradient or weight is not finite.
    """
    steps = steps or config.steps
    optimizer = gpt.make_optimizer(model, config.lr, config.beta2, config.weight_decay)
    started = time.perf_counter()
    for step in range(steps):
        loss = gpt.train_step(model, optimizer, tokens, step, config)
        gpt.progress(f"{title}: step {step + 1} of {steps}, loss {loss:.3f}")
    gpt.progress("")
    return time.perf_counter() - started


def val_loss(model, tokens):
    """Mean nats a token, in windows of the model's block_size: all of them, or of a large text 2**18 tokens."""
    T = model.config.block_size
    return gpt.evaluate(model, tokens, max(1, 3072 // T), None if len(tokens) <= 2**18 else max(1, 2**18 // T))


@torch.no_grad()
def sample(model, tokenizer, n):
    """What any model with logits writes: n characters of it, or what n tokens give, on one line."""
    idx, rng = torch.tensor([tokenizer.encode("\n")]), random.Random(0)
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :])[:, -1]
        idx = torch.cat((idx, gpt.sample(logits, 0.8, None, None, rng)), dim=1)
    return printable(tokenizer.decode_bytes(idx[0, 1:].tolist()))[:n]


def printable(data):
    """Bytes as text on one line."""
    text = data.decode(errors="replace").replace("\n", " ")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def replaced(ops, **formulas):
    """The formulas of `ops`, some of them exchanged, as a namespace for gpt.GPT."""
    names = (*gpt.FORMULAS, "linear_gelu")
    return SimpleNamespace(**{name: getattr(ops, name) for name in names} | formulas)


def mean_and_spread(values):
    """The mean and the standard deviation over seeds, which is None for one seed. Not finite: (inf, None)."""
    mean = sum(values) / len(values)
    if not math.isfinite(mean) or len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def write_json(path, results):
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_whole(path, write):
    """As gpt.write_whole. What could not be written to its end does not stay."""
    try:
        gpt.write_whole(path, write)
    finally:
        with suppress(FileNotFoundError):
            os.remove(f"{path}.tmp")


def try_files(json_path, plot_path):
    """Find out before the minutes of training, and not after, that a result can't be written or drawn."""
    bench.try_report_files(SimpleNamespace(json=json_path, markdown=None, plot=plot_path))
    for path in (json_path, plot_path):
        if path is not None:
            bench.try_file(f"{path}.tmp")  # see write_whole


def save_figure(figure, path):
    ending = os.path.splitext(path)[1][1:]
    write_whole(path, lambda name: figure.savefig(name, dpi=120, format=ending))


def lines_of(x):
    """Lines of the body of a class or function, without its docstring and empty ones."""
    source = textwrap.dedent(inspect.getsource(x))
    statements = ast.parse(source).body[0].body[1:]
    return sum(bool(line.strip()) for x in statements for line in source.splitlines()[x.lineno - 1 : x.end_lineno])


def definitions(cls):
    """All that a class is made of: of each name the latest definition, in the order of their birth. -> lines of code"""
    found = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(nn.Module)]):
        source = textwrap.dedent(inspect.getsource(base))
        for x in ast.parse(source).body[0].body[1:]:
            name = x.name if isinstance(x, ast.FunctionDef) else ast.unparse(getattr(x, "target", None) or x.targets[0])
            found[name] = source.splitlines()[x.lineno - 1 : x.end_lineno]
    return [line for lines in found.values() for line in [*lines, ""]]
