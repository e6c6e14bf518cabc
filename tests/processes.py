"""Training in several processes, as torchrun starts them but forked from this one, which has imported torch already.

    python tests/processes.py '[[2, null, ["--out", "a", "--steps", "9"]], [1, null, ["--out", "a", "--resume"]]]'

Runs one after another, each with a number of processes, a fault of FAULTS or null, and the options of `fastgpt train`.
Prints a list of [statuses, what was said] as JSON.
"""

import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgpt.train
import gpt
from fastgpt import processes


def bypassed_wrapper(shared):
    """The loss is the module's own: DistributedDataParallel doesn't hear of it."""
    shared.ddp.forward = shared.ddp.module.forward


def late_flag(shared):
    """no_sync() is entered after the forward, which has settled by then that this gradient is exchanged."""
    forward = shared.ddp.forward

    def forward_first(*args):
        flag, shared.ddp.require_backward_grad_sync = shared.ddp.require_backward_grad_sync, True
        loss = forward(*args)
        shared.ddp.require_backward_grad_sync = flag
        return loss

    shared.ddp.forward = forward_first


def lost_process(shared):
    """The second process ends in the middle."""
    if shared.team.rank == 1:
        at_step(3, lambda: os._exit(9))


def signalled_process(shared):
    """A signal reaches the second process alone."""
    if shared.team.rank == 1:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


FAULTS = {f.__name__: f for f in (bypassed_wrapper, late_flag, lost_process, signalled_process)}


def at_step(step, act):
    real = gpt.train_step

    def train_step(*args):
        if args[3] == step:
            act()
        return real(*args)

    gpt.train_step = train_step


def plant(fault):
    """A fault of FAULTS, in the processes' Shared; or "killed at N", all of them, before step N + 1."""
    if fault.startswith("killed at "):
        at_step(int(fault.split()[-1]), lambda: os._exit(9))
    else:
        init = processes.Shared.__init__
        processes.Shared.__init__ = lambda shared, *args: (init(shared, *args), FAULTS[fault](shared))[0]


def process(rank, n, port, fault, argv, log):
    """What a fork does. -> its status"""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if fault:
        plant(fault)
    try:
        fastgpt.train.main(argv)
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 1


def run(n, fault, argv):
    """-> statuses of the processes, what they said"""
    with tempfile.NamedTemporaryFile() as log, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        pids = []
        for rank in range(n):
            pids.append(os.fork())
            if not pids[-1]:
                status = 1
                try:
                    status = process(rank, n, port, fault, argv, log.name)
                    sys.stdout.flush()
                finally:
                    os._exit(status)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        return statuses, Path(log.name).read_text(errors="replace")


if __name__ == "__main__":
    print(json.dumps([run(*one) for one in json.loads(sys.argv[1])]))
