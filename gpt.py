"""GPT-2 from first principles: the model, its training and its use, in one file to be read from top to bottom.

  1  Config        the four GPT-2s, as numbers
  2  Formulas      all the mathematics: layer_norm, gelu, linear, attention, lm_loss
  3  Model         where the weights live, and the order in which the formulas meet them
  4  Generation    one token after another, with a cache; how a token is drawn
  5  Data          text to integers and back; one long row of tokens, cut into windows
  6  Training      AdamW, warm-up and cosine, clipping, accumulation
  7  Files         weights in the Hugging Face layout; checkpoints, whole or not at all
  8  Command line  python gpt.py train | generate | eval; in an appendix, the random numbers of dropout

It needs torch, numpy, tiktoken and safetensors, and nothing else of this project. The model reaches the formulas
through `ops`: the package `fastgpt` holds the same as fused C++ kernels, and GPT(config, ops=fastgpt) runs on those.

The letters in every comment: B batch, T time (position), C channels, H heads, D = C / H head size, V vocabulary.
Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) for the model, "Attention Is All
You Need" (Vaswani et al. 2017) for attention, and the code that OpenAI released with GPT-2 for every detail.
"""

import argparse
import codecs
import fcntl
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace
from typing import get_args

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends the seconds in which torch is imported

import numpy as np
import safetensors.torch
import tiktoken
import torch
from torch import nn

# --------------------------------------------------------------------------------------------------- 1  Config


@dataclass
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # C
    block_size: int = 1024  # the longest T: positions are learned, there are no others
    vocab_size: int = 50257  # V: 256 bytes + 50,000 merges + <|endoftext|>
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            size = getattr(self, name)
            expect(type(size) is int and size > 0, f"GPTConfig: {name} is {size!r}, expected a positive integer")
        C, H = self.n_embd, self.n_head
        expect(C % H == 0, f"GPTConfig: n_embd={C} is not a multiple of n_head={H}")
        expect(0 <= self.dropout < 1, f"GPTConfig: dropout is {self.dropout}, expected 0 <= dropout < 1")


