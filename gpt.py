"""GPT-2 from first principles: the model, its training and its use, in one file to be read from top to bottom.

  1  Config        the four GPT-2s, as numbers
  2  Formulas      all the mathematics: layer_norm, gelu, linear, attention, lm_loss
  3  Model         where the weights live, and the order in which the formulas meet them
  4  Generation    one token after another, with a cache; how a token is drawn
  5  Data          text to integers and back; one long row of tokens, cut into windows
  6  Training      AdamW, warm-up and cosine, clipping, accumulation
  7  Files         checkpoints, and weights in the Hugging Face layout
  8  Command line  python gpt.py train | generate | eval; in an appendix, the random numbers of dropout

It runs on the CPU with torch, numpy, tiktoken and safetensors, and nothing else of this project. The package `fastgpt`
holds the same formulas as fused C++ kernels: GPT(config, ops=fastgpt) runs on those. `fastgpt train` guards long runs.

The letters in every comment: B batch, T time (position), C channels, H heads, D = C / H head size, V vocabulary.
Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and the code released with it;
for attention, Vaswani et al. 2017, "Attention Is All You Need".
"""

import argparse
import json
import math
import os
import random
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import get_args

import numpy as np
import safetensors.torch
import tiktoken
import torch
from torch import nn


def expect(good, message):
    if not good:
        raise ValueError(message)


# --------------------------------------------------------------------------------------------------- 1  Config


@dataclass
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C
    block_size: int = 1024  # the longest T: each position has a learned vector, there are no more
    vocab_size: int = 50257  # V: 256 bytes + 50,000 merges + <|endoftext|>
    dropout: float = 0.0

    def __post_init__(self):
        for name, x in vars(self).items():
            if name != "dropout":
                expect(type(x) is int and x > 0, f"GPTConfig: {name} is {x!r}, expected a positive integer")
        expect(0 <= self.dropout < 1, f"GPTConfig: dropout is {self.dropout!r}, expected 0 <= dropout < 1")
        C, H = self.n_embd, self.n_head
        expect(C % H == 0, f"GPTConfig: n_embd={C} is not a multiple of n_head={H}")


SIZES = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124,439,808 parameters
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 354,823,168
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774,030,080
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1,557,611,200
}

# ------------------------------------------------------------------------------------------------- 2  Formulas


def layer_norm(x, weight, bias, eps=1e-5):
    """Bring each position to mean 0 and variance 1, then scale and shift it. (..., C), (C), (C) -> (..., C)"""
    centered = x - x.mean(-1, keepdim=True)  # (..., C)
    variance = centered.square().mean(-1, keepdim=True)  # (..., 1), divided by C and not by C - 1
    return centered / torch.sqrt(variance + eps) * weight + bias


