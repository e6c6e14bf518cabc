"""GPT-2 from first principles: the model, its training and its use, in one file to be read from top to bottom.

  1  Sizes         the four GPT-2s, as numbers
  2  Formulas      all the mathematics: layer_norm, gelu, linear, attention, lm_loss
  3  Modules       where the weights live, and the order in which the formulas meet them
  4  GPT           tokens in, logits or a loss out; new tokens; weights in the Hugging Face layout
  5  Tokenizers    text to integers and back: GPT-2's own, or plain bytes
  6  Data          one long row of tokens, cut into windows
  7  Training      AdamW, warm-up and cosine, clipping, accumulation, checkpoints
  8  Command line  python gpt.py train | generate | eval

It needs torch, numpy and tiktoken, and nothing else of this project. The model reaches the five formulas through
`ops`: the package `fastgpt` holds the same five as fused C++ kernels, and GPT(config, ops=fastgpt) runs on those.

The letters in every comment: B batch, T time (position), C channels, H heads, D = C / H head size, V vocabulary.
Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) for the model, "Attention Is All
You Need" (Vaswani et al. 2017) for attention, and the code that OpenAI released with GPT-2 for every detail.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import tiktoken
import torch
from torch import nn

# ---------------------------------------------------------------------------------------------------- 1  Sizes


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
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, expected a positive integer")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}, expected 0 <= dropout < 1")


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
    """x times the chance that a normal variable is below x, in the tanh form that GPT-2 was trained with. Any shape."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def linear(x, weight, bias=None):
    """Each output channel is a weighted sum of all input channels. (..., K), (N, K), (N) -> (..., N)"""
    y = x @ weight.T
    return y if bias is None else y + bias


def attention(qkv, n_head, dropout=0.0, seed=0):
    """Each position takes a weighted mean of the values at itself and before it. (B, T, 3C) -> (B, T, C)

    softmax(Q K^T / sqrt(D)) V in each head; qkv holds the queries, keys and values of all heads side by side.
    `dropout` zeroes that share of the weights, chosen by `seed`, and scales up the others.
    """
    B, T, C3 = qkv.shape
    q, k, v = (x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.split(C3 // 3, dim=-1))  # (B, H, T, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, T): query i against key j
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)  # j > i
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)  # each row sums to 1
    if dropout:
        weights = weights * dropout_mask(B, n_head, T, dropout, seed).to(weights) / (1.0 - dropout)
    return (weights @ v).transpose(1, 2).flatten(2)  # heads side by side again: (B, T, C)


def lm_loss(hidden, weight, targets):
    """Mean surprise in nats, -log p(target), over the targets that aren't -1. (B, T, C), (V, C), (B, T) -> ()"""
    keep = targets != -1
    logits = hidden @ weight.T  # (B, T, V)
    chosen = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)  # (B, T)
    surprise = logits.logsumexp(-1) - chosen  # log of 1 / softmax(logits)[target]
    return torch.where(keep, surprise, 0.0).sum() / keep.sum()


FORMULAS = ("layer_norm", "gelu", "linear", "attention", "lm_loss")


def dropout_mask(B, H, T, dropout, seed):
    """Which attention weights stay: (B, H, T, T) booleans, each True with a chance of 1 - dropout.

    Random numbers without state, so that a kernel can make any part of the mask on the spot and never store it:
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


# -------------------------------------------------------------------------------------------------- 3  Modules


class LayerNorm(nn.Module):
    def __init__(self, config, ops):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x):
        return self.ops.layer_norm(x, self.weight, self.bias)


class Linear(nn.Module):
    def __init__(self, n_in, n_out, ops, std=0.02):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(n_out, n_in).normal_(0.0, std))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return self.ops.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Positions exchange information."""

    def __init__(self, config, ops):
        super().__init__()
        self.ops, self.n_head, self.dropout = ops, config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, ops)
        self.c_proj = Linear(config.n_embd, config.n_embd, ops, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x, cache=None):  # (B, T, C) -> (B, T, C)
        qkv = self.c_attn(x)  # (B, T, 3C)
        if cache is not None and cache.append(qkv):
            y = cache.attention(qkv)
        elif self.training and self.dropout:
            y = self.ops.attention(qkv, self.n_head, self.dropout, int(torch.randint(2**62, ())))
        else:
            y = self.ops.attention(qkv, self.n_head)
        return self.c_proj(y)


