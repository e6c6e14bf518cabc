"""Where a run computes its losses: on the CPU, or on a GPU that torch finds.

gpt.py makes, saves and samples models on the CPU. So for another device the model that it made stays where it is, a
copy is trained, and fetch() brings back what it has learned. Batches are drawn on the CPU and go to the device.
"""

import copy
import os
import re

import torch
from torch import nn

import gpt

from . import _kernels, bfloat16, metrics


def find(name):
    """--device cpu, cuda, cuda:N or mps. -> a torch.device; ValueError if torch doesn't find it here

    Of several processes on one machine each takes the GPU of its number, as torchrun counts them.
    """
    known = re.fullmatch(r"cpu|mps|cuda(:\d+)?", name)
    gpt.expect(known, f"--device is {name!r}, expected cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    built = torch.accelerator.current_accelerator()
    here = torch.accelerator.current_accelerator(check_available=True)
    others = f"expected {f'{here.type} or ' if here else ''}cpu"
    told = f"--device is {name!r}, but torch {torch.__version__}"
    gpt.expect(built and built.type == device.type, f"{told} was built without {device.type}, {others}")
    gpt.expect(here, f"{told} finds no GPU, {others}")
    several, count = int(os.environ.get("WORLD_SIZE", "1")) > 1, torch.accelerator.device_count()
    gpt.expect(not several or name == "cuda", f"--device is {name!r} for several processes, expected cpu or cuda")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    wanted = f"expected 0 to {count - 1}, or fewer processes"
    gpt.expect(index < count, f"--device is {name!r}: this process would take GPU {index}, {wanted}")
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


class Place:
    """A device, and how losses are computed there: in bfloat16 by torch.autocast, compiled by torch.compile."""

    def __init__(self, device, autocast=False, compiled=False):
        self.device, self.autocast, self.compiled = device, autocast, compiled
        self.away = device.type != "cpu"
        if autocast:
            gpt.expect(has_bfloat16(device), f"--dtype is bfloat16, which {device} lacks, expected float32")
        if compiled:
            try_to_compile(device)

    def dtype(self, ops):
        """Of the operands of products, as --dtype names it."""
        return "bfloat16" if self.autocast or getattr(ops, "linear", None) is bfloat16.linear else "float32"

    def __str__(self):
        names = dict(cpu=_kernels.isa, cuda=torch.cuda.get_device_name, mps=lambda: "mps")
        name = names[self.device.type]()
        return name + ", bfloat16 autocast" * self.autocast + ", compiled" * self.compiled

    def settle(self, model, optimizer, config):
        """-> the model and the optimizer to train: those that came, or copies of them on the device.

        The loss of each, also of a model that stays on the CPU, is then computed here, of batches from the CPU.
        """
        trained = (model, optimizer) if not self.away else self.copies(model, optimizer, config)
        if self.away or self.autocast or self.compiled:
            trained[0].loss = model.loss = self.loss_of(trained[0])
        return trained

    def copies(self, model, optimizer, config):
        there = {id(p): nn.Parameter(p.detach().to(self.device), p.requires_grad) for p in model.parameters()}
        model = copy.deepcopy(model, dict(there))
        states, optimizer = optimizer.state, gpt.make_optimizer(model, config.lr, config.beta2, config.weight_decay)
        for p, state in states.items():
            optimizer.state[there[id(p)]] = {name: x.to(self.device) for name, x in state.items()}
        return model, optimizer

    def loss_of(self, model):
        """(idx, targets) -> (), as model.loss; compiled where gradients are wanted, for training alone."""
        plain = model.loss
        compiled = torch.compile(plain) if self.compiled else plain

        def loss(idx, targets):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                function = compiled if torch.is_grad_enabled() else plain
                return function(idx.to(self.device), targets.to(self.device))

        return loss

    def limit(self, ops):
        """flops a second of these formulas' products, by a short measurement."""
        if self.away:
            return metrics.matmul_limit(self.device, torch.bfloat16 if self.autocast else torch.float32)
        return metrics.limit(_kernels.has_bfloat16() and self.dtype(ops) == "bfloat16")


def fetch(model, optimizer, trained, its_optimizer):
    """Bring what settle() made back to what it came from."""
    if trained is model:
        return
    for p, its in zip(model.parameters(), trained.parameters(), strict=True):
        if p.requires_grad:
            p.data.copy_(its.detach())
            optimizer.state[p] = {name: x.cpu() for name, x in its_optimizer.state[its].items()}


def has_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device)
        return True
    except (RuntimeError, TypeError):
        return False


def try_to_compile(device):
    """ValueError if torch.compile lacks something here, such as a C++ compiler: before the run begins."""
    torch._dynamo.config.capture_scalar_outputs = True  # dropout's seed, an int, then breaks no graph
    try:
        torch.compile(torch.tanh)(torch.ones(8, device=device, requires_grad=True)).sum().backward()
    except RuntimeError as error:
        raise ValueError(f"--compile: torch.compile does not work here ({str(error).splitlines()[0]})") from error
