"""Text to tokens and back, with GPT-2's real tokenizer and with bytes, without a network."""

import subprocess
import sys
from pathlib import Path

import pytest

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
