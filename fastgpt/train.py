"""`fastgpt train`: gpt.py's training on the kernels, where no work is lost and every change is reported.

The steps are gpt.train_step's, in the same order, so losses and weights are those of gpt.py's plain loop, bit for bit.
Around them: Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint; a folder belongs to one run at a
time and is tried before the first step; what differs from the run that is resumed is said; texts take little memory;
each step is logged, and the best weights are kept (metrics.py); several processes share the batches (processes.py).
"""

import argparse
import fcntl
import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace

import numpy as np
import safetensors
import torch

import gpt

from . import _kernels, bench, bfloat16, data, device, lora, metrics, ops, processes, torch_ops
from . import tokenizer as tokenizers
from .learn import exercise

FILES = ("training.safetensors", "model.safetensors", "config.json")
BEST = ("best/model.safetensors", "best/config.json")
OTHERS = (*lora.FILES, *(f"best/{name}" for name in lora.FILES), metrics.NAME, *tokenizers.FILES)


class Interrupts:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; inside `with interrupts:` they wait until the block is done.

    One of `many` processes waits until the others know, too: it has `agreed` with them, which is once a step.
    """

    def __init__(self):
        self.number, self.inside, self.handlers, self.many, self.agreed = 0, False, {}, False, False

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
        if not self.inside and not self.many:
            raise KeyboardInterrupt

    def __enter__(self):
        self.inside = True

    def __exit__(self, kind, *_):
        self.inside = False
        if self.number and kind is None and (self.agreed or not self.many):
            raise KeyboardInterrupt


class Run:
    """A run under way: its steps, evaluations and checkpoints, and what these say beyond gpt.py's."""

    def __init__(self, model, optimizer, place, tokens, val, config, step, interrupts, team, log, about):
        self.saves = model, optimizer
        self.model, self.optimizer = place.settle(model, optimizer, config)
        self.tokens, self.val, self.config = tokens, val, config
        self.interrupts, self.team, self.log, self.about = interrupts, team, log, about
        self.step = self.saved = self.first = step
        self.per_step = config.batch_size * model.config.block_size * config.accumulate
        self.shares, self.best, self.last = team.n, math.inf, dict(tokens=step * self.per_step, seconds=0.0)
        self.row = None  # of metrics.jsonl, which waits for its evaluation
        self.limit = sum(x for (x,) in team.gather([place.limit(model.ops)]))
        frozen = len(gpt.trained(model)) < len([*model.parameters()])  # the count knows nothing of those
        self.flops = None if frozen else metrics.flops(model.config, self.per_step)

    def resume(self, saved):
        """saved: what save() wrote. The log is cut back; an evaluation that was not over then is due."""
        self.best, self.last = saved["best"], saved["row"]
        self.shares = saved["shares"] if self.config.accumulate % saved["shares"] == 0 else self.team.n
        due = not saved["complete"]
        if self.team.rank == 0:
            after = self.log.cut(saved["size"], saved["crc"])
            if after is None:
                print(f"{self.log.path} is not as this run left it, so it begins again")
            elif due and after and after[0]["step"] == self.step:
                self.row, due = self.last, False
                self.evaluated(after[0]["validation"])
        due = self.team.gather([due])[0][0]  # as the first process found it
        self.row = self.last if due else None

    def go(self):
        """The steps that are left. An interrupt or an error keeps the last whole step."""
        self.model.train()
        self.started = time.perf_counter()
        self.shared = processes.share(self.model, self.config.accumulate, self.shares, self.team)
        self.interrupts.many = self.team.n > 1
        if self.shared is not self.model and self.shared.in_turns:
            print(
                f"the gradient of each batch is exchanged, to add up as {self.shares} processes did: slower, as exact"
            )
        try:
            with processes.connected():
                self.finish()
        except (ValueError, OSError) as error:  # a loss, a gradient or a weight that is not finite; a full disk
            gpt.progress("")
            path = os.path.join(self.config.out, FILES[0])
            rest = f"`--resume` goes on from step {self.saved}, {path!r}"
            raise ValueError(f"{error}; {rest if self.saved else 'nothing was saved'}") from error
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt), self.interrupts:
                gpt.progress("")
                if self.step > self.saved:
                    self.save()
                goes_on = f"after step {self.saved}; `fastgpt train --resume --out {self.config.out}` goes on"
                print(f"stopped {goes_on if self.saved else 'before the first step; nothing was saved'}", flush=True)
            if self.interrupts.agreed:
                with processes.connected():
                    self.team.gather([0.0])  # torchrun soon kills the first process if others end before it has saved
            raise
        self.interrupts.many = False
        if self.interrupts.number:  # it came too late to agree on
            raise KeyboardInterrupt

    def finish(self):
        if self.row:
            self.evaluate()
        while self.step < self.config.steps:
            self.train_step()
            if self.row:
                with self.interrupts:
                    self.save()
                self.evaluate()

    def train_step(self):
        started = time.perf_counter()
        with self.interrupts:
            try:
                loss = gpt.train_step(self.shared, self.optimizer, self.tokens, self.step, self.config, self.draw())
            except ValueError as error:
                raise ValueError(f"{error}; {self.suspects()}") from error
            if self.shared is not self.model:
                loss, number = self.shared.agree(self.optimizer.norm, self.interrupts.number)
                if number:
                    self.interrupts.number, self.interrupts.agreed = number, True
            self.step += 1
            self.last = self.row = self.measured(loss, time.perf_counter() - started)
            if self.step % self.config.eval_every and self.step < self.config.steps:
                self.write_row()
        gpt.progress(f"step {self.step} of {self.config.steps}: loss {loss:.3f}, {self.speed():,.0f} tokens/s")

    def measured(self, loss, seconds):
        """This step's row."""
        return dict(
            step=self.step,
            tokens=self.last["tokens"] + self.per_step,
            loss=loss,
            validation=None,
            rate=self.optimizer.param_groups[0]["lr"],
            norm=self.optimizer.norm,
            tokens_per_second=self.per_step / seconds,
            mfu=self.flops and self.flops / seconds / self.limit,
            seconds=self.last["seconds"] + seconds,
        )

    def write_row(self):
        if self.team.rank == 0:
            self.log.add(self.row)
        self.row = None

    def speed(self):
        """Tokens a second since this process began its steps, with all that stands between them."""
        if self.step == self.first:
            return self.last["tokens_per_second"]
        return (self.step - self.first) * self.per_step / (time.perf_counter() - self.started)

    def draw(self):
        """What this step draws its batches with."""
        return data.batches(self.about["windows"], self.config, self.step)

    def suspects(self):
        """Rate and windows of the step that failed: those whose own loss is not finite, or all."""
        T, positions = self.model.config.block_size, np.arange(len(self.tokens))
        batches = gpt.step_batches(positions, T, self.step, self.config, self.draw())
        starts = [start for idx, _ in batches for start in idx[:, 0].tolist()]
        self.model.eval()
        windows = (gpt.windows(self.tokens, np.array([[start]]), T) for start in starts)
        with torch.no_grad():
            finite = [bool(self.model.loss(idx, targets).isfinite()) for idx, targets in windows]
        bad = [start for start, good in zip(starts, finite, strict=True) if not good] or starts
        rate = self.optimizer.param_groups[0]["lr"]
        return f"learning rate {rate:.4g}, windows that start at tokens {', '.join(map(str, bad))}"

    def save(self):
        """A checkpoint. Its line in the log may be without the evaluation that comes after."""
        if self.team.rank == 0:
            self.log.sync()
            rest = dict(size=self.log.size, crc=self.log.crc, complete=not self.row, row=self.last)
            rest |= dict(best=self.best, shares=self.shares)
            model, optimizer = self.fetched()
            gpt.save_checkpoint(model, optimizer, self.step, self.config, run=json.dumps(rest), **self.about)
            lora.save(model, self.config.out, self.config.init)
            if self.log.held:  # the folder was another run's until now
                remove(self.config.out, [name for name in (*BEST, *OTHERS) if name.startswith("best/")])
            self.log.release()
        self.saved = self.step

    def fetched(self):
        """Model and optimizer as they are now, on the CPU."""
        device.fetch(*self.saves, self.model, self.optimizer)
        return self.saves

    def evaluate(self):
        """Measure, keep the weights if they are the best so far, and complete the row of this step."""
        val_loss = processes.evaluate(self.model, self.team, self.val, self.config.batch_size, max_windows=256)
        gpt.progress("")
        with self.interrupts:
            losses = f"loss {self.row['loss']:.4f}, val loss {val_loss:.4f}"
            best = " (the best so far)" if val_loss < self.best and self.best < math.inf else ""
            if val_loss < self.best and self.team.rank == 0:
                path, (model, _) = os.path.join(self.config.out, "best"), self.fetched()
                model.save_pretrained(path, tokenizer=self.config.tokenizer, step=self.step, val_loss=val_loss)
                lora.save(model, path, self.config.init)
                if self.config.tokenizer == tokenizers.OWN:
                    tokenizers.copy_files(self.config.out, path)
            self.evaluated(val_loss)
            left = (self.config.steps - self.step) * self.per_step / self.speed()
            print(f"step {self.step}: {losses}, {self.speed():,.0f} tokens/s, {left:.0f} s left{best}", flush=True)

    def evaluated(self, val_loss):
        self.best = min(self.best, math.inf if val_loss is None else val_loss)
        self.row = self.row | dict(validation=val_loss if val_loss is not None and math.isfinite(val_loss) else None)
        self.write_row()


