"""`fastgpt bench`: how fast each op, a training step and generation are, and how near to what the machine allows.

The contestants do the same work in one process: gpt.py's formula, what torch has for it (its own function, that under
torch.compile, a fused one where there is one), and the kernel. They take turns (A B C A B C ...), so whatever else the
machine does hits all alike; what counts is the ratio of the kernel's median to the best of torch's. The limits,
multiply-adds a second in registers and bytes a second from memory, are measured in the same run.

Where the processor has bfloat16 products, a second table has the kernels in them, beside the float32 kernels and torch
under bfloat16 autocast, with the limit of bfloat16 products.
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import gpt

from . import _kernels, bfloat16, check, ops, torch_ops

TURN = 0.01  # seconds


def contestants(op, compiled):
    """{name: function} of the formula, of torch's ways to compute it, and of the kernel, which comes last."""
    ways = {"formula": getattr(check.FORMULAS, op), "torch": getattr(torch_ops, op)}
    if compiled:
        torch.compiler.reset()
        ways["compile"] = torch.compile(getattr(torch_ops, op))
    if op == "lm_loss" and hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        options = torch.nn.LinearCrossEntropyOptions(acc_policy="compact")  # of its policies the fastest here
        ways["fused"] = lambda hidden, weight, targets: F.linear_cross_entropy(
            hidden.flatten(0, -2), weight, targets.flatten(), ignore_index=-1, options=options
        )
    return ways | {"kernel": getattr(ops, op)}


def contestants_in_bfloat16(op, compiled):
    """{name: function} of the float32 kernel, of torch's ways under bfloat16 autocast, and of the bfloat16 kernel."""
    ways = {"float32": getattr(ops, op), "torch": under_autocast(getattr(torch_ops, op))}
    if compiled:
        torch.compiler.reset()
        ways["compile"] = under_autocast(torch.compile(getattr(torch_ops, op)))
    return ways | {"kernel": getattr(bfloat16, op)}


def under_autocast(function):
    def run(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args, **kwargs)

    return run


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
    work = dict(gflops=lambda: _kernels.multiply_add_work(5_000_000, False), gbs=lambda: _kernels.read_work(data))
    if _kernels.has_bfloat16():
        work["bfloat16_gflops"] = lambda: _kernels.multiply_add_work(5_000_000, True)
    best = dict.fromkeys(work, 0.0)
    for _ in range(5):
        for name, run in work.items():
            start = time.perf_counter()
            done = run()
            best[name] = max(best[name], done / (time.perf_counter() - start) / 1e9)
    return best


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
        for op in ("linear", "linear_gelu") if N == 4 * C else ("linear",):
            cases.append((op, f"1024x{K} -> {N}", inputs, {}, (work, 3 * work), "GFLOP/s"))
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
    cases.append(("lm_loss", f"1024x{C} V{V}", inputs, options, (work, 3 * work), "GFLOP/s"))
    return cases


def bench_ops(quick, seconds, limit, compiled, in_bfloat16=False):
    rows = []
    for op, title, inputs, options, work, unit in op_cases(quick):
        if in_bfloat16 and op not in check.IN_BFLOAT16:
            continue
        args = {name: x.requires_grad_() for name, x in inputs.items()}
        ways = (contestants_in_bfloat16 if in_bfloat16 else contestants)(op, compiled)
        grad = torch.randn_like(ways["torch"](**args, **options).detach())
        grads = {dtype: grad.to(dtype) for dtype in (torch.float32, torch.bfloat16)}

        def forward(function, args=args, options=options):
            with torch.no_grad():
                function(**args, **options)

        def both(function, args=args, options=options, grads=grads):
            out = function(**args, **options)
            torch.autograd.grad(out, list(args.values()), grads[out.dtype])

        for part, run, amount in (("forward", forward, work[0]), ("forward+backward", both, work[1])):
            progress(f"{op} {title} {part} ...")
            functions = {name: partial(run, way) for name, way in ways.items()}
            times = interleaved(functions, seconds)
            rows.append(row(op, title, part, times, amount / 1e9, unit, limit, in_bfloat16))
            show(rows[-1])
    return rows


def row(op, title, part, times, amount, unit, limit, in_bfloat16=False):
    """One line of the report: medians in ms with their spread (half the distance of the quartiles), ratio, rate."""
    result = dict(op=op, case=title, part=part, unit=unit, beside="float32" if in_bfloat16 else "formula")
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = dict(ms=middle * 1e3, spread=(high - low) / 2 / middle)
    rivals = [name for name in times if name not in ("formula", "float32", "kernel")]
    result["best"] = min(rivals, key=lambda name: result[name]["ms"])
    kernel = result["kernel"]["ms"]
    result["ratio"] = result[result["best"]]["ms"] / kernel
    result["rate"] = amount / kernel * 1e3
    bound = {"GFLOP/s": limit["bfloat16_gflops" if in_bfloat16 else "gflops"], "GB/s": limit["gbs"]}.get(unit)
    result["share"] = result["rate"] / bound if bound else None
    return result


