"""Texts and shards of any size as rows of tokens, in little memory.

A text becomes tokens piece by piece: what gpt.py's load_tokens gives. A shard holds tokens already, in llm.c's format
(dev/data/data_common.py there): 256 int32, of which the first three are magic, version and number of tokens, then the
tokens. nanoGPT's train.bin and val.bin have no header. Shards stay in their files, which are mapped into memory.
"""

import codecs
import hashlib
import io
import json
import mmap
import os
import re
import zlib
from contextlib import contextmanager

import numpy as np

import gpt

from . import tokenizer as tokenizers

HEADER = 1024  # bytes
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, type of a token
PIECE = 1 << 17  # characters that are encoded at a time
LONGEST = 1 << 18  # without a place to cut; the tokenizer's regular expression refuses runs of a million blanks


def load_tokens(path, tokenizer, block_size):
    """Tokens to train on and tokens to validate on: two rows, arrays or Tokens.

    path: a UTF-8 file, a shard, a folder of shards, or None for Python's own help texts. Without shards of its own, the
    last tenth is there to validate. ValueError if it can't be read as that, if the tokens are not this tokenizer's, or
    if one of the rows is no longer than block_size. A text takes at most 3 bytes of memory a byte.
    """
    train, val = (load_shards if holds_shards(path) else load_text)(path, tokenizer)
    few = min(len(train), len(val))
    gpt.expect(few > block_size, f"--data gives a part of {few} tokens, expected more than {block_size} in each")
    return train, val


def load_all(path, tokenizer):
    """The same text or shards as one row, none kept apart."""
    if holds_shards(path):
        row = Tokens([shard for part in load_shards(path, tokenizer) for shard in part.shards])
    else:
        with open_text(path) as file:
            size = file.seek(0, os.SEEK_END)
            row = encode(file, 0, size, tokenizer, np.empty(size, token_type(tokenizer.n_vocab)))
    gpt.expect(len(row) > 1, f"--data gives {len(row)} tokens, expected 2 or more")
    return row


def describe(train, val):
    """A line on the rows, which differs if they do."""
    crc = 0
    for row in (train, val):
        crc = zlib.crc32(row.checksums() if isinstance(row, Tokens) else row, crc)
    return f"{len(train) + len(val):,} tokens with CRC-32 {crc:08x}"


# ------------------------------------------------------------------------------------------------------- texts


def load_text(path, tokenizer):
    with open_text(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size * 9 // 10)
        after = file.read(3)
        cut = size * 9 // 10 + len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))  # not within a character
        tokens = np.empty(size, token_type(tokenizer.n_vocab))  # no token is shorter than a byte
        train = encode(file, 0, cut, tokenizer, tokens)
        val = encode(file, cut, size, tokenizer, tokens[len(train) :])
    return train, val


@contextmanager
def open_text(path):
    """The bytes of a text file, or of gpt.load_text() without one."""
    with gpt.reported_as(f"--data is {path!r}, expected a readable text file in UTF-8"):
        file = io.BytesIO(gpt.load_text().encode()) if path is None else open(path, "rb")
    with gpt.reported_as(f"--data is {path!r}, expected a readable text file in UTF-8"), file:
        yield file


def token_type(n_vocab):
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def encode(file, start, end, tokenizer, out):
    """Tokens of the bytes from start to end of a file, read piece by piece, written to `out`. -> the part in use"""
    n, left = 0, end - start
    file.seek(start)

    def read():
        nonlocal left
        data = file.read(min(PIECE, left))
        left -= len(data) if data else left
        return data

    for text in pieces(decoded(read)):
        ids = to_tokens(text, tokenizer)
        out[n : n + len(ids)] = ids
        n += len(ids)
    return out[:n]


def decoded(read, done=0):
    """Text from bytes: read() -> bytes, none at the end; `done` were read before. ValueError where it is no UTF-8."""
    decoder, more = codecs.getincrementaldecoder("utf-8")(), True
    while more:
        data = read()
        more, waiting = bool(data), len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not more)
        except UnicodeDecodeError as error:
            at = done - waiting + error.start
            raise ValueError(f"byte {at:,} is no UTF-8: {error.reason}") from error
        done += len(data)
        if text:
            yield text


# Where a text may be cut, so that the tokens of the parts are those of the whole: no merge goes from a word on to the
# space that begins the next, nor from letters to digits. The last such place is wanted.
CUT = re.compile(r"(?s).*(?:\S(?=[ \n])|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z]))")