def gelu(x):
    """x * Phi(x), Phi the standard normal CDF, in the tanh approximation that GPT-2 was trained with. Any shape."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, weight, bias=None):
    """Each output channel is a weighted sum of all input channels. (..., K), (N, K), (N) -> (..., N)"""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_gelu(x, weight, bias=None):
    """Both at once, which a kernel can do in one pass. (..., K), (N, K), (N) -> (..., N)"""
    return gelu(linear(x, weight, bias))


linear_gelu.stands_for = (linear, gelu)  # type: ignore[attr-defined]  # section 3 asks


def attention(qkv, n_head, dropout=0.0, seed=0):
    """Split into heads, attend in each, and put the heads side by side again. (B, T, 3C) -> (B, T, C)

    qkv holds queries, keys and values. `dropout` zeroes a share of the weights, chosen by `seed`, and scales the rest.
    """
    B, T, _ = qkv.shape
    keep = dropout_mask(B, n_head, T, dropout, seed).to(qkv) / (1.0 - dropout) if dropout else None  # see the appendix
    return merge_heads(attend(*split_heads(qkv, n_head), keep))


def attend(q, k, v, keep=None):
    """Each query takes a mean of the values up to its position, weighted by how well their keys match it.

    softmax(Q K^T / sqrt(D)) V: (B, H, Tq, D), (B, H, Tk, D), (B, H, Tk, D) -> (B, H, Tq, D). The queries are the
    last Tq of Tk positions.
    """
    (Tq, D), Tk = q.shape[-2:], k.shape[-2]
    # A sum of D products grows like sqrt(D). Undivided, softmax would pick one key, and hardly any gradient would pass.
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, Tq, Tk)
    future = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(Tk - Tq + 1)  # key after query
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)  # each row sums to 1
    return (weights if keep is None else weights * keep) @ v


attention.attend = attend  # type: ignore[attr-defined]  # the KV cache calls this part alone


def split_heads(qkv, n_head):  # (B, T, 3C) -> q, k, v, each (B, H, T, D)
    return [x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)]


def merge_heads(y):  # (B, H, T, D) -> (B, T, C)
    return y.transpose(1, 2).flatten(2)


def lm_loss(hidden, weight, targets):
    """Cross-entropy: the mean of -log p(target) in nats. Targets of -1 are ignored; all of them: NaN.

    (B, T, C), (V, C), (B, T) -> ()
    """
    keep = targets != -1
    logits = hidden @ weight.T  # (B, T, V)
    target_logit = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)  # (B, T)
    nll = logits.logsumexp(-1) - target_logit  # -log softmax(logits)[target]
    return torch.where(keep, nll, 0.0).sum() / keep.sum()


FORMULAS = ("layer_norm", "gelu", "linear", "attention", "lm_loss")  # what `ops` must have; linear_gelu it may have

# ---------------------------------------------------------------------------------------------------- 3  Model


class Layer(nn.Module):
    """A formula with its weight and bias: layer_norm, linear or linear_gelu."""

    def __init__(self, formula, weight):
        super().__init__()
        self.formula, self.weight, self.bias = formula, nn.Parameter(weight), nn.Parameter(torch.zeros(len(weight)))

    def forward(self, x):
        return self.formula(x, self.weight, self.bias)


class Attention(nn.Module):
    """Positions exchange information."""

    def __init__(self, config, ops):
        super().__init__()
        self.formula, self.n_head, self.dropout = ops.attention, config.n_head, config.dropout
        self.c_attn = Layer(ops.linear, normal(3 * config.n_embd, config.n_embd))
        self.c_proj = Layer(ops.linear, normal(config.n_embd, config.n_embd, 2 * config.n_layer))

    def forward(self, x, cache=None):  # (B, T, C) -> (B, T, C)
        qkv = self.c_attn(x)  # (B, T, 3C)
        if cache is not None:
            y = cache.attention(qkv, self.n_head, self.formula)
        elif self.training and self.dropout:
            y = self.formula(qkv, self.n_head, self.dropout, int(torch.randint(2**62, ())))
        else:
            y = self.formula(qkv, self.n_head)
        return self.c_proj(y)


class MLP(nn.Module):
    """Each position thinks for itself."""

    def __init__(self, config, ops):
        super().__init__()
        self.c_fc = Layer(ops.linear_gelu, normal(4 * config.n_embd, config.n_embd))
        self.c_proj = Layer(ops.linear, normal(config.n_embd, 4 * config.n_embd, 2 * config.n_layer))

    def forward(self, x):  # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        return self.c_proj(self.c_fc(x))


class Block(nn.Module):
    """Normalize, compute, add back: twice.

    x is the residual stream: blocks only add to it, so gradients reach every layer undiminished. They read it through
    a layer_norm of their own (pre-norm); to normalize the sum, as the first transformer did, would break the stream.
    """

    def __init__(self, config, ops):
        super().__init__()
        self.ln_1, self.attn = Layer(ops.layer_norm, torch.ones(config.n_embd)), Attention(config, ops)
        self.ln_2, self.mlp = Layer(ops.layer_norm, torch.ones(config.n_embd)), MLP(config, ops)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):  # (B, T, C) -> (B, T, C)
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


def normal(n_out, n_in, n_added=1):
    """N(0, 0.02). Where n_added outputs add up in the residual stream each is smaller: their sum is like one alone."""
    return torch.empty(n_out, n_in).normal_(0.0, 0.02 / math.sqrt(n_added))


class GPT(nn.Module):
    """The whole model. `ops` is any namespace with the five formulas; None takes those of this file.

    Parameter names are Hugging Face's. The output has no weights of its own (tied): a token's row in wte is how it is
    read and what a hidden state must point to for it to come next. That saves a quarter of the parameters of "gpt2".
    """

    def __init__(self, config, ops=None):
        super().__init__()
        ops = ops or sys.modules[__name__]
        missing = [name for name in FORMULAS if not callable(getattr(ops, name, None))]
        expect(not missing, f"GPT: ops has no {', '.join(missing)}; expected a namespace with {', '.join(FORMULAS)}")
        self.config, self.ops, self.tokenizer = config, SimpleNamespace(**{x: getattr(ops, x) for x in FORMULAS}), None
        # linear_gelu is right only for the linear and the gelu it stands for; otherwise the two, one after the other
        fused = getattr(ops, "linear_gelu", None)
        fits = getattr(fused, "stands_for", None) == (ops.linear, ops.gelu)
        self.ops.linear_gelu = fused if fits else (lambda *args: ops.gelu(ops.linear(*args)))
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what the token is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, self.ops) for _ in range(config.n_layer))
        self.ln_f = Layer(ops.layer_norm, torch.ones(config.n_embd))
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def hidden(self, idx, caches=None):
        """The last layer's channels, normalized: (B, T) -> (B, T, C). With caches, idx goes on from what they hold."""
        past = caches[0].length if caches else 0
        if not torch.compiler.is_compiling():
            check_tokens(idx, past, self.config)
        x = self.drop(self.wte(idx) + self.wpe.weight[past : past + idx.shape[1]])  # tokens and their places
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None)
        return self.ln_f(x)

    def forward(self, idx):
        """Logits of the token that follows each position: (B, T) -> (B, T, V)."""
        return self.ops.linear(self.hidden(idx), self.wte.weight)

    def loss(self, idx, targets):
        """Mean cross-entropy in nats: (B, T), (B, T) -> (). The logits need never exist as a whole."""
        return self.ops.lm_loss(self.hidden(idx), self.wte.weight, targets)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
        """Append max_new_tokens to idx: (B, T) -> (B, T + max_new_tokens). See section 4."""
        return generate(self, idx, max_new_tokens, temperature, top_k, top_p, seed)

    @classmethod
    def from_pretrained(cls, path, ops=None, dropout=0.0):
        """Weights in the Hugging Face GPT-2 layout, from a folder or, by name, from the Hub ("gpt2-xl"). Section 7."""
        return load_pretrained(cls, path, ops, dropout)

    def save_pretrained(self, path, **extra):
        """Write model.safetensors and config.json (with `extra` in it), which transformers' GPT-2 loads too."""
        write_pretrained(self, path, extra)


