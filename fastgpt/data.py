"""Texts of any size to tokens, in little memory: what gpt.py's load_tokens gives, read piece by piece."""

import codecs
import io
import os
import re
from contextlib import contextmanager

import numpy as np

import gpt


def load_tokens(path, tokenizer, block_size):
    """Tokens to train on and, from the last tenth of the text, tokens to validate on: two rows of uint16.

    path: a UTF-8 file, or None for Python's own help texts. ValueError if it can't be read as that, or if one of the
    rows is no longer than block_size. At most 3 bytes of memory a byte of text.
    """
    with open_text(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size * 9 // 10)
        after = file.read(3)
        cut = size * 9 // 10 + len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))  # not within a character
        tokens = np.empty(size, np.uint16)  # no token is shorter than a byte
        train = encode(file, 0, cut, tokenizer, tokens)
        val = encode(file, cut, size, tokenizer, tokens[len(train) :])
    few = min(len(train), len(val))
    gpt.expect(few > block_size, f"--data gives a part of {few} tokens, expected more than {block_size} in each")
    return train, val


@contextmanager
def open_text(path):
    """The bytes of a text file, or of gpt.load_text() without one."""
    with gpt.reported_as(f"--data is {path!r}, expected a readable text file in UTF-8"):
        file = io.BytesIO(gpt.load_text().encode()) if path is None else open(path, "rb")  # noqa: SIM115
    with gpt.reported_as(f"--data is {path!r}, expected a readable text file in UTF-8"), file:
        yield file


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
        else:  # no merge goes from a word on to a space
            cut = found.end() if (found := re.match(r"(?s).*\S(?=[ \n])", text)) else 0
        if tokenizer.name == "bytes":
            ids = np.frombuffer(text[:cut].encode().replace(b"<|endoftext|>", b"\xff"), np.uint8).astype(np.uint16)
            ids[ids == 255] = 256  # no byte of UTF-8 is 255
        else:
            ids = tokenizer.encode(text[:cut], allowed_special="all")
        out[n : n + len(ids)] = ids
        n, text = n + len(ids), text[cut:]
    return out[:n]
