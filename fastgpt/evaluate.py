"""`fastgpt eval`: a text's loss; with --against, how far other forms of a model are from it.

At each position both models give the next token's probabilities, p and q. The KL divergence of q from p is
sum_v p_v (log p_v - log q_v) in nats: 0 where they agree, whatever the text says. It tells small differences that a
loss, which moves up and down with the text, does not.
"""

import argparse
import math
import sys
import warnings

import numpy as np
import torch

import gpt

from . import data, ops, packed
from . import tokenizer as tokenizers
from .decoder import FAST_PROMPTS, Decoder
from .packed import expect

ROWS = 64  # positions that are compared at once, in float64: 26 MB of GPT-2's vocabulary


def windows(tokens, T):
    """Consecutive ones, the last one shorter, as gpt.py's evaluate takes them: pairs of idx and targets."""
    for start in range(0, len(tokens) - 1, T):
        piece = torch.from_numpy(tokens[np.arange(start, min(start + T + 1, len(tokens)))].astype(np.int64))
        yield piece[:-1], piece[1:]


def compare(base, others, tokens, T):
    """What decoders predict of each token, given those before it in its window of T.

    -> nll of base (n,), and for each other a dict: its nll, kl, and same, whether the most likely token is that of base
    """
    base_nll, results = [], [dict(nll=[], kl=[], same=[]) for _ in others]
    for idx, targets in windows(tokens, T):
        logits = base.logits(idx[None])[0]
        base_nll += nll(logits, targets)
        for other, result in zip(others, results, strict=True):
            its_logits = other.logits(idx[None])[0]
            result["nll"] += nll(its_logits, targets)
            result["kl"] += kl_divergence(logits, its_logits)
            result["same"].append(logits.argmax(-1) == its_logits.argmax(-1))
    return torch.cat(base_nll), [{name: torch.cat(x) for name, x in result.items()} for result in results]


def nll(logits, targets):
    return [
        torch.nn.functional.cross_entropy(x.double(), y, reduction="none")
        for x, y in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    ]


def kl_divergence(p_logits, q_logits):
    pieces = []
    for p, q in zip(p_logits.split(ROWS), q_logits.split(ROWS), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        pieces.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))  # but for its rounding, it is
    return pieces


def report(name, base, names, others, tokens, T):
    """Print a table, a line for each."""
    base_nll, results = compare(base, others, tokens, T)
    print(f"{len(tokens) - 1:,} tokens in windows of {T}; KL divergence from {name} in {base.dtype}, nats a token")
    width = max(len(name) + 9, *map(len, names))
    print(f"{'':{width}}       MB     loss  perplexity   KL mean   KL 99 %  same top-1")

    def line(name, decoder, nll, rest=""):
        loss = float(nll.mean())
        perplexity = math.exp(loss) if loss < 700 else math.inf
        print(
            f"{name:{width}} {decoder.packed.memory.nbytes / 1e6:8,.1f} {loss:8.4f} {perplexity:11.3f} {rest}".rstrip()
        )

    line(f"{name} {base.dtype}", base, base_nll)
    for name, other, result in zip(names, others, results, strict=True):
        kl = result["kl"]
        rest = f"{kl.mean():9.6f} {np.quantile(kl, 0.99):9.6f}"
        line(name, other, result["nll"], f"{rest} {result['same'].double().mean():11.2%}")


def load_other(name, base, model, fast_prompts):
    """A form of the base model (float32, bfloat16, ...), or what another folder holds."""
    source, dtype = (model, name) if name in packed.DTYPES else (name, None)
    other = Decoder(source, dtype, fast_prompts=fast_prompts)
    for what, its, wanted in (
        ("vocab_size", other.config.vocab_size, base.config.vocab_size),
        ("tokenizer", other.tokenizer or base.tokenizer, base.tokenizer or other.tokenizer),
    ):
        expect(its == wanted, f"--against {name}: {what} is {its!r}, expected {wanted!r} as {model} has")
    return other


def measure(config):
    """gpt.py's eval in little memory, for shards, and with a folder's own tokenizer, too."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"fastgpt eval: {message}", file=sys.stderr)
        model = gpt.GPT.from_pretrained(config.model, ops).eval()
    tokenizer = tokenizers.of_model(model, config.model, config.tokenizer)
    _, tokens = data.load_tokens(config.data, tokenizer, block_size=1)
    loss, n = gpt.evaluate(model, tokens, config.batch_size), len(tokens) - 1
    bits = loss * n / math.log(2) / count_bytes(tokens, tokenizer)
    print(f"{n:,} tokens: loss {loss:.4f} nats, perplexity {np.exp(loss):.2f}, {bits:.4f} bits per byte")


def count_bytes(tokens, tokenizer, piece=1 << 18):
    """How many bytes all tokens but the first spell."""
    spans = ((start, min(start + piece, len(tokens))) for start in range(1, len(tokens), piece))
    return sum(len(tokenizer.decode_bytes(tokens[np.arange(*span)].tolist())) for span in spans)


def make_parser():
    parser = argparse.ArgumentParser(prog="fastgpt eval", description=f"{gpt.EvalConfig.__doc__}.".capitalize())
    parser.add_argument("folder", nargs="?", help="the same as --model FOLDER")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="DTYPE|FOLDER",
        help=f"KL divergence, same most likely tokens and perplexity of the model in {', '.join(packed.DTYPES)}, or "
        "of other folders' models, against this one",
    )
    parser.add_argument("--fast-prompts", action="store_true", help=f"of what is compared: {FAST_PROMPTS}")
    gpt.add_options(parser, gpt.EvalConfig)
    return parser


def main(argv=None):
    typed = vars(make_parser().parse_args(argv))
    folder, against, fast_prompts = (typed.pop(name) for name in ("folder", "against", "fast_prompts"))
    if folder is not None:
        expect("model" not in typed, f"FOLDER is {folder!r} and --model {typed.get('model')!r}, expected one of them")
        typed["model"] = folder
    config = gpt.EvalConfig(**typed)
    if against is None:
        return measure(config)
    base = Decoder(config.model)
    tokenizer = tokenizers.of_model(base, config.model, config.tokenizer)
    others = [load_other(name, base, config.model, fast_prompts) for name in against]
    _, tokens = data.load_tokens(config.data, tokenizer, block_size=1)
    T = min(decoder.config.block_size for decoder in (base, *others))
    report(config.model, base, against, others, tokens, T)
