"""`fastgpt prepare`: texts of any size to shards of tokens (data.py says their format), in constant memory.

Each document is <|endoftext|> and its tokens. A text file is one document, unless <|endoftext|> stands in it; a line of
.jsonl is one. The tokens of all documents are one row, cut every --shard-size; of each cut the first --val goes to
val_N.bin, the rest to train_N.bin. After each cut progress.json says from where to go on; meta.json is written last.
"""

import argparse
import gzip
import json
import os
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import gpt

from . import _kernels, data
from . import tokenizer as tokenizers
from .train import claimed

CHUNK = 1 << 17  # bytes that are read at a time


class Piece(NamedTuple):
    """Text to be encoded at once, and where it stands: in which file, after how many bytes of it with which CRC-32."""

    file: int
    offset: int
    crc: int
    text: str
    begins: bool  # a document
    special: bool  # <|endoftext|> in it is one


class End(NamedTuple):
    """Of a file, with its length and CRC-32."""

    file: int
    offset: int
    crc: int


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt prepare", description="Make shards of tokens of texts of any size.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="text, .jsonl with a field `text`, either .gz, or -")
    parser.add_argument("--tokenizer", required=True, help="gpt2, bytes or a folder with vocab.json and merges.txt")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    size, val = 1 << 25, 0.01
    parser.add_argument("--shard-size", type=int, default=size, metavar="N", help=f"tokens a shard (default: {size})")
    parser.add_argument("--val", type=float, default=val, metavar="X", help=f"share for validation (default: {val})")
    parser.add_argument("--jsonl", action="store_true", help="all files are .jsonl, whatever their names")
    args = parser.parse_args(argv)
    gpt.expect(1 <= args.shard_size < 2**31, f"--shard-size is {args.shard_size}, expected 1 or more, less than 2**31")
    gpt.expect(0 <= args.val < 1, f"--val is {args.val}, expected 0 <= val < 1")
    check_inputs(args.files)
    tokenizer = tokenizers.get(args.tokenizer)
    own = args.tokenizer not in ("bytes", "gpt2")
    settings = dict(
        tokenizer=tokenizers.OWN if own else args.tokenizer,
        fingerprint=tokenizers.fingerprint(tokenizer),
        vocab_size=tokenizer.n_vocab,
        eot=tokenizer.eot_token,
        shard_size=args.shard_size,
        val=args.val,
        jsonl=args.jsonl,
        files=[os.path.basename(path) for path in args.files],
    )
    with claimed(args.out):
        state = start(args.out, args.files, settings)
        if state is None:
            print(f"nothing to do: {args.out} is whole")
            return
        try:
            save(os.path.join(args.out, "progress.json"), state)
            if own:
                tokenizers.copy_files(args.tokenizer, args.out)
            write_shards(args.out, args.files, tokenizer, state)
        finally:
            remove_halves(args.out)


def check_inputs(paths):
    for path in paths:
        if path != "-":
            gpt.expect(os.path.exists(path), f"{path} does not exist")
            gpt.expect(not os.path.isdir(path), f"{path} is a folder, expected a file")
            gpt.expect(os.access(path, os.R_OK), f"{path} can't be read")
            gpt.expect(not os.path.isfile(path) or os.path.getsize(path), f"{path} is empty")
    gpt.expect(paths.count("-") < 2, "- stands for standard input and was given twice")


# --------------------------------------------------------------------------------------------------- where it is