class KVCache:
    """Keys and values of the positions that one layer has seen, so that a new token pays for one position, not T."""

    def __init__(self, B, config, dtype):
        self.n_head, self.length = config.n_head, 0
        self.kv = torch.empty(B, config.block_size, 2 * config.n_embd, dtype=dtype)

    def append(self, qkv):
        """Store the keys and values of (B, t, 3C). True if there was something before: then these t must look back."""
        before, self.length = self.length, self.length + qkv.shape[1]
        self.kv[:, before : self.length] = qkv[..., qkv.shape[-1] // 3 :]
        return before > 0

    def attention(self, qkv):
        """The same formula as above, for the newest position only. -> (B, 1, C)"""
        parts = (qkv[:, -1:, : qkv.shape[-1] // 3], *self.kv[:, : self.length].chunk(2, dim=-1))
        q, k, v = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for x in parts)  # (B, H, 1 or T, D)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)  # (B, H, 1, T)
        return (weights @ v).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Each position thinks for itself."""

    def __init__(self, config, ops):
        super().__init__()
        self.ops = ops
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, ops)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, ops, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x):  # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        if hasattr(self.ops, "linear_gelu"):  # the same in one pass
            return self.c_proj(self.ops.linear_gelu(x, self.c_fc.weight, self.c_fc.bias))
        return self.c_proj(self.ops.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Normalize, compute, add back: twice."""

    def __init__(self, config, ops):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config, ops), Attention(config, ops)
        self.ln_2, self.mlp = LayerNorm(config, ops), MLP(config, ops)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):  # (B, T, C) -> (B, T, C)
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


# ------------------------------------------------------------------------------------------------------ 4  GPT