def run(typed, ops, place, interrupts, team):
    """gpt.run_train, in a folder that is this run's alone, with what differs from before said."""
    out, resume, overwrite = typed.get("out", "out"), typed.get("resume"), typed.get("overwrite")
    path = os.path.join(out, FILES[0])
    gpt.expect(os.path.isfile(path) or not resume, f"{path} does not exist, so there is nothing to --resume")
    with claimed(out) if team.rank == 0 else nullcontext():
        there = [name for name in (*FILES, *BEST) if os.path.exists(os.path.join(out, name))]
        if team.rank == 0:
            ways = "add --resume or --overwrite" if FILES[0] in there else f"it has {there}: add --overwrite"
            free = resume or overwrite or not there
            gpt.expect(free, f"--out is {out!r}, which holds a checkpoint: {ways}, or take another")
        adapter = {name: typed.pop(name) for name in ("lora", "lora_alpha") if name in typed}
        folder = data.settle_tokenizer(typed, out)  # of the tokenizer's files, if it has some
        before = say_changes(path, typed) if resume else {}
        windows = typed.pop("windows", before.get("windows", "random"))
        adapter = lora.settled(adapter, before, typed.get("init"))

        def train(model, optimizer, tokens, val, config, step):
            if adapter and not resume:
                optimizer = lora.begin(model, adapter, config)
            about = dict(data=data.describe(tokens, val), windows=windows, lora=json.dumps(adapter))
            about |= dict(machine=machine(ops, place), dtype=place.dtype(ops))
            config = shared_out(config, team)
            say_how(config, step, before, about)
            if config.tokenizer == tokenizers.OWN and folder != out and team.rank == 0:
                tokenizers.copy_files(folder, out)
            team.expect_same(f"step {step}, {about}, {config}")
            log = metrics.Log(out, held=bool(there) and not resume)
            running = Run(model, optimizer, place, tokens, val, config, step, interrupts, team, log, about)
            if resume:
                running.shares = 1  # if gpt.py began it
            if "run" in before:
                with gpt.reported_as(f"{path} is damaged"):
                    running.resume(json.loads(before["run"]))
            if before.get("data") not in (None, about["data"]):
                running.best = math.inf  # that was on another text
            running.go()
            if team.rank > 0:
                raise Done

        def get_tokenizer(name):
            return tokenizers.get(folder if name == tokenizers.OWN else name)

        load = lora.loader(adapter) if adapter else gpt.load_checkpoint
        gpt.run_train(typed, ops, train, data.load_tokens, load_checkpoint=load, get_tokenizer=get_tokenizer)


