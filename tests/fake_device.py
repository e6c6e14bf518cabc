"""A training step on a device that need not be there: fake tensors, of which no operation may mix two devices.

    python tests/fake_device.py

torch lets a backend be made in Python: with its autograd, but without memory and autocast. It stands for a GPU. In a
process of its own, because a backend stays. Prints a line for each case that holds.
"""

import itertools
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpt
from fastgpt import device, lora, torch_ops

_setup_privateuseone_for_python_backend("npy")
torch.npy.get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch.autocast(enabled=False) asks, too
CPU, GPU = torch.device("cpu"), torch.device("npy", 0)
CONFIG = gpt.GPTConfig(n_layer=2, n_head=4, n_embd=48, block_size=40, vocab_size=97)


def asks_for_values_no_more():
    gpt.check_tokens = lambda *_: None
    torch.randint = lambda *_: 7  # a seed of dropout


def run_so_far(adapter, dropout):
    """A model and an optimizer with a step behind it, as gpt.py makes them."""
    model = gpt.GPT(gpt.replace(CONFIG, dropout=dropout), torch_ops)
    if adapter:
        lora.adapt(model, 2, 2.0)
    optimizer = gpt.make_optimizer(model, 1e-3, 0.99, 0.1)
    for p in gpt.trained(model).values():
        optimizer.state[p] = dict(step=torch.ones(()), **{x: torch.zeros_like(p) for x in gpt.MOMENTS})
    return model, optimizer


def devices(model, optimizer):
    states = (x for state in optimizer.state.values() for x in state.values())
    return {x.device for x in (*model.parameters(), *states)}


def step(adapter, dropout):
    model, optimizer = run_so_far(adapter, dropout)
    there, its = device.Place(GPU).settle(model, optimizer, gpt.TrainConfig())
    assert devices(there, its) == {GPU} and devices(model, optimizer) == {CPU}
    assert [p.requires_grad for p in there.parameters()] == [p.requires_grad for p in model.parameters()]
    idx = torch.zeros(3, 16, dtype=torch.int64)
    for loss_of in (model.loss, there.loss):  # gpt.run_train measures the model that it made
        loss = loss_of(idx, idx)
        assert (loss.device, loss.dtype) == (GPU, torch.float32)
    loss.backward()
    assert {(p.grad.device, p.grad.dtype) for p in gpt.trained(there).values()} == {(GPU, torch.float32)}
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in gpt.trained(there).values()]
    )  # gpt.clip_gradients looks at it
    torch.nn.utils.clip_grads_with_norm_(there.parameters(), 1.0, norm)
    assert norm.device == GPU
    its.step()
    device.fetch(model, optimizer, there, its)
    assert devices(there, its) == {GPU} and devices(model, optimizer) == {CPU}
    assert all(p.grad is None for p in model.parameters())
    try:  # the proof can fail
        gpt.GPT.loss(there, idx, idx)
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise AssertionError("a batch on the CPU went through a model that is elsewhere")


if __name__ == "__main__":
    asks_for_values_no_more()
    for case in itertools.product((False, True), (0.0, 0.1)):
        with FakeTensorMode():
            step(*case)
        print("adapter {}, dropout {}".format(*case))
