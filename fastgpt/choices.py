"""Multiple choice, from HellaSwag's JSONL: which of several endings does a model find most probable after a context?

An item is a line with `ctx` (or `ctx_a` and `ctx_b`), `endings` and `label`, the number of the right one from 0. As in
llm.c (dev/data/hellaswag.py) an ending's tokens are those of a space and the ending, after those of the context. acc
takes the ending with the largest sum of log-probabilities, acc_norm the one with the largest mean a token.
lm-evaluation-harness puts the item's activity_label before the context, removes what is in brackets and divides by
characters, so its figures are others.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import torch

import gpt

from . import data, likelihood
from .packed import expect

METRICS = ("acc", "acc_norm")


@dataclass
class Item:
    line: int  # in its file, from 1
    context: str
    endings: list
    label: int


def read(path, limit=None):
    """The first `limit` items of a file, or all. ValueError with the line that is none."""
    items = []
    with gpt.reported_as(f"--choices is {path!r}, expected a readable JSONL file"), open(path, "rb") as file:
        lines = file.read().split(b"\n")
    for n, line in enumerate(lines, 1):
        if line.strip() and len(items) != limit:
            with gpt.reported_as(f"--choices: line {n} of {path} is no item"):
                items.append(make_item(n, json.loads(line)))
    expect(items, f"--choices is {path!r}, which has no items, expected one a line")
    return items


def make_item(n, known):
    expect(isinstance(known, dict), "expected an object with ctx, endings and label")
    context = known.get("ctx")
    if context is None and isinstance(known.get("ctx_a"), str):
        context = " ".join(filter(None, (known["ctx_a"], known.get("ctx_b"))))
    expect(isinstance(context, str), f"ctx is {context!r}, expected a text, or ctx_a and ctx_b")
    endings, label = known.get("endings"), known.get("label")
    several = isinstance(endings, list) and len(endings) > 1
    expect(several, f"endings is {endings!r}, expected a list of two or more")
    for i, ending in enumerate(endings):
        good = isinstance(ending, str) and ending.strip()
        expect(good, f"ending {i} is {ending!r}, expected a text that isn't empty")
    "".join((context, *endings)).encode()  # refuses halves of surrogates
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    good = type(label) is int and 0 <= label < len(endings)
    expect(good, f"label is {label!r}, expected 0 <= label < {len(endings)}, the number of endings")
    return Item(n, context, endings, label)


@dataclass
class Row:
    """An ending after its context."""

    tokens: np.ndarray
    n: int  # how many of them, the last, are the ending's


def encode(items, tokenizer, T):
    """-> for each item its rows, and how many contexts were cut.

    A row has T + 1 tokens at most, as the last one is a target alone. A context that is too long is cut on the left, as
    much for all of its endings. An empty one is <|endoftext|>.
    """
    rows, cut = [], 0
    for item in items:
        context = data.to_tokens(item.context, tokenizer, special=False).tolist() or [tokenizer.eot_token]
        endings = [data.to_tokens(f" {ending}", tokenizer, special=False).tolist() for ending in item.endings]
        for i, ending in enumerate(endings):
            what = f"--choices: ending {i} of line {item.line} has {len(ending)} tokens"
            expect(len(ending) <= T, f"{what}, expected at most {T}, the model's block_size")
        room = T + 1 - max(map(len, endings))
        cut += len(context) > room
        rows.append([Row(np.array(context[-room:] + ending, np.int64), len(ending)) for ending in endings])
    return rows, cut


def log_probabilities(model, rows, batch_size):
    """Of each row's ending, in nats, given what is before it: float64 (len(rows),).

    The longest rows first, so that those of a batch are about as long. The shorter are filled up on the right, where no
    token before sees it.
    """
    sums = torch.empty(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    for start in range(0, len(order), batch_size):
        gpt.progress(f"ending {start + 1:,} of {len(order):,}")
        some = order[start : start + batch_size]
        nll = likelihood.nll_of_batch(model, *batch([rows[i] for i in some]))
        sums[some] = -torch.stack([x.sum() for x in nll.split([rows[i].n for i in some])])
    gpt.progress("")
    return sums


def batch(rows):
    """idx (B, T) and targets (B, T), which count where they are an ending's."""
    idx = torch.zeros(len(rows), max(len(row.tokens) for row in rows) - 1, dtype=torch.int64)
    targets = torch.full_like(idx, -1)
    for i, row in enumerate(rows):
        end, tokens = len(row.tokens) - 1, torch.from_numpy(row.tokens)
        idx[i, :end], targets[i, end - row.n : end] = tokens[:-1], tokens[-row.n :]
    return idx, targets


def correct(model, items, rows, batch_size):
    """Which items a model gets right: {metric: bool (len(items),)}. Of equal endings it takes the first."""
    sums = log_probabilities(model, [row for item in rows for row in item], batch_size)
    right = {metric: [] for metric in METRICS}
    for item, its_rows, scores in zip(items, rows, sums.split([len(x) for x in rows]), strict=True):
        means = scores / torch.tensor([row.n for row in its_rows])
        for metric, x in zip(METRICS, (scores, means), strict=True):
            right[metric].append(int(x.argmax()) == item.label)
    return {metric: np.array(x) for metric, x in right.items()}


def standard_error(right):
    """Of a share of n items, with n - 1 as for any mean; unknown for one item."""
    n, p = len(right), right.mean()
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


def mcnemar(won, lost):
    """McNemar's exact test: how probable is it to win or lose by so much, or more, if both were as likely?

    Two-sided, from the binomial distribution of won + lost throws of a coin (McNemar 1947).
    """
    n, below, ways = won + lost, 0, 1  # ways to choose k of n
    for k in range(min(won, lost) + 1):
        below, ways = below + ways, ways * (n - k) // (k + 1)
    return min(1.0, 2 * below / 2**n)


def report(names, models, items, tokenizer, T, batch_size):
    """Print a line for each model, and how the others differ from the first."""
    rows, cut = encode(items, tokenizer, T)
    results = [correct(model, items, rows, batch_size) for model in models]
    chance = np.mean([1 / len(item.endings) for item in items])
    print(f"{len(items):,} items; by chance {chance:.4f} are right")
    if cut:
        print(f"{cut:,} contexts were too long for {T} positions and were cut on the left")
    width, several = max(map(len, names)), "   won  lost       p" if len(names) > 1 else ""
    print(f"{'':{width}}" + "".join(f"{metric:>10}{'':9}{several}" for metric in METRICS).rstrip())
    for name, result in zip(names, results, strict=True):
        line = f"{name:{width}}"
        for metric in METRICS:
            right, first = result[metric], results[0][metric]
            line += f"{right.mean():10.4f} ± {standard_error(right):.4f}"
            line += " " * len(several) if result is results[0] else beside(right, first)
        print(line.rstrip())
    if several:
        print(f"won, lost: items that it alone gets right, or {names[0]} alone; p: McNemar's exact test")


def beside(right, first):
    won, lost = int((right & ~first).sum()), int((first & ~right).sum())
    return f"{won:6}{lost:6}{mcnemar(won, lost):8.4f}"
