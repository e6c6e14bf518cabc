"""The command line of `fastgpt ablate`: train the variants of ablate.py with several seeds, compare them with GPT-2."""

import argparse
import inspect
import json
import math
import os
import statistics
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import gpt

from .. import bench, data, ops
from . import ablate, experiment
from .ablate import VARIANTS

TOKENIZER = gpt.get_tokenizer("bytes")
SIZES = ("n_layer", "n_head", "n_embd", "block_size")
OPTIONS = dict(
    n_layer=4, n_head=4, n_embd=64, block_size=32, batch_size=24, lr=3e-3
)  # of gpt.TrainConfig: small, quick


def build(v, config):
    torch.manual_seed(config.seed)
    sizes = {name: getattr(config, name) for name in SIZES}
    return v.build(gpt.GPTConfig(**sizes, vocab_size=TOKENIZER.n_vocab), ops)


def measure(v, config, tokens, val, title):
    """One run of a variant. -> its figures; a loss of None means that it diverged"""
    model, loss = build(v, config), math.nan
    try:
        experiment.train(model, tokens, replace(config, **v.options), title, config.steps)
        loss = gpt.evaluate(model, val, 48, 512)
    except ValueError as error:
        if not str(error).startswith("step "):  # what gpt.train_step says of numbers that are not finite
            raise
    figures = dict(loss=None, parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))
    if not math.isfinite(loss):
        return figures
    end, sample = loss_at_the_end(model, val), experiment.sample(model, TOKENIZER, 92)
    return figures | dict(loss=loss, end=end, causal=is_causal(model, val), sample=sample)


def step_times(names, config, tokens):
    """Medians of what a step of each variant takes, in turns: {name: ms}. Two at a time need little memory."""
    steps = {}
    for name in names:
        v = VARIANTS[name]
        model, options = build(v, config), replace(config, **v.options)
        optimizer = gpt.make_optimizer(model, options.lr, options.beta2, options.weight_decay)
        steps[name] = partial(gpt.train_step, model, optimizer, tokens, 0, options)
    return {name: statistics.median(times) * 1e3 for name, times in bench.interleaved(steps, 0, least=7).items()}


@torch.no_grad()
def loss_at_the_end(model, tokens, n=256):
    """Mean nats of the byte after a window, which no position of it can see."""
    T = model.config.block_size
    starts = np.linspace(0, len(tokens) - T - 1, n).astype(np.int64)
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))
    targets = windows[:, 1:].clone()
    targets[:, :-1] = -1
    return model.loss(windows[:, :-1], targets).item()


@torch.no_grad()
def is_causal(model, tokens):
    """Does another last byte leave all logits before it alone?"""
    idx = torch.from_numpy(tokens[: model.config.block_size].astype(np.int64))[None]
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % TOKENIZER.n_vocab
    return bool(torch.allclose(model(idx)[:, :-1], model(other)[:, :-1], atol=1e-4))


def interval(differences):
    """Mean of paired differences and half of its 95 % interval, by Student's t; None for fewer than two."""
    mean, deviation = experiment.mean_and_spread(differences)
    if deviation is None:
        return mean, None
    n, t = len(differences), np.linspace(0, 100, 2_000_001)
    scale = math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) / math.sqrt((n - 1) * math.pi)
    share = np.cumsum(scale * (1 + t**2 / (n - 1)) ** (-n / 2)) * (t[1] - t[0])  # of the distribution, from 0 to t
    return mean, float(np.interp(0.475, share, t)) * deviation / math.sqrt(n)


def code(v):
    """What a run hangs on beside the settings: CRC-32 of the variant's function and options."""
    return f"{zlib.crc32(f'{inspect.getsource(v.build)}{v.options}'.encode()):08x}"


def complete(figures):
    """Does a run from a file have all that the tables ask for? KeyError or TypeError if not."""
    _ = figures["parameters"] + 1
    if figures["loss"] is not None:
        _ = figures["loss"] + figures["end"], figures["causal"], figures["sample"] + ""


class Runs:
    """The finished runs in a JSON file, replaced as a whole after each. The same command goes on from there."""

    def __init__(self, path, settings):
        self.path, self.settings, self.runs, self.rows = path, settings, {}, []
        self.codes = {v.name: code(v) for v in VARIANTS.values()}  # now: the file may change while the runs go on
        if not os.path.exists(path):
            return
        try:
            with open(path, encoding="utf-8") as file:
                saved = json.load(file)
            before, self.runs = dict(saved["settings"]), saved["runs"]
            for run in self.runs.values():
                _ = run["code"], run["time"], [complete(one) for one in run["seeds"].values()]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"--json is {path!r}, which holds no runs of fastgpt ablate ({error})") from error
        other = [f"{k} {before.get(k)!r} instead of {v!r}" for k, v in settings.items() if before.get(k) != v]
        if other:
            raise ValueError(f"--json is {path!r}, with runs of {', '.join(other)}: take another file, or remove it")

    def of(self, v):
        """What is known of a variant, to be added to: nothing, if its code is another now."""
        if self.runs.get(v.name, {}).get("code") != self.codes[v.name]:
            self.runs[v.name] = dict(code=self.codes[v.name], time=None, seeds={})
        return self.runs[v.name]

    def save(self):
        results = dict(about=bench.about(), settings=self.settings, rows=self.rows, runs=self.runs)
        experiment.write_json(self.path, results)