def expect(good, message):
    if not good:
        raise ValueError(message)


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
    """x * Phi(x), Phi the standard normal CDF, in GPT-2's tanh approximation. Any shape."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, weight, bias=None):
    """Each output channel is a weighted sum of all input channels. (..., K), (N, K), (N) -> (..., N)"""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_gelu(x, weight, bias=None):
    """Both at once, which a kernel can do in one pass. (..., K), (N, K), (N) -> (..., N)"""
    return gelu(linear(x, weight, bias))


def attention(qkv, n_head, dropout=0.0, seed=0):
    """Split into heads, attend in each, and put the heads side by side again. (B, T, 3C) -> (B, T, C)

    qkv holds queries, keys and values. `dropout` zeroes a share of the weights, chosen by `seed`, scales up the rest.
    """
    B, T, _ = qkv.shape
    keep = dropout_mask(B, n_head, T, dropout, seed).to(qkv) / (1.0 - dropout) if dropout else None
    return merge_heads(attend(*split_heads(qkv, n_head), keep))


def attend(q, k, v, keep=None):
    """Each query takes a mean of the values up to its position, weighted by how well their keys match it.

    softmax(Q K^T / sqrt(D)) V: (B, H, Tq, D), (B, H, Tk, D), (B, H, Tk, D) -> (B, H, Tq, D). The queries are the
    last Tq of Tk positions.
    """
    (Tq, D), Tk = q.shape[-2:], k.shape[-2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, Tq, Tk); a sum of D products has a deviation of sqrt(D)
    future = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(Tk - Tq + 1)  # key after query
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)  # each row sums to 1
    return (weights if keep is None else weights * keep) @ v


attention.attend = attend  # type: ignore[attr-defined]  # for a cache: new queries, all keys
linear_gelu.stands_for = (linear, gelu)  # type: ignore[attr-defined]  # who replaces one of them replaces this


def split_heads(qkv, n_head):  # (B, T, 3C) -> q, k, v, each (B, H, T, D)
    return [x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)]


def merge_heads(y):  # (B, H, T, D) -> (B, T, C)
    return y.transpose(1, 2).flatten(2)


def lm_loss(hidden, weight, targets):
    """Cross-entropy: the mean of -log p(target) in nats; targets of -1 are ignored. (B, T, C), (V, C), (B, T) -> ()"""
    keep = targets != -1
    logits = hidden @ weight.T  # (B, T, V)
    target_logit = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)  # (B, T)
    nll = logits.logsumexp(-1) - target_logit  # -log softmax(logits)[target]
    return torch.where(keep, nll, 0.0).sum() / keep.sum()


FORMULAS = ("layer_norm", "gelu", "linear", "attention", "lm_loss")

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
    """N(0, 0.02); smaller where n_added outputs add up in the residual stream, so that their sum is as large as one."""
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
        self.config, self.ops = config, SimpleNamespace(**{name: getattr(ops, name) for name in FORMULAS})
        fused = getattr(ops, "linear_gelu", None)  # may still be made of another gelu than the one in ops
        known = getattr(fused, "stands_for", None) == (ops.linear, ops.gelu)
        self.ops.linear_gelu = fused if known else lambda *args: ops.gelu(ops.linear(*args))
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
        x = self.drop(self.wte(idx) + self.wpe.weight[past : past + idx.shape[1]])
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
    low, high = (int(idx.min()), int(idx.max())) if idx.numel() else (0, 0)
    expect(0 <= low and high < V, f"GPT: idx has {low if low < 0 else high}, expected 0 <= idx < vocab_size={V}")


# ----------------------------------------------------------------------------------------------- 4  Generation


class KVCache:
    """What one layer projected at all positions so far, so that a new token pays for one position, not T."""

    def __init__(self, B, config, dtype):
        self.qkv, self.length = torch.empty(B, config.block_size, 3 * config.n_embd, dtype=dtype), 0

    def attention(self, qkv, n_head, formula):
        """The formula's result at new positions, which see those before them: (B, t, 3C) -> (B, t, C).

        If it says how (`attend`), for the new queries alone. Else, a formula of one's own, for all positions: it costs
        more and is right whatever the formula does, as long as it is causal.
        """
        past, self.length = self.length, self.length + qkv.shape[1]
        self.qkv[:, past : self.length] = qkv
        seen = self.qkv[:, : self.length]
        if past == 0 or not hasattr(formula, "attend") or hasattr(formula, "__wrapped__"):  # functools.wraps copies it
            return formula(seen, n_head)[:, past:]
        q, k, v = split_heads(seen, n_head)
        return merge_heads(formula.attend(q[:, :, past:], k, v))


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
    """Append max_new_tokens to idx, one after another, each drawn by `sample`: (B, T) -> (B, T + max_new_tokens).

    Positions are learned, so once the window of block_size is full it slides and every position changes: from there on
    each token costs a whole pass. `seed` is that of random.Random; None takes a new one from torch's generator.
    """
    good = idx.dim() == 2 and idx.shape[1] > 0
    expect(good, f"generate: idx is {tuple(idx.shape)}, expected (B, T) with T >= 1")
    good = isinstance(max_new_tokens, int) and max_new_tokens >= 0
    expect(good, f"generate: max_new_tokens is {max_new_tokens}, expected 0 or more")
    expect(0 <= temperature < math.inf, f"generate: temperature is {temperature}, expected 0 or more")
    good = top_k is None or isinstance(top_k, int) and top_k >= 1
    expect(good, f"generate: top_k is {top_k}, expected None or an integer of 1 or more")
    expect(top_p is None or 0 < top_p <= 1, f"generate: top_p is {top_p}, expected None or 0 < top_p <= 1")
    expect(seed is None or isinstance(seed, int), f"generate: seed is {seed!r}, expected None or an integer")
    rng = random.Random(int(torch.randint(2**62, ())) if seed is None else seed)
    caches, new, training = None, idx, model.training
    model.eval()
    for _ in range(max_new_tokens):
        if caches is None or caches[0].length == model.config.block_size:  # at the start, and when the window slides
            caches = [KVCache(len(idx), model.config, model.wte.weight.dtype) for _ in model.h]
            new = idx[:, -model.config.block_size :]
        logits = model.ops.linear(model.hidden(new, caches)[:, -1], model.wte.weight)  # (B, V)
        new = sample(logits, temperature, top_k, top_p, rng)  # (B, 1)
        idx = torch.cat((idx, new), dim=1)
    model.train(training)
    return idx


def sample(logits, temperature, top_k, top_p, rng):
    """Draw one token from each row of logits: (B, V) -> (B, 1). Who follows these lines draws the same for a seed.

    temperature 0 takes the most likely token, the first of equals. Else: tokens from the most to the least likely,
    equals by id; of them the first top_k; their probabilities, the softmax of logits / temperature in float64; of them
    top_p's (Holtzman et al. 2019), which drops a token where the sum of those before it is >= p. Then, row by row, one
    u = rng.random() * (sum of what is left), and the first token whose running sum is > u.
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
    u = torch.tensor([rng.random() for _ in probs], dtype=torch.float64)[:, None] * sums[:, -1:]
    return tokens.gather(-1, torch.searchsorted(sums, u, right=True))


# ----------------------------------------------------------------------------------------------------- 5  Data


TOKENIZERS = ("bytes", "gpt2")