def start(out, paths, settings):
    """What is done in this folder, as progress.json says; None if that is all."""
    done, going = (os.path.join(out, name) for name in ("meta.json", "progress.json"))
    for name in (done, going):
        if not os.path.exists(name):
            continue
        with gpt.reported_as(f"{name} is damaged; take another --out"), open(name, encoding="utf-8") as file:
            state = json.load(file)
            same = {key: state[key] for key in settings} == settings
            others = [f"{key} {state[key]!r}, not {x!r}" for key, x in settings.items() if state[key] != x]
            files, shards, at = state["inputs"], state["shards"], name == going and state["at"]
        if name == going and not shards:
            break
        gpt.expect(same, f"--out is {out!r}, which was begun with {', '.join(others)}: take another")
        for path, known in zip(paths, files, strict=False):
            size = os.path.getsize(path) if is_plain(path) else known["bytes"]
            told = f"{path} has {size:,} bytes, but had {known['bytes']:,} before"
            gpt.expect(size == known["bytes"], told)
        for shard in shards:
            path = os.path.join(out, shard["name"])
            gpt.expect(os.path.exists(path), f"--out is {out!r}, which lacks {shard['name']}: take another")
            n = len(data.Shard(path, "--out"))
            gpt.expect(n == shard["tokens"], f"{path} holds {n:,} tokens, expected {shard['tokens']:,}")
        if name == done:
            with suppress(FileNotFoundError):
                os.remove(going)
            return None
        if shards:
            print(f"going on after {len(shards)} shards, byte {at['bytes']:,} of {paths[len(files)]}")
        return state
    there = sorted(os.listdir(out))
    free = not there or os.path.exists(going)
    gpt.expect(free, f"--out is {out!r}, which holds {there[:1] and there[0]}: take an empty folder")
    for name in there:
        if name.endswith(".bin"):  # of a first cut that was not over
            os.remove(os.path.join(out, name))
    at = dict(bytes=0, crc32="00000000", skip=0)
    return settings | dict(documents=0, tokens=0, inputs=[], shards=[], at=at)