def check_tokens(idx, past, config):
    good = idx.dim() == 2 and idx.dtype in (torch.int64, torch.int32)
    expect(good, f"GPT: idx is {idx.dtype} of shape {tuple(idx.shape)}, expected int64 of shape (B, T)")
    T, V = past + idx.shape[1], config.vocab_size
    expect(T <= config.block_size, f"GPT: idx has {T} positions, expected at most {config.block_size}")
    bad = idx[(idx < 0) | (idx >= V)].tolist()
    expect(not bad, f"GPT: idx has {bad and bad[0]}, expected 0 <= idx < vocab_size={V}")


# ----------------------------------------------------------------------------------------------- 4  Generation


class KVCache:
    """One layer's queries, keys and values of all positions so far: a new token pays for one position, not for T."""

    def __init__(self, B, config, dtype, device=None):
        self.qkv, self.length = torch.empty(B, config.block_size, 3 * config.n_embd, dtype=dtype, device=device), 0

    def attention(self, qkv, n_head, formula):
        """The formula's result at new positions, which see those before them: (B, t, 3C) -> (B, t, C).

        An attention of one's own without an `attend` is computed over all positions again: slower, but right.
        """
        past, self.length = self.length, self.length + qkv.shape[1]
        self.qkv[:, past : self.length] = qkv
        seen = self.qkv[:, : self.length]
        if past == 0 or not hasattr(formula, "attend") or hasattr(formula, "__wrapped__"):  # wraps() copies attend
            return formula(seen, n_head)[:, past:]
        q, k, v = split_heads(seen, n_head)
        return merge_heads(formula.attend(q[:, :, past:], k, v))


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
    """Append max_new_tokens to idx, one after another, each drawn by `sample`: (B, T) -> (B, T + max_new_tokens).

    Positions are learned, so once the window of block_size is full it slides and every position changes: from there on
    each token costs a whole pass. `seed` starts Python's random.Random (Mersenne Twister); None takes one from torch.
    """
    expect(idx.dim() == 2 and idx.shape[1] > 0, f"generate: idx is {tuple(idx.shape)}, expected (B, T) with T >= 1")
    expect(max_new_tokens >= 0, f"generate: max_new_tokens is {max_new_tokens}, expected 0 or more")
    expect(0 <= temperature < math.inf, f"generate: temperature is {temperature}, expected 0 or more")
    expect(top_k is None or top_k >= 1, f"generate: top_k is {top_k}, expected None or 1 or more")
    expect(top_p is None or 0 < top_p <= 1, f"generate: top_p is {top_p}, expected None or 0 < top_p <= 1")
    rng = random.Random(int(torch.randint(2**62, ())) if seed is None else seed)
    caches, training = None, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if caches is None or caches[0].length == model.config.block_size:  # at the start; when the window slides
                caches = [KVCache(len(idx), model.config, model.wte.weight.dtype, idx.device) for _ in model.h]
                new = idx[:, -model.config.block_size :]
            logits = model.ops.linear(model.hidden(new, caches)[:, -1], model.wte.weight)  # (B, V)
            new = sample(logits, temperature, top_k, top_p, rng)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)
        return idx
    finally:
        model.train(training)


def sample(logits, temperature, top_k, top_p, rng):
    """Draw one token from each row of logits: (B, V) -> (B, 1). A program that does these steps draws the same tokens.

    temperature 0: the most likely token, of equals the smallest id. Otherwise, row by row:
    1. order the tokens by logit, the largest first, equals by id; keep the first top_k
    2. probabilities: softmax of logits / temperature, in float64
    3. top_p (Holtzman et al. 2019): keep a token if those before it sum to less than top_p
    4. u = rng.random() * (sum of what is kept); the token is the first whose running sum is > u
    """
    expect(logits.isfinite().all(), "generate: the logits are not finite; are the weights damaged, or diverged?")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered[:, :top_k].double()
    probs = torch.softmax((ordered - ordered[:, :1]) / temperature, dim=-1)
    if top_p is not None:
        before = nn.functional.pad(probs.cumsum(-1)[:, :-1], (1, 0))
        probs[before >= top_p] = 0.0
    sums = probs.cumsum(-1)  # (B, k)
    u = probs.new_tensor([rng.random() for _ in probs])[:, None] * sums[:, -1:]
    return tokens.gather(-1, torch.searchsorted(sums, u, right=True))