def shared_out(config, team):
    """With batches that the processes can share: the same windows, if need be in smaller batches."""
    B, A = processes.divided(config.batch_size, config.accumulate, team.n)
    if A != config.accumulate:
        print(f"{team.n} processes share a step as --batch-size {B} --accumulate {A}")
    return replace(config, batch_size=B, accumulate=A)


def say_how(config, step, before, about):
    """What may surprise: in the options, or beside the run that is resumed."""
    for name, what in (("data", "the text has changed"), ("machine", "last digits may differ")):
        if before.get(name) not in (None, about[name]):
            print(f"{what}: {about[name]}, it was {before[name]}")
    if config.warmup > config.steps:
        print(f"--warmup {config.warmup} is longer than the run, so it is cut to --steps {config.steps}")
    if step >= config.steps:
        print(f"nothing to do: {config.out} is at step {step} of {config.steps}; --resume --steps N goes on")


@contextmanager
def one_of(team):
    """All processes may complain, but only the first one talks."""
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if team.rank == 0 else nowhere):
            with processes.connected():
                yield team
    except Done:
        pass
    except (ValueError, OSError) as error:
        if team.n == 1:
            raise
        raise ValueError(f"process {team.rank} of {team.n}: {error}") from error
    finally:
        team.close()


class Done(Exception):
    """The last step is done; the first process does the rest."""