def pieces(texts, size=PIECE, longest=LONGEST):
    """Cut a text that comes in parts of any length into pieces of about `size` characters, to be encoded one by one.

    Where a piece ends follows from the text after its start alone. What has no place to cut in `longest` characters
    (a word of that length, or a run of blanks) is cut there.
    """
    text, texts = "", iter(texts)
    while True:
        n, cut = size, 0
        while not cut:
            while len(text) <= n and (part := next(texts, "")):
                text += part
            if len(text) <= n:
                cut = len(text)
                break
            if found := CUT.match(text, 0, n + 1):
                cut = found.end()
            elif n >= longest:
                cut = n if "<" not in text[n - 12 : n] else text.rindex("<", 0, n)  # not within <|endoftext|>
            n = min(2 * n, longest)
        if not cut:
            return
        yield text[:cut]
        text = text[cut:]


def to_tokens(text, tokenizer, special=True):
    """An array of the text's tokens. special: <|endoftext|> in it is the token of that name, else it is only text."""
    if tokenizer.name == "bytes":
        data = text.encode()
        ids = np.frombuffer(data.replace(b"<|endoftext|>", b"\xff") if special else data, np.uint8).astype("<u2")
        ids[ids == 255] = tokenizer.eot_token  # no byte of UTF-8 is 255
        return ids
    allowed = {"<|endoftext|>"} if special else set()
    ids = tokenizer.encode(text, allowed_special=allowed, disallowed_special=())
    return np.array(ids, token_type(tokenizer.n_vocab))


# ------------------------------------------------------------------------------------------------------ shards


class Tokens:
    """Shards end to end as one row, to be indexed by arrays of places. Their files are mapped, not read as a whole."""

    def __init__(self, shards):
        self.shards = [shard for shard in shards if len(shard)]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.dtype = self.shards[0].tokens.dtype if self.shards else np.dtype("<u2")

    def __len__(self):
        return int(self.ends[-1]) if self.shards else 0

    def __getitem__(self, at):
        """The tokens at an array of places, each from 0 to len() - 1; or Tokens, for a slice."""
        if isinstance(at, slice):
            start, end, _ = at.indices(len(self))
            firsts = self.ends - [len(shard) for shard in self.shards]
            return Tokens([s.part(start - first, end - first) for s, first in zip(self.shards, firsts, strict=True)])
        places = np.asarray(at).reshape(-1)
        out, which = np.empty(len(places), self.dtype), np.searchsorted(self.ends, places, side="right")
        for start in range(0, len(places), 1024):  # few, since the system maps up to 2 MB around each
            some = slice(start, start + 1024)
            for i in np.unique(which[some]):
                shard, here = self.shards[i], start + np.flatnonzero(which[some] == i)
                out[here] = shard.tokens[places[here] - (self.ends[i] - len(shard))]
                shard.release()
        return out.reshape(np.shape(at))

    def checksums(self):
        return b"".join(b"%08x %d " % (shard.crc32, len(shard)) for shard in self.shards)