def get_tokenizer(name):
    """A tiktoken.Encoding: "bytes" gives each byte its own id; "gpt2" then merges the pairs that are common in English.

    Bytes, because they spell any text; merges, because a token of four letters makes a window four times as long.
    """
    if name == "bytes":
        ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens=special)
    expect(name in TOKENIZERS, f"get_tokenizer: name is {name!r}, expected 'gpt2' or 'bytes'")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise ValueError(
            "the GPT-2 tokenizer needs vocab.bpe and encoder.json, which tiktoken downloads once, and that failed "
            f"({type(error).__name__}). Connect once, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has them "
            "already, or use --tokenizer bytes, which needs no file"
        ) from error


def load_text(path=None):
    """The text in a UTF-8 file, or, without one, half a megabyte of English that every Python carries: its own help."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    with open_data(path) as file:
        return file.read().decode()


@contextmanager
def open_data(path):
    try:
        with io.BytesIO(load_text().encode()) if path is None else open(path, "rb") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data is {path!r}, expected a readable text file in UTF-8 ({error})") from error


def load_tokens(path, tokenizer, block_size):
    """Tokens to train on and, from the last tenth of the text, tokens to validate on: two rows of uint16."""
    with open_data(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size * 9 // 10)
        after = file.read(3)
        cut = size * 9 // 10 + len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))  # not within a character
        tokens = np.empty(size, np.uint16)  # no token is shorter than a byte
        train = encode(file, 0, cut, tokenizer, tokens)
        val = encode(file, cut, size, tokenizer, tokens[len(train) :])
    found = f"{len(train)} tokens to train on and {len(val)} to validate on"
    enough = min(len(train), len(val)) > block_size
    expect(enough, f"--data has {found}, expected more than --block-size={block_size} of each")
    return train, val


def encode(file, start, end, tokenizer, out):
    """Tokens of the bytes from start to end of a file, read piece by piece, written to `out`. -> the part in use"""
    n, text, decoder = 0, "", codecs.getincrementaldecoder("utf-8")()
    file.seek(start)
    while start < end or text:
        piece = file.read(min(1 << 20, end - start))
        start = start + len(piece) if piece else end
        text += decoder.decode(piece, final=start == end)
        if start == end:
            cut = len(text)
        elif tokenizer.name == "bytes":  # anywhere but inside <|endoftext|>
            cut = len(text) if "<" not in text[-12:] else text.rindex("<")
        else:  # no merge crosses from a word to a space
            cut = found.end() if (found := re.match(r"(?s).*\S(?=[ \n])", text)) else 0
        if tokenizer.name == "bytes":
            ids = np.frombuffer(text[:cut].encode().replace(b"<|endoftext|>", b"\xff"), np.uint8).astype(np.uint16)
            ids[ids == 255] = 256  # no byte of UTF-8 is 255
        else:
            ids = tokenizer.encode(text[:cut], allowed_special="all")
        out[n : n + len(ids)] = ids
        n, text = n + len(ids), text[cut:]
    return out[:n]


def random_batch(tokens, B, T, generator):
    """B windows that start anywhere, and the same windows one token later, the targets: (B, T), (B, T)."""
    starts = torch.randint(len(tokens) - T, (B, 1), generator=generator)
    windows = torch.from_numpy(np.asarray(tokens)[starts.numpy() + np.arange(T + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


# ------------------------------------------------------------------------------------------------- 6  Training


def option(default, help, limits="True"):
    """A field of a dataclass that is an option on the command line as well. `limits` is an expression over its name."""
    return field(default=default, metadata=dict(help=help, limits=limits))


class Options:
    """Base of the dataclasses that hold a command's options: refuses by name what is out of range."""

    def __post_init__(self):
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata["limits"]
            kind, *optional = get_args(f.type) or (f.type,)  # `int | None` is a pair
            right = isinstance(value, (int, float) if kind is float else kind)
            good = (optional and value is None) or (right and eval(limits, vars(math) | {f.name: value}))
            expected = kind.__name__ if limits == "True" else limits
            expect(good, f"--{dashed(f.name)} is {value!r}, expected {expected}")


def dashed(name):
    return name.replace("_", "-")


@dataclass
class TrainConfig(Options):
    """train a model on a text"""

    data: str | None = option(None, "text file in UTF-8; without one, Python's own help texts")
    tokenizer: str = option("bytes", "how text becomes tokens: bytes or gpt2", "tokenizer in ('bytes', 'gpt2')")
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
    clip: float = option(1.0, "longest gradient", "0 < clip < inf")
    dropout: float = option(0.0, "share of channels and attention weights to zero", "0 <= dropout < 1")
    seed: int = option(1337, "of all randomness", "0 <= seed < 2**32")


