"""The command `fastgpt`: check, bench, demo, train, generate, eval and more; and the commands of learn/."""

import argparse
import hashlib
import itertools
import os
import platform
import signal
import sys
import time

import numpy
import tiktoken
import torch

import gpt

from . import _kernels, bench, check, compare, evaluate, generate, lora, packed, plot, prepare, train
from .learn import ablate, cost, exercise, ladder, look


def info():
    """What a report of a problem or of a speed should say."""
    print(f"fastgpt {bench.version()}, torch {torch.__version__}, numpy {numpy.__version__}, ", end="")
    print(f"tiktoken {tiktoken.__version__}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"processor: {bench.processor()}")
    print(f"instruction sets: {', '.join(_kernels.isas())}; in use: {_kernels.isa()} (FASTGPT_ISA forces another)")
    if _kernels.isa() == "amx":
        print("matrix products: on AMX's tiles, a float32 as three bfloat16, whose six products take less")
        print("  than half the time of a float32 multiply-add; FASTGPT_ISA=avx512 does without")
    else:
        print("matrix products: float32 multiply-adds")
    print(f"bfloat16 products: {check.bfloat16_products()}")
    print(f"threads: {_kernels.num_threads()}, in torch's own pool (torch.set_num_threads sets their number)")


DEMO = ["--steps", "1000", "--eval-every", "250", "--sample", "400"]  # how it trains


def demo():
    """The main job: parity, speed, a small GPT trained on the text that every Python carries, and a sample."""
    started = time.perf_counter()
    demo_folder()  # if none can be written, say so now
    title("This machine")
    info()
    title("Do the kernels compute what gpt.py's formulas say? Errors against float64")
    failed = check.run(quick=True)
    title("How fast are they?")
    bench.run(quick=True, seconds=1.0)
    title("A small GPT, trained on Python's own help texts, byte by byte")
    print("Two kinds of val loss: the lines during training take at most 256 windows, spread over the text that is")
    print("kept for it; the last line takes all of that text. So the last two differ a little.\n", flush=True)
    out = demo_folder()
    train.main(["--out", out, *(["--overwrite"] if is_demos_own(out) else []), *DEMO])
    with open(os.path.join(out, MARK), "w", encoding="utf-8") as file:
        file.write(fingerprint(out))
    print(f"\n{time.perf_counter() - started:.0f} s in all; the model is in {out!r}. To try next:\n")
    model, into = ("", "") if out == "out" else (f" --model {out}", f" --out {out}")
    for command, what in (
        (f"fastgpt generate{model}", "more of the same; --prompt TEXT begins it"),
        (f"fastgpt train --resume --steps 2000{into}", "train it on"),
        ("fastgpt train --data FILE --out mine", "train another on a text of your own"),
    ):
        print(f"  {command:<52}{what}")
    return 1 if failed else 0


MARK = "demo.sha256"  # stands beside the demo's model, and says which one it is


def fingerprint(folder):
    """What MARK holds for the model in this folder, in sha256sum's format."""
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        return f"{hashlib.sha256(file.read()).hexdigest()}  model.safetensors\n"


def is_demos_own(folder):
    """Whether the model in this folder is as a demo left it."""
    try:
        with open(os.path.join(folder, MARK), encoding="utf-8") as file:
            return file.read() == fingerprint(folder)
    except FileNotFoundError:
        return False


def demo_folder():
    """Where the demo keeps its model: `out`, where `fastgpt generate` looks, or a free name if that is somebody's."""
    for name in itertools.chain(("out", "out-demo"), (f"out-demo-{n}" for n in itertools.count(2))):
        if os.path.exists(name) and not os.path.isdir(name):
            continue
        os.makedirs(name, exist_ok=True)
        if not any(entry.endswith((".safetensors", ".json")) for entry in os.listdir(name)) or is_demos_own(name):
            bench.try_file(os.path.join(name, MARK))
            return name


def title(text):
    print(f"\n== {text}\n", flush=True)


def without_options(command, function):
    """A command that takes no arguments: argparse answers --help, and refuses what else comes."""

    def run(argv):
        argparse.ArgumentParser(prog=f"fastgpt {command}", description=function.__doc__).parse_args(argv)
        return function()

    return run


COMMANDS = {
    "info": ("versions, processor, instruction set, threads", without_options("info", info)),
    "check": ("parity of kernels and formulas, as a table; status 1 if any fails", lambda argv: check.main(argv)),
    "bench": ("speed of formulas, torch and kernels", lambda argv: bench.main(argv)),
    "demo": ("all of it once, in a minute or two; keeps its model in out", without_options("demo", demo)),
    "ablate": ("variants of GPT-2: which differences are real", lambda argv: ablate.main(argv)),
    "cost": ("parameters, flops, bytes, hours and money of a model, before you pay", lambda argv: cost.main(argv)),
    "exercise": ("write the formulas yourself, be told what is wrong", lambda argv: exercise.main(argv)),
    "ladder": ("from counting to GPT-2, a class at a time", lambda argv: ladder.main(argv)),
    "prepare": ("make shards of tokens of texts of any size", lambda argv: prepare.main(argv)),
    "train": (
        "train a model; --dtype bfloat16: faster; --ops FILE: on your own functions",
        lambda argv: train.main(argv),
    ),
    "compare": ("from scratch, fine-tuned, LoRA, as it is: on one budget", lambda argv: compare.main(argv)),
    "plot": ("draw the losses of runs together", lambda argv: plot.main(argv)),
    "merge": ("make a plain model of a base and a LoRA adapter", lambda argv: lora.merge(argv)),
    "generate": ("continue a prompt", lambda argv: generate.main(argv)),
    "quantize": ("pack a model's weights for generation, smaller", lambda argv: packed.quantize(argv)),
    "dequantize": ("make a plain model of packed weights", lambda argv: packed.dequantize(argv)),
    "look": ("open a model: a page of what happens in it while it reads a text", lambda argv: look.main(argv)),
    "eval": (
        "loss and bits per byte of a text, multiple choice; against other models",
        lambda argv: evaluate.main(argv),
    ),
}


def run(argv):
    """One command. -> its status"""
    parser = argparse.ArgumentParser(
        prog="fastgpt",
        usage="fastgpt [-h] [--version] COMMAND ...",
        description="GPT-2 on fused kernels: `python gpt.py` is the same train, generate and eval on the formulas.",
        epilog="\n".join(["commands:", *(f"  {name:<11}{what}" for name, (what, _) in COMMANDS.items())])
        + "\n\nfastgpt COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("--version", action="version", version=f"fastgpt {bench.version()}")
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    command, *rest = argv
    parser.parse_args(["--version"] if "--version" in rest else [command])
    return COMMANDS[command][1](rest) or 0


def main(argv=None):
    """The command line. -> the status: 0, 1 for what failed, 2 for what argparse refuses, 130 for Ctrl-C"""
    argv = sys.argv[1:] if argv is None else argv
    prog = " ".join(["fastgpt", *argv[:1]])
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # while torch was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            return run(argv)
        finally:
            if sys.stdout:
                sys.stdout.flush()  # here, where a pipe that nobody reads or a full disk is answered
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's word for too little memory
            raise
        if not isinstance(error, BrokenPipeError):
            print(
                f"{prog}: error: {gpt.one_line(error) if isinstance(error, RuntimeError) else error}", file=sys.stderr
            )
        drop_what_cannot_be_written()
        return 1


def drop_what_cannot_be_written():
    """The interpreter would try to write it again at its end, and complain."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
