"""`fastgpt plot`: the losses of runs in one picture, from their metrics.jsonl."""

import argparse
import os

from . import bench, metrics

COLORS = ("#2f6f9f", "#c8553d", "#3d8b5f", "#8a5a9e", "#b8862b", "#4aa3a2", "#7a7a7a", "#d17ba5")


def curves(rows, x):
    """-> x and training loss of each row, smoothed; x and validation loss where it was measured"""
    losses, mean = [], None
    for row in rows:
        mean = row["loss"] if mean is None else 0.9 * mean + 0.1 * row["loss"]
        losses.append(mean)
    validated = [row for row in rows if row["validation"] is not None]
    return ([row[x] for row in rows], losses), ([row[x] for row in validated], [row["validation"] for row in validated])


def picture(runs, x, first=None):
    """runs: {name: rows}; first: {name: validation loss before the first step}, where known. -> figure, axes"""
    pyplot = bench.import_pyplot("plot")
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for i, (name, rows) in enumerate(runs.items()):
        trained, validated = curves(rows, x)
        if first and name in first:
            validated = ([0, *validated[0]], [first[name], *validated[1]])
        color = COLORS[i % len(COLORS)]
        axes.plot(*trained, color=color, linewidth=1, alpha=0.45)
        axes.plot(*validated, color=color, linewidth=1.8, marker="o", markersize=3, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel("loss, nats a token")
    axes.set_title("thick: validation; thin: training, a running mean", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend()
    figure.tight_layout()
    return figure, axes


def names(folders):
    """The last parts of the paths, or all of each where those are not different."""
    short = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    return short if len(set(short)) == len(short) else folders


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt plot", description="Draw the losses of runs together.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of `fastgpt train`, or a metrics.jsonl")
    parser.add_argument("--out", default="loss.png", metavar="FILE", help="PNG or SVG (default: %(default)s)")
    parser.add_argument("--x", choices=("step", "tokens", "seconds"), default="step", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    runs = dict(zip(names(args.runs), map(metrics.read, args.runs), strict=True))
    bench.try_picture(args.out, "--out")
    picture(runs, args.x)[0].savefig(args.out, dpi=120)
    for name, rows in runs.items():
        best = min((row for row in rows if row["validation"] is not None), key=lambda row: row["validation"], default=0)
        measured = f"best validation {best['validation']:.4f} at step {best['step']}" if best else "no validation"
        print(f"{name}: {len(rows):,} steps, {measured}")