COLUMNS = {  # title: width, negative where the text begins at the left; 100 in all
    "op": -12,
    "case": -17,
    "part": -8,
    "formula": 7,
    "best of torch": 19,
    "kernel": 11,
    "ratio": 7,
    "rate": 13,
    "limit": 6,
}


IN_BFLOAT16_TITLES = tuple("float32" if title == "formula" else title for title in COLUMNS)


def cells(r):
    """A row of the report as texts, one for each of COLUMNS."""

    def digits(value):  # three that count
        return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"

    def time(name):
        return f"{digits(r[name]['ms'])} ±{r[name]['spread']:.0%}"

    best = time(r["best"]) if r["best"] == "torch" else f"{r['best']} {time(r['best'])}"
    part = r["part"].replace("forward+backward", "fwd+bwd")
    rate = f"{digits(r['rate'])} {r['unit']}"
    share = f"{r['share']:.0%}" if r["share"] else "-"
    return [
        r["op"],
        r["case"],
        part,
        digits(r[r["beside"]]["ms"]),
        best,
        time("kernel"),
        f"{r['ratio']:.2f}x",
        rate,
        share,
    ]


def show(r=None, titles=tuple(COLUMNS)):
    """Print a row, or the titles."""
    show_texts(COLUMNS, cells(r) if r else titles)


def show_texts(columns, texts):
    line = "".join(f"{text:{'<' if w < 0 else '>'}{abs(w)}}" for text, w in zip(texts, columns.values(), strict=True))
    progress("")
    print(line.rstrip(), flush=True)


def progress(text):
    """What is measured now, until the next line, if a person watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def notes(rows, isa):
    """What the columns mean, and why a share may exceed 100 %. -> lines"""
    lines = [
        "Medians in ms ± half the distance of the quartiles; of torch's ways the best, by name if not plain.",
        "ratio: best of torch / kernel. limit: the rate's share of the machine's, measured in this run.",
    ]
    above = {r["unit"] for r in rows if r["share"] and r["share"] > 1}
    if "GB/s" in above:
        lines.append("Above 100 % of the reads from memory: these tensors stay in the processor's cache.")
    if "GFLOP/s" in above and isa == "amx":
        lines.append("Above 100 % of the multiply-adds: these products run on AMX's tiles, which are faster.")
    elif "GFLOP/s" in above:
        lines.append("Above 100 % of the multiply-adds: the machine was slower while the limit was measured.")
    return lines


def bench_models(quick, seconds, limit, compiled, in_bfloat16=False):
    """A whole training step (loss, gradients, AdamW) and generation, with each set of formulas."""
    rows = []
    beside, kernels = ("float32", bfloat16) if in_bfloat16 else ("formula", ops)
    autocast = under_autocast if in_bfloat16 else lambda function: function
    small = gpt.GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=257)
    cases = [("small", small, 12)]
    if not quick:
        cases.append(("124M", gpt.GPTConfig(block_size=256), 1))
    for title, config, B in cases:
        models = {beside: gpt.GPT(config, ops if in_bfloat16 else None), "torch": gpt.GPT(config, torch_ops)}
        models["kernel"] = gpt.GPT(config, kernels)
        losses = {name: autocast(model.loss) if name == "torch" else model.loss for name, model in models.items()}
        if compiled:
            torch.compiler.reset()
            models["compile"] = gpt.GPT(config, torch_ops)
            losses["compile"] = autocast(torch.compile(models["compile"].loss))
        optimizers = {name: gpt.make_optimizer(model, 1e-4, 0.99, 0.1) for name, model in models.items()}
        tokens = torch.randint(config.vocab_size, (B, config.block_size + 1))

        def step(name, losses=losses, optimizers=optimizers, tokens=tokens):
            losses[name](tokens[:, :-1], tokens[:, 1:]).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        n = sum(p.numel() for p in models["kernel"].parameters())
        done = 6 * n * B * config.block_size / 1e9
        case = f"B{B} T{config.block_size}, {n / 1e6:.1f}M"
        progress(f"train step {title} ...")
        times = interleaved({name: partial(step, name) for name in models}, 2 * seconds)
        rows.append(row("train step", case, title, times, done, "GFLOP/s", limit, in_bfloat16))
        show(rows[-1])
        if in_bfloat16:  # generation has no products to speak of
            continue
        models.pop("compile", None)  # each token makes the cache longer: a new compilation for each

        def generate(model, prompt=tokens[:1, :8]):
            model.generate(prompt, 24, temperature=0)

        progress(f"generate {title} ...")
        times = interleaved({name: partial(generate, model) for name, model in models.items()}, 2 * seconds)
        rows.append(row("generate", "24 tokens", title, times, 24, "token/s", limit))
        show(rows[-1])
    return rows


def balance(seconds):
    """How much faster two threads are than one with a single head, which both must share."""
    qkv = torch.randn(1, 4096, 3 * 64, requires_grad=True)
    grad = torch.randn(1, 4096, 64)
    threads = torch.get_num_threads()

    def run(n):
        torch.set_num_threads(n)
        torch.autograd.grad(ops.attention(qkv, 1), qkv, grad)

    times = interleaved({n: partial(run, n) for n in (1, 2)}, seconds)
    torch.set_num_threads(threads)
    ratio = statistics.median(times[1]) / statistics.median(times[2])
    return ratio


def peak_memory():
    """The most MiB that this process has held so far."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # getrusage would begin with the parent's peak
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024)


