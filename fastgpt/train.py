"""`fastgpt train`: gpt.py's training on the kernels, where no work is lost and every change is reported.

The steps are gpt.train_step's, in the same order, so losses and weights are those of gpt.py's plain loop, bit for bit.
Around them: Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint; a folder belongs to one run at a
time and is tried before the first step; what differs from the run that is resumed is said; texts take little memory.
"""

import argparse
import fcntl
import json
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress

import safetensors

import gpt

from . import data, ops
from . import tokenizer as tokenizers
from .learn import exercise

FILES = ("training.safetensors", "model.safetensors", "config.json")


class Interrupts:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; inside `with interrupts:` they wait until the block is done."""

    def __init__(self):
        self.number, self.inside, self.handlers = 0, False, {}

    def take_over(self):
        with suppress(ValueError):  # in a thread that is not the main one
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self)

    def give_back(self):
        self.inside = True  # nothing is left to interrupt
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def __call__(self, number, _):
        self.number = number
        if not self.inside:
            raise KeyboardInterrupt

    def __enter__(self):
        self.inside = True

    def __exit__(self, kind, *_):
        self.inside = False
        if self.number and kind is None:
            raise KeyboardInterrupt


def loop(model, optimizer, tokens, val, config, step=0, interrupts=None, text="", windows="random"):
    """The steps that are left, with evaluations and checkpoints on the way. An interrupt saves the last whole step."""
    first = saved = step
    started, per_step = time.perf_counter(), config.batch_size * model.config.block_size * config.accumulate

    def save():
        gpt.save_checkpoint(model, optimizer, step, config, data=text, windows=windows)
        return step

    model.train()
    try:
        while step < config.steps:
            with interrupts:
                loss = gpt.train_step(model, optimizer, tokens, step, config, data.batches(windows, config, step))
                step += 1
            speed = (step - first) * per_step / (time.perf_counter() - started)
            gpt.progress(f"step {step} of {config.steps}: loss {loss:.3f}, {speed:,.0f} tokens/s")
            if step % config.eval_every == 0 or step == config.steps:
                with interrupts:
                    saved = save()
                val_loss = gpt.evaluate(model, val, config.batch_size, max_windows=256)
                left = (config.steps - step) * per_step / speed
                gpt.progress("")
                losses = f"loss {loss:.4f}, val loss {val_loss:.4f}"
                print(f"step {step}: {losses}, {speed:,.0f} tokens/s, {left:.0f} s left", flush=True)
    except (ValueError, OSError) as error:  # a loss, a gradient or a weight that is not finite; a full disk
        gpt.progress("")
        rest = f"`--resume` goes on from step {saved}" if saved else "nothing was saved"
        raise ValueError(f"{error}; {rest} in {config.out!r}") from error
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt), interrupts:
            gpt.progress("")
            if step > saved:
                saved = save()
            goes_on = f"after step {saved}; `train --resume --out {config.out}` goes on"
            print(f"stopped {goes_on if saved else 'before the first step; nothing was saved'}", flush=True)
        raise


def run(typed, ops, interrupts):
    """gpt.run_train, in a folder that is this run's alone, with what differs from before said."""
    out, resume, overwrite = typed.get("out", "out"), typed.get("resume"), typed.get("overwrite")
    path = os.path.join(out, FILES[0])
    gpt.expect(os.path.isfile(path) or not resume, f"{path} does not exist, so there is nothing to --resume")
    with claimed(out):
        there = [name for name in FILES if os.path.exists(os.path.join(out, name))]
        ways = "add --resume or --overwrite" if FILES[0] in there else f"it has {there}: add --overwrite"
        free = resume or overwrite or not there
        gpt.expect(free, f"--out is {out!r}, which holds a checkpoint: {ways}, or take another")
        folder = data.settle_tokenizer(typed, out)  # of the tokenizer's files, if it has some
        about = say_changes(path, typed) if resume else {}
        before, windows = about.get("data"), typed.pop("windows", about.get("windows", "random"))

        def train(model, optimizer, tokens, val, config, step):
            text = data.describe(tokens, val)
            if before not in (None, text):
                print(f"the text has changed: {text}, it was {before}")
            if config.warmup > config.steps:
                print(f"--warmup {config.warmup} is longer than the run, so it is cut to --steps {config.steps}")
            if step >= config.steps:
                print(f"nothing to do: {out} is at step {step} of {config.steps}; --resume --steps N goes on")
            if config.tokenizer == tokenizers.OWN and folder != out:
                tokenizers.copy_files(folder, out)
            loop(model, optimizer, tokens, val, config, step, interrupts, text, windows)

        def get_tokenizer(name):
            return tokenizers.get(folder if name == tokenizers.OWN else name)

        gpt.run_train(typed, ops, train, data.load_tokens, get_tokenizer=get_tokenizer)


def say_changes(path, typed):
    """What was typed other than the run's own options. -> what the checkpoint says about the run"""
    with gpt.reported_as(f"{path} is missing or damaged"), safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
        saved = json.loads(about["options"]) | {"windows": about.get("windows", "random")}
        changed = [k for k, x in typed.items() if k != "out" and x != saved.get(k, x)]
    if changed:
        words = (f"--{gpt.dashed(k)} {typed[k]} instead of {saved[k]}" for k in changed)
        print(f"from here on with {', '.join(words)}")
    return about


@contextmanager
def claimed(folder):
    """Before the first step: can the folder be written, and does no other run write there? Holds a lock meanwhile."""
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the lock goes with the process, however it ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--out is {folder!r}, where another run is at work: wait, or take another") from error
        try:
            with open(os.path.join(folder, "trial.tmp"), "wb") as file:
                file.write(b"can it be written?")
            remove_leftovers(folder)
            yield
        finally:
            remove_leftovers(folder)
    finally:
        os.close(lock)
        with suppress(OSError):
            os.rmdir(folder)  # if it is empty


def remove_leftovers(folder):
    for name in (*FILES, "trial"):
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, f"{name}.tmp"))  # half a file, of a run that was killed


def main(argv=None, ops=ops):
    """`fastgpt train`. Ends with status 1 and one line for an error of use, 130 for Ctrl-C, 143 for SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="fastgpt train", description="Train a model on a text, or on shards of tokens."
    )
    gpt.add_options(parser, gpt.TrainConfig)
    kinds = ("random", "permutation")
    parser.add_argument("--windows", choices=kinds, help="random, or each once before any repeats (default: random)")
    parser.add_argument("--ops", metavar="FILE", help="Python file with functions of your own, by the formulas' names")
    typed = vars(parser.parse_args(argv))
    interrupts = Interrupts()
    interrupts.take_over()
    try:
        if "ops" in typed:
            ops = exercise.load_ops(typed.pop("ops"))
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{parser.prog}: {message}", file=sys.stderr)
            run(typed, ops, interrupts)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + (interrupts.number or signal.SIGINT))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError, MemoryError, RuntimeError, safetensors.SafetensorError) as error:
        if interrupts.number:  # a library that a KeyboardInterrupt passes through may make another error of it
            sys.exit(128 + interrupts.number)
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch has not enough memory
            raise
        sys.exit(f"{parser.prog}: error: {gpt.one_line(error)}")
    finally:
        interrupts.give_back()