def machine(ops, place):
    """What the last digits depend on."""
    return f"torch {torch.__version__}, {getattr(ops, '__name__', 'gpt')} on {place}"


def read_about(path):
    """What a checkpoint says about itself."""
    with gpt.reported_as(f"{path} is missing or damaged"), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def say_changes(path, typed):
    """What was typed other than the run's own options. -> what the checkpoint says about itself"""
    about = read_about(path)
    with gpt.reported_as(f"{path} is missing or damaged"):
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
    """Half a file, of a run that was killed."""
    remove(folder, [f"{name}.tmp" for name in (*FILES, *BEST, *OTHERS, "trial")])


def remove(folder, names):
    for name in names:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def saved_dtype(typed):
    """That of the run that is resumed, which goes on in it unless another is typed."""
    path = os.path.join(typed.get("out", "out"), FILES[0])
    return read_about(path).get("dtype") if typed.get("resume") and os.path.isfile(path) else None


def choose(typed, ops):
    """The functions to train on, and the place, as the options say. ValueError where these don't go together."""
    own, in_bfloat16 = typed.pop("ops", None), (typed.pop("dtype", None) or saved_dtype(typed)) == "bfloat16"
    where = device.find(typed.pop("device", "cpu"))
    kernels, compiled = where.type == "cpu" and own != "torch", typed.pop("compile", False)
    gpt.expect(not (kernels and compiled), "--compile is for torch's functions, expected --ops torch with it")
    if not kernels:
        ops = torch_ops
    elif in_bfloat16:
        gpt.expect(not own, f"--dtype is bfloat16 with --ops {own}, expected float32, as its functions compute")
        _kernels.expect_bfloat16("--dtype bfloat16")
        ops = bfloat16
    if own not in (None, "torch"):
        on_cpu = f"--ops is {own!r} with --device {where}, expected a Python file: C++ runs on the CPU"
        gpt.expect(where.type == "cpu" or not exercise.is_cpp(own), on_cpu)
        ops = exercise.load_ops(own, ops)
    return ops, device.Place(where, in_bfloat16 and not kernels, compiled)


def main(argv=None, ops=ops):
    """`fastgpt train`. Ends with status 1 and one line for an error of use, 130 for Ctrl-C, 143 for SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="fastgpt train", description="Train a model on a text, or on shards of tokens."
    )
    gpt.add_options(parser, gpt.TrainConfig)
    parser.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank beside --init's weights")
    parser.add_argument("--lora-alpha", type=float, metavar="X", help="their weight is X / R (default: R)")
    kinds = ("random", "permutation")
    parser.add_argument("--windows", choices=kinds, help="random, or each once before any repeats (default: random)")
    what = "Python or C++ file with functions of your own, by the formulas' names; or torch, for its own fused ones"
    parser.add_argument("--ops", metavar="FILE|torch", help=what)
    what = "of the operands of matrix products; all else is float32 (default: float32)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=what)
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; all but cpu on torch's functions (default: cpu)")
    parser.add_argument("--compile", action="store_true", help="torch's functions by torch.compile")
    typed = vars(parser.parse_args(argv))
    interrupts = Interrupts()
    interrupts.take_over()
    bench.keep_memory()
    try:
        ops, place = choose(typed, ops)
        with warnings.catch_warnings(), one_of(processes.team()) as team:
            warnings.showwarning = lambda message, *_: print(f"{parser.prog}: {message}", file=sys.stderr)
            run(typed, ops, place, interrupts, team)
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