def in_a_fresh_process(code):
    """What Python code prints. Not in this folder: in the project's, its sources would hide the built package."""
    return subprocess.check_output([sys.executable, "-c", code], cwd=tempfile.gettempdir(), text=True)


def attention_memory(what, T):
    """MiB that attention forward+backward of B1 H12 D64 takes on top of qkv. Once in a process."""
    qkv = torch.randn(1, T, 3 * 768, requires_grad=True)
    before = peak_memory()
    {"kernel": ops.attention, "torch": torch_ops.attention}[what](qkv, 12).sum().backward()
    return peak_memory() - before


def memory():
    """attention_memory for two lengths: it should double with T; T x T scores would need four times as much."""
    results = {}
    for what in ("kernel", "torch"):
        for T in (16384, 32768):
            code = f"from fastgpt import bench; print(bench.attention_memory({what!r}, {T}))"
            results[f"{what} {T}"] = float(in_a_fresh_process(code))
    return results


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory():
    """Let malloc keep what is freed (glibc): else each large tensor is cleared anew, page by page, in every round."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25):  # an older glibc's largest
            mallopt(M_TRIM_THRESHOLD, 1 << 30)


def plot(rows, path):
    """Bars: how many times as fast as torch each kernel is."""
    pyplot = import_pyplot()
    labels = [f"{r['op']}  {r['case']}  {r['part']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.35 * len(rows) + 1))
    bars = axes.barh(labels, [r["ratio"] for r in rows], color="#2f6f9f")
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("speed of the kernel, best of torch = 1")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def import_pyplot(option="--plot"):
    try:
        import matplotlib
    except ImportError:
        raise ValueError(f"{option} needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def version():
    """fastgpt's own."""
    try:
        return importlib.metadata.version("fastgpt")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def processor():
    """The processor's name; with family and model, where Linux tells them: rented machines hide much of the name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line.partition(":") for line in file.read().split("\n\n")[0].splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
    except OSError:
        fields = {}
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def about():
    """What a figure hangs on."""
    return dict(
        fastgpt=version(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=processor(),
        isa=_kernels.isa(),
        threads=torch.get_num_threads(),
    )


HELD = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "FASTGPT_ISA", "OMP_NUM_THREADS")  # environment that counts

TITLE = """# Speeds

Written by `fastgpt bench --markdown FILE`, a section for each machine; a new run replaces its machine's section. The
contestants take turns in one process: gpt.py's formula, torch's own ways to compute the same, and the kernel.
"""


def section(results, argv):
    """One machine's report in Markdown: (its heading, all of it)."""
    rows, rounded = results["rows"], results.get("in_bfloat16")
    facts = f"Limits measured in this run: {spell(results['limits'])}."
    below = (*notes(rows, results["about"]["isa"]), *extras(results))
    words = "In bfloat16 products, beside the float32 kernels; torch under bfloat16 autocast:"
    columns = dict(zip(IN_BFLOAT16_TITLES, COLUMNS.values(), strict=True))
    second = [words, "", *table(columns, map(cells, rounded))] if rounded else []
    return markdown(results["about"], argv, "", facts, COLUMNS, map(cells, rows), below, second)


def markdown(about, argv, subject, facts, columns, rows, below, second=()):
    """-> (heading, section): the machine and the command, facts, a table of texts, a second one, lines below it"""
    held = [f"{name}={os.environ[name]}" for name in HELD if name in os.environ]
    heading = f"## {subject}{about['cpu']}, {about['isa']}, {about['threads']} threads"
    if rivals := [setting for setting in held if not setting.startswith(("FASTGPT", "OMP"))]:
        heading += f", torch under {' '.join(rivals)}"
    command = " ".join([*held, "fastgpt bench", *map(shlex.quote, argv)])
    lines = [
        heading,
        "",
        f"{datetime.date.today()}, `{command}`",
        "",
        f"fastgpt {about['fastgpt']}, torch {about['torch']}, Python {about['python']}, {about['system']}. {facts}",
        "",
        *table(columns, rows),
        *second,
        *(f"{line}  " for line in below),
    ]
    return heading, "\n".join(lines).rstrip() + "\n"


