"""`fastgpt generate`: gpt.py's generate on fastgpt.Decoder. One text is printed as it comes, several at the end."""

import argparse
import codecs
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import gpt

from . import _kernels, packed
from . import tokenizer as tokenizers
from .decoder import FAST_PROMPTS, Decoder
from .packed import expect


class Text:
    """What tokens spell, in whole characters, up to the first of the stop strings."""

    def __init__(self, stops=()):
        self.stops, self.held, self.text, self.stopped = stops, "", "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, data, final=False):
        """Bytes of one more token. -> what may be shown now: nothing that a stop string may begin with"""
        if self.stopped:
            return ""
        self.held += self.decoder.decode(data, final)
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, ready, self.held = True, self.held[: min(found)], ""
        else:
            n = 0 if final else self._open()
            ready, self.held = self.held[: len(self.held) - n], self.held[len(self.held) - n :]
        self.text += ready
        return ready

    def _open(self):
        """The longest end of the text that a stop string begins with."""
        lengths = range(max(map(len, self.stops), default=1) - 1, 0, -1)
        return next((n for n in lengths for stop in self.stops if n < len(stop) and self.held.endswith(stop[:n])), 0)


def token_bytes(tokenizer, token):
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:  # the model has more ids than the tokenizer
        return "\ufffd".encode()


def read_limit():
    """GB/s at which all threads read memory now."""
    data, speeds = np.ones(32 << 20, np.float32), []
    for _ in range(5):
        start = time.perf_counter()
        size = _kernels.read_work(data)
        speeds.append(size / (time.perf_counter() - start) / 1e9)
    return sorted(speeds)[2]


@dataclass
class GenerateConfig(gpt.GenerateConfig):
    """continue a prompt"""

    model: str = gpt.option("out", "folder with a checkpoint or packed weights, or gpt2, gpt2-medium, ...")
    dtype: str | None = gpt.option(
        None,
        f"of the weights: {', '.join(packed.DTYPES)}; float32 if not packed",
        f"dtype in {packed.DTYPES}",
    )
    kv_dtype: str = gpt.option("float32", "of keys and values: float32 or bfloat16", f"kv_dtype in {packed.DTYPES[:2]}")
    lookup: int = gpt.option(
        0, "for text that repeats itself: try N tokens that followed where it ended so before", "0 <= lookup <= 64"
    )


def make_parser():
    parser = argparse.ArgumentParser(prog="fastgpt generate", description="Continue a prompt.")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--logprobs", action="store_true", help="log probability of each token, on stderr")
    parser.add_argument("--fast-prompts", action="store_true", help=FAST_PROMPTS)
    parser.add_argument("--stats", action="store_true", help="speeds and what limits them, on stderr")
    gpt.add_options(parser, GenerateConfig)
    return parser


def main(argv=None):
    typed = vars(make_parser().parse_args(argv))
    names = "stop", "logprobs", "stats", "fast_prompts"
    stops, show_logprobs, show_stats, fast_prompts = (typed.pop(name) for name in names)
    args = GenerateConfig(**typed)
    expect(all(stops), "--stop is '', expected at least one character")
    expect(not args.lookup or args.samples == 1, f"--samples is {args.samples} with --lookup, expected 1")
    decoder = Decoder(args.model, args.dtype, args.kv_dtype, fast_prompts)
    tokenizer = tokenizers.of_model(decoder, args.model, args.tokenizer)
    limit = decoder.config.block_size
    start = tokenizer.encode(args.prompt, allowed_special="all") or [tokenizer.eot_token]
    expect(len(start) <= limit, f"--prompt has {len(start)} tokens, expected at most the model's {limit}")

    texts, logprobs = [Text(stops) for _ in range(args.samples)], [[] for _ in range(args.samples)]

    def keep(logits, new):
        shown = torch.log_softmax(torch.from_numpy(logits), -1)
        for row, token, logprob in zip(logprobs, new.tolist(), shown[range(len(new)), new].tolist(), strict=True):
            row.append((token, logprob))

    one = args.samples == 1
    prompt = tokenizer.decode(start)
    if one:
        print(prompt, end="", flush=True)
    times = [time.perf_counter()]
    idx = torch.tensor([start] * args.samples)
    options = args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, args.lookup
    stream = decoder.stream(idx, *options, each=keep if show_logprobs else None)
    for new in stream:
        times.append(time.perf_counter())
        for text, token in zip(texts, new.tolist(), strict=True):
            piece = text.add(token_bytes(tokenizer, token))
            if one and piece:
                print(piece, end="", flush=True)
        if all(text.stopped for text in texts):
            break
    stream.close()
    for text in texts:
        piece = text.add(b"", final=True)
        print(piece if one else prompt + text.text, end="\n" if one else "\n---\n")
    sys.stdout.flush()

    for i, row in enumerate(logprobs):
        for token, logprob in row:
            print(f"{f'{i} ' if not one else ''}{logprob:9.4f} {token_bytes(tokenizer, token)!r}", file=sys.stderr)
    made = len(times) - 1
    print(f"[{args.samples * made / (times[-1] - times[0]):,.1f} tokens/s]", file=sys.stderr)
    if show_stats:
        stats(decoder, args.samples, len(start), times, args.lookup)


def stats(decoder, B, T, times, lookup):
    """Lines on stderr."""
    made, limit = len(times) - 1, decoder.config.block_size
    prefill, slid = times[1] - times[0], max(0, T + made - 1 - limit)
    print(f"prefill: {T} tokens, once for all samples: {T / prefill:,.1f} tokens/s", file=sys.stderr)
    if made - 1 - slid > 0:
        seconds = (times[made - slid] - times[1]) / (made - 1 - slid)
        size, share = decoder.token_bytes(T + (made - slid) // 2) / 1e9, ""
        if B == 1 and not lookup:  # then each token reads all weights
            speed = read_limit()
            share = f"; {size / seconds:.1f} GB/s of weights, keys and values"
            share += f", {size / seconds / speed:.0%} of the {speed:.1f} at which memory is read now"
        print(f"decode: {B / seconds:,.1f} tokens/s in {decoder.dtype}{share}", file=sys.stderr)
    if slid:
        seconds = (times[-1] - times[made - slid]) / slid
        print(f"the window slid for {slid} tokens, each a whole pass: {B / seconds:,.1f} tokens/s", file=sys.stderr)
    print(
        f"context: {min(T + made, limit)} of {limit} positions, keys and values in {decoder.kv_dtype}", file=sys.stderr
    )
