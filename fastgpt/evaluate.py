"""`fastgpt eval`: gpt.py's eval on the kernels, in little memory, for shards and with a model's own tokenizer, too."""

import argparse
import math
import sys
import warnings

import numpy as np

import gpt

from . import data, ops
from . import tokenizer as tokenizers


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt eval", description="Loss, perplexity and bits per byte of a text.")
    gpt.add_options(parser, gpt.EvalConfig)
    config = gpt.EvalConfig(**vars(parser.parse_args(argv)))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"{parser.prog}: {message}", file=sys.stderr)
        model = gpt.GPT.from_pretrained(config.model, ops).eval()
    tokenizer = tokenizers.of_model(config.tokenizer, config.model, model.tokenizer)
    gpt.tokenizer_of(model, None, lambda _: tokenizer)  # has no more ids than the model
    _, tokens = data.load_tokens(config.data, tokenizer, block_size=1)
    try:
        loss, n = gpt.evaluate(model, tokens, config.batch_size), len(tokens) - 1
    except RuntimeError as error:
        if "allocate" not in str(error):  # torch's word for too little memory
            raise
        raise MemoryError(gpt.one_line(error)) from error
    bits = loss * n / math.log(2) / count_bytes(tokens, tokenizer)
    print(f"{n:,} tokens: loss {loss:.4f} nats, perplexity {np.exp(loss):.2f}, {bits:.4f} bits per byte")


def count_bytes(tokens, tokenizer, piece=1 << 18):
    """How many bytes all tokens but the first spell."""
    spans = ((start, min(start + piece, len(tokens))) for start in range(1, len(tokens), piece))
    return sum(len(tokenizer.decode_bytes(tokens[np.arange(*span)].tolist())) for span in spans)