def make_optimizer(model, lr, beta2, weight_decay):
    """AdamW (Loshchilov and Hutter 2019). Matrices decay towards zero; biases and layer_norm's scales do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


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
    tokens, T, training, total, counted = np.asarray(tokens), model.config.block_size, model.training, 0.0, 0
    n = math.ceil((len(tokens) - 1) / T)
    model.eval()
    for some in torch.linspace(0, n - 1, min(n, max_windows or n)).long().split(batch_size):
        with uninterrupted:
            windows = torch.full((len(some), T + 1), -1)
            for window, i in zip(windows, some.tolist(), strict=True):
                piece = tokens[i * T : i * T + T + 1].astype(np.int64)
                window[: len(piece)] = torch.from_numpy(piece)
            idx, targets = windows[:, :-1].clamp(min=0), windows[:, 1:].contiguous()
            kept = int((targets != -1).sum())
            total, counted = total + float(model.loss(idx, targets)) * kept, counted + kept
    model.train(training)
    return total / counted


def train_step(model, optimizer, tokens, step, config):
    """One step of the optimizer: loss and gradients of `accumulate` batches, clipped to norm `clip`. -> the loss"""
    seed = config.seed * 1_000_003 + step  # by step, so that a resumed run draws the same batches and dropout masks
    generator, total = torch.Generator().manual_seed(seed), 0.0
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config.steps, config.warmup, config.lr)
    optimizer.zero_grad()
    for _ in range(config.accumulate):
        with uninterrupted:
            idx, targets = random_batch(tokens, config.batch_size, model.config.block_size, generator)
            loss = model.loss(idx, targets) / config.accumulate
            loss.backward()
            total += loss.item()
    with uninterrupted:
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
        for what, value in (("loss", total), ("norm of the gradient", norm)):
            expect(math.isfinite(value), f"step {step + 1}: the {what} is {value}, expected a finite number")
        optimizer.step()
        if not nn.utils.get_total_norm(list(model.parameters())).isfinite():  # or only its square has overflowed
            expect_finite(model.named_parameters(), f"step {step + 1}")
    return total


def train(model, optimizer, tokens, val, config, data):
    """The steps that are left, with evaluations and checkpoints on the way. An interrupt saves the last whole step."""
    per_step = config.batch_size * model.config.block_size * config.accumulate
    started, first = time.perf_counter(), steps_done(optimizer)
    step = saved = first
    model.train()
    try:
        while step < config.steps:
            loss = train_step(model, optimizer, tokens, step, config)
            step += 1
            speed = (step - first) * per_step / (time.perf_counter() - started)
            progress(f"step {step} of {config.steps}: loss {loss:.3f}, {speed:,.0f} tokens/s")
            if step % config.eval_every == 0 or step == config.steps:
                val_loss = evaluate(model, val, config.batch_size, max_windows=256)
                with uninterrupted:
                    save_checkpoint(model, optimizer, config, data)
                    saved, left = step, (config.steps - step) * per_step / speed
                progress("")
                losses = f"loss {loss:.4f}, val loss {val_loss:.4f}"
                print(f"step {step}: {losses}, {speed:,.0f} tokens/s, {left:.0f} s left", flush=True)
    except ValueError as error:
        progress("")
        rest = f"`--resume` goes on from step {saved}" if saved else "nothing was saved"
        raise ValueError(f"{error}; a lower --lr than {config.lr:g} may help, {rest} in {config.out!r}") from error
    except KeyboardInterrupt:
        with uninterrupted:
            progress("")
            done = steps_done(optimizer)
            if done is not None and done > saved:  # None: an update was cut short, these weights are of no step
                save_checkpoint(model, optimizer, config, data)
                saved = done
            goes_on = f"after step {saved}; `train --resume --out {config.out}` goes on"
            print(f"stopped {goes_on if saved else 'before the first step; nothing was saved'}", flush=True)
        raise


def steps_done(optimizer):
    """As AdamW counts them, beside the weights, so that the two agree whenever one asks. None in mid-update."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    counts = {int(optimizer.state[p]["step"]) if optimizer.state[p] else 0 for p in params}
    return counts.pop() if len(counts) == 1 else None


