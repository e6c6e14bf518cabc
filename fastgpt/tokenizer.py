"""Tokenizers by name, bytes or gpt2, and those that a folder brings along: its vocab.json and merges.txt.

These two files are how GPT-2 was released and how Hugging Face keeps a byte-level BPE: each token's id, and which two
tokens are merged, the first pair first. Bytes stand there as printable characters. transformers 5 writes both into
tokenizer.json alone; there, or in added_tokens.json, are the tokens that were added to a vocabulary later.
"""

import hashlib
import json
import os
import shutil

import tiktoken

import gpt

FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json")
NEEDED = "vocab.json and merges.txt, or tokenizer.json"
OWN = FILES[0]  # the name in a checkpoint and in meta.json for the tokenizer whose files lie beside it
EOT = "<|endoftext|>"
GPT2 = "c2adac633cbc8dba723d5ef3ee4a851b8a1a3e0581e3d65f3d86a3b81354fc17"  # its fingerprint
# As in the code released with GPT-2 (encoder.py): contractions, words, numbers, the rest; blanks, but not the last.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def get(name):
    """A tiktoken.Encoding: gpt.py's bytes or gpt2, or that of a folder with vocab.json and merges.txt."""
    if name in ("bytes", "gpt2"):
        return gpt.get_tokenizer(name)
    good = isinstance(name, str) and has_files(name)
    gpt.expect(good, f"tokenizer is {name!r}, expected 'gpt2', 'bytes' or a folder with {NEEDED}")
    return from_files(name)


def of_model(model, folder, typed=None):
    """A model's tokenizer: what is typed, else what its config says, else its folder's own files, else GPT-2's."""
    own, said = has_files(folder), model.tokenizer
    lacks = f"{folder} lacks {NEEDED}, which its config names as its tokenizer"
    gpt.expect(own or typed or said != OWN, lacks)
    name = typed or (said if said != OWN else None) or (folder if own else "gpt2")
    return gpt.tokenizer_of(model, name, get)


def has_files(folder):
    vocabulary, merges, _, both = (os.path.isfile(os.path.join(folder, name)) for name in FILES)
    return vocabulary and merges or both


def copy_files(folder, into):
    for name in filter(lambda name: os.path.isfile(os.path.join(folder, name)), FILES):
        source = os.path.join(folder, name)
        gpt.write_whole(os.path.join(into, name), lambda path, source=source: shutil.copyfile(source, path))


def fingerprint(tokenizer):
    """The same for tokenizers that give the same ids, whatever their names."""
    kind = b"bytes " if tokenizer.name == "bytes" else b""  # other words
    return fingerprint_of(tokenizer._mergeable_ranks, tokenizer._special_tokens, kind)


def fingerprint_of(ids, special, kind=b""):
    tokens = (b"%d %d %b" % (id, len(token), token) for token, id in sorted(ids.items()))
    return hashlib.sha256(kind + repr(sorted(special.items())).encode() + b"".join(tokens)).hexdigest()


def byte_characters():
    """Which character stands for which byte (GPT-2's encoder.py): itself if it can be printed, else one from 256 on."""
    shown = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(others)}


def read_files(folder):
    """-> a folder's vocabulary {token: id}, its merges as pairs, and what was added to it {text: id}"""

    def read_json(name, absent):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            return absent
        with open(path, encoding="utf-8") as file:
            return json.load(file)

    whole = read_json("tokenizer.json", None)
    added = read_json("added_tokens.json", {})
    if whole is not None:
        added |= {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
    if all(os.path.isfile(os.path.join(folder, name)) for name in FILES[:2]):
        with open(os.path.join(folder, "merges.txt"), encoding="utf-8") as file:
            rows = [row.split() for row in file.read().split("\n") if row and not row.startswith("#version")]
        return read_json("vocab.json", None), rows, added
    model, before = whole["model"], whole.get("pre_tokenizer") or {}
    about = model["type"], whole.get("normalizer"), before.get("type"), before.get("add_prefix_space")
    expected = "BPE", None, "ByteLevel", False
    gpt.expect(
        about == expected, f"model, normalizer, pre_tokenizer, add_prefix_space are {about}, expected {expected}"
    )
    gpt.expect(before.get("use_regex", True), "pre_tokenizer has no regular expression, expected GPT-2's")
    return model["vocab"], [row.split() if isinstance(row, str) else row for row in model["merges"]], added


def from_files(folder):
    """The Encoding of a folder's files. What is neither a byte nor a merge, or was added, is a special token.

    ValueError if tiktoken, which merges by id, would not follow the merges.
    """
    found = [path for name in FILES if os.path.isfile(path := os.path.join(folder, name))]
    with gpt.reported_as(f"{' and '.join(found)} are no byte-level BPE as GPT-2's"):
        vocabulary, rows, added = read_files(folder)
        good = isinstance(vocabulary, dict) and all(isinstance(id, int) and id >= 0 for id in vocabulary.values())
        gpt.expect(good, "vocab.json is not an object of ids")
        for token, id in added.items():
            good = type(id) is int and id >= 0 and vocabulary.setdefault(token, id) == id
            gpt.expect(good, f"the added token {token!r} has id {id!r}, but {vocabulary.get(token)} in vocab.json")
        gpt.expect(
            len(set(vocabulary.values())) == len(vocabulary), "two tokens in vocab.json, or added, have the same id"
        )
        gpt.expect(EOT in vocabulary, f"vocab.json lacks {EOT}")
        to_byte = byte_characters()
        missing = [c for c in to_byte if c not in vocabulary]
        gpt.expect(not missing, f"vocab.json lacks {len(missing)} of the 256 bytes")
        ids, merges = {bytes([b]): vocabulary[c] for c, b in to_byte.items()}, {}
        for n, row in enumerate(rows):
            good = len(row) == 2 and all(token in vocabulary for token in (*row, "".join(row)))
            gpt.expect(good, f"merge {n + 1}, {' '.join(row)!r}, is not two tokens and a third of vocab.json")
            a, b = (bytes(to_byte[c] for c in token) for token in row)
            gpt.expect(a + b not in ids, f"merge {n + 1}, {' '.join(row)!r}, makes a token that is there already")
            ids[a + b], merges[a + b] = vocabulary["".join(row)], (a, b)
        order = [ids[token] for token in merges]
        gpt.expect(order == sorted(order), "the ids in vocab.json do not rise as the merges in merges.txt do")
        ordinary = set(ids.values())
        special = {token: id for token, id in vocabulary.items() if id not in ordinary}
        if fingerprint_of(ids, special) != GPT2:  # which is known to be good
            check_merges(ids, merges)
    return tiktoken.Encoding(folder, pat_str=PATTERN, mergeable_ranks=ids, special_tokens=special)


def check_merges(ids, merges):
    """tiktoken merges any two neighbours that make a token; merges.txt names one pair for each.

    Both give the same if, for each token that could be made of another pair, the merges before its own lead to the pair
    that is named: if others were neighbours, the merges within the token would have been just those.
    """
    for token, pair in merges.items():
        others = any(token[:i] in ids and token[i:] in ids for i in range(1, len(token)) if i != len(pair[0]))
        if others and merged(token, ids, merges) != list(pair):
            raise ValueError(f"the merges do not lead to {token!r} by the pair {pair} that merges.txt names")


def merged(token, ids, merges):
    """The parts of a token after all merges with smaller ids than its own, the smallest first."""
    parts = [bytes([b]) for b in token]
    while True:
        pairs = [(ids[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in merges]
        id, i = min(pairs, default=(ids[token], 0))
        if id >= ids[token]:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