class Shard:
    """One file of tokens, or a part of it: .tokens is an array that the file is mapped to."""

    def __init__(self, path, expected="--data"):
        self.path, self.crc32, size = path, 0, os.path.getsize(path)
        gpt.expect(size, f"{expected}: {path} is empty, expected a shard")
        with open(path, "rb") as file:
            first = np.frombuffer(file.read(HEADER)[: size // 4 * 4], "<i4")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.headerless = os.path.basename(path) in ("train.bin", "val.bin") and not looks_like_header(first)
        if self.headerless:
            gpt.expect(size % 2 == 0, f"{expected}: {path} has {size:,} bytes, expected uint16 tokens without a header")
            self.tokens = np.frombuffer(self.map, "<u2")
            return
        gpt.expect(len(first) == 256, f"{expected}: {path} has {size:,} bytes, expected a shard's header of {HEADER}")
        magic, version, n = map(int, first[:3])
        known = " or ".join(map(str, FORMATS))
        gpt.expect(magic in FORMATS, f"{expected}: {path} has magic {magic}, expected {known} of a shard of tokens")
        good, dtype = FORMATS[magic]
        gpt.expect(version == good, f"{expected}: {path} has version {version}, expected {good} with magic {magic}")
        holds = (size - HEADER) / dtype.itemsize
        told = f"{expected}: {path} holds {holds:,.15g} tokens, expected {n:,} by its header"
        gpt.expect(holds == n, f"{told}; it is cut short" if holds < n else told)
        gpt.expect(n > 0, f"{expected}: {path} holds no tokens")
        self.tokens = np.frombuffer(self.map, dtype, offset=HEADER)

    def __len__(self):
        return len(self.tokens)

    def part(self, start, end):
        other = object.__new__(Shard)
        other.__dict__ = self.__dict__ | dict(tokens=self.tokens[max(0, start) : max(0, end)])
        return other

    def release(self):
        """The pages that were read no longer count as this process's memory; the system keeps them as it can."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def check(self, tokenizer, told=None):
        """Read all of it once: is each token one of the tokenizer's, and is all as meta.json told?"""
        n = told["tokens"] if told else len(self)
        gpt.expect(len(self) == n, f"--data: {self.path} holds {len(self):,} tokens, expected {n:,} by meta.json")
        top, crc = 0, 0
        for start in range(0, len(self), 1 << 22):
            piece = self.tokens[start : start + (1 << 22)]
            top, crc = max(top, int(piece.max())), zlib.crc32(piece, crc)
            self.release()
        good, found = told["crc32"] if told else f"{crc:08x}", f"{crc:08x}"
        damaged = f"--data: {self.path} is damaged: CRC-32 {found}, expected {good} by meta.json"
        gpt.expect(found == good, damaged)
        V, name = tokenizer.n_vocab, tokenizer.name
        gpt.expect(top < V, f"--data: {self.path} has token {top}, expected less than {V}, of --tokenizer {name}")
        self.crc32 = crc


def looks_like_header(first):
    """Do the first 256 int32 have a known magic, or the zeros that fill a header, as no text's tokens do?"""
    return len(first) == 256 and (int(first[0]) in FORMATS or not first[16:].any())


def header(n, dtype):
    """The bytes before n tokens of this type in a shard."""
    magic, (version, _) = next((magic, about) for magic, about in FORMATS.items() if about[1] == dtype)
    return np.array([magic, version, n, *[0] * 253], "<i4").tobytes()


def holds_shards(path):
    """Whether --data is a folder or a shard, not a text."""
    if path is None or not os.path.exists(path):
        return False
    return os.path.isdir(path) or path.endswith(".bin") or starts_as_shard(path)


def starts_as_shard(path):
    """By its magic, which no text in UTF-8 begins with."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") in FORMATS


def load_shards(path, tokenizer):
    """The shards of a folder whose names say val, and all others; or the last tenth of them, if none does."""
    paths, about = find_shards(path)
    if about:
        same = about["fingerprint"] == tokenizers.fingerprint(tokenizer)
        has = f"--data is {path!r}, made with tokenizer {about['tokenizer']!r}"
        gpt.expect(same, f"{has}, but --tokenizer is {tokenizer.name!r}, which is another")
    told = {shard["name"]: shard for shard in about.get("shards", [])}
    shards = [Shard(path) for path in paths]
    for shard in shards:
        dtype, first = shard.tokens.dtype, shards[0].tokens.dtype
        gpt.expect(dtype == first, f"--data: {shard.path} has {dtype} tokens, expected {first} as in {paths[0]}")
    for i, shard in enumerate(shards):
        gpt.progress(f"checking shard {i + 1} of {len(shards)}")
        shard.check(tokenizer, told.get(os.path.basename(shard.path)))
    gpt.progress("")
    val = [shard for shard in shards if re.search(r"(?:^|[_-])val(?:[_.-]|$)", os.path.basename(shard.path))]
    if not val or len(shards) == 1:
        row = Tokens(shards)
        return row[: len(row) * 9 // 10], row[len(row) * 9 // 10 :]
    return Tokens([shard for shard in shards if shard not in val]), Tokens(val)


def find_shards(path):
    """-> the files of a folder, or the one; and what their meta.json says, if they have one"""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    about = read_meta(folder)
    listed = [shard["name"] for shard in about.get("shards", [])]
    if not os.path.isdir(path):
        return [path], about if os.path.basename(path) in listed else {}
    there = sorted(name for name in os.listdir(path) if name.endswith(".bin"))
    missing = [name for name in listed if name not in there]
    gpt.expect(not missing, f"--data is {path!r}, which lacks {missing[:1] and missing[0]} of its meta.json")
    gpt.expect(there, f"--data is {path!r}, a folder without shards (.bin), expected some")
    return [os.path.join(path, name) for name in listed or there], about


def read_meta(path):
    """What `fastgpt prepare` wrote beside the shards, or nothing."""
    name = os.path.join(path, "meta.json")
    if not os.path.isfile(name):
        unfinished = os.path.exists(os.path.join(path, "progress.json"))
        gpt.expect(not unfinished, f"--data is {path!r}, which `fastgpt prepare` has not finished: run it again first")
        return {}
    with gpt.reported_as(f"--data: {name} is damaged"), open(name, encoding="utf-8") as file:
        about = json.load(file)
        for key, kind in (("tokenizer", str), ("fingerprint", str), ("shards", list)):
            gpt.expect(isinstance(about.get(key), kind), f"{key} is {about.get(key)!r}, expected a {kind.__name__}")
        for shard in about["shards"]:
            good = isinstance(shard.get("name"), str) and os.path.basename(shard["name"]) == shard["name"]
            gpt.expect(good and {"tokens", "crc32"} <= shard.keys(), f"a shard in it is {shard!r}")
    return about


def tokenizer_of(path):
    """What shards were made with: bytes, gpt2 or a folder with vocab.json. None for a text."""
    if not holds_shards(path):
        return None
    paths, about = find_shards(path)
    folder = os.path.dirname(paths[0]) or "."
    if about:
        return about["tokenizer"] if about["tokenizer"] != tokenizers.OWN else folder
    chars = os.path.exists(os.path.join(folder, "meta.pkl"))
    gpt.expect(not chars, f"--data is {path!r}, whose meta.pkl has a vocabulary that is not read: type --tokenizer")
    wide = Shard(paths[0]).tokens.itemsize > 2
    gpt.expect(not wide, f"--data is {path!r}, uint32 tokens of an unknown vocabulary: type --tokenizer FOLDER")
    return "gpt2"  # llm.c's magic for GPT-2, and what nanoGPT's headerless shards hold


def settle_tokenizer(typed, out):
    """Make what is typed name the tokenizer of a run: that typed, else --init's own, else the one of --data's shards.

    A folder's becomes tokenizer.OWN. -> the folder that this stands for
    """
    name, resume, init = typed.get("tokenizer"), typed.get("resume"), typed.get("init")
    if name is None and not resume:
        name = init if init and tokenizers.has_files(init) else tokenizer_of(typed.get("data"))
    if name is None:
        return out
    if name in ("bytes", "gpt2"):
        typed["tokenizer"] = name
        return out
    own, typed["tokenizer"] = tokenizers.get(name), tokenizers.OWN
    if not resume:
        return name
    known = tokenizers.has_files(out) and tokenizers.fingerprint(tokenizers.from_files(out))
    same = known == tokenizers.fingerprint(own)
    gpt.expect(same, f"--tokenizer is {name!r}, which is not that of {out!r}, and cannot change")
    return out


# ----------------------------------------------------------------------------------------------------- windows


def permuted_batches(seed, step, accumulate):
    """gpt.random_batch's place in a step, for windows without repeats: each once before any comes again.

    The row is cut into windows of T. Batch after batch takes the next of them, in an order that is another in each
    round. A batch is a function of (seed, step) alone.
    """
    count = step * accumulate

    def batch(tokens, B, T, generator):
        nonlocal count
        n = (len(tokens) - 1) // T
        at = np.arange(count * B, (count + 1) * B, dtype=np.int64)
        count += 1
        starts = np.array([permute(i % n, n, (seed, i // n)) for i in at.tolist()])[:, None] * T
        return gpt.windows(tokens, starts, T)

    return batch


def permute(i, n, key):
    """Where a random permutation of range(n) takes i, without a table: a Feistel network over the next power of 4.

    Luby and Rackoff 1988; out of range, it is applied again (Black and Rogaway 2002).
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask, salt = (1 << half) - 1, b"%d %d" % key
    while True:
        left, right = i >> half, i & mask
        for round in range(4):
            digest = hashlib.blake2b(b"%d %d" % (round, right), digest_size=8, key=salt).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & mask
        i = left << half | right
        if i < n:
            return i


def batches(kind, config, step):
    """What gpt.train_step draws its batches with: --windows random or permutation."""
    return gpt.random_batch if kind == "random" else permuted_batches(config.seed, step, config.accumulate)