def train_all(names, config, seeds, tokens, val, runs):
    """What is still to do, seed by seed, GPT-2 first; then the times of a step."""
    trials = [(name, seed) for seed in range(config.seed, config.seed + seeds) for name in names]
    trials = [(name, seed) for name, seed in trials if str(seed) not in runs.of(VARIANTS[name])["seeds"]]
    print(f"{len(names) * seeds} runs of {config.steps} steps, {len(names) * seeds - len(trials)} done", end="")
    if trials:
        ms = step_times(["gpt2"], config, tokens)["gpt2"]
        minutes = math.ceil(len(trials) * (config.steps + 30) * ms / 60e3)  # 30 steps' time to evaluate and to sample
        print(f"; {len(trials)} to do, some {minutes} min on {torch.get_num_threads()} threads", end="")
    print("\n", flush=True)
    for i, (name, seed) in enumerate(trials):
        title = f"{i + 1} of {len(trials)}: {name}, seed {seed}"
        figures = measure(VARIANTS[name], replace(config, seed=seed), tokens, val, title)
        runs.of(VARIANTS[name])["seeds"][str(seed)] = figures
        runs.save()
    for name in names:
        run = runs.of(VARIANTS[name])
        if run["time"] is None and name != "gpt2" and run["seeds"][str(config.seed)]["loss"] is not None:
            times = step_times(["gpt2", name], config, tokens)
            run["time"] = times[name] / times["gpt2"]
            runs.save()


def compare(v, run, baseline, floor=0.0):
    """A variant's row of the table, beside GPT-2's runs, {seed: figures}; `floor` is noise_floor's. -> dict"""
    figures = [run["seeds"][seed] for seed in baseline]
    row = dict(name=v.name, loss=None, difference=None, interval=None, floor=floor, time=run["time"])
    row |= dict(verdict="diverged")
    row |= dict(lines=experiment.lines_of(v.build) + 2)  # with its first line and its docstring
    row |= dict(parameters=figures[0]["parameters"] / next(iter(baseline.values()))["parameters"])
    pairs = list(zip([one["loss"] for one in figures], [one["loss"] for one in baseline.values()], strict=True))
    if any(None in pair for pair in pairs):
        return row
    row["difference"], row["interval"] = interval([one - other for one, other in pairs])
    row["loss"] = sum(one for one, _ in pairs) / len(pairs)
    row["verdict"] = verdict(row["difference"], row["interval"], floor)
    if not all(one["causal"] for one in figures):
        row["verdict"] = "sees the answer"
    return row


def noise_floor(runs, baseline):
    """How far from GPT-2 a variant may be that is GPT-2: the far end of the interval of `same`, 0.0 if not measured."""
    row = compare(VARIANTS["same"], runs.of(VARIANTS["same"]), baseline)
    return abs(row["difference"]) + row["interval"] if row["interval"] is not None else 0.0


def verdict(difference, half, floor):
    if half is None:
        return "one seed"
    return "within noise" if abs(difference) <= max(half, floor) else "worse" if difference > 0 else "better"


def show(rows, baseline, config, floor):
    """Print the table and what it means."""
    print(
        f"{'variant':<18}{'lines':>5}{'val loss':>10}{'difference':>12}{'± 95 %':>9}{'time':>8}{'params':>8}  verdict"
    )
    for r in rows:
        loss, difference, half, time = (
            "-" if r[key] is None else format(r[key], style)
            for key, style in dict(loss=".4f", difference="+.4f", interval=".4f", time=".2f").items()
        )
        sizes = f"{time:>7}x{r['parameters']:>7.2f}x"
        print(f"{r['name']:<18}{r['lines']:>5}{loss:>10}{difference:>12}{half:>9}{sizes}  {r['verdict']}")
    losses = [one["loss"] for one in baseline if one["loss"] is not None]
    loss, spread = experiment.mean_and_spread(losses) if losses else (math.inf, None)
    seeds = "1 seed" if len(baseline) == 1 else f"{len(baseline)} seeds"
    print(f"\nGPT-2: {loss:.4f} nats a byte after {config.steps} steps", end="")
    print(f", ±{spread:.4f} from seed to seed ({seeds})." if spread is not None else f" ({seeds}).")
    print("difference: to GPT-2 with the same seed, so batches and most first weights are the same; its mean")
    print("and 95 % interval over the seeds. time, params: of a step, of all that is trained. Within noise:")
    print("the interval holds 0", end="")
    print(f", or the difference is at most {floor:.4f}, as far as `same` may be from GPT-2." if floor else ".")