class GPT(nn.Module):
    """The whole model. `ops` is any namespace with the five formulas; None takes those of this file.

    Parameter names are Hugging Face's. The output layer has no weights of its own: it is wte again.
    """

    def __init__(self, config, ops=None):
        super().__init__()
        ops = ops or sys.modules[__name__]
        missing = [name for name in FORMULAS if not callable(getattr(ops, name, None))]
        if missing:
            raise ValueError(f"GPT: ops has no {', '.join(missing)}; expected a namespace with {', '.join(FORMULAS)}")
        names = [name for name in (*FORMULAS, "linear_gelu") if hasattr(ops, name)]
        self.config, self.ops = config, SimpleNamespace(**{name: getattr(ops, name) for name in names})
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # what the token is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, self.ops) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config, self.ops)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def hidden(self, idx, caches=None):
        """The last layer's channels, normalized: (B, T) -> (B, T, C)."""
        start = caches[0].length if caches else 0
        if idx.dim() != 2 or idx.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"GPT: idx is {idx.dtype} of shape {tuple(idx.shape)}, expected int64 of shape (B, T)")
        if start + idx.shape[1] > self.config.block_size:
            raise ValueError(f"GPT: idx has {idx.shape[1]} positions, expected at most {self.config.block_size}")
        if not torch.compiler.is_compiling() and idx.numel():
            low, high = idx.min().item(), idx.max().item()
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"GPT: idx has {bad}, expected 0 <= idx < vocab_size={self.config.vocab_size}")
        x = self.drop(self.wte(idx) + self.wpe.weight[start : start + idx.shape[1]])
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None)
        return self.ln_f(x)

    def forward(self, idx):
        """Logits of the token that follows each position: (B, T) -> (B, T, V)."""
        return self.ops.linear(self.hidden(idx), self.wte.weight)

    def loss(self, idx, targets):
        """Mean cross-entropy in nats: (B, T), (B, T) -> (). The logits need never exist as a whole."""
        return self.ops.lm_loss(self.hidden(idx), self.wte.weight, targets)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
        """Append max_new_tokens to idx: (B, T) -> (B, T + max_new_tokens).

        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p (Holtzman et al. 2019) the fewest
        that together have a chance of p. Positions are learned, so once the window of block_size is full it slides
        and every position changes: from there on each token costs a whole pass.
        """
        for name, value, good, expected in (
            ("idx", tuple(idx.shape), idx.dim() == 2 and idx.shape[1] > 0, "(B, T) with T >= 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
            ("top_k", top_k, top_k is None or top_k >= 1, "None or 1 or more"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "None or 0 < top_p <= 1"),
        ):
            if not good:
                raise ValueError(f"generate: {name} is {value}, expected {expected}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        caches, new, training = None, idx, self.training
        self.eval()
        for _ in range(max_new_tokens):
            if caches is None or caches[0].length == self.config.block_size:  # at the start, and when the window slides
                caches = [KVCache(len(idx), self.config, self.wte.weight.dtype) for _ in self.h]
                new = idx[:, -self.config.block_size :]
            logits = self.ops.linear(self.hidden(new, caches)[:, -1], self.wte.weight)  # (B, V)
            new = sample(logits, temperature, top_k, top_p, generator)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)
        self.train(training)
        return idx

    @classmethod
    def from_pretrained(cls, path, ops=None, dropout=0.0):
        """Weights in the Hugging Face GPT-2 layout, from a folder or, by name, from the Hub ("gpt2-xl")."""
        path = path if os.path.isdir(path) else download(path)
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            hf = json.load(file)
        for key, expected in HF_FIXED.items():  # what would make it another model than the one above
            if hf.get(key, expected[0]) not in expected:
                raise ValueError(f"from_pretrained: {key} is {hf[key]!r} in {path}, expected {expected[0]!r}")
        if hf.get("n_inner") not in (None, 4 * hf["n_embd"]):
            raise ValueError(f"from_pretrained: n_inner is {hf['n_inner']} in {path}, expected 4 * n_embd")
        names = dict(
            n_layer="n_layer", n_head="n_head", n_embd="n_embd", block_size="n_positions", vocab_size="vocab_size"
        )
        model = cls(GPTConfig(**{ours: hf[theirs] for ours, theirs in names.items()}, dropout=dropout), ops)
        tensors, _ = load_tensors(os.path.join(path, "model.safetensors"))
        tensors = {key.removeprefix("transformer."): tensor.float() for key, tensor in tensors.items()}
        head = tensors.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, tensors["wte.weight"]):
            raise ValueError(f"from_pretrained: lm_head.weight differs from wte.weight in {path}, expected them tied")
        for key in list(tensors):
            if key.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, stored as if it were learned
                del tensors[key]
            elif key.endswith(HF_TRANSPOSED):  # stored (in, out)
                tensors[key] = tensors[key].T
        model.load_state_dict(tensors)
        return model

    def save_pretrained(self, path, **extra):
        """Write config.json (with `extra` in it) and model.safetensors, which transformers' GPT-2 loads too."""
        os.makedirs(path, exist_ok=True)
        c = self.config
        sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size, n_ctx=c.block_size)
        drops = dict(embd_pdrop=c.dropout, attn_pdrop=c.dropout, resid_pdrop=c.dropout)
        eot = dict(bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
        fixed = {key: expected[0] for key, expected in HF_FIXED.items()}
        config = dict(
            architectures=["GPT2LMHeadModel"], **fixed, **sizes, vocab_size=c.vocab_size, **drops, **eot, **extra
        )
        write_file(os.path.join(path, "config.json"), [json.dumps(config, indent=2).encode()])
        tensors = {f"transformer.{k}": x.T if k.endswith(HF_TRANSPOSED) else x for k, x in self.state_dict().items()}
        save_tensors(os.path.join(path, "model.safetensors"), tensors)


# The configuration values that GPT-2 shares in all sizes; the first of each is what save_pretrained writes.
HF_FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
HF_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def sample(logits, temperature, top_k, top_p, generator):
    """Draw one token from each row of logits: (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    ordered, tokens = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    chances = torch.softmax(ordered, dim=-1)
    if top_k is not None:
        chances[:, top_k:] = 0.0
    if top_p is not None:
        chances[chances.cumsum(-1) - chances >= top_p * chances.sum(-1, keepdim=True)] = 0.0  # p was reached before
    return tokens.gather(-1, torch.multinomial(chances, 1, generator=generator))


def download(name):
    """Fetch config.json and model.safetensors from the Hugging Face Hub, once. -> the folder they are in"""
    if name not in SIZES and "/" not in name:
        raise ValueError(
            f"from_pretrained: {name!r} is no folder and no model, expected a folder or {', '.join(SIZES)}"
        )
    try:
        from huggingface_hub import snapshot_download

        repository = f"openai-community/{name}" if name in SIZES else name
        return snapshot_download(repository, allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"from_pretrained: {name!r} is no folder here and could not be fetched ({reason}). With a network, "
            "`pip install huggingface_hub` and try again; without, pass a folder with config.json and model.safetensors"
        ) from error


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def save_tensors(path, tensors, metadata=None):
    """Write a safetensors file: the header's length in 8 bytes, a JSON header, then each tensor's bytes in turn."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, x in tensors.items():
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": codes[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors start at a multiple of 8
    payload = (x.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for x in tensors.values())
    write_file(path, [len(header).to_bytes(8, "little"), header, *payload])


def load_tensors(path):
    """Read a safetensors file: ({name: tensor}, metadata)."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist, expected a safetensors file")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path):
                raise ValueError("no header")
            header = json.loads(file.read(length))
            metadata, tensors = header.pop("__metadata__", {}), {}
            for name, about in header.items():
                tensors[name] = x = torch.empty(about["shape"], dtype=SAFETENSORS_DTYPES[about["dtype"]])
                file.seek(8 + length + about["data_offsets"][0])
                if file.readinto(x.view(-1).view(torch.uint8).numpy()) != x.nbytes:
                    raise ValueError(f"{name} is cut off")
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error!r})") from error
    return tensors, metadata


def write_file(path, chunks):
    """All or nothing: whatever happens in between, `path` is the old file or the new one."""
    with open(f"{path}.tmp", "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


# ----------------------------------------------------------------------------------------------- 5  Tokenizers


def get_tokenizer(name):
    """A tiktoken.Encoding: "gpt2" is GPT-2's byte-pair encoding, "bytes" gives each byte its own id."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
        )
    if name != "gpt2":
        raise ValueError(f"get_tokenizer: name is {name!r}, expected 'gpt2' or 'bytes'")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise ValueError(
            "the GPT-2 tokenizer needs vocab.bpe and encoder.json, which tiktoken downloads once, and that failed "
            f"({type(error).__name__}). Connect once, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has them "
            "already, or use --tokenizer bytes, which needs no file"
        ) from error