# ----------------------------------------------------------------------------------------------------- 5  Data


def get_tokenizer(name):
    """A tiktoken.Encoding. "bytes": every byte is a token. "gpt2": then 50,000 times, a common pair becomes one token.

    Bytes can spell any text. With merges a token is about four letters, so the same window holds four times the text.
    """
    expect(name in ("bytes", "gpt2"), f"tokenizer is {name!r}, expected 'gpt2' or 'bytes'")
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens=special)
    with reported_as("GPT-2's tokenizer is not in TIKTOKEN_CACHE_DIR, nor to be had; --tokenizer bytes needs no file"):
        return tiktoken.get_encoding("gpt2")


def load_text(path=None):
    """The text in a UTF-8 file, or, without one, half a megabyte of English that every Python carries: its own help."""
    if path is None:
        return "\n\n".join(topics[name] for name in sorted(topics))
    with reported_as(f"--data is {path!r}, expected a readable text file in UTF-8"), open(path, "rb") as file:
        return file.read().decode()


def load_tokens(path, tokenizer, block_size):
    """Tokens to train on and, from the last tenth of the text, tokens to validate on: two rows of uint16."""
    text = load_text(path)
    data = text.encode()
    val = data[len(data) * 9 // 10 :].decode(errors="ignore")  # without the rest of a character that is cut in two
    parts = (text[: len(text) - len(val)], val)
    rows = [tokenizer.encode_to_numpy(part, allowed_special="all").astype(np.uint16) for part in parts]
    few = min(map(len, rows))
    expect(few > block_size, f"--data gives a part of {few} tokens, expected more than {block_size} in each")
    return rows


def random_batch(tokens, B, T, generator):
    """B windows that start anywhere, and the same windows one token later, the targets: (B, T), (B, T)."""
    return windows(tokens, torch.randint(len(tokens) - T, (B, 1), generator=generator).numpy(), T)


def windows(tokens, starts, T):
    """The T tokens from each of the starts, (B, 1), and those one later: (B, T), (B, T)."""
    rows = torch.from_numpy(np.asarray(tokens[starts + np.arange(T + 1)], np.int64))
    return rows[:, :-1], rows[:, 1:]


# ------------------------------------------------------------------------------------------------- 6  Training


def option(default, help, limits="True"):
    """A field that is an option on the command line as well. `limits` is an expression over its name."""
    return field(default=default, metadata=dict(help=help, limits=limits))


class Options:
    def __post_init__(self):
        for f in fields(self):
            x, limits = getattr(self, f.name), f.metadata["limits"]
            kind = f.type | int if f.type is float else f.type  # 1 is a float, too
            good = isinstance(x, kind) and (x is None or eval(limits, {f.name: x, "inf": math.inf}))
            expect(good, f"--{dashed(f.name)} is {x!r}, expected {limits if limits != 'True' else f.type}")


def dashed(name):
    return name.replace("_", "-")


@dataclass
class TrainConfig(Options):
    """train a model on a text"""

    data: str | None = option(None, "text file in UTF-8; without one, Python's own help texts")
    tokenizer: str = option("bytes", "how text becomes tokens: bytes or gpt2")
    out: str = option("out", "folder for the checkpoint")
    init: str | None = option(None, "fine-tune: start from a folder or from gpt2, gpt2-medium, ...")
    n_layer: int = option(4, "blocks", "1 <= n_layer <= 1000")
    n_head: int = option(4, "heads in each block", "1 <= n_head <= 1000")
    n_embd: int = option(128, "channels", "1 <= n_embd <= 100_000")
    block_size: int = option(64, "positions in a window", "1 <= block_size <= 1_000_000")
    batch_size: int = option(12, "windows in a batch", "1 <= batch_size <= 100_000")
    accumulate: int = option(1, "batches in a step", "1 <= accumulate <= 100_000")
    steps: int = option(2000, "steps in all", "1 <= steps <= 1_000_000_000")
    eval_every: int = option(250, "steps between evaluations, each with a checkpoint", "eval_every >= 1")
    sample: int = option(300, "tokens to sample at the end", "0 <= sample <= 1_000_000")
    warmup: int = option(100, "steps of rising learning rate", "warmup >= 0")
    lr: float = option(1e-3, "highest learning rate", "0 < lr < inf")
    beta2: float = option(0.99, "AdamW's memory of squared gradients", "0 <= beta2 < 1")
    weight_decay: float = option(0.1, "pull of the matrices towards zero", "0 <= weight_decay < inf")
    clip: float = option(1.0, "largest norm of the gradient", "0 < clip < inf")
    dropout: float = option(0.0, "share of channels and attention weights set to zero", "0 <= dropout < 1")
    seed: int = option(1337, "of all randomness", "0 <= seed < 2**32")


def make_optimizer(model, lr, beta2, weight_decay):
    """AdamW (Loshchilov and Hutter 2019). Matrices decay towards zero; biases and layer_norm's scales do not."""
    matrices = dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=weight_decay)
    vectors = dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, beta2), fused=True)