def save(path, state):
    gpt.write_whole(path, lambda name: Path(name).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8"))


def remove_halves(out):
    """What a stopped run leaves half written, and, before the first shard, all of it."""
    for name in os.listdir(out):
        if name.endswith((".bin.tmp", ".json.tmp", ".txt.tmp")):
            os.remove(os.path.join(out, name))
    if {"progress.json"} <= set(os.listdir(out)) <= {"progress.json", *tokenizers.FILES}:  # nothing is lost with them
        for name in os.listdir(out):
            os.remove(os.path.join(out, name))


# ------------------------------------------------------------------------------------------------------- reading


def is_plain(path):
    return os.path.isfile(path) and not path.endswith(".gz")


def open_input(path):
    if path == "-":
        return sys.stdin.buffer
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def read_pieces(paths, jsonl, done, at):
    """Pieces and Ends of all files, from `at` on. What comes before it must be what it was."""
    for i, path in enumerate(paths):
        known = [*done, at][i] if i <= len(done) else dict(bytes=0, crc32="00000000")
        begin = known["bytes"], int(known["crc32"], 16)
        with gpt.reported_as(f"{path} can't be read"), open_input(path) as stream:
            skip(stream, *begin)
            if i >= len(done):
                lines = jsonl or path.removesuffix(".gz").endswith(".jsonl")
                yield from (read_documents if lines else read_text)(stream, i, *begin)


def skip(stream, size, crc):
    found, left = 0, size
    while left and (read := stream.read(min(CHUNK, left))):
        found, left = zlib.crc32(read, found), left - len(read)
    gpt.expect((left, found) == (0, crc), f"its first {size:,} bytes are others than before")


def read_text(stream, file, offset, crc):
    for text in data.pieces(data.decoded(partial(stream.read, CHUNK), offset)):
        yield Piece(file, offset, crc, text, offset == 0, True)
        raw = text.encode()
        offset, crc = offset + len(raw), zlib.crc32(raw, crc)
    gpt.expect(offset, "it is empty")
    yield End(file, offset, crc)


def read_documents(stream, file, offset, crc):
    for line in stream:
        if line.strip():
            try:
                document = json.loads(line)
                text = document.get("text") if isinstance(document, dict) else None
                gpt.expect(isinstance(text, str), "expected an object with a string `text`")
                text.encode()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the line at byte {offset:,}: {error}") from error
            yield Piece(file, offset, crc, text, True, False)
        offset, crc = offset + len(line), zlib.crc32(line, crc)
    gpt.expect(offset, "it is empty")
    yield End(file, offset, crc)


# ------------------------------------------------------------------------------------------------------- writing


def encode(tokenizer, item):
    """-> the item and its tokens"""
    if isinstance(item, End):
        return item, []
    ids = [np.array([tokenizer.eot_token] * item.begins, data.token_type(tokenizer.n_vocab))]
    return item, np.concatenate(ids + [data.to_tokens(t, tokenizer, item.special) for t in data.pieces([item.text])])


def ahead(function, items):
    """map(function, items) on all threads, a few items at a time."""
    workers, waiting = _kernels.num_threads(), deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_shards(out, paths, tokenizer, state):
    buffer, n, skipped = np.empty(state["shard_size"], data.token_type(tokenizer.n_vocab)), 0, state["at"]["skip"]
    before, started = state["tokens"], time.perf_counter()
    total = sum(map(os.path.getsize, paths)) if all(map(is_plain, paths)) else 0
    read = sum(known["bytes"] for known in state["inputs"])
    try:
        for item, ids in ahead(
            partial(encode, tokenizer), read_pieces(paths, state["jsonl"], state["inputs"][:], state["at"])
        ):
            if isinstance(item, End):
                state["inputs"].append(dict(name=state["files"][item.file], bytes=item.offset, crc32=f"{item.crc:08x}"))
                read += item.offset
                continue
            used, skipped = skipped, 0
            while used < len(ids):
                take = min(len(ids) - used, len(buffer) - n)
                buffer[n : n + take] = ids[used : used + take]
                n, used = n + take, used + take
                if n == len(buffer):
                    write_cut(out, buffer, state)
                    state["at"] = dict(bytes=item.offset, crc32=f"{item.crc:08x}", skip=used)
                    save(os.path.join(out, "progress.json"), state)
                    n = 0
            tokens = state["tokens"] + n
            speed = (tokens - before) / (time.perf_counter() - started)
            share = f"{(read + item.offset) / 1e6:,.0f}{f' of {total / 1e6:,.0f}' if total else ''} MB"
            gpt.progress(f"{share}, {tokens:,} tokens, {speed:,.0f} tokens/s, {len(state['shards'])} shards")
        gpt.expect(state["tokens"] + n, f"no document in {', '.join(paths)}")
        if n:
            write_cut(out, buffer[:n], state)
        del state["at"]
        save(os.path.join(out, "meta.json"), state)
        os.remove(os.path.join(out, "progress.json"))
    except (KeyboardInterrupt, OSError, ValueError) as error:
        gpt.progress("")
        done = len(state["shards"])
        rest = f"the same command goes on after {done} whole shards in {out}" if done else "no shard was finished"
        if not isinstance(error, KeyboardInterrupt):
            raise ValueError(f"{gpt.one_line(error)}; {rest}") from error
        print(f"stopped: {rest}", flush=True)
        raise
    finally:
        gpt.progress("")
    val = sum(shard["tokens"] for shard in state["shards"] if shard["name"].startswith("val"))
    print(f"{out}: {state['documents']:,} documents, {state['tokens']:,} tokens, {val:,} of them to validate")


def write_cut(out, tokens, state):
    """Two shards: of these tokens the first share to validate, the rest to train."""
    n, number = int(len(tokens) * state["val"]), state["tokens"] // state["shard_size"]
    written = []
    for kind, part in (("val", tokens[:n]), ("train", tokens[n:])):
        if len(part):
            name = f"{kind}_{number:06d}.bin"
            gpt.write_whole(os.path.join(out, name), partial(write_shard, part))
            written.append(dict(name=name, tokens=len(part), crc32=f"{zlib.crc32(part):08x}"))
    state["shards"] += written
    state["tokens"] += len(tokens)
    state["documents"] += int((tokens == state["eot"]).sum())


def write_shard(tokens, path):
    """In llm.c's format."""
    with open(path, "wb") as file:
        file.write(data.header(len(tokens), tokens.dtype))
        file.write(tokens.data)