# ----------------------------------------------------------------------------------------------------- 6  Data


def load_text(path=None):
    """The text in a UTF-8 file, or, without one, half a megabyte of English that every Python carries: its own help."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data is {path!r}, expected a readable text file in UTF-8 ({error})") from error


def load_tokens(path, tokenizer, block_size):
    """Tokens to train on and, the last tenth of the text, tokens to validate on: two rows of int64."""
    text = load_text(path)
    cut = len(text) * 9 // 10
    train, val = (torch.tensor(tokenizer.encode(part, allowed_special="all")) for part in (text[:cut], text[cut:]))
    if min(len(train), len(val)) <= block_size:
        raise ValueError(
            f"--data has {len(train)} tokens to train on and {len(val)} to validate on, expected more than "
            f"--block-size={block_size} of each"
        )
    return train, val


def random_batch(tokens, B, T, generator):
    """B windows that start anywhere, and the same windows one token later, the targets: (B, T), (B, T)."""
    starts = torch.randint(len(tokens) - T, (B, 1), generator=generator)
    windows = tokens[starts + torch.arange(T + 1)]
    return windows[:, :-1], windows[:, 1:]


# ------------------------------------------------------------------------------------------------- 7  Training


def make_optimizer(model, lr, beta2, weight_decay):
    """AdamW (Loshchilov and Hutter 2019). Matrices decay towards zero; biases and layer_norm's scales do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def learning_rate(step, steps, warmup, lr):
    """Up in a line for `warmup` steps, then down half a cosine to a tenth."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model, tokens, batch_size, max_windows=None):
    """Mean loss in nats a token over consecutive windows: all of them, or max_windows spread over the whole row."""
    T = model.config.block_size
    n = math.ceil((len(tokens) - 1) / T)
    pad = n * T - (len(tokens) - 1)
    idx = nn.functional.pad(tokens[:-1], (0, pad)).view(n, T)
    targets = nn.functional.pad(tokens[1:], (0, pad), value=-1).view(n, T)
    chosen = torch.linspace(0, n - 1, min(n, max_windows or n)).long()
    total, count, training = 0.0, 0, model.training
    model.eval()
    for some in chosen.split(batch_size):
        kept = int((targets[some] != -1).sum())
        total += float(model.loss(idx[some], targets[some])) * kept
        count += kept
    model.train(training)
    return total / count


def train_step(model, optimizer, tokens, step, args):
    """One step of the optimizer: loss and gradients of args.accumulate batches, clipped to norm args.clip."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # a step's randomness hangs on nothing
    torch.manual_seed(args.seed * 1_000_003 + step)  # before it, so a run that is resumed takes the same path
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args.steps, args.warmup, args.lr)
    total = 0.0
    for _ in range(args.accumulate):
        idx, targets = random_batch(tokens, args.batch_size, model.config.block_size, generator)
        loss = model.loss(idx, targets) / args.accumulate
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


