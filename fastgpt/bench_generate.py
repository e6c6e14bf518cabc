"""`fastgpt bench --generate`: how fast GPT-2 124M generates here and in other programs, with the same random weights.

All contestants of a case take turns in one process, with the same number of threads, each through its Python API; what
counts is the ratio of medians. The limit, bytes a second that all threads read from memory, is measured in the same
turns. A program that is not installed is named, and what to install.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

import gpt

from . import _kernels, bench, ops, packed, peers
from .decoder import Decoder
from .packed import Packed, expect, head_dtype
from .peers import Missing, Peer

CONTEXT, TOKENS, PROMPT = 16, 24, 512  # decoding: tokens before those that are timed, and timed ones; prefill
QUICK = gpt.GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=1024, vocab_size=503)  # shows that it runs, no more
SMALL = gpt.GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=257)  # fastgpt train's, 0.8M

RIVALS = {  # of our dtype: the programs, and theirs
    "float32": [(p, "float32") for p in (peers.transformers, peers.onnxruntime, peers.ctranslate2, peers.llama_cpp)],
    "bfloat16": [(peers.transformers, "bfloat16"), (peers.ctranslate2, "bfloat16"), (peers.llama_cpp, "float16")],
    "int8": [(p, "int8") for p in (peers.onnxruntime, peers.ctranslate2, peers.llama_cpp)],
    "int4": [(peers.llama_cpp, "int4")],
}


def prompt_of(config, n):
    return torch.randint(config.vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def ours(decoder):
    def stream(prompt, n):
        for new in decoder.stream(torch.tensor([prompt]), n, temperature=0):
            yield int(new)

    name = f"fastgpt {decoder.dtype}{', fast prompts' if decoder.fast_prompts else ''}"
    return Peer(name, head_dtype(decoder.dtype), stream)


def token_times(stream, prompt, n):
    """Seconds of each of n tokens after the first."""
    tokens, times = stream(prompt, n + 1), []
    next(tokens)
    for _ in range(n):
        start = time.perf_counter()
        next(tokens)
        times.append(time.perf_counter() - start)
    for _ in tokens:
        pass
    return times


def first_time(stream, prompt):
    """Seconds until the first token."""
    start = time.perf_counter()
    for _ in stream(prompt, 1):
        break
    return [time.perf_counter() - start]


def mapped(path, config, dtype):
    """A packed file's weights where the system's cache of files has them, unchecked."""
    (length,) = np.fromfile(path, np.uint64, 1)
    return Packed(config, dtype, None, np.memmap(path, np.uint8, "r", offset=8 + int(length)))


def read_times(data):
    start = time.perf_counter()
    _kernels.read_work(data)
    return [time.perf_counter() - start]


def work_times():
    """Seconds of one floating-point operation, where all threads do nothing but multiply and add."""
    start = time.perf_counter()
    flops = _kernels.multiply_add_work(2_000_000, False)
    return [(time.perf_counter() - start) / flops]


def take_turns(functions, seconds, least=3):
    """Let functions that return times take turns for about `seconds`. The first turn counts for nobody."""
    times = {name: [] for name in functions}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds <= least or time.perf_counter() < end:
        for name, function in functions.items():
            some = function()
            if rounds:
                times[name] += some
        rounds += 1
    return times


def line(case, name, times, amount=1.0, unit="tokens/s", head="", share=None):
    """One line of the report: the rate, or the time if the unit is seconds, and half the distance of its quartiles."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    value = middle if unit == "s" else amount / middle
    spread = (high - low) / 2 / middle
    return dict(case=case, name=name, head=head, value=value, unit=unit, spread=spread, share=share, ratio=None)


def compare(lines):
    """How many times as fast the first is as each other one."""
    for other in lines[1:]:
        other["ratio"] = lines[0]["value"] / other["value"]
    return lines