def learning_rate(step, steps, warmup, lr):
    """Up in a line for `warmup` steps, then down half a cosine to a tenth."""
    warmup = min(warmup, steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model, tokens, batch_size, max_windows=None):
    """Mean loss in nats a token over consecutive windows: all of them, or max_windows spread over the whole row."""
    T, training, total, count = model.config.block_size, model.training, 0.0, 0
    n, last = math.ceil((len(tokens) - 1) / T), len(tokens) - 1
    model.eval()
    for starts in torch.linspace(0, n - 1, min(n, max_windows or n)).long().clamp(max=n - 1).mul(T).split(batch_size):
        at = (starts[:, None] + torch.arange(T + 1)).clamp(max=last)  # the last window may reach past the end
        rows = torch.from_numpy(np.asarray(tokens[at.numpy()], np.int64))
        idx, targets = rows[:, :-1], rows[:, 1:].masked_fill(at[:, :-1] == last, -1)
        kept = int((targets != -1).sum())
        total, count = total + float(model.loss(idx, targets)) * kept, count + kept
    model.train(training)
    return total / count


def step_batches(tokens, T, step, config, batch=random_batch):
    """A step's `accumulate` batches. Its number seeds them and their dropout, so that a resumed run draws the same."""
    seed = config.seed * 1_000_003 + step
    generator = torch.Generator().manual_seed(seed)
    for i in range(config.accumulate):
        torch.manual_seed(seed + i * 0x9E3779B9)  # dropout's, batch by batch, whoever computes it
        yield batch(tokens, config.batch_size, T, generator)


def clip_gradients(model, limit):
    """Scale all gradients until their norm together is `limit`, if it is larger. -> the norm that it was"""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if norm > limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm.item()


def train_step(model, optimizer, tokens, step, config, batch=random_batch):
    """One step of the optimizer: loss and gradients of `accumulate` batches, clipped to norm `clip`. -> the loss"""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config.steps, config.warmup, config.lr)
    optimizer.zero_grad()
    total = 0.0
    for idx, targets in step_batches(tokens, model.config.block_size, step, config, batch):
        loss = model.loss(idx, targets) / config.accumulate
        loss.backward()
        total += loss.item()
    norm = optimizer.norm = clip_gradients(model, config.clip)  # kept for who logs it
    finite = math.isfinite(total) and math.isfinite(norm)
    expect(finite, f"step {step + 1}: loss {total}, norm of its gradient {norm}, expected finite; try a lower --lr")
    optimizer.step()
    return total


def train(model, optimizer, tokens, val, config, step=0):
    """The steps from `step` to config.steps; a checkpoint every eval_every, from which --resume goes on."""
    first, started = step, time.perf_counter()
    model.train()
    while step < config.steps:
        loss = train_step(model, optimizer, tokens, step, config)
        step += 1
        n = (step - first) * config.batch_size * config.accumulate * model.config.block_size
        speed = n / (time.perf_counter() - started)
        progress(f"step {step} of {config.steps}: loss {loss:.3f}, {speed:,.0f} tokens/s")
        if step % config.eval_every == 0 or step == config.steps:
            save_checkpoint(model, optimizer, step, config)
            val_loss = evaluate(model, val, config.batch_size, max_windows=256)
            progress("")
            print(f"step {step}: loss {loss:.4f}, val loss {val_loss:.4f}, {speed:,.0f} tokens/s", flush=True)


def progress(text):
    """One line that is written over and over, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- 7  Files


@contextmanager
def reported_as(what):
    """Any error inside becomes a ValueError of one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({one_line(error)})") from error


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def write_whole(path, write):
    """Write another file, then rename it: whatever happens, `path` is the whole new file or still the old one."""
    write(f"{path}.tmp")
    sync(f"{path}.tmp")  # the content is on the disk before it gets its name
    os.replace(f"{path}.tmp", path)
    sync(os.path.dirname(path) or ".")  # and so is the name


def sync(path):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def save_tensors(path, tensors, about=None):
    """A safetensors file: tensors by name, strings about them, and a CRC-32 of all that."""
    tensors, about = {k: x.detach().cpu().contiguous() for k, x in tensors.items()}, {"format": "pt", **(about or {})}
    about["crc32"] = checksum(tensors, about)
    with reported_as(f"{path} could not be written"):
        write_whole(path, lambda name: safetensors.torch.save_file(tensors, name, about))


def load_tensors(path):
    """-> tensors by name, strings about them. The checksum, which our own files have, must be that of both."""
    with reported_as(f"{path} can't be read as safetensors"):
        expect(os.path.isfile(path), "it does not exist or is no file")  # a pipe would wait
        with safetensors.safe_open(path, "pt") as file:
            tensors, about = {k: file.get_tensor(k).clone() for k in file.keys()}, file.metadata() or {}
        crc, ours = about.pop("crc32", None), {"formulas", "about"} & about.keys()
        if crc or ours:  # version 0.1.0 and other programs wrote none
            expect(crc == checksum(tensors, about), "its CRC-32 does not match")
    return tensors, about