def save_checkpoint(path, model, optimizer, step, args):
    """model.safetensors and config.json for use, training.safetensors to go on from: weights and AdamW's moments."""
    model.save_pretrained(path, tokenizer=args.tokenizer)
    tensors = {}
    for name, p in model.named_parameters():
        tensors[name], state = p, optimizer.state[p]
        tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq") if moment in state}
    options = {key: value for key, value in vars(args).items() if key not in ("run", "resume", "overwrite", "init")}
    about = dict(step=str(step), options=json.dumps(options), config=json.dumps(asdict(model.config)))
    save_tensors(os.path.join(path, "training.safetensors"), tensors, about)


def load_checkpoint(path, model, optimizer):
    """Put back what save_checkpoint stored. -> the step to go on with"""
    tensors, about = load_tensors(path)
    step = int(about["step"])
    for name, p in model.named_parameters():
        p.data.copy_(tensors[name])
        if step:
            moments = {moment: tensors[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = dict(step=torch.tensor(float(step)), **moments)
    return step


def train(model, optimizer, tokens, val, step, args):
    """Steps until args.steps or Ctrl-C, with a progress bar, validation and checkpoints. -> the steps done"""
    try:
        from tqdm import tqdm
    except ImportError:  # a comfort: the lines printed at each evaluation tell the same
        tqdm = None
    bar = tqdm(total=args.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5) if tqdm else None
    say = tqdm.write if tqdm else print
    per_step, started, first = args.batch_size * model.config.block_size * args.accumulate, time.perf_counter(), step
    model.train()
    try:
        while step < args.steps:
            loss = train_step(model, optimizer, tokens, step, args)
            step += 1
            speed = (step - first) * per_step / (time.perf_counter() - started)
            if bar:
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
            if step % args.eval_every == 0 or step == args.steps:
                val_loss = evaluate(model, val, args.batch_size, max_windows=256)
                left = (args.steps - step) * per_step / speed
                say(f"step {step}: loss {loss:.4f}, val loss {val_loss:.4f}, {speed:,.0f} tokens/s, {left:.0f} s left")
                save_checkpoint(args.out, model, optimizer, step, args)
    except KeyboardInterrupt:
        say(f"stopped after step {step}; `train --resume --out {args.out}` goes on")
        save_checkpoint(args.out, model, optimizer, step, args)
    if bar:
        bar.close()
    return step


# --------------------------------------------------------------------------------------------- 8  Command line


def run_train(args, ops):
    checkpoint = os.path.join(args.out, "training.safetensors")
    if args.resume:
        config = GPTConfig(**json.loads(load_tensors(checkpoint)[1]["config"]))
    elif os.path.exists(checkpoint) and not args.overwrite:
        raise ValueError(
            f"--out is {args.out!r}, which holds a checkpoint: add --resume or --overwrite, or take another"
        )
    tokenizer = get_tokenizer(args.tokenizer)
    torch.manual_seed(args.seed)
    if args.init and not args.resume:
        model = GPT.from_pretrained(args.init, ops, args.dropout)
    else:
        sizes = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, block_size=args.block_size)
        new = GPTConfig(**sizes, vocab_size=tokenizer.n_vocab, dropout=args.dropout)
        model = GPT(config if args.resume else new, ops)
    check_vocabulary(model, tokenizer)
    tokens, val = load_tokens(args.data, tokenizer, model.config.block_size)
    optimizer = make_optimizer(model, args.lr, args.beta2, args.weight_decay)
    step = load_checkpoint(checkpoint, model, optimizer) if args.resume else 0
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens, {len(val):,} to validate"
    )
    train(model, optimizer, tokens, val, step, args)
    print(f"val loss {evaluate(model, val, args.batch_size):.4f} on all {len(val):,} tokens; saved in {args.out}\n")
    start = torch.tensor([tokenizer.encode("\n")])
    print(tokenizer.decode(model.generate(start, args.sample, temperature=0.8, top_k=200, seed=args.seed)[0].tolist()))