class Bench:
    def __init__(self, quick, seconds, folder):
        torch.manual_seed(0)
        self.config = QUICK if quick else gpt.GPTConfig()
        self.model, self.seconds, self.folder = gpt.GPT(self.config).eval(), seconds, folder
        self.absent = {}  # why a peer is not there
        self.data = np.ones((1 if quick else 64) << 20, np.float32)

    def rivals(self, dtype):
        found = []
        for program, its in RIVALS[dtype]:
            bench.progress(f"{program.__name__} {its} ...")
            try:
                peer = program(self.model, its, self.folder)
                next(iter(peer.stream([0], 1)))
                found.append(peer)
            except Missing as error:
                self.absent[f"{program.__name__} {its}"] = str(error)
            except Exception as error:  # whatever another program does, ours are measured
                self.absent[f"{program.__name__} {its}"] = f"failed, {gpt.one_line(error).rstrip('.')}"
        return found

    def decode(self, dtype):
        """One token after another, batch 1."""
        case, decoder = f"decode {dtype}", Decoder(self.model, dtype)
        peers, prompt = [ours(decoder), *self.rivals(dtype)], prompt_of(self.config, CONTEXT)
        bench.progress(f"{case} ...")
        functions = {p.name: partial(token_times, p.stream, prompt, TOKENS) for p in peers}
        times = take_turns({"read": partial(read_times, self.data)} | functions, self.seconds)
        limit = self.data.nbytes / statistics.median(times["read"])
        lines = compare([line(case, p.name, times[p.name], head=p.head) for p in peers])
        lines[0]["share"] = decoder.token_bytes(CONTEXT + TOKENS // 2) * lines[0]["value"] / limit
        lines[0]["limit"] = limit / 1e9
        return lines

    def prefill(self, dtype):
        """A long prompt, until its first token."""
        case, mine = f"prefill {dtype}", [ours(Decoder(self.model, dtype))]
        if _kernels.rounds_prompts(dtype):
            mine = [ours(Decoder(self.model, dtype, fast_prompts=True)), *mine]
        if dtype != "float32":
            mine.append(ours(Decoder(self.model, "float32")))
        peers, prompt = mine + self.rivals(dtype), prompt_of(self.config, PROMPT)
        bench.progress(f"{case} ...")
        times = take_turns({p.name: partial(first_time, p.stream, prompt) for p in peers}, self.seconds)
        return compare([line(case, p.name, times[p.name], PROMPT, head=p.head) for p in peers])

    def batch(self, dtype):
        """Eight texts at a time against one."""
        case, decoder = f"batch of 8, {dtype}", Decoder(self.model, dtype)
        bench.progress(f"{case} ...")

        def stream(B, prompt, n):
            return decoder.stream(torch.tensor([prompt] * B), n, temperature=0)

        prompt = prompt_of(self.config, CONTEXT)
        functions = {B: partial(token_times, partial(stream, B), prompt, TOKENS) for B in (8, 1)}
        times = take_turns({"work": work_times} | functions, self.seconds)
        lines = compare([line(case, f"fastgpt, batch {B}", times[B], B, head=head_dtype(dtype)) for B in (8, 1)])
        if dtype != "int4":  # whose products are not multiply-adds of floats
            matrices = sum(N * K for N, K in packed.sizes(self.config).values())
            for r in lines:
                r["gflops"] = 1e-9 / statistics.median(times["work"])  # the limit
                r["share"] = 2e-9 * matrices * r["value"] / r["gflops"]
        return lines

    def passes(self, decoder, rows):
        """Take turns with passes of some rows of one text after T tokens: {name: times} for {name: (T, rows)}."""

        def again(sequences, T, n):
            times = []
            for _ in range(TOKENS):
                sequences.length = T
                start = time.perf_counter()
                sequences.append(np.zeros(1, np.int64)) if n == 1 else sequences.extend([0] * n)
                times.append(time.perf_counter() - start)
            return times

        with ExitStack() as stack:
            functions = {}
            for name, (T, n) in rows.items():
                sequences = stack.enter_context(decoder.sequences(np.array([prompt_of(self.config, T)]), n))
                sequences.start()
                functions[name] = partial(again, sequences, T, n)
            return take_turns(functions, self.seconds)

    def context(self, dtype):
        """A token after 10 and after 1000 others, keys and values in bfloat16."""
        case, lengths = f"context, {dtype}", (10, 1000)
        bench.progress(f"{case} ...")
        times = self.passes(Decoder(self.model, dtype, "bfloat16"), {T: (T, 1) for T in lengths})
        return compare([line(case, f"fastgpt after {T} tokens", times[T], head=head_dtype(dtype)) for T in lengths])

    def lookup(self, dtype):
        """Tokens that are verified together, if all are right, against one at a time."""
        case = f"lookup, {dtype}"
        bench.progress(f"{case} ...")
        times = self.passes(Decoder(self.model, dtype), {n: (CONTEXT, n) for n in (5, 1)})
        names = {5: "fastgpt, 4 of 4 are right", 1: "fastgpt without lookup"}
        return compare([line(case, names[n], times[n], n, head=head_dtype(dtype)) for n in (5, 1)])

    def small(self):
        """A model whose time is that of calls and not of memory, beside one Python call an op."""
        model, case = gpt.GPT(SMALL, ops).eval(), "decode, 0.8M"
        decoder, prompt = Decoder(model), prompt_of(SMALL, CONTEXT)
        bench.progress(f"{case} ...")

        def with_caches(prompt, n):
            caches = [gpt.KVCache(1, SMALL, torch.float32) for _ in model.h]
            new = torch.tensor([prompt])
            for _ in range(n):
                with torch.no_grad():
                    new = model.ops.linear(model.hidden(new, caches)[:, -1], model.wte.weight).argmax(-1, keepdim=True)
                yield int(new)

        streams = {"fastgpt float32": ours(decoder).stream, "gpt.py on the kernels": with_caches}
        times = take_turns({name: partial(token_times, s, prompt, TOKENS) for name, s in streams.items()}, self.seconds)
        return compare([line(case, name, times[name], head="float32") for name in streams])

    def first(self, dtype):
        """From a packed file to the first token, the package imported: read into huge pages and checked, or mapped."""
        case, folder = f"first token, {dtype}", Path(self.folder) / f"packed-{dtype}"
        folder.mkdir(exist_ok=True)
        Packed.from_model(self.model, dtype).save(folder / packed.FILE)
        prompt = prompt_of(self.config, CONTEXT)
        bench.progress(f"{case} ...")
        ways = {
            "read": lambda: Decoder(str(folder)),
            "mapped": lambda: Decoder(mapped(folder / packed.FILE, self.config, dtype)),
        }

        def load(way):
            gc.collect()
            return first_time(lambda prompt, n: ours(way()).stream(prompt, n), prompt)

        times = take_turns({name: partial(load, way) for name, way in ways.items()}, self.seconds)
        head = head_dtype(dtype)
        lines = [line(case, f"fastgpt, {name}", times[name], unit="s", head=head) for name in ways]
        decoders = {name: ours(way()) for name, way in ways.items()}
        functions = {name: partial(token_times, peer.stream, prompt, TOKENS) for name, peer in decoders.items()}
        times = take_turns(functions, self.seconds)
        return lines + compare([line(f"then, {dtype}", f"fastgpt, {name}", times[name], head=head) for name in ways])

    def cases(self):
        """{name: function -> lines} in the order of the report."""
        cases = {f"decode {dtype}": partial(self.decode, dtype) for dtype in packed.DTYPES}
        cases |= {f"prefill {dtype}": partial(self.prefill, dtype) for dtype in packed.DTYPES}
        cases |= {f"batch {dtype}": partial(self.batch, dtype) for dtype in packed.DTYPES}
        cases |= {f"context {dtype}": partial(self.context, dtype) for dtype in packed.DTYPES}
        cases |= {f"lookup {dtype}": partial(self.lookup, dtype) for dtype in packed.DTYPES}
        return cases | {"small": self.small} | {f"first {dtype}": partial(self.first, dtype) for dtype in packed.DTYPES}


COLUMNS = {"case": -22, "contestant": -31, "head": -10, "speed": 16, "spread": 8, "of limit": 10, "ratio": 8}


def cells(r):
    """A line of the report as texts, one for each of COLUMNS."""
    digits = 3 if r["value"] < 1 else 1 if r["value"] < 1000 else 0
    return [
        r["case"],
        r["name"],
        r["head"],
        f"{r['value']:,.{digits}f} {r['unit']}",
        f"±{r['spread']:.0%}",
        f"{r['share']:.0%}" if r["share"] else "",
        f"{r['ratio']:.2f}x" if r["ratio"] else "",
    ]


def notes(results):
    return [
        f"GPT-2 124M, random weights, unless said. decode: batch 1, after {CONTEXT} tokens; prefill: {PROMPT} tokens.",
        "speed: the median, ± half the distance of the quartiles. head: dtype of the rows that logits are made of.",
        "of limit: bytes of weights, keys and values that a token reads, as a share of the speed at which all threads",
        "read memory; for batches, products as a share of the multiply-adds in float32 that all threads can do; both",
        "measured in the same turns. ratio: how many times as fast the case's first line is as this one.",
        *(f"Not measured: {name}: {why}." for name, why in results["absent"].items()),
    ]


def run(quick=False, seconds=4.0, only=(), keep=None):
    """Print the report. -> everything in it, as a dictionary"""
    bench.keep_memory()
    results = dict(about=bench.about(), rows=[])
    print("torch {torch}, {isa}, {threads} threads".format_map(results["about"]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(keep or temporary, "quick" if quick else "gpt2")
        os.makedirs(folder, exist_ok=True)
        bencher = Bench(quick, seconds, folder)
        cases = bencher.cases()
        for some in only:
            known = any(name.startswith(some) for name in cases)
            expect(known, f"--only is {some!r}, expected the beginning of one of: {', '.join(cases)}")
        bench.show_texts(COLUMNS, COLUMNS)
        for name, function in cases.items():
            if not only or any(name.startswith(some) for some in only):
                for r in function():
                    results["rows"].append(r)
                    bench.show_texts(COLUMNS, cells(r))
    results["absent"] = bencher.absent
    results["limits"] = dict(gbs=max((r["limit"] for r in results["rows"] if "limit" in r), default=None))
    print("\n".join(notes(results)))
    return results


def plot(rows, path):
    """Bars, a panel for each case with rivals: tokens a second."""
    pyplot = bench.import_pyplot()
    panels = {}
    for r in rows:
        if r["unit"] == "tokens/s":
            panels.setdefault(r["case"], []).append(r)
    heights = [len(some) + 1 for some in panels.values()]
    figure, all_axes = pyplot.subplots(
        len(panels), figsize=(9, 0.32 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    for (case, some), axes in zip(panels.items(), all_axes[:, 0], strict=True):
        colors = ["#2f6f9f" if r["name"].startswith("fastgpt") else "#b0b0b0" for r in some]
        labels = [f"{r['name']} (head {r['head']})" for r in some]
        bars = axes.barh(labels, [r["value"] for r in some], color=colors)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{case}, tokens/s", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def section(results, argv):
    gbs = results["limits"]["gbs"]
    facts = f"Reads from memory: {gbs:.1f} GB/s." if gbs else ""
    rows = [cells(r) for r in results["rows"]]
    return bench.markdown(results["about"], argv, "Generation: ", facts, COLUMNS, rows, notes(results))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fastgpt bench --generate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--generate", action="store_true", required=True, help="this report")
    bench.add_report_options(parser, 4.0)
    names = "such as decode, prefill int8, batch, context, lookup, small, first"
    parser.add_argument("--only", nargs="+", default=(), metavar="CASE", help=names)
    parser.add_argument("--keep", metavar="FOLDER", help="keep the other programs' models, 2.5 GB, for the next time")
    args = parser.parse_args(argv)
    bench.try_report_files(args)
    results = run(args.quick, args.seconds, args.only, args.keep)
    bench.write_report(args, argv, results, section, plot)
