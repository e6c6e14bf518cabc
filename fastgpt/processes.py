"""A training step in several processes, on torch's DistributedDataParallel: the bits of one process.

    torchrun --nproc-per-node 2 -m fastgpt train --accumulate 4 ...

A step has `accumulate` batches, whatever the number N of processes. Every process draws them all and computes its own:
with N = 2, the first two or the last two of four. Gradients are added up in each process, then process by process, in
that order: DistributedDataParallel's own mean would add in an order that depends on N.

Floats don't add up to the same bits in every order. One process adds g1 + g2 + g3 + g4 from left to right, two that
keep their sums to themselves until the end (g1 + g2) + (g3 + g4). So the number of `shares`, in which the sums are
kept, belongs to the run: a run keeps the one that it began with, and a number of processes other than that takes the
batches in turns and exchanges every gradient, in the order of the shares. Each way has the same bits, then.
"""

import math
import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gpt


class Alone:
    """One process, that of a plain `fastgpt train`."""

    rank, n = 0, 1

    def start(self):
        """A process group of one, for a run that several began."""
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)

    def expect_same(self, what):
        """Before the first step: ValueError in each process if they were started on other things."""

    def gather(self, row):
        """A list of floats from each process, all of one length. -> all lists"""
        return [row]

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


class Team(Alone):
    """The processes that torchrun started."""

    def __init__(self):
        dist.init_process_group(backend())
        self.rank, self.n = dist.get_rank(), dist.get_world_size()

    def start(self):
        pass

    def expect_same(self, what):
        known = [None] * self.n
        dist.all_gather_object(known, what)
        for i, x in enumerate(known):
            gpt.expect(x == known[0], f"process 0 was started on {known[0]}, process {i} on {x}, expected the same")

    def gather(self, row):
        rows = [torch.empty(len(row), dtype=torch.float64) for _ in range(self.n)]
        dist.all_gather(rows, torch.tensor(row, dtype=torch.float64))
        return [row.tolist() for row in rows]


def backend():
    """What carries the tensors of each device. What isn't a gradient is on the CPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


@contextmanager
def connected():
    """That another process has gone is a ValueError in those that wait for it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ValueError("another process has gone; what it said last may tell why") from error
        raise


def team():
    """That of this process, by torchrun's environment."""
    return Team() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()


def divided(batch_size, accumulate, n):
    """-> batch_size, accumulate: the same windows, in batches that n processes can share. ValueError if none are."""
    pieces = n // math.gcd(n, accumulate)
    windows = f"--batch-size {batch_size} x --accumulate {accumulate} windows"
    gpt.expect(batch_size % pieces == 0, f"{n} processes can't share a step of {windows}, expected a multiple of {n}")
    return batch_size // pieces, accumulate * pieces


def share(model, accumulate, shares, team):
    """-> what gpt.train_step takes for the model: itself where one process adds up from left to right"""
    return model if team.n == 1 and shares in (1, accumulate) else Shared(model, accumulate, shares, team)