def table(columns, rows):
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if width < 0 else "--:" for width in columns.values()) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def spell(limit):
    text = f"{limit['gflops']:.0f} GFLOP/s of multiply-adds, {limit['gbs']:.1f} GB/s of reads from memory"
    return text + (f", {limit['bfloat16_gflops']:.0f} GFLOP/s in bfloat16" if "bfloat16_gflops" in limit else "")


def write_markdown(path, results, argv, section=section):
    """Put this machine's section into the file, in its old one's place or at the end."""
    heading, new = section(results, argv)
    path = Path(path)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    title, *sections = ("\n" + (old or TITLE)).split("\n## ")
    sections = [f"## {text.rstrip()}\n" for text in sections]
    headings = [text.splitlines()[0] for text in sections]
    if heading in headings:
        sections[headings.index(heading)] = new
    else:
        sections.append(new)
    path.write_text("\n".join([title.strip() + "\n", *sections]), encoding="utf-8")


def extras(results):
    """The lines below the table of a full run."""
    lines = []
    if "balance" in results:
        ratio = results["balance"]
        lines.append(f"Attention of one head, T 4096, fwd+bwd: 2 threads are {ratio:.2f} times as fast as 1.")
    if "memory" in results:
        lines.append("Attention B1 H12 D64, fwd+bwd, peak memory on top of qkv:")
        lines[-1] += ",".join(f" {name} {mib:.0f} MiB" for name, mib in results["memory"].items())
    return lines


def run(quick=False, seconds=2.0, compiled=False):
    """Print the report. -> everything in it, as a dictionary"""
    keep_memory()
    torch.manual_seed(0)
    limit = limits()
    results = dict(about=about(), limits=limit)
    print("torch {torch}, {isa}, {threads} threads; limits measured now:".format_map(results["about"]))
    print(spell(limit))
    show()
    rows = bench_ops(quick, seconds, limit, compiled) + bench_models(quick, seconds, limit, compiled)
    results["rows"] = rows
    if _kernels.has_bfloat16():
        print("\nin bfloat16 products, beside the float32 kernels; torch under bfloat16 autocast:")
        show(titles=IN_BFLOAT16_TITLES)
        again = (bench_ops, bench_models)
        results["in_bfloat16"] = [r for part in again for r in part(quick, seconds, limit, compiled, True)]
        print()
    if not quick:
        results |= dict(balance=balance(2 * seconds), memory=memory())
    print("\n".join(notes(rows, results["about"]["isa"]) + extras(results)))
    return results


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


positive.__name__ = "positive number"  # argparse names it in its error


def try_file(path):
    """Find out now that a file can't be written, and not after the minutes that fill it."""
    there = os.path.exists(path)
    with open(path, "a", encoding="utf-8"):
        pass
    if not there:
        os.remove(path)


def try_picture(path, option="--plot"):
    """Find out now that no picture can be drawn into this file."""
    known = import_pyplot(option).figure().canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:] not in known:
        raise ValueError(f"{option} is {path!r}, expected a name that ends in one of: .{', .'.join(known)}")
    try_file(path)


def add_report_options(parser, seconds):
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument(
        "--seconds", type=positive, default=seconds, metavar="S", help="time for each line (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--markdown", metavar="FILE", help="write this machine's section of a report here")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios here")


def try_report_files(args):
    for path in (args.json, args.markdown):
        if path is not None:
            try_file(path)
    if args.plot:
        try_picture(args.plot)


def write_report(args, argv, results, section, plot=None):
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    if args.markdown:
        write_markdown(args.markdown, results, argv, section)
    if args.plot:
        plot(results["rows"], args.plot)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--generate" in argv:
        from . import bench_generate

        return bench_generate.main(argv)
    if "--step" in argv:
        from . import bench_step

        return bench_step.main(argv)
    parser = argparse.ArgumentParser(prog="fastgpt bench", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--generate", action="store_true", help="generation beside other programs, with options of its own"
    )
    parser.add_argument("--step", action="store_true", help="whole training steps, with options of its own")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    add_report_options(parser, 2.0)
    args = parser.parse_args(argv)
    try_report_files(args)
    results = run(args.quick, args.seconds, not (args.quick or args.no_compile))
    write_report(args, argv, results, section, plot)