def load_model(args, ops):
    """The model in args.model and its tokenizer: the one it was trained with, unless the command line names one."""
    model = GPT.from_pretrained(args.model, ops).eval()
    name = args.tokenizer
    if name is None and os.path.isdir(args.model):
        with open(os.path.join(args.model, "config.json"), encoding="utf-8") as file:
            name = json.load(file).get("tokenizer")
    tokenizer = get_tokenizer(name or "gpt2")
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def check_vocabulary(model, tokenizer):
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"--tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, expected at most the model's "
            f"{model.config.vocab_size}"
        )


def run_generate(args, ops):
    model, tokenizer = load_model(args, ops)
    start = tokenizer.encode(args.prompt, allowed_special="all") or [tokenizer.eot_token]
    started = time.perf_counter()
    idx = torch.tensor([start] * args.samples)
    out = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    for row in out.tolist():
        print(tokenizer.decode(row), end="\n---\n" if args.samples > 1 else "\n")
    speed = args.samples * args.max_new_tokens / (time.perf_counter() - started)
    print(f"[{speed:,.1f} tokens/s]", file=sys.stderr)


def run_eval(args, ops):
    model, tokenizer = load_model(args, ops)
    _, tokens = load_tokens(args.data, tokenizer, block_size=1)
    loss = evaluate(model, tokens, args.batch_size)
    n_bytes = len(tokenizer.decode_bytes(tokens[1:].tolist()))
    bits = loss * (len(tokens) - 1) / math.log(2) / n_bytes
    print(
        f"{len(tokens) - 1:,} tokens: loss {loss:.4f} nats, perplexity {math.exp(loss):.2f}, {bits:.4f} bits per byte"
    )


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names it in its error