def show_literature(rows):
    print("\nWhat others found, beside ours\n")
    for r in rows:
        v = VARIANTS[r["name"]]
        ours = r["verdict"] if r["difference"] is None else f"{r['difference']:+.3f} {r['verdict']}"
        print(f"{v.name:<18}{ours:<24}{v.found or '-'}\n{'':<42}{v.source}")


def show_mask(ours, without):
    """The lesson on validation, from one run of each: a loss that looks at its own target says nothing."""
    if None in (ours["loss"], without["loss"]):
        return
    print(f"\nThe mask left off: a loss of\n{without['loss']:.3f} where the window holds the answer ", end="")
    print(f"(GPT-2: {ours['loss']:.3f}),\n{without['end']:.3f} for the byte after the window, which it ", end="")
    print(f"can't see (GPT-2: {ours['end']:.3f}).\nIt writes:\n    | {without['sample']}")
    print(f"and GPT-2:\n    | {ours['sample']}")


def plot(rows, path, config, floor):
    """Differences with their intervals; beyond 0.1 nats the axis is logarithmic."""
    rows = [r for r in reversed(rows) if r["difference"] is not None]
    figure, axes = bench.import_pyplot().subplots(figsize=(9, 0.32 * len(rows) + 1.4))
    colors = {"better": "#1b7837", "worse": "#b2182b"}
    for y, r in enumerate(rows):
        color = colors.get(r["verdict"], "gray")
        axes.errorbar(r["difference"], y, xerr=r["interval"] or 0, fmt="o", capsize=4, color=color)
    axes.axvspan(-floor, floor, color="gray", alpha=0.2)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [r["name"] for r in rows])
    axes.grid(axis="x", linewidth=0.3)
    axes.set_xlabel(f"validation loss minus GPT-2's after {config.steps} steps, nats a byte, with 95 % interval")
    figure.tight_layout()
    experiment.save_figure(figure, path)


def chosen(text):
    """Names from --only, or a line with those that there are."""
    names = [name.strip() for name in text.split(",")] if text else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"{name!r} is no variant, expected some of: {', '.join(VARIANTS)}")
    return ["gpt2", *(name for name in VARIANTS if name in names and name != "gpt2")]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt ablate", description=ablate.__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="NAME,NAME", help="these variants alone, beside gpt2, which is always there")
    parser.add_argument("--data", metavar="FILE", help="text file in UTF-8 (default: Python's own help texts)")
    count = experiment.at_least(1)
    parser.add_argument("--steps", type=count, default=500, metavar="N", help="of training (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=4, metavar="N", help="runs of each (default: %(default)s)")
    for name, default in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--json", default="ablate.json", metavar="FILE", help="where runs are kept (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the differences here")
    args = parser.parse_args(argv)
    names = chosen(args.only)
    config = gpt.TrainConfig(data=args.data, steps=args.steps, **{name: getattr(args, name) for name in OPTIONS})
    config = replace(config, warmup=min(config.warmup, config.steps))
    gpt.GPTConfig(**{name: getattr(config, name) for name in SIZES})
    experiment.try_files(args.json, args.plot)
    tokens, val = data.load_tokens(args.data, TOKENIZER, config.block_size)
    text = f"{len(tokens) + len(val)} bytes with CRC-32 {zlib.crc32(val, zlib.crc32(tokens)):08x}"
    runs = Runs(args.json, dict(text=text, steps=config.steps) | {name: getattr(config, name) for name in OPTIONS})
    try:
        train_all(names, config, args.seeds, tokens, val, runs)
    except KeyboardInterrupt:
        gpt.progress("")
        print(f"what is finished is kept in {args.json!r}; the same command goes on")
        raise
    seeds = [str(seed) for seed in range(config.seed, config.seed + args.seeds)]
    baseline = {seed: runs.of(VARIANTS["gpt2"])["seeds"][seed] for seed in seeds}
    floor = noise_floor(runs, baseline) if "same" in names else 0.0
    runs.rows = rows = [compare(VARIANTS[name], runs.of(VARIANTS[name]), baseline, floor) for name in names[1:]]
    runs.save()
    show(rows, list(baseline.values()), config, floor)
    show_literature(rows)
    if "no-mask" in names:
        show_mask(baseline[seeds[0]], runs.of(VARIANTS["no-mask"])["seeds"][seeds[0]])
    if args.plot:
        plot(rows, args.plot, config, floor)
