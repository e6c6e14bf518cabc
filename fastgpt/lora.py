"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"): fine-tune a model by small matrices.

Beside each frozen weight W (N, K) of a block stand A (R, K) and B (N, R), which alone are trained:

    y = x W^T + bias + alpha / R (x A^T) B^T

B begins as zeros, so that the model begins as it was. At the end the product of both is added to W (`state_dict` and
so `save_pretrained` give these merged weights), or both are kept as they are, in the files of Hugging Face's PEFT.
"""

import argparse
import json
import math
import os
from functools import partial
from pathlib import Path

import torch
from torch import nn

import gpt

from . import ops

NAMES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # in each block
FILES = ("adapter_model.safetensors", "adapter_config.json")
PREFIX = "base_model.model.transformer."  # of PEFT's names


class Adapted(gpt.Layer):
    """A linear or linear_gelu whose weight and bias are frozen, with A and B beside it."""

    def __init__(self, layer, ops, rank, alpha):
        nn.Module.__init__(self)
        self.formula, self.weight, self.bias = layer.formula, layer.weight, layer.bias
        self.linear, self.gelu = ops.linear, ops.gelu if layer.formula is ops.linear_gelu else None
        (N, K), self.scale = self.weight.shape, alpha / rank
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, K).uniform_(-1 / math.sqrt(K), 1 / math.sqrt(K)))
        self.lora_B = nn.Parameter(self.weight.new_zeros(N, rank))

    def forward(self, x):  # (..., K) -> (..., N)
        y = self.linear(x, self.weight, self.bias)
        y = y + self.linear(self.scale * self.linear(x, self.lora_A), self.lora_B)
        return y if self.gelu is None else self.gelu(y)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """What a plain Layer computes the same with."""
        merged = self.weight + self.scale * (self.lora_B @ self.lora_A)
        destination |= {f"{prefix}weight": merged.detach(), f"{prefix}bias": self.bias.detach()}


def expect_fits(config, rank, alpha):
    limit = config.n_embd
    gpt.expect(1 <= rank <= limit, f"--lora is {rank}, expected 1 <= lora <= {limit}, the model's channels")
    gpt.expect(0 < alpha < math.inf, f"--lora-alpha is {alpha}, expected 0 < lora_alpha < inf")


def adapt(model, rank, alpha, places=None):
    """Freeze a model and put A and B into its blocks, in place. places: ["h.0.attn.c_attn", ...], or None for all."""
    expect_fits(model.config, rank, alpha)
    model.requires_grad_(False)
    for place in places or [f"h.{i}.{name}" for i in range(model.config.n_layer) for name in NAMES]:
        parent, _, name = place.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, Adapted(getattr(parent, name), model.ops, rank, alpha))
    return model


def adapters(model):
    """{place: its Adapted}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def checksum(model):
    """Of the frozen weights: an adapter without them is worth nothing."""
    return gpt.checksum({name: p.detach() for name, p in model.named_parameters() if "lora_" not in name}, {})


def settled(typed, before, init):
    """What `fastgpt train` is told, and what the run that it resumes has. -> dict(lora=rank, lora_alpha=...), or {}"""
    if before:
        saved = json.loads(before.get("lora", "{}"))
        gpt.expect_same(typed, dict(lora=saved.get("lora"), lora_alpha=saved.get("lora_alpha")))
        return saved | dict(init=json.loads(before["options"])["init"]) if saved else {}
    if "lora" not in typed:
        gpt.expect(not typed, "--lora-alpha is nothing without --lora")
        return {}
    gpt.expect(init, "--lora adapts a model that is there, expected --init with its name or folder")
    return dict(lora_alpha=float(typed["lora"])) | typed


def begin(model, adapter, config):
    """Put new adapters into a model. -> an optimizer for them. `adapter` learns what the frozen weights are."""
    torch.manual_seed(config.seed)
    adapter["base"] = checksum(adapt(model, adapter["lora"], adapter["lora_alpha"]))
    n = sum(p.numel() for p in gpt.trained(model).values())
    print(f"{n:,} parameters in adapters of rank {adapter['lora']} are trained, all others frozen")
    return gpt.make_optimizer(model, config.lr, config.beta2, config.weight_decay)


