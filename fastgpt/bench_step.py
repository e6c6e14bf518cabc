"""`fastgpt bench --step`: whole training steps, fastgpt's and torch's, in float32 and in bfloat16 products.

A step is loss, gradients, clipping and AdamW (torch's fused one for all). The contestants share weights and optimizer
and take turns, as in bench.py. Then, for fastgpt: which operations a step spends its time in, and how near each of
them is to the limits of the machine.
"""

import argparse
import os
import statistics
from functools import partial

import torch

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
        gpt.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def prepare(config, B):
    torch.manual_seed(0)
    model = gpt.GPT(config)
    return model, make_step(model, torch.randint(config.vocab_size, (B, config.block_size + 1)))


def run(case, seconds, compiled, limit):
    """Print one case. -> (a row for each contestant, a row for each operation that takes long)"""
    config, B = CASES[case]
    model, step = prepare(config, B)
    losses = contestants(model, compiled)
    times = bench.interleaved({name: partial(step, loss) for name, loss in losses.items()}, seconds, least=2)
    rows, tokens = [], B * config.block_size
    flops = sum(amount for amount, is_flops in work(config, B).values() if is_flops)
    for name, values in times.items():
        low, time, high = statistics.quantiles(values, n=4)
        row = dict(case=case, name=name, seconds=time, spread=(high - low) / 2 / time, tokens=tokens / time)
        rows.append(row | dict(share=flops / time / multiply_adds(name, limit), ratio=None))
    for dtype in ("float32", "bfloat16"):
        *rivals, ours = [row for row in rows if row["name"].endswith(dtype)] or [None]
        if rivals:
            ours["ratio"] = min(row["seconds"] for row in rivals) / ours["seconds"]
    for row in rows:
        bench.show_texts(COLUMNS, cells(row))
    ops_rows = [dict(case=case) | row for row in where(partial(step, losses[name]), config, B, name, limit)]
    print(f"\nWhere a step of {name} spends its time:")
    for row in ops_rows:
        bench.show_texts(OPS_COLUMNS, ops_cells(row))
    print(flush=True)
    return rows, ops_rows


COLUMNS = {"case": -24, "contestant": -18, "a step": 11, "spread": 8, "tokens/s": 11, "of limit": 10, "ratio": 8}
OPS_COLUMNS = {"case": -24, "operation": -26, "time": 12, "of the step": 13, "of limit": 10}


def cells(row):
    """A contestant's line as texts, one for each of COLUMNS."""
    ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
    figures = [f"{row['seconds'] * 1e3:,.1f} ms", f"±{row['spread']:.0%}", f"{row['tokens']:,.0f}"]
    return [row["case"], row["name"], *figures, f"{row['share']:.0%}", ratio]


def ops_cells(row):
    share = f"{row['share']:.0%}" if row["share"] else ""
    return [row["case"], row["name"], f"{row['seconds'] * 1e3:,.2f} ms", f"{row['part']:.0%}", share]


def multiply_adds(name, limit):
    """Flops a second at best, for what `name` multiplies."""
    return limit["bfloat16_gflops" if name.endswith("bfloat16") else "gflops"] * 1e9


def work(config, B):
    """{operation: (flops of its products or bytes that it reads and writes, flops?)}, in a step on the kernels."""
    L, C, T, V = config.n_layer, config.n_embd, config.block_size, config.vocab_size
    N, parameters = B * T, 12 * L * C * C + (V + T) * C  # but for vectors
    attention = L * B * T * (T + 1) // 2 * 4 * C  # two products, the causal half; the backward has five
    flops = dict(linear=2 * N * L * 8 * C * C, linear_gelu=2 * N * L * 4 * C * C, attention=attention)
    flops |= {
        f"{name}Backward": amount * 5 // 2 if name == "attention" else amount * 2 for name, amount in flops.items()
    }
    flops["lm_loss"] = 6 * N * C * V  # the backward as well
    values = dict(layer_norm=2 * N * C * (2 * L + 1), layer_normBackward=3 * N * C * (2 * L + 1))
    values |= {"_fused_adamw_": 7 * parameters, "linalg_vector_norm": parameters, "add": 3 * N * C * (2 * L + 1)}
    return {k: (x, True) for k, x in flops.items()} | {k: (4 * x, False) for k, x in values.items()}


def where(step, config, B, name, limit, most=14):
    """Which operations a step of contestant `name` spends its time in: rows, the longest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says when it starts
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [e for e in profile.key_averages() if e.self_cpu_time_total]
    total = sum(e.self_cpu_time_total for e in events)
    amounts, rows = work(config, B), []
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:most]:
        op, seconds, share = event.key.split("::")[-1], event.self_cpu_time_total / 1e6, None
        if op in amounts:
            amount, is_flops = amounts[op]
            share = amount / seconds / (multiply_adds(name, limit) if is_flops else limit["gbs"] * 1e9)
        rows.append(dict(name=op, seconds=seconds, part=event.self_cpu_time_total / total, share=share))
    return rows


NOTES = [
    "ratio: the time of the best of torch over this one's, both in the same products.",
    "of limit: flops against multiply-adds in registers (weights, and attention's causal half);",
    "of operations without products, bytes against reads from memory.",
]


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
    results = dict(about=bench.about(), limits=limit, rows=[], operations=[])
    bench.show_texts(COLUMNS, COLUMNS)
    for case in CASES if only is None else [only]:
        rows, operations = run(case, seconds, compiled, limit)
        results["rows"] += rows
        results["operations"] += operations
    if only is None:
        names = [f"{who} {'bfloat16' if _kernels.has_bfloat16() else 'float32'}" for who in ("fastgpt", "torch")]
        code = "from fastgpt import bench_step; print(bench_step.memory({!r}))"
        results["peak MiB"] = {name: float(bench.in_a_fresh_process(code.format(name))) for name in names}
    print("\n".join(notes(results)))
    return results


def notes(results):
    """The lines below the tables."""
    lines = list(NOTES)
    if results["about"]["isa"] == "amx":
        lines.append("In float32 above 100 % of the multiply-adds: products run on AMX's tiles, which are faster.")
    if peaks := results.get("peak MiB"):
        ours, theirs = peaks.values()
        texts = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in peaks.items())
        lines.append(f"Peak memory of 124M B4 T256: {texts}, {ours / theirs:.2f} times as much.")
    return lines


def section(results, argv):
    """One machine's report in Markdown: (its heading, all of it)."""
    facts = f"Limits measured in this run: {bench.spell(results['limits'])}."
    words = "Where a step of fastgpt spends its time:"
    second = [words, "", *bench.table(OPS_COLUMNS, map(ops_cells, results["operations"]))]
    rows = map(cells, results["rows"])
    return bench.markdown(results["about"], argv, "Training steps: ", facts, COLUMNS, rows, notes(results), second)


def main(argv):
    parser = argparse.ArgumentParser(prog="fastgpt bench --step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--step", action="store_true", help="this")
    parser.add_argument(
        "--seconds", type=bench.positive, default=20.0, metavar="S", help="time for a case (default: 20)"
    )
    parser.add_argument("--case", choices=CASES, help="this one alone, without peak memory")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--markdown", metavar="FILE", help="write this machine's section of a report here")
    parser.set_defaults(plot=None)  # it draws nothing
    args = parser.parse_args(argv)
    bench.try_report_files(args)
    results = report(args.seconds, not args.no_compile, args.case)
    bench.write_report(args, argv, results, section)
