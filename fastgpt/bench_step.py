"""`fastgpt bench --step`: whole training steps, fastgpt's and torch's, in float32 and in bfloat16 products.

A step is loss, gradients, clipping and AdamW (torch's fused one for all). The contestants share weights and optimizer
and take turns, as in bench.py. Then, for fastgpt: which operations a step spends its time in.
"""

import argparse
import json
import os
import statistics
import textwrap
from functools import partial
from pathlib import Path

import torch
from torch import nn

import gpt

from . import _kernels, bench, bfloat16, ops, torch_ops

CASES = {  # title: model, B
    "0.8M B12 T64": (gpt.GPTConfig(4, 4, 128, 64, 257), 12),
    "6 layers C384 B16 T256": (gpt.GPTConfig(6, 6, 384, 256, 257), 16),
    "124M B4 T256": (gpt.GPTConfig(block_size=256), 4),
    "124M B1 T1024": (gpt.GPTConfig(), 1),
}


def sharing(model, formulas):
    """The same model on other formulas: its parameters are those of `model`."""
    with torch.device("meta"):
        other = gpt.GPT(model.config, formulas)
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        theirs._parameters.update(mine._parameters)
    return other


def contestants(model, compiled):
    """{name: loss function}: torch's ways, and fastgpt's, each in float32 and, if the processor can, in bfloat16."""
    losses = {"torch float32": sharing(model, torch_ops).loss}
    if compiled:
        torch.compiler.reset()
        losses["compile float32"] = torch.compile(sharing(model, torch_ops).loss)
    losses["fastgpt float32"] = sharing(model, ops).loss
    if _kernels.has_bfloat16():
        for name in [name for name in losses if not name.startswith("fastgpt")]:
            loss = sharing(model, torch_ops).loss
            loss = bench.under_autocast(torch.compile(loss) if name.startswith("compile") else loss)
            losses[name.replace("float32", "bfloat16")] = loss
        losses["fastgpt bfloat16"] = sharing(model, bfloat16).loss
    return losses


def make_step(model, tokens):
    """step(loss function): one step of training, on the same batch each time."""
    optimizer = gpt.make_optimizer(model, 1e-4, 0.99, 0.1)

    def step(loss):
        loss(tokens[:, :-1], tokens[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepare(config, B):
    torch.manual_seed(0)
    model = gpt.GPT(config)
    return model, make_step(model, torch.randint(config.vocab_size, (B, config.block_size + 1)))


def run(case, seconds, compiled, limit):
    """Print one case. -> its figures: seconds a step by contestant"""
    config, B = CASES[case]
    model, step = prepare(config, B)
    losses = contestants(model, compiled)
    times = bench.interleaved({name: partial(step, loss) for name, loss in losses.items()}, seconds, least=2)
    medians = {name: statistics.median(values) for name, values in times.items()}
    T = config.block_size
    attention = 12 * config.n_layer * config.n_embd * (T + 1) // 2  # two products, the causal half; three times
    flops = B * T * (6 * sum(p.numel() for p in model.parameters()) + attention)
    for name, time in medians.items():
        best = limit["bfloat16_gflops" if name.endswith("bfloat16") else "gflops"]
        low, _, high = statistics.quantiles(times[name], n=4)
        print(
            f"{case:24}{name:18}{time * 1e3:9.1f} ms ±{(high - low) / 2 / time:3.0%}{B * T / time:9,.0f} tokens/s"
            f"{flops / time / 1e9 / best:6.0%} of the limit",
            flush=True,
        )
    for dtype in ("float32", "bfloat16"):
        rivals = [name for name in medians if name.endswith(dtype) and not name.startswith("fastgpt")]
        if rivals:
            best = min(rivals, key=medians.__getitem__)
            print(
                f"{case:24}fastgpt {dtype} is {medians[best] / medians['fastgpt ' + dtype]:.2f} times as fast as {best}"
            )
    name = list(losses)[-1]
    shares = f"Where a step of {name} spends its time: {', '.join(where(partial(step, losses[name])))}."
    print(textwrap.fill(shares, 100) + "\n", flush=True)
    return medians


def where(step, most=9):
    """Which operations a step spends its time in: texts, the longest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says when it starts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [e for e in profile.key_averages() if e.self_cpu_time_total]
    total = sum(e.self_cpu_time_total for e in events)
    events.sort(key=lambda e: -e.self_cpu_time_total)
    names = {e.key: e.key.removeprefix("aten::").removeprefix("fastgpt::") for e in events}
    return [f"{names[e.key]} {e.self_cpu_time_total / total:.0%}" for e in events[:most]]


def memory(name):
    """The most MiB that three steps of 124M, B4 T256, take with one of the contestants. Once in a process."""
    model, step = prepare(*CASES["124M B4 T256"])
    loss = contestants(model, False)[name]
    for _ in range(3):
        step(loss)
    return bench.peak_memory()


def report(seconds, compiled, only=None):
    """Print all cases, or one. -> the figures"""
    bench.keep_memory()
    limit = bench.limits()
    print("torch {torch}, {isa}, {threads} threads; limits measured now:".format_map(bench.about()))
    print(bench.spell(limit) + "\n")
    results = dict(about=bench.about(), limits=limit)
    results["seconds"] = {case: run(case, seconds, compiled, limit) for case in CASES if only in (None, case)}
    if only is None:
        names = [f"{who} {'bfloat16' if _kernels.has_bfloat16() else 'float32'}" for who in ("fastgpt", "torch")]
        code = "from fastgpt import bench_step; print(bench_step.memory({!r}))"
        peaks = {name: float(bench.in_a_fresh_process(code.format(name))) for name in names}
        print("peak memory of 124M B4 T256: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in peaks.items()))
        results["peak MiB"] = peaks
    return results


def main(argv):
    parser = argparse.ArgumentParser(prog="fastgpt bench --step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--step", action="store_true", help="this")
    parser.add_argument(
        "--seconds", type=bench.positive, default=20.0, metavar="S", help="time for a case (default: 20)"
    )
    parser.add_argument("--case", choices=CASES, help="this one alone, without peak memory")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    if args.json:
        bench.try_file(args.json)
    results = report(args.seconds, not args.no_compile, args.case)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
