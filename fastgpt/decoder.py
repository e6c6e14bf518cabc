"""Generation at the speed at which memory is read: gpt.py's tokens from packed weights (csrc/decoder.h).

decoder = fastgpt.Decoder("gpt2", dtype="int8")
idx = decoder.generate(idx, 100, temperature=0.8, top_k=200, seed=1)
for token in decoder.stream(idx, 100): ...
"""

import math
import random
import threading
from contextlib import contextmanager

import numpy as np
import torch

from . import _kernels, packed
from .packed import expect

FAST_PROMPTS = "with bfloat16 or int8 weights: round prompts' activations like them, for faster products"
FAST_PROMPTS_NEED = "bfloat16 with AVX-512 BF16, AMX or ARM's BF16, or int8 with AVX-512 VNNI"
SHORT = 8  # prompts up to this length go through the layers as tokens do, longer ones through the matmul
MATCHES = (5, 3)  # tokens at a text's end that have occurred before, for a draft of the next ones
TOGETHER = 4096  # tokens of several prompts that go through the matmul at once


class Decoder:
    """A GPT-2 for generation.

    model     a gpt.GPT; or a folder: one of `fastgpt quantize`, with a model, or gpt2, gpt2-medium, ... from the Hub
    dtype     of the weights: float32, bfloat16, int8 (a scale for each row) or int4 (a scale for 32 values, wte in
              int8; its products round activations to int8, too). None: what the folder has been packed in, or float32
    kv_dtype  of the cache of keys and values: float32 or bfloat16
    fast_prompts   a prompt's activations are rounded as its weights are, for faster products; tokens after it are
              computed as ever. With bfloat16 weights as fastgpt.bfloat16 does, on the processors that it needs; with
              int8 weights to int8, with a scale for each 256 channels, on processors with AVX-512 VNNI

    The weights are copied: what becomes of the model later does not matter. A token's bits depend on its own text
    alone, neither on other rows of the batch, if these are finite, nor on the number of threads. One thread may use a
    decoder at a time.
    """

    def __init__(self, model, dtype=None, kv_dtype="float32", fast_prompts=False):
        expect(kv_dtype in packed.DTYPES[:2], f"Decoder: kv_dtype is {kv_dtype!r}, expected float32 or bfloat16")
        if dtype is not None:
            check_fast_prompts(fast_prompts, dtype)
        self.packed = packed.load(model, dtype)
        check_fast_prompts(fast_prompts, self.packed.dtype)
        self.config, self.dtype, self.kv_dtype = self.packed.config, self.packed.dtype, kv_dtype
        self.tokenizer = self.packed.tokenizer  # its name, or None
        c = self.config
        sizes = c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size
        tensors = list(self.packed.tensors.values())
        self._kernel = _kernels.Decoder(*sizes, self.dtype, packed.head_dtype(self.dtype), tensors, bool(fast_prompts))
        self.fast_prompts = bool(fast_prompts)
        self._lock, self._spare = threading.RLock(), np.empty(0, np.uint8)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, lookup=0):
        """Append max_new_tokens to idx: (B, T) -> (B, T + max_new_tokens), int64, as gpt.py's generate does.

        idx has at least one token and at most block_size. Rules, seed and tokens are those of gpt.py's sample.
        """
        with self.alone():
            new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, lookup))
        return torch.cat((idx.long(), torch.stack(new, dim=1)), dim=1) if new else idx.long()

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, lookup=0, each=None):
        """The same tokens, one after the other: a generator of max_new_tokens tensors (B,).

        It may be left before its end. `each`, if given, is called with each token's logits, an array (B, V) that the
        next token overwrites, and the tokens (B,). With `lookup`, for one text (Saxena 2023, "Prompt Lookup
        Decoding"): where the text ended before as it does now, up to that many tokens that followed then are verified
        in one pass. The tokens are the same; they come faster where a text repeats itself.
        """
        self._check(idx)
        check_options(max_new_tokens, temperature, top_k, top_p, seed)
        good = isinstance(lookup, int) and 0 <= lookup <= 64 and (lookup == 0 or len(idx) == 1)
        expect(good, f"generate: lookup is {lookup} for {len(idx)} texts, expected 0, or at most 64 and one text")
        rng = random.Random(int(torch.randint(2**62, ())) if seed is None else seed)
        prompts = idx.detach().to(torch.int64).numpy()

        def draw(logits):
            u = np.array([rng.random() for _ in logits] if temperature else [0.0] * len(logits))
            tokens = np.empty(len(logits), np.int64)
            _kernels.sample(logits, temperature, top_k or 0, 2.0 if top_p is None else top_p, u, tokens)
            good = tokens.min(initial=0) >= 0
            expect(good, "generate: the logits are not finite; are the weights damaged, or diverged?")
            return tokens

        def tokens():
            if not max_new_tokens:
                return
            new = None
            with self.sequences(prompts, max_new_tokens) as sequences:
                rows = sequences.logits_after_each(lookup)
                for _ in range(max_new_tokens):
                    with self.alone():
                        logits = rows.send(new)
                        new = draw(logits)
                        if each:
                            each(logits, new)
                    yield torch.from_numpy(new.copy())

        return tokens()

    def logits(self, idx):
        """Logits of the token that follows each position: (B, T) -> (B, T, V), as model(idx)."""
        self._check(idx)
        with self.alone(), self.sequences(idx.detach().to(torch.int64).numpy(), 0) as sequences:
            return torch.from_numpy(sequences.start(all_logits=True))

    def token_bytes(self, context):
        """Bytes of memory that one token of batch 1 reads after `context` others: weights, keys and values."""
        c, width = self.config, 4 if self.kv_dtype == "float32" else 2
        embeddings = self.packed.tensors["wpe.weight"].nbytes
        return self.packed.memory.nbytes - embeddings + 2 * c.n_layer * c.n_embd * width * context

    def sequences(self, prompts, new=0):
        """Room for prompts, an int64 array (B, T), and `new` tokens more. A context manager."""
        return Sequences(self, prompts, new)

    @contextmanager
    def alone(self):
        free = self._lock.acquire(blocking=False)
        expect(free, "Decoder: another thread is using it; expected one at a time, or a decoder for each")
        try:
            yield
        finally:
            self._lock.release()

    def _check(self, idx):
        good = isinstance(idx, torch.Tensor) and idx.dim() == 2 and idx.dtype in (torch.int64, torch.int32)
        found = f"{idx.dtype} of shape {tuple(idx.shape)}" if isinstance(idx, torch.Tensor) else type(idx).__name__
        expect(good, f"Decoder: idx is {found}, expected int64 of shape (B, T)")
        T, V, most = idx.shape[1], self.config.vocab_size, self.config.block_size
        expect(T > 0, f"Decoder: idx is {tuple(idx.shape)}, expected (B, T) with T >= 1")
        expect(T <= most, f"Decoder: idx has {T} positions, expected at most block_size={most}")
        low, high = (int(idx.min()), int(idx.max())) if idx.numel() else (0, 0)
        expect(
            0 <= low and high < V, f"Decoder: idx has {low if low < 0 else high}, expected 0 <= idx < vocab_size={V}"
        )