class Loss(nn.Module):
    """DistributedDataParallel sees to the gradients of what a module's forward computes: here, the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model.loss(idx, targets)


class Shared:
    """A model as gpt.train_step and gpt.evaluate need it, whose batches are shared among the processes of a team.

    After the step's last batch each parameter's .grad is the sum over all of them, in every process.
    """

    def __init__(self, model, accumulate, shares, team):
        self.model, self.config, self.parameters, self.team = model, model.config, model.parameters, team
        self.accumulate, self.size = accumulate, accumulate // shares  # batches in a step, in a share
        self.in_turns = shares != team.n and not (self.size in (1, accumulate) and accumulate == team.n)
        self.batch, self.losses, self.sums = 0, [], {}
        team.start()
        self.ddp = DistributedDataParallel(Loss(model))
        self.ddp.register_comm_hook(self, Shared.add_up)

    def is_own(self, i):
        """Is batch i this process's?"""
        return (i % self.team.n if self.in_turns else i * self.team.n // self.accumulate) == self.team.rank

    def loss(self, idx, targets):
        """The loss of a batch, if it is this process's; else 0, which has no gradient."""
        i, self.batch = self.batch, (self.batch + 1) % self.accumulate
        if i == 0:
            self.losses, self.sums = [], {}
        if not self.is_own(i):
            return torch.zeros((), requires_grad=True)
        if self.in_turns:
            for p in self.parameters():
                p.grad = None
        last = self.in_turns or i + 1 == self.accumulate or not self.is_own(i + 1)
        with nullcontext() if last else self.ddp.no_sync():  # the forward settles whether its backward exchanges
            loss = self.ddp(idx, targets)
        self.losses.append((loss.detach() / self.accumulate).item())
        return loss if loss.isfinite() else loss * torch.nan  # so that the others' norm is not finite, too

    def add_up(self, bucket):
        """DistributedDataParallel's hook: a bucket of this process's gradients -> a future of the sum over all."""
        own = bucket.buffer()
        parts = [torch.empty_like(own) for _ in range(self.team.n)]
        dist.all_gather(parts, own)
        if self.in_turns:
            total = self.add_in_turns(bucket, parts)
        else:
            total = parts[0]
            for part in parts[1:]:
                total += part
        future = torch.futures.Future(devices=[own.device] if own.is_cuda else [])
        future.set_result(total)
        return future

    def add_in_turns(self, bucket, parts):
        """Parts are those of single batches: they are added up within their shares, then share by share."""
        total = torch.empty_like(parts[0])
        first = (self.batch - 1) % self.accumulate // self.team.n * self.team.n  # of this turn's batches
        for p, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            begin = view.storage_offset() - bucket.buffer().storage_offset()
            place = slice(begin, begin + view.numel())
            sums = self.sums.setdefault(p, SimpleNamespace(done=None, share=None))
            for i, part in enumerate(parts, start=first):
                if i % self.size == 0:
                    sums.done = add(sums.done, sums.share)
                    sums.share = None
                sums.share = add(sums.share, part[place])
            total[place] = add(sums.done, sums.share)
        return total

    def agree(self, norm, number):
        """After a step. -> its loss over all batches; the number of a signal that reached any process, or 0.

        ValueError if the gradients are not the same everywhere: something went past DistributedDataParallel.
        """
        rows = self.team.gather([norm, number, *self.losses])
        norms, numbers, *losses = zip(*rows, strict=True)
        same = f"the gradients of the processes have norms {norms}, expected the same: they are not synchronised"
        gpt.expect(len(set(norms)) == 1, same)
        each = zip(*losses, strict=True) if not self.in_turns else losses  # process by process; in turns
        return sum((x for row in each for x in row), 0.0), int(max(numbers))


def add(a, b):
    """a + b, where None is nothing yet."""
    return b if a is None else a if b is None else a + b


def evaluate(model, team, tokens, batch_size, max_windows):
    """gpt.evaluate, its batches shared among the processes: the same bits in each."""
    turns = Turns(model, team)
    if team.n > 1:
        gpt.evaluate(turns, tokens, batch_size, max_windows)
        turns.exchange()
    return gpt.evaluate(turns, tokens, batch_size, max_windows)


class Turns:
    """A model as gpt.evaluate needs it, with the batches of this process alone; after exchange(), the losses of all."""

    def __init__(self, model, team):
        self.model, self.config, self.eval, self.train, self.team = model, model.config, model.eval, model.train, team
        self.training, self.batch, self.losses, self.all = model.training, 0, [], None

    def loss(self, idx, targets):
        i, self.batch = self.batch, self.batch + 1
        if self.all is not None:
            return self.all[i % self.team.n][i // self.team.n]
        if i % self.team.n != self.team.rank:
            return 0.0
        self.losses.append(float(self.model.loss(idx, targets)))
        return self.losses[-1]

    def exchange(self):
        missing = -(-self.batch // self.team.n) - len(self.losses)
        self.all, self.batch = self.team.gather(self.losses + [0.0] * missing), 0
