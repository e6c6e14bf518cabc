"""The command line of `fastgpt ladder`: train the rungs of ladder.py, print what each reaches, draw it."""

import argparse
import difflib
import math
import time
from dataclasses import replace

import numpy as np
import torch

import gpt

from .. import bench, data, ops
from . import experiment, ladder
from .ladder import CONFIG, RUNGS, LearnedPairs, Pretrained, Uniform

LETTERS, LENGTH, COPIES = 10, 12, 4  # of the random strings; 12 is more than rung 5 sees
MOST = 50_000_000  # bytes to count: 6 GB of memory
COPY_STEPS = 500  # at most, on the strings
CHANCE = math.log(LETTERS)  # nats a letter


def repeats(n, seed):
    """n random strings, each written four times: a row of tokens."""
    strings = np.random.default_rng(seed).integers(ord("a"), ord("a") + LETTERS, (n, 1, LENGTH), dtype=np.uint16)
    return np.tile(strings, (1, COPIES, 1)).ravel()


@torch.no_grad()
def second_copy(model):
    """Mean nats a letter on the second copy of strings that the model has not seen; chance is ln 10 = 2.30."""
    ids = torch.tensor([model.tokenizer.encode_single_token(bytes([i])) for i in range(256)])
    idx, T = ids[repeats(256, seed=1).astype(np.int64)].view(256, -1)[:, : 2 * LENGTH], model.config.block_size
    targets = idx[:, 1:].clone()
    targets[:, : LENGTH - 1] = -1  # the first copy
    return model.loss(idx[:, :-1][:, -T:], targets[:, -T:].contiguous()).item()


def difference(one, other):
    """The code of two rungs as a diff."""
    titles = [f"{number}  {RUNGS[number].__name__}: {RUNGS[number].__doc__}" for number in (one, other)]
    return difflib.unified_diff(*map(experiment.definitions, (RUNGS[one], RUNGS[other])), *titles, lineterm="", n=1)


def nats_a_byte(model, path):
    """Validation loss on the text's last tenth. For bytes, nats a token are nats a byte."""
    _, val = data.load_tokens(path, model.tokenizer, model.config.block_size)
    n_bytes = len(model.tokenizer.decode_bytes(val[1:].tolist()))
    return experiment.val_loss(model, val) * (len(val) - 1) / n_bytes


def fitted(number, args, tokens, steps, seed, title):
    """A rung that has learned from `tokens`. -> the model, seconds"""
    seed += gpt.TrainConfig.seed  # the first is that of `fastgpt train`
    config = gpt.TrainConfig(steps=steps, seed=seed, batch_size=args.batch_size)
    torch.manual_seed(config.seed)
    if RUNGS[number] is Pretrained:
        model = Pretrained.load(args.pretrained, ops)
    else:
        model = RUNGS[number](replace(CONFIG, block_size=args.block_size), ops)
    started = time.perf_counter()
    model.fit(tokens, config, f"{number} {model.__doc__}{title}")
    return model, time.perf_counter() - started


def measure(number, args):
    """Train a rung with every seed, and once more on strings that repeat. -> its row of the table"""
    tokens, _ = data.load_tokens(args.data, Uniform.tokenizer, args.block_size)
    learns = issubclass(RUNGS[number], LearnedPairs) and RUNGS[number] is not Pretrained
    seeds = range(args.seeds if learns else 1)
    runs = [fitted(number, args, tokens, args.steps, seed, f", seed {seed + 1}") for seed in seeds]
    losses = [nats_a_byte(model, args.data) for model, _ in runs]
    loss, spread = experiment.mean_and_spread(losses)
    model, _ = runs[0]
    copier, _ = fitted(number, args, repeats(4096, seed=0), min(args.steps, COPY_STEPS), 0, ", strings that repeat")
    counted = int((model.table[1] > 0).sum()) if hasattr(model, "table") else 0
    return dict(
        rung=number,
        name=type(model).__name__,
        what=model.__doc__,
        lines=experiment.lines_of(type(model)),
        parameters=sum(p.numel() for p in model.parameters()) or counted,
        seconds=sum(seconds for _, seconds in runs) / len(runs),
        losses=losses,
        loss=loss,
        spread=spread,
        bits=loss / math.log(2),
        second_copy=second_copy(copier),
        sample=experiment.sample(model, model.tokenizer, 92),
    )


def show(r):
    """A row of the table, and below it what the model writes."""
    spread = "" if r["spread"] is None else f"±{r['spread']:.4f}"
    print(
        f"{r['rung']:>2}  {r['what']:<36}{r['lines']:>5}{r['parameters']:>13,}{r['seconds']:>8.1f}"
        f"{r['loss']:>9.4f} {spread:<8}{r['bits']:>6.3f}{r['second_copy']:>9.3f}\n    | {r['sample']}",
        flush=True,
    )