def loader(adapter):
    """gpt.load_checkpoint, for one that holds adapters alone: the frozen weights are read where they came from."""

    def build(cls, sizes, tensors, ops):
        model = adapt(cls.from_pretrained(adapter["init"], ops, sizes.dropout), adapter["lora"], adapter["lora_alpha"])
        gpt.expect(
            checksum(model) == adapter["base"], f"--init {adapter['init']} has other weights than when it was adapted"
        )
        for name, p in gpt.trained(model).items():
            p.data.copy_(gpt.take(tensors, name, p))
        return model

    return partial(gpt.load_checkpoint, build=build)


def save(model, folder, base):
    """PEFT's two files: A and B by its names, and what it must know to use them on the model called `base`.

    For a model without adapters none, and another run's are removed.
    """
    found = adapters(model)
    if not found:
        for name in FILES:
            Path(folder, name).unlink(missing_ok=True)
        return
    first = next(iter(found.values()))
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=len(first.lora_A),
        lora_alpha=first.scale * len(first.lora_A),
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted({place.rpartition(".")[2] for place in found}),
        fan_in_fan_out=True,  # the base's weights are stored (in, out)
        inference_mode=True,
    )
    tensors = {f"{PREFIX}{place}.{x}.weight": getattr(m, x) for place, m in found.items() for x in ("lora_A", "lora_B")}
    os.makedirs(folder, exist_ok=True)
    gpt.save_tensors(os.path.join(folder, FILES[0]), tensors)
    text = json.dumps(config, indent=2)
    gpt.write_whole(os.path.join(folder, FILES[1]), lambda name: Path(name).write_text(text, encoding="utf-8"))


KNOWN = dict(  # what an adapter_config.json may say of what is not built here
    peft_type=("LORA",), bias=("none",), use_dora=(False,), use_rslora=(False,), modules_to_save=(None, []),
    rank_pattern=({},), alpha_pattern=({},), trainable_token_indices=(None,), lora_bias=(False,), use_qalora=(False,),
)  # fmt: skip


def load(model, folder):
    """Put the adapter in a folder, PEFT's or save()'s, into a plain model, in place. ValueError if it doesn't fit."""
    path = os.path.join(folder, FILES[1])
    with gpt.reported_as(f"{path} is no adapter's configuration"):
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        for key, values in KNOWN.items():
            gpt.expect(config.get(key, values[0]) in values, f"{key} is {config.get(key)!r}, expected {values[0]!r}")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    tensors, _ = gpt.load_tensors(os.path.join(folder, FILES[0]))
    with gpt.reported_as(f"{os.path.join(folder, FILES[0])} doesn't fit the model"):
        tensors = {key.removeprefix(PREFIX).removesuffix(".weight"): x for key, x in tensors.items()}
        places = sorted({key.rpartition(".")[0] for key in tensors})
        known = [f"h.{i}.{name}" for i in range(model.config.n_layer) for name in NAMES]
        gpt.expect(places and {*places} <= {*known}, f"it has {', '.join({*places} - {*known}) or 'no matrices'}")
        adapt(model, rank, alpha, places)
        for name, p in gpt.trained(model).items():
            p.data.copy_(gpt.take(tensors, name, p))
        gpt.expect(not tensors, f"it has {', '.join(tensors)}")
    return model


def merge(argv=None):
    """`fastgpt merge`: a plain model of a base and an adapter."""
    parser = argparse.ArgumentParser(prog="fastgpt merge", description="Make a plain model of a base and an adapter.")
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of `fastgpt train --lora`, or of PEFT")
    parser.add_argument("--model", help="the base: a folder, or gpt2, gpt2-medium, ... (default: the adapter's own)")
    parser.add_argument("--out", required=True, help="folder for the model")
    args = parser.parse_args(argv)
    base = args.model or base_of(args.adapter)
    there = os.path.exists(os.path.join(args.out, "model.safetensors"))
    gpt.expect(not there, f"--out is {args.out!r}, which holds a model: take another")
    model = gpt.GPT.from_pretrained(base, ops)
    tokenizer = model.tokenizer
    load(model, args.adapter).save_pretrained(args.out, **(dict(tokenizer=tokenizer) if tokenizer else {}))
    print(f"{base} with {args.adapter} is in {args.out}")


def base_of(folder):
    path = os.path.join(folder, FILES[1])
    with gpt.reported_as(f"{path} names no base model"):
        base = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
        gpt.expect(isinstance(base, str) and base, f"base_model_name_or_path is {base!r}")
    return base