def progress(text):
    """One line that is written over and over, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- 7  Files


FILES = ("training.safetensors", "model.safetensors", "config.json")


class Uninterrupted:
    """`with uninterrupted:` Ctrl-C and SIGTERM wait until the block is done. Elsewhere they raise KeyboardInterrupt."""

    def __init__(self):
        self.depth, self.waiting, self.received, self.status = 0, False, False, 128 + signal.SIGINT

    def __enter__(self):
        self.depth += 1

    def __exit__(self, kind, *_):
        self.depth -= 1
        if kind is None:
            self.raise_if_waiting()

    def handle(self, number, _):
        self.waiting, self.received, self.status = True, True, 128 + number
        self.raise_if_waiting()

    def raise_if_waiting(self):
        if self.waiting and not self.depth:
            self.waiting = False
            raise KeyboardInterrupt


uninterrupted = Uninterrupted()


@contextmanager
def written_whole(path):
    """Gives another name to write to. Whatever happens, `path` is then the whole new file, or still the old one."""
    temporary = f"{path}.tmp"
    try:
        with uninterrupted:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            os.fsync(folder)  # so that the new name lasts, too
            os.close(folder)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def save_tensors(path, tensors, metadata=None):
    """Write a safetensors file, with a CRC-32 of all that is in it."""
    tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    with written_whole(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata | {"crc32": checksum(tensors, metadata)})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written ({error})") from error


def load_tensors(path):
    """Read a safetensors file: ({name: tensor}, metadata). What save_tensors wrote is checked to the last bit."""
    expect(os.path.isfile(path), f"{path} does not exist or is no file, expected a safetensors file")
    with reading(path), uninterrupted:  # a KeyboardInterrupt in the library's midst would look like damage
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        crc = metadata.pop("crc32", None)
        anothers = crc is None and not {"about", "data"} & metadata.keys()
        expect(anothers or crc == checksum(tensors, metadata), "its checksum is another")
    return tensors, metadata


@contextmanager
def reading(path):
    """Whatever a damaged file leads to is said in one line, with the file's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is damaged or not what was expected ({first_line(error)})") from error


def first_line(error):
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def checksum(tensors, metadata):
    """CRC-32 of names, kinds, shapes, values and metadata, in an order that no library decides."""
    about = {name: (str(x.dtype), tuple(x.shape)) for name, x in tensors.items()}
    crc = zlib.crc32(json.dumps((about, metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def expect_finite(named, where):
    for name, x in named:
        expect(x.isfinite().all(), f"{where}: {name} has values that are not finite")


def take(tensors, name, shape, path):
    """Remove from `tensors` what a file says of one parameter, if the parameter can be that."""
    x = tensors.pop(name, None)
    expect(x is not None, f"{path} has no {name}")
    right = x.shape == shape and x.is_floating_point()
    expect(right, f"{path}: {name} is {x.dtype} of shape {tuple(x.shape)}, expected floats of shape {tuple(shape)}")
    expect_finite([(name, x.float())], path)
    return x


def build(cls, config, ops, tensors, path):
    """A model with the parameters from a file, whose sizes are compared before anything is allocated."""
    shapes = [tuple(tensors[name].shape) if name in tensors else None for name in ("wte.weight", "wpe.weight")]
    found = *shapes, len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    expected = (config.vocab_size, config.n_embd), (config.block_size, config.n_embd), config.n_layer
    expect(found == expected, f"{path}: wte, wpe and the number of layers are {found}, its config says {expected}")
    model = cls(config, ops)
    for name, p in model.named_parameters():
        p.data.copy_(take(tensors, name, p.shape, path))
    expect(not tensors, f"{path} has {next(iter(tensors), None)}, which GPT-2 has not")
    return model


# The configuration values that GPT-2 shares in all sizes; the first of each is what save_pretrained writes.
HF_FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
HF_SIZES = dict(n_layer="n_layer", n_head="n_head", n_embd="n_embd", block_size="n_positions", vocab_size="vocab_size")
HF_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_pretrained(cls, path, ops, dropout):
    path = path if os.path.isdir(path) else download(path)
    weights, about = os.path.join(path, "model.safetensors"), os.path.join(path, "config.json")
    tensors, metadata = load_tensors(weights)
    with reading(about):
        own = json.loads(metadata.get("about", "{}"))  # beside the weights: right even if a kill left another's about
        if os.path.exists(about) or not own:
            with open(about, encoding="utf-8") as file:
                own = {**json.load(file), **own}
        config = GPTConfig(**{ours: own.get(theirs) for ours, theirs in HF_SIZES.items()})
        tokenizer, formulas = own.get("tokenizer"), own.get("fastgpt_ops", {})
        expect(tokenizer in (None, *TOKENIZERS), f"tokenizer is {tokenizer!r}, expected bytes or gpt2")
    for key, expected in (*HF_FIXED.items(), ("n_inner", (None, 4 * config.n_embd))):
        value = own.get(key, expected[0])  # another value would make it another model than the one above
        expect(value in expected, f"from_pretrained: {key} is {value!r} in {about}, expected {expected[-1]!r}")
    tensors = {key.removeprefix("transformer."): x for key, x in tensors.items()}
    for key in list(tensors):
        if key.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, stored as if it were learned
            del tensors[key]
        elif key.endswith(HF_TRANSPOSED) and tensors[key].dim() == 2:  # stored (in, out)
            tensors[key] = tensors[key].T
    head = tensors.pop("lm_head.weight", None)
    model = build(cls, replace(config, dropout=dropout), ops, tensors, weights)
    tied = head is None or torch.equal(head.to(model.wte.weight), model.wte.weight)
    expect(tied, f"from_pretrained: lm_head.weight differs from wte.weight in {weights}, expected them tied")
    model.tokenizer = tokenizer
    compare_ops(model, formulas, path)
    return model


def write_pretrained(model, path, extra):
    c = model.config
    config = {key: expected[0] for key, expected in HF_FIXED.items()}
    config |= {theirs: getattr(c, ours) for ours, theirs in HF_SIZES.items()}
    config |= dict(architectures=["GPT2LMHeadModel"], n_ctx=c.block_size, **extra)
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), c.dropout)
    config |= dict.fromkeys(("bos_token_id", "eos_token_id"), c.vocab_size - 1)
    if formulas := own_formulas(model.ops):
        config["fastgpt_ops"] = formulas
    tensors = {f"transformer.{k}": x.T if k.endswith(HF_TRANSPOSED) else x for k, x in model.state_dict().items()}
    os.makedirs(path, exist_ok=True)
    save_tensors(os.path.join(path, "model.safetensors"), tensors, dict(about=json.dumps(config)))
    with written_whole(os.path.join(path, "config.json")) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)


