"""Text to tokens and back, with GPT-2's real tokenizer and with bytes, without a network; files, piece by piece."""

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastgpt.data
import gpt

TEXTS = [
    "", " ", "Hello, world!", "  two  spaces\n\n\ttabs", "Don't we'll I'VE 12345", "naïve café — “quotes”", "日本語のテキスト",
    "Ωμέγα, жизнь, שלום, سلام", "👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 \u200b\ufeff \x00\x7f", "<|endoftext|>", "a<|endoftext|>b",
]  # fmt: skip


@pytest.fixture(params=("bytes", "gpt2"))
def tokenizer(request, gpt2_tokenizer_files):
    import tiktoken.registry

    tiktoken.registry.ENCODINGS.pop("gpt2", None)  # read it from this test's cache
    return gpt.get_tokenizer(request.param)


@pytest.fixture(params=(gpt.load_tokens, fastgpt.data.load_tokens), ids=("gpt.py", "in little memory"))
def load_tokens(request):
    return request.param


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, allowed_special="all")) == text
    assert tokenizer.decode(tokenizer.encode(text, disallowed_special=())) == text


def test_known_ids(tokenizer):
    text, eot = "Hello world", [tokenizer.eot_token]
    if tokenizer.name == "gpt2":
        assert tokenizer.n_vocab == 50257 and eot == [50256]
        assert tokenizer.encode(text) == [15496, 995]
    else:
        assert tokenizer.n_vocab == 257 and eot == [256]
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.encode("é日") == list("é日".encode())
    assert tokenizer.encode("<|endoftext|>", allowed_special="all") == eot


@pytest.mark.slow
def test_gpt2_tokenizer_offline_says_what_to_do(tmp_path):
    """A process of its own, in which no connection can be made and the cache is empty."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        f"sys.path.insert(0, {str(Path(gpt.__file__).parent)!r})\n"
        "import gpt\n"
        f"gpt.main(['train', '--tokenizer', 'gpt2', '--out', {str(tmp_path / 'out')!r}])\n"
    )
    import os

    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300
    )
    assert run.returncode == 1
    assert "TIKTOKEN_CACHE_DIR" in run.stderr and "--tokenizer bytes" in run.stderr
    assert "Traceback" not in run.stderr and len(run.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- files


PARTS = ["a", "the", "don't", " ", "  ", "\n", "\r\n", "\n\n", "\t", "1234", "é", "日本", "\u3000", "\xa0", "\x1c", "<|endoftext|>",
         "<", "<|endof", "<|endoftext", "|>", "!?", "'s", "👩‍👧", "\x85", "x"]  # fmt: skip


def encoded_in_pieces(content, tokenizer, size, monkeypatch, start=0):
    class File(io.BytesIO):
        def read(self, n=-1):
            return super().read(min(n, size))

    out = np.empty(len(content), np.uint16)
    return fastgpt.data.encode(File(content), start, len(content), tokenizer, out).tolist()


@pytest.mark.slow
def test_pieces_of_a_text_give_the_tokens_of_the_whole(tokenizer, monkeypatch):
    rng = random.Random(0)
    for _ in range(600):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randint(0, 60)))
        whole = tokenizer.encode(text, allowed_special="all")
        for size in (1, 2, 7, 13, 30):
            assert encoded_in_pieces(text.encode(), tokenizer, size, monkeypatch) == whole, (text, size)


@pytest.mark.parametrize("bad", (b"\xff", b"\xc3", b"\xe6\x97", b"\xed\xa0\x80", b"\xc0\xaf"))
@pytest.mark.parametrize("at", (0, 100, (1 << 20) - 1, (1 << 20) + 5, -1))
def test_what_is_not_utf8_is_refused_by_name(load_tokens, tmp_path, bad, at):
    content = b"words and words " * 100_000
    path = tmp_path / "text.txt"
    path.write_bytes(content[:at] + bad + content[at:] if at >= 0 else content + bad)
    with pytest.raises(ValueError, match="text.txt.*expected a readable text file in UTF-8"):
        load_tokens(str(path), gpt.get_tokenizer("bytes"), 8)


@pytest.mark.parametrize("extra", range(12))
def test_the_last_tenth_begins_with_a_character(load_tokens, tmp_path, extra):
    path = tmp_path / "text.txt"
    text = "日本語é" * 500 + "x" * extra
    path.write_bytes(text.encode())
    train, val = load_tokens(str(path), gpt.get_tokenizer("bytes"), 8)
    assert train.dtype == val.dtype == np.uint16
    assert bytes(train.tolist()).decode() + bytes(val.tolist()).decode() == text
    assert abs(len(val) - len(text.encode()) / 10) <= 4


def test_newlines_are_kept(load_tokens, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a\r\nb\rc\n" * 50)
    train, val = load_tokens(str(path), gpt.get_tokenizer("bytes"), 8)
    assert bytes((*train.tolist(), *val.tolist())) == path.read_bytes() == gpt.load_text(str(path)).encode()


def test_both_ways_to_load_a_text_give_the_same_tokens(tmp_path, tokenizer):
    rng, path = random.Random(1), tmp_path / "text.txt"
    for _ in range(20):
        path.write_bytes("".join(rng.choice(PARTS) for _ in range(rng.randint(4000, 9000))).encode())
        for a, b in zip(
            *(load(str(path), tokenizer, 8) for load in (gpt.load_tokens, fastgpt.data.load_tokens)), strict=True
        ):
            assert a.tolist() == b.tolist()


def test_text_without_a_file_gives_the_same_tokens(load_tokens, tokenizer):
    train, val = load_tokens(None, tokenizer, 64)
    assert tokenizer.decode(train.tolist()) + tokenizer.decode(val.tolist()) == gpt.load_text()


@pytest.mark.slow
@pytest.mark.parametrize("line", (b"the quick brown fox jumps over the lazy dog\n", b"ACGTTGCA", "日本語".encode()))
def test_encoding_takes_little_memory(tmp_path, line):
    size = 30_000_000
    path = tmp_path / "text.txt"
    path.write_bytes(line * (size // len(line)))
    code = (
        "import fastgpt.data, gpt, sys\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) * 1024\n"
        "tokenizer = gpt.get_tokenizer('bytes'); fastgpt.data.load_tokens(None, tokenizer, 8); before = peak()\n"
        "train, val = fastgpt.data.load_tokens(sys.argv[1], tokenizer, 8); print(peak() - before, len(train) + len(val))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=Path(gpt.__file__).parent, timeout=300
    )
    memory, n = map(int, run.stdout.split())
    assert n == path.stat().st_size and memory < 3 * n