def make_parser(prog=None):
    parser = argparse.ArgumentParser(prog=prog, description="GPT-2: train it, sample from it, measure it.")
    commands = parser.add_subparsers(required=True, metavar="train | generate | eval")
    help = argparse.ArgumentDefaultsHelpFormatter

    t = commands.add_parser("train", help="train a model on a text", formatter_class=help)
    t.set_defaults(run=run_train)
    t.add_argument("--data", help="text file in UTF-8; without one, Python's own help texts")
    t.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes", help="how text becomes tokens")
    t.add_argument("--out", default="out", help="folder for the checkpoint")
    t.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its options")
    t.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --out")
    t.add_argument("--init", metavar="MODEL", help="fine-tune: start from a folder or from gpt2, gpt2-medium, ...")
    for name, default, what in (
        ("--n-layer", 4, "blocks"),
        ("--n-head", 4, "heads in each block"),
        ("--n-embd", 128, "channels"),
        ("--block-size", 64, "positions in a window"),
        ("--batch-size", 12, "windows in a batch"),
        ("--accumulate", 1, "batches in a step"),
        ("--steps", 2000, "steps in all"),
        ("--eval-every", 250, "steps between evaluations, each with a checkpoint"),
        ("--sample", 300, "tokens to sample at the end"),
    ):
        t.add_argument(name, type=positive, default=default, metavar="N", help=what)
    t.add_argument("--warmup", type=int, default=100, metavar="N", help="steps of rising learning rate")
    t.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    t.add_argument("--beta2", type=float, default=0.99, help="AdamW's memory of squared gradients")
    t.add_argument("--weight-decay", type=float, default=0.1, help="pull of the matrices towards zero")
    t.add_argument("--clip", type=float, default=1.0, help="longest gradient")
    t.add_argument("--dropout", type=float, default=0.0, help="share of channels and attention weights to zero")
    t.add_argument("--seed", type=int, default=1337, help="of all randomness")

    g = commands.add_parser("generate", help="continue a prompt", formatter_class=help)
    g.set_defaults(run=run_generate)
    g.add_argument("--prompt", default="\n", help="text to continue")
    g.add_argument("--max-new-tokens", type=positive, default=200, metavar="N", help="tokens to add")
    g.add_argument("--samples", type=positive, default=1, metavar="N", help="continuations to draw")
    g.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    g.add_argument("--top-k", type=int, default=200, metavar="K", help="draw from the K likeliest tokens")
    g.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens with a chance of P together")
    g.add_argument("--seed", type=int, help="for the same sample again")

    e = commands.add_parser(
        "eval", help="loss, perplexity and bits per byte of a text's last tenth", formatter_class=help
    )
    e.set_defaults(run=run_eval)
    e.add_argument("--data", help="text file in UTF-8; without one, Python's own help texts")
    e.add_argument("--batch-size", type=positive, default=8, metavar="N", help="windows at a time")
    for p in (g, e):
        p.add_argument("--model", default="out", help="folder with a checkpoint, or gpt2, gpt2-medium, ...")
        p.add_argument("--tokenizer", choices=("bytes", "gpt2"), help="only if the model's folder names none")
    return parser


def main(argv=None, ops=None, prog=None):
    """The command line. `ops` as in GPT: `fastgpt train` is this with the kernels. Errors of use end with status 1."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    try:
        if getattr(args, "resume", False):  # the checkpoint's options count as if typed, and what is typed goes first
            saved = load_tensors(os.path.join(args.out, "training.safetensors"))[1]["options"]
            sub = parser._subparsers._group_actions[0].choices["train"]
            sub.set_defaults(**json.loads(saved))
            args = parser.parse_args(argv)
        args.run(args, ops)
    except ValueError as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