def own_formulas(ops):
    """Which formulas are neither this file's nor fastgpt's: {"attention": "rotary.attention"}."""
    own = {name: getattr(ops, name) for name in FORMULAS if getattr(ops, name) is not globals()[name]}
    names = {name: (f.__module__, getattr(f, "__qualname__", type(f).__name__)) for name, f in own.items()}
    return {name: ".".join(words) for name, words in names.items() if words[0] != "fastgpt.ops"}


def compare_ops(model, saved, path):
    now = own_formulas(model.ops)
    if saved != now:
        warnings.warn(f"{path} was trained with {saved or 'GPT-2'!s} as ops, not with {now or 'GPT-2'!s}", stacklevel=3)


def download(name):
    """Fetch config.json and model.safetensors from the Hugging Face Hub, once. -> the folder they are in"""
    known = name in SIZES or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    expect(known, f"from_pretrained: {name!r} is no folder and no model, expected a folder or {', '.join(SIZES)}")
    try:
        from huggingface_hub import snapshot_download

        repository = f"openai-community/{name}" if name in SIZES else name
        return snapshot_download(repository, allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:
        raise ValueError(
            f"from_pretrained: {name!r} is no folder here and could not be fetched ({first_line(error)}). With a "
            "network, `pip install huggingface_hub` and try again; without, pass a folder with config.json and "
            "model.safetensors"
        ) from error


def save_checkpoint(model, optimizer, config, data):
    """training.safetensors to go on from, weights and AdamW's moments; model.safetensors and config.json for use."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors |= {name: p} | {f"{moment}.{name}": optimizer.state[p][moment] for moment in ("exp_avg", "exp_avg_sq")}
    expect_finite(tensors.items(), "nothing saved")
    about = dict(step=str(steps_done(optimizer)), config=json.dumps(asdict(model.config)), data=data)
    about |= dict(options=json.dumps(asdict(config)), ops=json.dumps(own_formulas(model.ops)))
    save_tensors(os.path.join(config.out, "training.safetensors"), tensors, about)
    model.save_pretrained(config.out, tokenizer=config.tokenizer)


def load_checkpoint(path, typed, ops):
    """-> the model, its optimizer, its options with what is typed on top, and a line on the data it was trained on"""
    tensors, about = load_tensors(path)
    with reading(path):
        step, sizes, saved = int(about["step"]), json.loads(about["config"]), json.loads(about["options"])
        expect(0 < step <= 10**9, f"step is {step}")
        sizes = asdict(GPTConfig(**sizes))
        saved |= {name: sizes[name] for name in FIXED[:4]} | dict(out=os.path.dirname(path))
        saved = asdict(TrainConfig(**saved))
        formulas = json.loads(about.get("ops", "{}"))
    refuse_other(typed, saved, path)
    changed = [f"--{dashed(name)} {x} instead of {saved[name]}" for name, x in typed.items() if x != saved[name]]
    if changed:
        print(f"from here on with {', '.join(changed)}")
    config = TrainConfig(**saved | typed)
    moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith("exp_avg")}
    model = build(GPT, GPTConfig(**sizes | dict(dropout=config.dropout)), ops, tensors, path)
    compare_ops(model, formulas, path)
    optimizer = make_optimizer(model, config.lr, config.beta2, config.weight_decay)
    for name, p in model.named_parameters():  # AdamW itself checks no shape, and would write beside the memory
        both = {key: take(moments, f"{key}.{name}", p.shape, path).float() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = dict(step=torch.tensor(float(step)), **both)
    return model, optimizer, config, about.get("data")


FIXED = ("n_layer", "n_head", "n_embd", "block_size", "tokenizer", "init")  # what a model cannot change any more


def refuse_other(typed, fixed, path):
    for name in FIXED:
        typed_value, value = typed.get(name), fixed.get(name)
        same = name not in typed or name not in fixed or typed_value == value
        expect(same, f"--{dashed(name)} is {typed_value!r}, but {path} has {value!r}, which cannot change")


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
        for name in FILES:
            with suppress(FileNotFoundError):
                os.remove(os.path.join(folder, f"{name}.tmp"))  # of a run that was killed
        with open(os.path.join(folder, "trial.tmp"), "wb") as file:
            file.write(b"can it be written?")
        os.remove(file.name)
        yield
    finally:
        os.close(lock)
        with suppress(OSError):
            os.rmdir(folder)  # if nothing came to be in it


# --------------------------------------------------------------------------------------------- 8  Command line


@dataclass
class GenerateConfig(Options):
    """continue a prompt"""

    model: str = option("out", "folder with a checkpoint, or gpt2, gpt2-medium, ...")
    tokenizer: str | None = option(None, "bytes or gpt2, if the model names none", "tokenizer in ('bytes', 'gpt2')")
    prompt: str = option("\n", "text to continue")
    max_new_tokens: int = option(200, "tokens to add", "1 <= max_new_tokens <= 1_000_000_000")
    samples: int = option(1, "continuations to draw", "1 <= samples <= 100_000")
    temperature: float = option(0.8, "0 takes the most likely token each time", "0 <= temperature < inf")
    top_k: int = option(200, "draw from the N most likely tokens", "1 <= top_k <= 1_000_000_000")
    top_p: float | None = option(None, "draw from the fewest tokens with a probability of X together", "0 < top_p <= 1")
    seed: int | None = option(None, "for the same sample again")


@dataclass
class EvalConfig(Options):
    """loss, perplexity and bits per byte of a text's last tenth"""

    model: str = option("out", "folder with a checkpoint, or gpt2, gpt2-medium, ...")
    tokenizer: str | None = option(None, "bytes or gpt2, if the model names none", "tokenizer in ('bytes', 'gpt2')")
    data: str | None = option(None, "text file in UTF-8; without one, Python's own help texts")
    batch_size: int = option(8, "windows at a time", "1 <= batch_size <= 100_000")


def run_train(typed, ops):
    resume, overwrite = typed.pop("resume", False), typed.pop("overwrite", False)
    config = TrainConfig(**typed)
    path = os.path.join(config.out, "training.safetensors")
    expect(os.path.isfile(path) or not resume, f"{path} does not exist, so there is nothing to --resume")
    with claimed(config.out):
        there = [name for name in FILES if os.path.exists(os.path.join(config.out, name))]
        ways = "add --resume or --overwrite" if os.path.isfile(path) else f"it has {there}: add --overwrite"
        free = resume or overwrite or not there
        expect(free, f"--out is {config.out!r}, which holds a checkpoint: {ways}, or take another")
        model, before = None, None
        if resume:
            model, optimizer, config, before = load_checkpoint(path, typed, ops)
        elif config.init:
            model = GPT.from_pretrained(config.init, ops, config.dropout)
            sizes = {name: getattr(model.config, name) for name in FIXED[:4]}
            refuse_other(typed, sizes, config.init)
            config = replace(config, **sizes)
        tokenizer = get_tokenizer(config.tokenizer)
        tokens, val = load_tokens(config.data, tokenizer, config.block_size)
        data = f"{len(tokens) + len(val):,} tokens with CRC-32 {zlib.crc32(val, zlib.crc32(tokens)):08x}"
        if before not in (None, data):
            print(f"the text is another than before: {data} instead of {before}")
        torch.manual_seed(config.seed)
        if model is None:
            sizes = {name: getattr(config, name) for name in FIXED[:4]}
            model = GPT(GPTConfig(**sizes, vocab_size=tokenizer.n_vocab, dropout=config.dropout), ops)
        check_vocabulary(model, tokenizer)
        if not resume:
            optimizer = make_optimizer(model, config.lr, config.beta2, config.weight_decay)
        n = sum(p.numel() for p in model.parameters())
        print(f"{n:,} parameters, {len(tokens):,} tokens, {len(val):,} to validate")
        if config.warmup > config.steps:
            print(f"--warmup {config.warmup} is longer than the run, so it is cut to --steps {config.steps}")
        if (step := steps_done(optimizer)) >= config.steps:
            print(f"nothing to do: {config.out} is at step {step} of {config.steps}; --resume --steps N goes on")
            return
        train(model, optimizer, tokens, val, config, data)
        most, on = None, f"all {len(val):,} tokens"
        if len(val) > 2**18:  # to measure all of a large text would take longer than to train
            most = max(1, 2**18 // config.block_size)
            on = f"{most:,} windows of {config.block_size} from all over {len(val):,} tokens"
        print(f"val loss {evaluate(model, val, config.batch_size, most):.4f} on {on}; saved in {config.out}\n")
        start = torch.tensor([tokenizer.encode("\n")])
        out = model.generate(start, config.sample, temperature=0.8, top_k=200, seed=config.seed)
        print(tokenizer.decode(out[0].tolist()))


def load_model(config, ops):
    """The model and its tokenizer: the one it was trained with, unless the command line names one."""
    model = GPT.from_pretrained(config.model, ops).eval()
    tokenizer = get_tokenizer(config.tokenizer or model.tokenizer or "gpt2")
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def check_vocabulary(model, tokenizer):
    n, V = tokenizer.n_vocab, model.config.vocab_size
    expect(n <= V, f"--tokenizer {tokenizer.name} has {n} ids, expected at most the model's {V}")


def run_generate(typed, ops):
    config = GenerateConfig(**typed)
    model, tokenizer = load_model(config, ops)
    start = tokenizer.encode(config.prompt, allowed_special="all") or [tokenizer.eot_token]
    idx, started = torch.tensor([start] * config.samples), time.perf_counter()
    how = config.temperature, config.top_k, config.top_p, config.seed
    for row in model.generate(idx, config.max_new_tokens, *how).tolist():
        print(tokenizer.decode(row), end="\n---\n" if config.samples > 1 else "\n")
    speed = config.samples * config.max_new_tokens / (time.perf_counter() - started)
    print(f"[{speed:,.1f} tokens/s]", file=sys.stderr)


def run_eval(typed, ops):
    config = EvalConfig(**typed)
    model, tokenizer = load_model(config, ops)
    _, tokens = load_tokens(config.data, tokenizer, block_size=1)
    loss, n = evaluate(model, tokens, config.batch_size), len(tokens) - 1
    lengths = np.array([len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)])
    bits = loss * n / math.log(2) / lengths[tokens[1:]].sum()
    perplexity = math.exp(loss) if loss < 700 else math.inf
    print(f"{n:,} tokens: loss {loss:.4f} nats, perplexity {perplexity:.2f}, {bits:.4f} bits per byte")


COMMANDS = {
    "train": (run_train, TrainConfig),
    "generate": (run_generate, GenerateConfig),
    "eval": (run_eval, EvalConfig),
}


def make_parser(prog=None):
    """Each command's options are its dataclass's fields. What is not typed is absent from what argparse returns."""
    parser = argparse.ArgumentParser(prog=prog, description="GPT-2: train it, sample from it, measure it.")
    parser.add_argument("--version", action="version", version=f"gpt.py 0.2, torch {torch.__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="train | generate | eval")
    for name, (_, options) in COMMANDS.items():
        command = commands.add_parser(name, help=options.__doc__, argument_default=argparse.SUPPRESS)
        for f in fields(options):
            kind = (get_args(f.type) or (f.type,))[0]
            help = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default!r})")
            metavar = {int: "N", float: "X", str: "TEXT"}[kind]
            command.add_argument(f"--{dashed(f.name)}", type=kind, metavar=metavar, help=help)
        if name == "train":
            command.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
            command.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    return parser