def check_fast_prompts(wanted, dtype):
    can = not wanted or _kernels.rounds_prompts(dtype)
    expect(can, f"Decoder: fast_prompts with {dtype} weights on {_kernels.isa()}, expected {FAST_PROMPTS_NEED}")


def check_options(max_new_tokens, temperature, top_k, top_p, seed):
    """As gpt.py's generate."""
    good = isinstance(max_new_tokens, int) and max_new_tokens >= 0
    expect(good, f"generate: max_new_tokens is {max_new_tokens}, expected 0 or more")
    expect(0 <= temperature < math.inf, f"generate: temperature is {temperature}, expected 0 or more")
    good = top_k is None or isinstance(top_k, int) and top_k >= 1
    expect(good, f"generate: top_k is {top_k}, expected None or an integer of 1 or more")
    expect(top_p is None or 0 < top_p <= 1, f"generate: top_p is {top_p}, expected None or 0 < top_p <= 1")
    expect(seed is None or isinstance(seed, int), f"generate: seed is {seed!r}, expected None or an integer")


class Sequences:
    """B texts under way: their keys and values, and the window that the next token sees."""

    def __init__(self, decoder, prompts, new):
        self.decoder, self.kernel, c = decoder, decoder._kernel, decoder.config
        (B, T), self.limit = prompts.shape, c.block_size
        self.window, self.length = np.zeros((B, min(self.limit, T + new)), np.int64), T
        self.window[:, :T] = prompts
        self.slots, self.logits = np.arange(B), np.empty((B, c.vocab_size), np.float32)
        self.drafted, self.capacity = self.logits[:0], packed.padded(self.window.shape[1])
        self.memory = self.cache = np.empty((0, 0), np.uint8)

    def __enter__(self):
        decoder, B = self.decoder, len(self.slots)
        each = self.kernel.cache_bytes(decoder.kv_dtype, self.capacity)
        self.memory, decoder._spare = decoder._spare, np.empty(0, np.uint8)
        if self.memory.nbytes < B * each:
            self.memory = packed.arena(B * each, f"Decoder: keys and values of {B} x {self.capacity} positions")
        self.cache = self.memory[: B * each].reshape(B, each)
        return self

    def __exit__(self, kind, *_):
        if kind in (None, GeneratorExit) and self.memory.nbytes > self.decoder._spare.nbytes:
            self.decoder._spare = self.memory  # for the next; after an error it may hold NaN
        self.memory = self.cache = np.empty((0, 0), np.uint8)

    def start(self, all_logits=False):
        """The whole window at once. -> logits (B, V) of the next token, or of all: (B, T, V)"""
        B, T = len(self.slots), self.length
        window = self.window[:, :T]
        if all_logits:
            logits = np.empty((B, T, self.logits.shape[1]), np.float32)
            for b in range(B):
                self._prefill(window[b : b + 1], self.slots[b : b + 1], logits[b], True)
            return logits
        if B > 1 and (window == window[0]).all():  # samples of one prompt
            self._start(window[:1], self.slots[:1], self.logits[:1])
            self.logits[1:], self.cache[1:] = self.logits[0], self.cache[0]
            return self.logits
        some = max(1, (SHORT if T <= SHORT else TOGETHER) // T)
        for b in range(0, B, some):
            self._start(window[b : b + some], self.slots[b : b + some], self.logits[b : b + some])
        return self.logits

    def _start(self, window, slots, logits):
        B, T = window.shape
        if T > SHORT:
            return self._prefill(window, slots, logits, False)
        every = np.empty((B * T, logits.shape[1]), np.float32)
        self._decode(window.reshape(-1), np.repeat(slots, T), np.tile(np.arange(T), B), every)
        logits[:] = every[T - 1 :: T]

    def append(self, tokens):
        """One more token for each text: (B,). -> logits (B, V) of the next"""
        if self.length == self.limit:  # the window slides: all positions change
            self.window[:, :-1] = self.window[:, 1:]
            self.window[:, -1] = tokens
            return self.start()
        self.window[:, self.length] = tokens
        self.length += 1
        positions = np.full(len(tokens), self.length - 1)
        self._decode(tokens, self.slots, positions, self.logits)
        return self.logits

    def logits_after_each(self, lookup=0):
        """A generator of logits (B, V): of the prompts, then of the tokens (B,) that are sent to it."""
        new = yield self.start()
        while True:
            draft = self._draft(new, lookup)
            if not len(draft):
                new = yield self.append(new)
                continue
            logits = self.extend([*new, *draft])
            for i in range(len(logits)):
                new = yield logits[i : i + 1]
                if i == len(draft) or new[0] != draft[i]:
                    self.length -= len(draft) - i  # what follows in the cache is overwritten before it is read
                    break

    def _draft(self, new, most):
        """What followed where the text ended before as it does with `new` now: at most `most` tokens."""
        most = min(most, self.window.shape[1] - self.length - 1)
        if most > 0:
            text = np.append(self.window[0, : self.length], new)
            for n in MATCHES:
                ends = np.lib.stride_tricks.sliding_window_view(text[:-1], n) if len(text) > n else text[:0, None]
                found = np.flatnonzero((ends == text[-n:]).all(1)) + n  # where it went on
                if len(found):
                    whole = found[found + most <= len(text)]  # if it can be, not cut short by the end
                    return text[whole[-1] if len(whole) else found[0] :][:most]
        return ()

    def extend(self, tokens):
        """Several tokens more for the only text. -> logits (n, V) after each"""
        n, T = len(tokens), self.length
        if n > len(self.drafted):
            self.drafted = np.empty((n, self.logits.shape[1]), np.float32)
        self.window[0, T : T + n] = tokens
        self.length += n
        self._decode(self.window[0, T : T + n], np.zeros(n, np.int64), np.arange(T, T + n), self.drafted[:n])
        return self.drafted[:n]

    def _decode(self, ids, slots, positions, logits):
        ids = np.ascontiguousarray(ids)
        self.kernel.decode(ids, slots, positions, self.cache, self.decoder.kv_dtype, self.capacity, logits)

    def _prefill(self, window, slots, logits, all_logits):
        lengths = np.full(len(window), window.shape[1])
        ids, kv_dtype = np.ascontiguousarray(window).reshape(-1), self.decoder.kv_dtype
        self.kernel.prefill(ids, lengths, slots, self.cache, kv_dtype, self.capacity, logits, all_logits)
