"""`fastgpt bench`: how fast each op, a training step and generation are, and how near to what the machine allows.

Three contestants do the same work in one process: gpt.py's formula, the best that torch has, and the kernel. They take
turns (A B C A B C ...), so whatever else the machine does hits all alike; what counts is the ratio of the medians.
The limits, multiply-adds a second in registers and bytes a second from memory, are measured in the same run.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import gpt

from . import _kernels, ops


def torch_attention(qkv, n_head):
    """torch's fused attention, and the transposes that it needs around it."""
    q, k, v = (x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


TORCH = SimpleNamespace(
    layer_norm=lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
    gelu=lambda x: F.gelu(x, approximate="tanh"),
    linear=F.linear,
    attention=torch_attention,
    lm_loss=lambda hidden, weight, targets: F.cross_entropy(
        F.linear(hidden, weight).flatten(0, -2), targets.flatten(), ignore_index=-1
    ),
)

TURN = 0.01  # seconds

CONTESTANTS = {"formula": gpt, "torch": TORCH, "kernel": ops}


def interleaved(functions, seconds, least=5):
    """Let the functions take turns for about `seconds`. -> {name: times of single calls in seconds}

    A turn is a burst of calls of TURN seconds, or one call that takes longer. Only the second half of a burst counts:
    by then the caches hold what this function uses, and not what the others left. The first turn counts for nobody.
    """
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds <= least or time.perf_counter() < end:
        for name, function in functions.items():
            burst, started = [], time.perf_counter()
            while not burst or time.perf_counter() - started < TURN:
                start = time.perf_counter()
                function()
                burst.append(time.perf_counter() - start)
            if rounds:
                times[name] += burst[len(burst) // 2 :]
        rounds += 1
    return times


def limits():
    """What this machine does at best on the threads in use: GFLOP/s of multiply-adds, GB/s of reads from memory."""
    data = torch.ones(64 << 20).numpy()  # 256 MiB
    flops, reads = [], []
    for _ in range(5):
        start = time.perf_counter()
        operations = _kernels.fma_work(5_000_000)
        middle = time.perf_counter()
        size = _kernels.read_work(data)
        flops.append(operations / (middle - start) / 1e9)
        reads.append(size / (time.perf_counter() - middle) / 1e9)
    return dict(gflops=max(flops), gbs=max(reads))


def op_cases(quick):
    """(op, title, inputs, options, work, unit): `work` is flops or bytes of the forward and of forward + backward."""

    def normal(*size, scale=1.0):
        return torch.randn(size) * scale

    cases = []
    C, H = 768, 12
    for n in (1024,) if quick else (1024, 8192):
        inputs = dict(x=normal(n, C), weight=normal(C), bias=normal(C))
        cases.append(("layer_norm", f"{n}x{C}", inputs, {}, (2 * 4 * n * C, 5 * 4 * n * C), "GB/s"))
    n = 1024 * 4 * C
    cases.append(("gelu", f"1024x{4 * C}", dict(x=normal(1024, 4 * C)), {}, (2 * 4 * n, 5 * 4 * n), "GB/s"))
    for K, N in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)) if not quick else ((C, 3 * C),):
        inputs = dict(x=normal(1024, K), weight=normal(N, K, scale=0.02), bias=normal(N))
        work = 2 * 1024 * K * N
        cases.append(("linear", f"1024x{K} -> {N}", inputs, {}, (work, 3 * work), "GFLOP/s"))
    for B, T in ((4, 256), (1, 1024)) if quick else ((4, 256), (1, 1024), (1, 4096)):
        work = B * H * T * (T + 1) // 2 * 4 * (C // H)  # two products, the causal half only; seven with the backward
        inputs = dict(qkv=normal(B, T, 3 * C))
        cases.append(
            ("attention", f"B{B} T{T} H{H} D{C // H}", inputs, dict(n_head=H), (work, 7 * work // 2), "GFLOP/s")
        )
    V = 8192 if quick else 50257
    inputs = dict(hidden=normal(1, 1024, C), weight=normal(V, C, scale=0.02))
    work = 2 * 1024 * C * V
    options = dict(targets=torch.randint(V, (1, 1024)))
    cases.append(("lm_loss", f"1024x{C}, V {V}", inputs, options, (work, 3 * work), "GFLOP/s"))
    return cases


def bench_ops(quick, seconds, limit):
    rows = []
    for op, title, inputs, options, work, unit in op_cases(quick):
        args = {name: x.requires_grad_() for name, x in inputs.items()}
        grad = torch.randn_like(getattr(TORCH, op)(**args, **options).detach())

        def forward(function, args=args, options=options):
            with torch.no_grad():
                function(**args, **options)

        def both(function, args=args, options=options, grad=grad):
            torch.autograd.grad(function(**args, **options), list(args.values()), grad)

        for part, run, amount in (("forward", forward, work[0]), ("forward+backward", both, work[1])):
            functions = {name: partial(run, getattr(where, op)) for name, where in CONTESTANTS.items()}
            rows.append(row(op, title, part, interleaved(functions, seconds), amount / 1e9, unit, limit))
            show(rows[-1])
    return rows


def row(op, title, part, times, amount, unit, limit):
    """One line of the report: medians in ms with their spread (half the distance of the quartiles), ratio, rate."""
    result = dict(op=op, case=title, part=part, unit=unit)
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = dict(ms=middle * 1e3, spread=(high - low) / 2 / middle)
    kernel = result["kernel"]["ms"]
    result["ratio"] = result["torch"]["ms"] / kernel if "torch" in result else None
    result["rate"] = amount / kernel * 1e3
    bound = {"GFLOP/s": limit["gflops"], "GB/s": limit["gbs"]}.get(unit)
    result["share"] = result["rate"] / bound if bound else None
    return result


def header():
    times = "".join(f"{name + ' ms':>17}" for name in CONTESTANTS)
    print(f"{'op':<11}{'case':<20}{'part':<17}{times}{'torch/kernel':>14}{'rate':>18}{'of limit':>9}")


def show(r):
    times = "".join(
        f"{r[name]['ms']:>10.2f} ±{r[name]['spread']:>4.0%}" if name in r else f"{'-':>17}" for name in CONTESTANTS
    )
    share = f"{r['share']:.0%}" if r["share"] else "-"
    rate = f"{r['rate']:>10.1f} {r['unit']:<7}"
    print(f"{r['op']:<11}{r['case']:<20}{r['part']:<17}{times}{r['ratio']:>13.2f}x{rate}{share:>9}")


def bench_models(quick, seconds, limit):
    """A whole training step (loss, gradients, AdamW) and generation, with each set of formulas."""
    rows = []
    small = gpt.GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=257)
    cases = [("small model", small, 12)]
    if not quick:
        cases.append(("GPT-2 124M", gpt.GPTConfig(block_size=256), 1))
    for title, config, B in cases:
        models = {name: gpt.GPT(config, where) for name, where in CONTESTANTS.items()}
        optimizers = {name: gpt.make_optimizer(model, 1e-4, 0.99, 0.1) for name, model in models.items()}
        tokens = torch.randint(config.vocab_size, (B, config.block_size + 1))

        def step(name, models=models, optimizers=optimizers, tokens=tokens):
            models[name].loss(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        n = sum(p.numel() for p in models["kernel"].parameters())
        functions = {name: (lambda name=name: step(name)) for name in models}
        done = 6 * n * B * config.block_size / 1e9
        case = f"B{B} T{config.block_size}, {n / 1e6:.1f}M"
        rows.append(row("train step", case, title, interleaved(functions, 2 * seconds), done, "GFLOP/s", limit))
        show(rows[-1])

        def generate(model, prompt=tokens[:1, :8]):
            model.generate(prompt, 24, temperature=0)

        functions = {name: (lambda model=model: generate(model)) for name, model in models.items()}
        times = interleaved(functions, 2 * seconds)
        rows.append(row("generate", "24 tokens", title, times, 24, "token/s", limit))
        show(rows[-1])
    return rows


def keep_memory():
    """Let malloc keep what is freed (glibc): else each large tensor is cleared anew, page by page, in every round."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 1 << 30)


def plot(rows, path):
    """Bars: how many times as fast as torch each kernel is."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{r['op']}  {r['case']}  {r['part']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.35 * len(rows) + 1))
    bars = axes.barh(labels, [r["ratio"] for r in rows], color="#2f6f9f")
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("speed of the kernel, torch = 1")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run(quick=False, seconds=2.0):
    """Print the report. -> everything in it, as a dictionary"""
    keep_memory()
    torch.manual_seed(0)
    limit = limits()
    about = dict(torch=torch.__version__, isa=_kernels.isa(), threads=torch.get_num_threads(), cpu=platform.machine())
    print(f"torch {about['torch']}, {about['isa']}, {about['threads']} threads; limits measured now: ", end="")
    print(f"{limit['gflops']:.0f} GFLOP/s of multiply-adds, {limit['gbs']:.1f} GB/s of reads from memory")
    header()
    rows = bench_ops(quick, seconds, limit) + bench_models(quick, seconds, limit)
    return dict(about=about, limits=limit, rows=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each line (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios here")
    args = parser.parse_args(argv)
    results = run(args.quick, args.seconds)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    if args.plot:
        plot(results["rows"], args.plot)