def main(argv=None, ops=None, prog=None):
    """The command line. `ops` as in GPT: `fastgpt train` is this with the kernels. Errors of use end with status 1."""
    parser = make_parser(prog)
    typed = vars(parser.parse_args(argv))
    run = COMMANDS[typed.pop("command")][0]
    uninterrupted.__init__()
    handlers = {}
    try:
        with suppress(ValueError):  # in a thread that is not the main one
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, uninterrupted.handle)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{parser.prog}: {message}", file=sys.stderr)
            run(typed, ops)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(uninterrupted.status)
    except BrokenPipeError:  # whoever read our output has gone, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        if uninterrupted.received:  # C++ that a KeyboardInterrupt passes through may make another error of it
            sys.exit(uninterrupted.status)
        if not isinstance(error, (ValueError, OSError, MemoryError)) and "allocate" not in str(error):
            raise  # an error of this program, not of its use; "allocate": torch has not enough memory
        sys.exit(f"{parser.prog}: error: {first_line(error)}")
    finally:
        uninterrupted.depth += 1  # nothing is left to interrupt
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


# ----------------------------------------------------------------------------------- Appendix: dropout's numbers


def dropout_mask(B, H, T, dropout, seed):
    """Which attention weights stay: (B, H, T, T) booleans, each True with probability 1 - dropout.

    Random numbers without state, so that a kernel can compute any part of the mask on the spot and never store it:
    Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") under the key `seed`
    turns the counter (query, key // 4, head, 0) into four 32-bit words, one each for four neighbouring keys.
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