def checksum(tensors, about):
    kinds = {k: (str(x.dtype), tuple(x.shape)) for k, x in tensors.items()}
    crc = zlib.crc32(json.dumps((kinds, about), sort_keys=True).encode())
    for k in sorted(tensors):
        crc = zlib.crc32(tensors[k].reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def build(cls, sizes, tensors, ops):
    """A model of these sizes, which must be those of the weights, before any memory is asked for."""
    n_layer = len({k.split(".")[1] for k in tensors if k.startswith("h.")})
    found = (n_layer, *tensors["wpe.weight"].shape, *tensors["wte.weight"].shape)
    said = (sizes.n_layer, sizes.block_size, sizes.n_embd, sizes.vocab_size, sizes.n_embd)
    expect(said == found, f"layers, wpe's shape, wte's shape are {said} by the config, {found} in the weights")
    model = cls(sizes, ops)
    for name, p in model.named_parameters():
        p.data.copy_(take(tensors, name, p))
    return model


def take(tensors, name, p):
    """The tensor of this name, out of `tensors`: it must be there, of p's shape and finite."""
    expect(name in tensors, f"it has no {name}")
    x = tensors.pop(name)
    good = x.shape == p.shape and x.is_floating_point() and x.isfinite().all()
    expect(good, f"{name} is {x.dtype} {tuple(x.shape)}, expected finite floats of shape {tuple(p.shape)}")
    return x.to(p.dtype)


# GPT-2 in Hugging Face's words, where matrices are stored (in, out).
HF_SIZES = dict(n_layer="n_layer", n_head="n_head", n_embd="n_embd", block_size="n_positions", vocab_size="vocab_size")
HF_FIXED = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True)
HF_FIXED |= dict(scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
HF_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_pretrained(cls, path, ops, dropout):
    if not os.path.isdir(path):
        with reported_as(f"from_pretrained: {path!r} is no folder and no model that could be fetched"):
            from huggingface_hub import snapshot_download

            name = f"openai-community/{path}" if path in SIZES else path
            path = snapshot_download(name, allow_patterns=["config.json", "model.safetensors"])
    weights, config = os.path.join(path, "model.safetensors"), os.path.join(path, "config.json")
    tensors, about = load_tensors(weights)
    with reported_as(f"from_pretrained: {config} is damaged or not a GPT-2's"):
        with open(config, encoding="utf-8") as file:
            known = json.load(file)
        known |= json.loads(about.get("about", "{}"))  # our files carry it with the weights too; that one counts
        for k, x in (HF_FIXED | dict(n_inner=4 * known["n_embd"])).items():
            expect(known.get(k) in (None, x), f"{k} is {known.get(k)!r}, expected {x!r}")
        good = (None, "gpt2", "bytes", "vocab.json")  # the last: its own, in a file that fastgpt reads
        expect(known.get("tokenizer") in good, f"tokenizer is {known.get('tokenizer')!r}")
        sizes = GPTConfig(**{k: known[theirs] for k, theirs in HF_SIZES.items()}, dropout=dropout)
    with reported_as(f"from_pretrained: {weights} is not what its config says"):
        masks = (".attn.bias", ".attn.masked_bias")  # causal masks, stored as if they were learned
        tensors = {k.removeprefix("transformer."): x for k, x in tensors.items() if not k.endswith(masks)}
        head = tensors.pop("lm_head.weight", tensors["wte.weight"])
        expect(torch.equal(head, tensors["wte.weight"]), "lm_head.weight differs from wte.weight, expected them tied")
        tensors = {k: x.t() if k.endswith(HF_TRANSPOSED) else x for k, x in tensors.items()}
        model = build(cls, sizes, tensors, ops)
        expect(not tensors, f"it has {', '.join(tensors)}, unknown to GPT-2")
    model.tokenizer = known.get("tokenizer")
    compare_formulas(path, known.get("fastgpt_ops", {}), model.ops)
    return model


def write_pretrained(model, path, extra):
    sizes = {theirs: getattr(model.config, k) for k, theirs in HF_SIZES.items()}
    config = HF_FIXED | sizes | dict(architectures=["GPT2LMHeadModel"], fastgpt_ops=own_formulas(model.ops), **extra)
    tensors = {f"transformer.{k}": x.t() if k.endswith(HF_TRANSPOSED) else x for k, x in model.state_dict().items()}
    os.makedirs(path, exist_ok=True)
    save_tensors(os.path.join(path, "model.safetensors"), tensors, dict(about=json.dumps(config)))
    write_whole(os.path.join(path, "config.json"), lambda name: Path(name).write_text(json.dumps(config, indent=2)))


def own_formulas(ops):
    """Which formulas are neither this file's nor fastgpt's: {"attention": "rotary.attention"}."""
    own = {
        x: f for x in FORMULAS if (f := getattr(ops, x)) is not globals()[x] and not f.__module__.startswith("fastgpt.")
    }
    return {x: f"{f.__module__}.{getattr(f, '__qualname__', type(f).__name__)}" for x, f in own.items()}


def compare_formulas(path, trained, ops):
    if trained != own_formulas(ops):
        warnings.warn(f"{path} was trained with {trained or 'GPT-2'} as ops, not with these", stacklevel=4)


SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's means of the gradient and of its square


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(model, optimizer, step, config, **more):
    """training.safetensors, to go on from: weights, AdamW's moments, options. Beside it, the weights alone, to use."""
    tensors = trained(model)
    tensors |= {f"{moment}.{name}": optimizer.state[p][moment] for name, p in tensors.items() for moment in MOMENTS}
    for name, x in tensors.items():
        expect(x.isfinite().all(), f"step {step}: {name} is not finite, so nothing is saved; a lower --lr may help")
    about = dict(config=asdict(model.config), options=asdict(config), formulas=own_formulas(model.ops))
    about = {k: json.dumps(x) for k, x in about.items()} | dict(step=str(step), **more)
    save_tensors(os.path.join(config.out, "training.safetensors"), tensors, about)
    model.save_pretrained(config.out, tokenizer=config.tokenizer)


def expect_same(typed, fixed):
    for name, x in fixed.items():
        expect(typed.get(name, x) == x, f"--{dashed(name)} is {typed.get(name)!r}, but was {x!r}, which cannot change")


def load_checkpoint(path, typed, ops, build=build):
    """-> model, optimizer, options (those of the run, with what is typed on top) and step."""
    tensors, about = load_tensors(path)
    with reported_as(f"{path} cannot be resumed"):
        step, saved, sizes = int(about["step"]), json.loads(about["options"]), GPTConfig(**json.loads(about["config"]))
        expect_same(typed, {name: saved[name] for name in (*SHAPE, "tokenizer", "init")})
        config = TrainConfig(**saved | dict(out=os.path.dirname(path)) | typed)
        model = build(GPT, replace(sizes, dropout=config.dropout), tensors, ops)
        optimizer = make_optimizer(model, config.lr, config.beta2, config.weight_decay)
        for name, p in trained(model).items():
            moments = {moment: take(tensors, f"{moment}.{name}", p) for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
        expect(step >= 0 and not tensors, f"step is {step}, unknown tensors are {list(tensors)}")
    compare_formulas(path, json.loads(about.get("formulas", "{}")), model.ops)
    return model, optimizer, config, step


# --------------------------------------------------------------------------------------------- 8  Command line


def run_train(
    typed, ops, train=train, load_tokens=load_tokens, load_checkpoint=load_checkpoint, get_tokenizer=get_tokenizer
):
    resume, overwrite = typed.pop("resume", False), typed.pop("overwrite", False)
    config, step = TrainConfig(**typed), 0
    path = os.path.join(config.out, "training.safetensors")
    there = [x for x in ("training", "model") if os.path.exists(os.path.join(config.out, f"{x}.safetensors"))]
    what = f"--out is {config.out!r}, which holds a checkpoint: add --resume or --overwrite, or take another"
    expect(resume or overwrite or not there, what)
    if resume:
        model, optimizer, config, step = load_checkpoint(path, typed, ops)
    tokenizer = get_tokenizer(config.tokenizer)
    tokens, val = load_tokens(config.data, tokenizer, config.block_size)
    torch.manual_seed(config.seed)
    if not resume:
        if config.init:
            model = GPT.from_pretrained(config.init, ops, config.dropout)
            expect_same(typed, {name: getattr(model.config, name) for name in SHAPE})
            config = replace(config, **{name: getattr(model.config, name) for name in SHAPE})
        else:
            sizes = {name: getattr(config, name) for name in SHAPE}
            model = GPT(GPTConfig(**sizes, vocab_size=tokenizer.n_vocab, dropout=config.dropout), ops)
        optimizer = make_optimizer(model, config.lr, config.beta2, config.weight_decay)
    tokenizer_of(model, config.tokenizer, lambda _: tokenizer)  # has no more ids than the model
    n = sum(p.numel() for p in model.parameters())
    print(f"{n:,} parameters, {len(tokens):,} tokens, {len(val):,} to validate")
    os.makedirs(config.out, exist_ok=True)
    train(model, optimizer, tokens, val, config, step)
    T, most = config.block_size, max(1, 2**18 // config.block_size)  # to measure all of a large text would take long
    on = "all" if len(val) <= most * T else f"{most:,} windows of {T} from all over"
    val_loss = evaluate(model, val, config.batch_size, most)
    print(f"val loss {val_loss:.4f} on {on} {len(val):,} tokens; saved in {config.out}\n")
    start = torch.tensor([tokenizer.encode("\n")])
    print(tokenizer.decode(model.generate(start, config.sample, 0.8, top_k=200, seed=config.seed)[0].tolist()))


@dataclass
class GenerateConfig(Options):
    """continue a prompt"""

    model: str = option("out", "folder with a checkpoint, or gpt2, gpt2-medium, ...")
    tokenizer: str | None = option(None, "bytes or gpt2, if the model names none")
    prompt: str = option("\n", "text to continue")
    max_new_tokens: int = option(200, "tokens to add", "1 <= max_new_tokens <= 1_000_000_000")
    samples: int = option(1, "continuations to draw", "1 <= samples <= 100_000")
    temperature: float = option(0.8, "0 takes the most likely token each time", "0 <= temperature < inf")
    top_k: int = option(200, "draw from the N most likely tokens", "1 <= top_k <= 1_000_000_000")
    top_p: float | None = option(None, "draw from the fewest tokens with a probability of X together", "0 < top_p <= 1")
    seed: int | None = option(None, "for the same sample again")


def run_generate(typed, ops):
    config = GenerateConfig(**typed)
    model = GPT.from_pretrained(config.model, ops).eval()
    tokenizer = tokenizer_of(model, config.tokenizer)
    start = tokenizer.encode(config.prompt, allowed_special="all") or [tokenizer.eot_token]
    idx, how = torch.tensor([start] * config.samples), (config.temperature, config.top_k, config.top_p, config.seed)
    for row in model.generate(idx, config.max_new_tokens, *how).tolist():
        print(tokenizer.decode(row), end="\n---\n" if config.samples > 1 else "\n")


@dataclass
class EvalConfig(Options):
    """loss, perplexity and bits per byte of a text's last tenth"""

    model: str = option("out", "folder with a checkpoint, or gpt2, gpt2-medium, ...")
    tokenizer: str | None = option(None, "bytes or gpt2, if the model names none")
    data: str | None = option(None, "text file in UTF-8; without one, Python's own help texts")
    batch_size: int = option(8, "windows at a time", "1 <= batch_size <= 100_000")


def run_eval(typed, ops):
    config = EvalConfig(**typed)
    model = GPT.from_pretrained(config.model, ops).eval()
    tokenizer = tokenizer_of(model, config.tokenizer)
    _, tokens = load_tokens(config.data, tokenizer, block_size=1)
    loss, n = evaluate(model, tokens, config.batch_size), len(tokens) - 1
    bits = loss * n / math.log(2) / len(tokenizer.decode_bytes(tokens[1:].tolist()))
    print(f"{n:,} tokens: loss {loss:.4f} nats, perplexity {np.exp(loss):.2f}, {bits:.4f} bits per byte")


def tokenizer_of(model, name, get=get_tokenizer):
    """The tokenizer of this name, or the one that the model was trained with."""
    tokenizer, V = get(name or model.tokenizer or "gpt2"), model.config.vocab_size
    expect(tokenizer.n_vocab <= V, f"--tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, the model only {V}")
    return tokenizer


COMMANDS = dict(train=(run_train, TrainConfig), generate=(run_generate, GenerateConfig), eval=(run_eval, EvalConfig))


def add_options(parser, options):
    """The fields of a dataclass as arguments. What is not typed is absent from what the parser returns."""
    parser.argument_default = argparse.SUPPRESS
    for f in fields(options):
        kind = (get_args(f.type) or (f.type,))[0]
        help = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default!r})")
        parser.add_argument(f"--{dashed(f.name)}", type=kind, metavar=kind.__name__.upper(), help=help)
    if options is TrainConfig:
        parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
        parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")


def main(argv=None, ops=None, prog=None):
    """The command line, on the formulas of `ops` as in GPT. Errors of use end with one line and status 1."""
    parser = argparse.ArgumentParser(prog=prog, description="GPT-2: train it, sample from it, measure it.")
    parser.add_argument("--version", action="version", version=f"gpt.py 0.2, torch {torch.__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="train | generate | eval")
    for name, (_, options) in COMMANDS.items():
        add_options(commands.add_parser(name, help=options.__doc__), options)
    typed = vars(parser.parse_args(argv))
    run = COMMANDS[typed.pop("command")][0]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{parser.prog}: {message}", file=sys.stderr)
            run(typed, ops)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError, MemoryError, KeyError, RuntimeError) as error:  # KeyError: an id without a text
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's word for too little memory
            raise
        sys.exit(f"{parser.prog}: error: {one_line(error)}")


# ----------------------------------------------------------------------------------- Appendix: dropout's numbers


def dropout_mask(B, H, T, dropout, seed):
    """Which attention weights stay: (B, H, T, T) booleans, each True with probability 1 - dropout.

    Random numbers without state, so that a kernel can compute any part of the mask on the spot and never store it:
    Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") under the key `seed`
    turns the counter (query, key // 4, b * H + head, 0) into four 32-bit words, one each for four neighbouring keys.
    """
    low = 0xFFFFFFFF
    query, group = torch.arange(T)[:, None], torch.arange((T + 3) // 4)
    head = torch.arange(B * H)[:, None, None]
    c0, c1, c2, c3 = torch.broadcast_tensors(query, group, head, torch.zeros((), dtype=torch.int64))
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; their sign bit is masked away below
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(-2)[..., :T]  # (B * H, T, T)
    return (words >= round(dropout * 2**32)).view(B, H, T, T)


if __name__ == "__main__":
    main()