def notes(rows, steps):
    """What the columns mean, and who is ahead, by the figures above. -> lines"""
    loss = {r["rung"]: r["loss"] for r in rows}
    lines = [
        "nats a byte: validation loss, ± its spread over seeds; bits: the same in bits. Below, what the rung writes.",
        f"2nd copy: trained on random strings that repeat, nats a letter where one does; chance is {CHANCE:.2f}.",
    ]
    if {3, 10} <= loss.keys():
        who = "counting" if loss[3] < loss[10] else "GPT-2"
        lines.append(f"Counts of four bytes: {loss[3]:.4f}. GPT-2 after {steps} steps: {loss[10]:.4f}. ")
        lines[-1] += f"So {who} is ahead by {abs(loss[3] - loss[10]):.4f}."
    return lines


def plot(rows, path):
    """Both columns of losses, rung by rung."""
    figure, axes = bench.import_pyplot().subplots(figsize=(9, 5.5))
    x = range(len(rows))
    spreads = [r["spread"] or 0.0 for r in rows]
    axes.errorbar(x, [r["loss"] for r in rows], spreads, marker="o", capsize=4, label="the text, ± spread over seeds")
    axes.plot(x, [r["second_copy"] for r in rows], marker="s", label="second copy of a random string")
    axes.axhline(CHANCE, color="gray", linewidth=1, linestyle=":", label="chance for a random letter")
    axes.set_xticks(x, [f"{r['rung']}  {r['what']}" for r in rows], rotation=35, ha="right")
    axes.set_ylabel("validation loss, nats a byte")
    axes.set_ylim(0)
    axes.legend()
    figure.tight_layout()
    experiment.save_figure(figure, path)


def known(text):
    """The rung that a number names, or a line with those that there are."""
    if not (text.isdecimal() and int(text) < len(RUNGS)):
        names = ", ".join(f"{number} {rung.__name__}" for number, rung in enumerate(RUNGS))
        raise ValueError(f"{text!r} is no rung, expected one of: {names}")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt ladder", description=ladder.__doc__.split("\n\n")[0])
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help="two rungs: print their difference, train nothing")
    parser.add_argument("--only", metavar="3,10", help="train these rungs alone")
    parser.add_argument("--data", metavar="FILE", help="text file in UTF-8 (default: Python's own help texts)")
    count = experiment.at_least(1)
    parser.add_argument("--steps", type=count, default=500, metavar="N", help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=2, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--block-size", type=count, default=64, metavar="T", help="bytes in a window, 128 in rung 11")
    parser.add_argument("--batch-size", type=count, default=12, metavar="B", help="windows in a batch (default: 12)")
    parser.add_argument("--pretrained", metavar="MODEL", help="rung 12: a folder, gpt2, gpt2-medium, ...")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the losses here")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, after every rung")
    args = parser.parse_args(argv)
    numbers = [known(text) for text in args.rungs]
    if numbers:
        if len(numbers) != 2 or args.only:
            raise ValueError(f"RUNG is {' '.join(args.rungs)}, expected two to compare, or --only to train some")
        print("\n".join(difference(*numbers)))
        return
    only = [known(text.strip()) for text in args.only.split(",")] if args.only else range(len(RUNGS))
    if args.only and 12 in only and not args.pretrained:
        raise ValueError("rung 12 needs weights: --pretrained FOLDER, or gpt2, which is downloaded once")
    climb([number for number in only if number != 12 or args.pretrained], args)


def climb(numbers, args):
    """Train the rungs, print the table, write the files."""
    experiment.try_files(args.json, args.plot)
    if 12 in numbers:
        Pretrained.load(args.pretrained, ops)  # is it there?
    tokens, _ = data.load_tokens(args.data, Uniform.tokenizer, max(args.block_size, 128 if 11 in numbers else 1))
    if len(tokens) > MOST and any(RUNGS[number].fit is ladder.ByteCounts.fit for number in numbers):
        raise ValueError(
            f"--data has {len(tokens):,} bytes to train on, expected at most {MOST:,}: counting takes memory"
        )
    text = args.data or "Python's own help texts"
    print(f"{text}; {args.steps} steps; {args.seeds} {'seed' if args.seeds == 1 else 'seeds'}")
    print(f"{'rung':<40}{'lines':>5}{'parameters':>13}{'seconds':>8}{'nats a byte':>18}{'bits':>6}{'2nd copy':>9}")
    rows = []
    for number in numbers:
        rows.append(measure(number, args))
        show(rows[-1])
        if args.json:
            settings = {name: getattr(args, name) for name in ("data", "steps", "seeds", "block_size", "batch_size")}
            experiment.write_json(args.json, dict(about=bench.about(), settings=settings, rows=rows))
    print("\n".join(notes(rows, args.steps)))
    if args.plot:
        plot(rows, args.plot)
