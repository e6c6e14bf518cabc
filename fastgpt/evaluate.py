"""`fastgpt eval`: a text's loss, or multiple choice; with --against, other forms of the model or others, beside it.

A KL divergence tells small differences that a loss, which moves up and down with the text, does not.
"""

import argparse
import math
import sys
import warnings
from dataclasses import dataclass

import numpy as np

import gpt

from . import choices, data, ops, packed
from . import tokenizer as tokenizers
from .decoder import FAST_PROMPTS, Decoder
from .likelihood import compare, mean_loss
from .packed import expect


@dataclass
class EvalConfig(gpt.EvalConfig):
    """loss, perplexity and bits per byte of a text's last tenth; or multiple choice"""

    stride: int | None = gpt.option(
        None, "tokens from the start of a window to that of the next, without one: block_size", "stride >= 1"
    )
    choices: str | None = gpt.option(None, "HellaSwag's JSONL: which ending does the model find most probable?")
    limit: int | None = gpt.option(None, "of --choices, the first N items", "limit >= 1")


def described(n, T, stride):
    overlapping = f", stride {stride}, each after {T - stride + 1} to {T} others" if stride < T else ""
    return f"{n:,} tokens in windows of {T}{overlapping}"


def measure(model, tokens, tokenizer, stride, batch_size):
    """gpt.py's eval in little memory, for shards, strides, and with a folder's own tokenizer, too."""
    loss, n = mean_loss(model, tokens, stride, batch_size), len(tokens) - 1
    bits = loss * n / math.log(2) / count_bytes(tokens, tokenizer)
    what = described(n, model.config.block_size, stride)
    print(f"{what}: loss {loss:.4f} nats, perplexity {np.exp(loss):.2f}, {bits:.4f} bits per byte")


def count_bytes(tokens, tokenizer, piece=1 << 18):
    """How many bytes all tokens but the first spell."""
    spans = ((start, min(start + piece, len(tokens))) for start in range(1, len(tokens), piece))
    return sum(len(tokenizer.decode_bytes(tokens[np.arange(*span)].tolist())) for span in spans)


def report(names, models, tokens, T, stride):
    """Print a table, a line for each."""
    base_nll, results = compare(models[0], models[1:], tokens, T, stride)
    print(f"{described(len(base_nll), T, stride)}; KL divergence from {names[0]}, nats a token")
    width = max(map(len, names)) + 1
    print(f"{'':{width}}       MB     loss  perplexity   KL mean   KL 99 %  same top-1")
    for name, model, result in zip(names, models, [dict(nll=base_nll), *results], strict=True):
        loss = float(result["nll"].mean())
        perplexity = math.exp(loss) if loss < 700 else math.inf
        line = f"{name:{width}} {model.packed.memory.nbytes / 1e6:8,.1f} {loss:8.4f} {perplexity:11.3f}"
        if "kl" in result:
            kl = result["kl"]
            line += f" {kl.mean():9.6f} {np.quantile(kl, 0.99):9.6f} {result['same'].double().mean():11.2%}"
        print(line)


def load(model, against, fast_prompts):
    """-> names and models: one on the kernels; or, with others, all of them as decoders"""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"fastgpt eval: {message}", file=sys.stderr)
        if not against:
            return [model], [gpt.GPT.from_pretrained(model, ops).eval()]
        base = Decoder(model)
        return [f"{model} {base.dtype}", *against], [base, *(load_other(x, base, model, fast_prompts) for x in against)]


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


def make_parser():
    parser = argparse.ArgumentParser(prog="fastgpt eval", description=f"{EvalConfig.__doc__}.".capitalize())
    parser.add_argument("folder", nargs="?", help="the same as --model FOLDER")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="DTYPE|FOLDER",
        help=f"beside this model, itself in {', '.join(packed.DTYPES)}, or other folders' models: KL divergence, same "
        "most likely tokens and perplexity; with --choices, the items that one gets right and the other does not",
    )
    parser.add_argument("--fast-prompts", action="store_true", help=f"of what is compared: {FAST_PROMPTS}")
    parser.add_argument("--all", action="store_true", help="of the text, all of it instead of the last tenth")
    gpt.add_options(parser, EvalConfig)
    return parser


def check_options(typed, whole):
    """What is typed goes together."""
    others = [name for name in ("data", "stride") if name in typed] + ["all"] * whole
    alone = "choices" not in typed or not others
    expect(alone, f"--choices and --{others and others[0]}: expected one of them, items have no text")
    expect("choices" in typed or "limit" not in typed, f"--limit is {typed.get('limit')}, expected --choices with it")


def main(argv=None):
    typed = vars(make_parser().parse_args(argv))
    folder, against, fast_prompts, whole = (typed.pop(name) for name in ("folder", "against", "fast_prompts", "all"))
    if folder is not None:
        expect("model" not in typed, f"FOLDER is {folder!r} and --model {typed.get('model')!r}, expected one of them")
        typed["model"] = folder
    config = EvalConfig(**typed)
    check_options(typed, whole)
    expect(against or not fast_prompts, "--fast-prompts is for what is compared, expected --against with it")
    items = choices.read(config.choices, config.limit) if config.choices is not None else None
    names, models = load(config.model, against, fast_prompts)
    tokenizer = tokenizers.of_model(models[0], config.model, config.tokenizer)
    T = min(model.config.block_size for model in models)
    if items:
        return choices.report(names, models, items, tokenizer, T, config.batch_size)
    stride = config.stride or T
    expect(stride <= T, f"--stride is {stride}, expected 1 <= stride <= {T}, the model's block_size")
    tokens = data.load_all(config.data, tokenizer) if whole else data.load_tokens(config.data, tokenizer, 1)[1]
    if against:
        return report(names, models, tokens, T, stride)
    return measure(models[0], tokens, tokenizer, stride, config.batch_size)
