"""Texts to shards and back: llm.c's format to the byte, stopped runs, shards of others, windows, a folder's tokenizer."""

import gzip
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastgpt.__main__
import fastgpt.train
import gpt
from fastgpt import data, prepare
from fastgpt import tokenizer as tokenizers

HERE = Path(gpt.__file__).parent
TEXT = "the quick brown fox, aged 7, jumps over 12 lazy dogs.\n日本語 – naïve café  " * 40
PARTS = ["a", "the", "don't", " ", "  ", "\n", "\r\n", "\n\n", "\t", "1234", "é", "日本", "\u3000", "\xa0", "\x1c", "<|endoftext|>",
         "<", "<|endof", "|>", "!?", "'s", "'s1", "x9", "👩‍👧", "\x85", "x"]  # fmt: skip
TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --steps 6 --eval-every 3 --sample 3 --warmup 2".split()


@pytest.fixture(autouse=True)
def small_machine(threads, tmp_path, monkeypatch):
    threads(1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpt2(gpt2_tokenizer_files):
    import tiktoken.registry

    tiktoken.registry.ENCODINGS.pop("gpt2", None)  # read it from this test's cache
    return gpt.get_tokenizer("gpt2")


def run(*argv):
    prepare.main([str(word) for word in argv])


def whole(out):
    """All tokens of a folder in the order in which they were prepared."""
    meta = json.loads(Path(out, "meta.json").read_text())
    return np.concatenate([data.Shard(str(Path(out, shard["name"]))).tokens for shard in meta["shards"]]).tolist()


def content(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def shard_bytes(tokens, magic=20240520, version=1, count=None, kind="H"):
    """As llm.c's dev/data/data_common.py says, spelled out."""
    n = len(tokens) if count is None else count
    return struct.pack("<256i", magic, version, n, *[0] * 253) + struct.pack(f"<{len(tokens)}{kind}", *tokens)


def some_tokens(n, top=257, seed=0):
    return np.random.default_rng(seed).integers(0, top, n).tolist()


# ------------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize("name", ("bytes", "gpt2"))
def test_pieces_of_any_size_have_the_tokens_of_the_whole(name, gpt2):
    tokenizer, rng = gpt.get_tokenizer(name), random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randint(0, 60)))
        for special, expected in (
            (True, tokenizer.encode(text, allowed_special="all")),
            (False, tokenizer.encode_ordinary(text)),
        ):
            for size in (1, 5, 17):
                parts = list(data.pieces(iter([text[:7], text[7:]] if text[7:] else [text]), size, 1000))
                ids = [i for part in parts for i in data.to_tokens(part, tokenizer, special).tolist()]
                assert "".join(parts) == text and ids == expected, (text, size)


def test_where_a_piece_ends_follows_from_what_comes_after_its_start():
    rng = random.Random(1)
    for _ in range(100):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 200)))
        parts = list(data.pieces([text], 30, 60))
        at = rng.randrange(len(parts))
        rest = "".join(parts[at:])
        again = list(data.pieces((rest[i : i + 11] for i in range(0, len(rest), 11)), 30, 60))
        assert again == parts[at:]


def test_a_word_without_end_is_cut_but_never_within_the_end_of_text():
    for n in range(40, 70):
        text = "." * n + "<|endoftext|>" + "." * 80
        parts = list(data.pieces([text], 30, 60))
        assert "".join(parts) == text and all(len(part) <= 60 for part in parts)
        assert sum(part.count("<|endoftext|>") for part in parts) == 1


def test_runs_of_blanks_that_the_tokenizer_refuses_as_a_whole(gpt2):
    text = " " * (1 << 20) + "x"
    ids = [i for part in data.pieces([text]) for i in data.to_tokens(part, gpt2).tolist()]
    assert gpt2.decode(ids) == text


# ------------------------------------------------------------------------------------------------------ format


def test_shards_are_llm_c_s_byte_for_byte():
    Path("a.txt").write_bytes(TEXT.encode())
    run("a.txt", "--tokenizer", "bytes", "--out", "d", "--shard-size", "1000", "--val", "0.25")
    tokens = [256, *TEXT.encode()]
    found = content("d")
    for i in range(0, len(tokens), 1000):
        part = tokens[i : i + 1000]
        val = len(part) // 4
        assert found.pop(f"val_{i // 1000:06d}.bin") == shard_bytes(part[:val])
        assert found.pop(f"train_{i // 1000:06d}.bin") == shard_bytes(part[val:])
    meta = json.loads(found.pop("meta.json"))
    assert not found and meta["tokens"] == len(tokens) and meta["documents"] == 1 and meta["tokenizer"] == "bytes"
    assert meta["vocab_size"] == 257 and meta["inputs"][0]["bytes"] == len(TEXT.encode())
    assert sum(shard["tokens"] for shard in meta["shards"]) == len(tokens)


def test_large_vocabularies_take_llm_c_s_uint32():
    tokens = [0, 65535, 65536, 128255]
    prepare.write_shard(np.array(tokens, data.token_type(128256)), "w.bin")
    assert Path("w.bin").read_bytes() == shard_bytes(tokens, 20240801, 7, kind="I")
    assert data.Shard("w.bin").tokens.tolist() == tokens
    assert data.token_type(65536) == np.uint16 and data.token_type(65537) == np.uint32


@pytest.mark.parametrize("name", ("bytes", "gpt2"))
def test_documents_of_all_kinds_of_files(name, gpt2, monkeypatch):
    tokenizer = gpt.get_tokenizer(name)
    texts = ["one two  three", "", "naïve <|endoftext|> 日本語\n", TEXT]
    rows = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 > 0) for i, text in enumerate(texts)]
    rows.insert(1, "")
    Path("a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    Path("a.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    Path("t.txt").write_text("x <|endoftext|>y", encoding="utf-8")
    Path("t.gz").write_bytes(gzip.compress(Path("t.txt").read_bytes()))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    files = ["a.jsonl", "t.txt", "-", "a.jsonl.gz", "t.gz"]
    run(*files, "--tokenizer", name, "--out", "d", "--shard-size", "997", "--val", "0")
    eot = tokenizer.eot_token
    lines = [i for text in texts for i in (eot, *tokenizer.encode_ordinary(text))]
    text = [eot, *tokenizer.encode("x <|endoftext|>y", allowed_special="all")]
    assert whole("d") == [*lines, *text, eot, *tokenizer.encode("from a pipe"), *lines, *text]
    assert json.loads(Path("d/meta.json").read_text())["documents"] == 2 * (4 + 2) + 1


def test_text_and_shards_have_the_same_tokens_at_any_size_of_piece(gpt2, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 7)
    pieces = data.pieces
    monkeypatch.setattr(data, "pieces", lambda texts: pieces(texts, 20, 10_000))
    rng = random.Random(2)
    text = "".join(rng.choice(PARTS) for _ in range(3000))
    Path("a.txt").write_bytes(text.encode())
    run("a.txt", "--tokenizer", "gpt2", "--out", "d", "--shard-size", "500", "--val", "0.1")
    assert whole("d") == [gpt2.eot_token, *gpt2.encode(text, allowed_special="all")]


def test_threads_do_not_change_a_byte(threads):
    Path("a.jsonl").write_text("\n".join(json.dumps(dict(text=TEXT[:i])) for i in range(0, 2000, 30)))
    for n in (1, 2):
        threads(n)
        run("a.jsonl", "--tokenizer", "bytes", "--out", f"d{n}", "--shard-size", "9999")
    assert content("d1") == content("d2")


# ------------------------------------------------------------------------------------------------ stopped runs


FILES = ("a.txt", "b.jsonl.gz", "c.txt")


def make_inputs():
    Path("a.txt").write_bytes(TEXT.encode())
    rows = "\n".join(json.dumps(dict(text=TEXT[i : i + 300])) for i in range(0, 1200, 100))
    Path("b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    Path("c.txt").write_bytes(TEXT[::-1].encode())
    return [*FILES, "--tokenizer", "bytes", "--shard-size", "3000", "--val", "0.1"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", (KeyboardInterrupt, OSError), ids=("Ctrl-C", "disk full"))
def test_a_run_stopped_at_any_file_ends_with_the_bytes_of_one_go(kind, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "CHUNK", 100)
    pieces = data.pieces
    monkeypatch.setattr(data, "pieces", lambda texts: pieces(texts, 150, 300))
    argv, real = make_inputs(), gpt.write_whole
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "write_whole", lambda *args: (calls.append(args), real(*args)))
        run(*argv, "--out", "one")
    expected = content("one")
    assert len(calls) > 12 and len(expected) > 8
    for first in range(len(calls)):
        out, left = f"out{first}", [first]

        def stopped(path, write, left=left):
            left[0] -= 1
            if left[0] < 0:
                Path(f"{path}.tmp").write_bytes(b"half")
                raise kind("No space left on device")
            real(path, write)

        for times in (first, first // 2, 10**9):  # stopped twice
            left[0] = times
            with monkeypatch.context() as patch:
                patch.setattr(gpt, "write_whole", stopped)
                try:
                    run(*argv, "--out", out)
                    break
                except KeyboardInterrupt:
                    said = capsys.readouterr().out
                    assert times == 0 or "whole shards" in said or "no shard" in said
                except (ValueError, OSError) as error:
                    assert "No space left" in str(error) and "\n" not in str(error)
            left_behind = content(out) if os.path.exists(out) else {}
            assert not [name for name in left_behind if name.endswith(".tmp")]
            whole_ones = {name: x for name, x in left_behind.items() if name.endswith(".bin")}
            assert whole_ones.items() <= expected.items()  # what is there is whole
        assert content(out) == expected, first


def test_a_killed_run_goes_on_and_a_finished_one_has_nothing_to_do(monkeypatch, capsys):
    argv = [*make_inputs(), "--out", "d"]
    run(*argv, "--out", "one")
    real = prepare.save

    def killed(path, state):
        real(path, state)
        if len(state["shards"]) == 4:
            raise MemoryError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "save", killed)
        patch.setattr(prepare, "remove_halves", lambda out: None)
        with pytest.raises(MemoryError):
            run(*argv)
    Path("d/train_000002.bin.tmp").write_bytes(b"half")
    capsys.readouterr()
    run(*argv)
    assert "going on after 4 shards" in capsys.readouterr().out and content("d") == content("one")
    run(*argv)
    assert "nothing to do" in capsys.readouterr().out and content("d") == content("one")


def test_a_run_killed_before_the_first_cut_was_over_leaves_nothing_to_the_next(monkeypatch):
    argv, real = make_inputs(), gpt.write_whole

    def killed(path, write):
        if path.endswith("train_000000.bin"):
            raise MemoryError("as if killed")
        real(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(gpt, "write_whole", killed)
        with pytest.raises(MemoryError):
            run(*argv, "--out", "d")
    assert "val_000000.bin" in content("d")
    for out in ("d", "one"):
        run(*argv, "--out", out, "--val", "0")
    assert content("d") == content("one")


def stop_after(shards, argv):
    real, pytest_patch = prepare.save, pytest.MonkeyPatch()

    def stop(path, state):
        real(path, state)
        if len(state["shards"]) >= shards:
            raise KeyboardInterrupt

    pytest_patch.setattr(prepare, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*argv)
    pytest_patch.undo()


def test_what_was_begun_with_other_texts_or_settings_is_not_gone_on_with():
    argv = [*make_inputs(), "--out", "d"]
    stop_after(4, argv)
    before = content("d")
    for more, words in (
        (["--shard-size", "100"], "begun with shard_size 3000, not 100"),
        (["--val", "0.2"], "begun with val 0.1, not 0.2"),
        (["--tokenizer", write_vocabulary("own", [("a", "b")])], "tokenizer 'bytes', not 'vocab.json'"),
        (["--jsonl"], "jsonl"),
    ):
        with pytest.raises(ValueError, match=words):
            run(*argv, *more)
    with pytest.raises(ValueError, match="begun with files"):
        run("c.txt", *argv)
    raw = Path("a.txt").read_bytes()
    Path("a.txt").write_bytes(b"T" + raw[1:])
    with pytest.raises(ValueError, match="a.txt.* others than before"):
        run(*argv)
    Path("a.txt").write_bytes(raw)
    shard = Path("d/train_000001.bin")
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(ValueError, match="train_000001.bin holds .* it is cut short"):
        run(*argv)
    shard.write_bytes(good)
    assert content("d") == before
    with pytest.raises(ValueError, match="not finished"):
        data.load_tokens("d", gpt.get_tokenizer("bytes"), 8)
    run(*argv)
    Path("c.txt").write_bytes(b"more" + Path("c.txt").read_bytes())
    with pytest.raises(ValueError, match="c.txt has .* bytes, but had"):
        run(*argv)


@pytest.mark.slow
def test_a_large_text_is_prepared_in_constant_memory_though_killed_twice():
    size, rng = 30_000_000, random.Random(3)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(1, 9))) for _ in range(1000)]
    line = " ".join(rng.choice(words) for _ in range(20_000)).encode() + b"\n"
    Path("small.txt").write_bytes(line)
    Path("large.txt").write_bytes(line * (size // len(line)))
    code = (
        "import sys; from fastgpt import prepare; prepare.main(sys.argv[1:])\n"
        "print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) * 1024)\n"
    )

    def command(name, out):
        words = [name, "--tokenizer", "bytes", "--out", out, "--shard-size", "2000000"]
        env = os.environ | {"PYTHONPATH": str(HERE)}
        return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, env=env)

    def peak(process):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        return int(out.split()[-1])

    small, large = peak(command("small.txt", "s")), peak(command("large.txt", "one"))
    assert large - small < 25_000_000, (small, large)  # less than the text; the buffer of a shard is 4 MB
    killed = 0
    for wanted in (4, 14):
        process = command("large.txt", "parts")
        while process.poll() is None and len([p for p in Path("parts").glob("*.bin")]) < wanted:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    process = command("large.txt", "parts")
    assert peak(process) - small < 25_000_000
    assert killed == 2 and content("parts") == content("one")


# ------------------------------------------------------------------------------------------------------ reading


def folder_of(name, parts, writer=shard_bytes):
    Path(name).mkdir()
    for file, tokens in parts.items():
        Path(name, file).write_bytes(writer(tokens))
    return name


def test_tokens_of_several_shards_are_one_row():
    parts = {f"x_{i}.bin": some_tokens(n, seed=i) for i, n in enumerate((5, 1, 300, 64))}
    folder_of("d", parts)
    row, expected = data.Tokens([data.Shard(f"d/{name}") for name in parts]), np.concatenate(list(parts.values()))
    assert len(row) == len(expected) == 370 and row.dtype == np.uint16
    at = np.random.default_rng(0).integers(0, 370, (7, 50))
    assert np.array_equal(row[at], expected[at])
    for start, end in ((0, 370), (3, 7), (5, 6), (6, 100), (300, 370), (370, 370)):
        part = row[start:end]
        assert len(part) == end - start
        assert part[np.arange(end - start)].tolist() == expected[start:end].tolist()


def test_mapped_shards_train_as_an_array_would(small, ops):
    folder_of("d", {f"train_{i}.bin": some_tokens(100 + i, 97, i) for i in range(5)})
    row = data.Tokens([data.Shard(f"d/train_{i}.bin") for i in range(5)])
    array = row[np.arange(len(row))]
    for seed in range(5):
        batches = [
            gpt.random_batch(x, 3, 40, torch.Generator().manual_seed(seed)) for x in (row, array, torch.tensor(array))
        ]
        assert all(torch.equal(a, b) for batch in batches for a, b in zip(batch, batches[0], strict=True))
    model = gpt.GPT(small, ops)
    for n in (510, 481, 482, 45):
        assert gpt.evaluate(model, row[:n], 4) == gpt.evaluate(model, array[:n], 4)
    assert gpt.evaluate(model, row, 4, max_windows=3) == gpt.evaluate(model, array, 4, max_windows=3)


@pytest.mark.parametrize(
    "name, names",
    [
        ("llm.c", {"tiny_shakespeare_train.bin": 1, "tiny_shakespeare_val.bin": 0}),
        ("modded-nanogpt", {"fineweb_train_000001.bin": 1, "fineweb_train_000002.bin": 1, "fineweb_val_000000.bin": 0}),
        ("no part to validate", {"interval_1.bin": 1, "interval_2.bin": 1}),
    ],
)
def test_shards_of_others(name, names):
    folder_of("d", {file: some_tokens(200, 50257, seed) for seed, file in enumerate(names)})
    tokens = {kind: [] for kind in (0, 1)}
    for file, kind in sorted(names.items()):
        tokens[kind] += data.Shard(f"d/{file}").tokens.tolist()
    if not tokens[0]:
        tokens = {1: tokens[1][:360], 0: tokens[1][360:]}
    assert data.tokenizer_of("d") == "gpt2"
    train, val = data.load_shards("d", FakeTokenizer(50257))
    assert train[np.arange(len(train))].tolist() == tokens[1] and val[np.arange(len(val))].tolist() == tokens[0]


class FakeTokenizer:
    def __init__(self, n_vocab):
        self.n_vocab, self.name = n_vocab, "fake"


def test_nanogpt_s_shards_have_no_header():
    parts = {"train.bin": some_tokens(5000, 50257), "val.bin": some_tokens(700, 50257, 1)}
    folder_of("d", parts, lambda tokens: np.array(tokens, "<u2").tobytes())
    train, val = data.load_shards("d", FakeTokenizer(50257))
    assert train[np.arange(5000)].tolist() == parts["train.bin"] and val[np.arange(700)].tolist() == parts["val.bin"]
    assert data.tokenizer_of("d") == "gpt2"
    Path("d/meta.pkl").write_bytes(b"characters")
    with pytest.raises(ValueError, match="meta.pkl.* type --tokenizer"):
        data.tokenizer_of("d")


def test_one_shard_is_cut_for_validation_and_a_text_is_no_shard():
    tokens = some_tokens(1000)
    Path("anything").write_bytes(shard_bytes(tokens))
    train, val = data.load_tokens("anything", gpt.get_tokenizer("bytes"), 16)
    assert train[np.arange(900)].tolist() == tokens[:900] and val[np.arange(100)].tolist() == tokens[900:]
    Path("text").write_bytes(TEXT.encode())
    train, val = data.load_tokens("text", gpt.get_tokenizer("bytes"), 16)
    assert isinstance(train, np.ndarray) and data.tokenizer_of("text") is None


@pytest.mark.slow
def test_reading_windows_all_over_a_large_shard_takes_little_memory():
    n = 100_000_000
    with open("large.bin", "wb") as file:
        file.write(data.header(n, np.dtype("<u2")))
        file.truncate(1024 + 2 * n)
    code = (
        "import sys, numpy as np, torch, gpt; from fastgpt import data\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) * 1024\n"
        "tokenizer, g = gpt.get_tokenizer('bytes'), torch.Generator().manual_seed(0)\n"
        "gpt.random_batch(np.zeros(100), 2, 9, g); before = peak()\n"
        "train, val = data.load_tokens('large.bin', tokenizer, 64)\n"
        "data.describe(train, val)\n"
        "for _ in range(100): gpt.random_batch(train, 64, 64, g)\n"
        "print(peak() - before)\n"
    )
    env = os.environ | {"PYTHONPATH": str(HERE)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 60_000_000  # of 200 MB: what the system maps around a few windows


# ------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("n", (1, 2, 3, 16, 17, 1000))
def test_a_permutation_takes_each_once_and_differs_by_round_and_seed(n):
    orders = [[data.permute(i, n, key) for i in range(n)] for key in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n > 16:
        assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != list(range(n))


def test_a_permutation_spreads_its_first_windows():
    """The first tenth comes from all over: its mean is near the middle, its neighbours are far apart."""
    n = 20_000
    first = np.array([data.permute(i, n, (7, 0)) for i in range(n // 10)])
    assert abs(first.mean() / n - 0.5) < 0.03 and abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1


def test_windows_without_repeats_follow_from_seed_and_step():
    tokens, B, T, accumulate = np.arange(1, 1000), 3, 16, 2
    n, generator = (len(tokens) - 1) // T, torch.Generator()

    def starts(step):
        batch = data.permuted_batches(5, step, accumulate)
        windows = [batch(tokens, B, T, generator) for _ in range(accumulate)]
        for idx, targets in windows:
            assert idx.shape == targets.shape == (B, T) and torch.equal(idx[:, 1:], targets[:, :-1])
        return [int(start) for idx, _ in windows for start in idx[:, 0]]

    steps = [starts(step) for step in range(40)]
    row = sum(steps, [])
    assert sorted(row[:n]) == sorted(row[n : 2 * n]) == list(range(1, n * T, T)) and row[:n] != row[n : 2 * n]
    assert starts(17) == steps[17] and starts(0) == steps[0]


def test_a_resumed_run_without_repeats_goes_on_where_it_was(capsys):
    Path("a.txt").write_bytes(TEXT.encode())
    argv = ["--data", "a.txt", *TINY, "--windows", "permutation"]
    fastgpt.train.main(["--out", "one", *argv], None)
    fastgpt.train.main(["--out", "random", *argv, "--windows", "random"], None)
    real, calls = gpt.train_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch().context() as patch, pytest.raises(SystemExit):
        patch.setattr(gpt, "train_step", interrupted)
        fastgpt.train.main(["--out", "parts", *argv], None)
    fastgpt.train.main(["--out", "parts", "--resume"], None)
    one, parts, other = (gpt.load_tensors(f"{x}/training.safetensors")[0] for x in ("one", "parts", "random"))
    assert all(torch.equal(one[name], parts[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    fastgpt.train.main(["--out", "parts", "--resume", "--windows", "random", "--steps", "7"], None)
    assert "--windows random instead of permutation" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- tokenizer


def write_vocabulary(folder, merges, special=("<|endoftext|>",), start=0):
    """vocab.json and merges.txt of the 256 bytes, these merges and special tokens. -> the folder"""
    characters = list(tokenizers.byte_characters())
    names = characters + ["".join(pair) for pair in merges] + list(special)
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "vocab.json").write_text(
        json.dumps({name: start + i for i, name in enumerate(names)}), encoding="utf-8"
    )
    rows = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    Path(folder, "merges.txt").write_text("\n".join(rows), encoding="utf-8")
    return str(folder)


def learned_merges(text, n):
    """Byte-pair encoding, as Sennrich et al. 2016: the pair that is most common, again and again."""
    import regex

    spell = {b: c for c, b in tokenizers.byte_characters().items()}
    words = [[spell[b] for b in word.encode()] for word in regex.findall(tokenizers.PATTERN, text)]
    merges = []
    while len(merges) < n:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=counts.get)
        merges.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


@pytest.fixture
def vocabulary():
    return write_vocabulary("own", learned_merges(TEXT[:800] + "don't we'll I'VE aaaaaaab \n\n\n   xxx", 60))


def test_a_folder_s_vocabulary_gives_the_tokens_of_transformers(vocabulary):
    from transformers import GPT2Tokenizer

    theirs, ours, rng = GPT2Tokenizer.from_pretrained(vocabulary), tokenizers.get(vocabulary), random.Random(4)
    assert ours.n_vocab == 256 + 60 + 1 == len(theirs) and ours.eot_token == theirs.eos_token_id
    texts = [TEXT, "", " ", "aaaaaaaaaab", *("".join(rng.choice(PARTS) for _ in range(30)) for _ in range(300))]
    texts += ["".join(rng.choice("abtheqx 12\n'") for _ in range(60)) for _ in range(300)]
    merged = 0
    for text in texts:
        ids = ours.encode(text, allowed_special="all")
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == text
        merged += len(text.encode()) - len(ids)
    assert merged > 1000


@pytest.mark.slow
def test_gpt2_s_own_files_are_gpt2(gpt2, gpt2_tokenizer_files):
    folder = Path("hub")
    folder.mkdir()
    for cached, name in (("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "merges.txt"), ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "vocab.json")):  # fmt: skip
        (folder / name).write_bytes((gpt2_tokenizer_files / cached).read_bytes())
    own = tokenizers.get("hub")
    assert tokenizers.fingerprint(own) == tokenizers.fingerprint(gpt2) == tokenizers.GPT2
    assert own.encode(TEXT) == gpt2.encode(TEXT) and own.n_vocab == 50257
    assert tokenizers.fingerprint(gpt.get_tokenizer("bytes")) != tokenizers.GPT2


def test_unknown_entries_are_special_and_text_does_not_spell_them():
    own = tokenizers.get(write_vocabulary("own", [("a", "b")], ("<pad>", "<|endoftext|>")))
    assert own.n_vocab == 259 and own.decode([257, 256]) == "<pad>ab"
    assert 257 not in data.to_tokens("a <pad>", own) and 258 in data.to_tokens("<|endoftext|>", own)


@pytest.mark.parametrize(
    "merges, words",
    [
        ([("a", "b"), ("b", "c"), ("a", "bc")], "do not lead to b'abc'"),  # tiktoken would make abc of ab and c
        ([("a", "b"), ("a", "bb")], "not two tokens"),
        ([("a", "b"), ("a", "b")], "there already"),
    ],
)
def test_merges_that_tiktoken_would_not_follow_are_refused(merges, words):
    write_vocabulary("own", [pair for pair in merges if pair != ("a", "bb")])
    rows = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    Path("own/merges.txt").write_text(rows)
    with pytest.raises(ValueError, match=words) as error:
        tokenizers.get("own")
    assert "\n" not in str(error.value)


def merged_by_list(word, merges):
    """The pair that stands first in merges.txt, leftmost, until there is none: no ids."""
    parts, rank = list(word), {pair: i for i, pair in enumerate(merges)}
    while pairs := [(rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in rank]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_every_vocabulary_that_is_taken_follows_its_merges():
    rng, taken, wrong = random.Random(5), 0, 0
    for _ in range(150):
        tokens, merges = ["a", "b", "c"], []
        for _ in range(rng.randint(2, 9)):
            pair = rng.choice(tokens), rng.choice(tokens)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
                merges.append(pair)
        words = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 12))) for _ in range(60)]
        try:
            own = tokenizers.get(write_vocabulary("own", merges))
        except ValueError as error:
            assert "do not lead to" in str(error)
            own = None
        ids = {bytes([b]): i for i, b in enumerate(tokenizers.byte_characters().values())}
        ids |= {"".join(pair).encode(): 256 + i for i, pair in enumerate(merges)}
        encoding = own or tokenizers.tiktoken.Encoding("x", pat_str=r"\S+", mergeable_ranks=ids, special_tokens={})
        same = [[encoding.decode([i]) for i in encoding.encode(word)] == merged_by_list(word, merges) for word in words]
        if own:
            taken += 1
            assert all(same), merges
        else:
            wrong += not all(same)
    assert taken > 30 and wrong > 10  # and what is refused is refused for a reason


@pytest.mark.parametrize("what", ("order", "eot", "bytes", "ids", "json", "list"))
def test_damaged_vocabularies_are_refused(what, vocabulary):
    path = Path(vocabulary, "vocab.json")
    known = json.loads(path.read_text())
    if what == "order":
        merges = Path(vocabulary, "merges.txt").read_text().split("\n")
        merges[1], merges[40] = merges[40], merges[1]
        Path(vocabulary, "merges.txt").write_text("\n".join(merges))
    known = {
        "eot": {k: x for k, x in known.items() if k[0] != "<"},
        "bytes": {k: x for k, x in known.items() if k != "!"},
        "ids": known | {"a": 7},
        "list": [*known],
    }.get(what, known)
    path.write_text("{" if what == "json" else json.dumps(known))
    with pytest.raises(ValueError, match="vocab.json") as error:
        tokenizers.get(vocabulary)
    assert "\n" not in str(error.value)


def saved_by_transformers(vocabulary, folder):
    """With tokens added, as transformers 5 saves it: in tokenizer.json alone."""
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer.from_pretrained(vocabulary)
    theirs.add_special_tokens(dict(pad_token="[PAD]"))
    theirs.add_tokens(["<user>"])
    theirs.save_pretrained(folder)
    return theirs


def test_added_tokens_and_a_tokenizer_json_alone_are_read(vocabulary):
    theirs = saved_by_transformers(vocabulary, "saved")
    assert not os.path.exists("saved/vocab.json") and not tokenizers.has_files(".")
    own = tokenizers.get("saved")
    assert own.n_vocab == len(theirs) == 319 and own.encode(TEXT) == tokenizers.get(vocabulary).encode(TEXT)
    text = "the <user> quick[PAD] fox"
    ids = theirs(text)["input_ids"]
    assert {317, 318} < set(ids) == set(own.encode(text, allowed_special="all")) and own.decode(ids) == text
    assert not {317, 318} & set(data.to_tokens(text, own).tolist())  # a text does not spell them
    # The older layout: three files.
    Path(vocabulary, "added_tokens.json").write_text(json.dumps({"[PAD]": 317, "<user>": 318}))
    assert tokenizers.fingerprint(tokenizers.get(vocabulary)) == tokenizers.fingerprint(own)
    os.mkdir("copied")
    for source in ("saved", vocabulary):
        tokenizers.copy_files(source, "copied")
        assert tokenizers.fingerprint(tokenizers.get("copied")) == tokenizers.fingerprint(own)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(normalizer=dict(type="NFC")), "expected ('BPE', None, 'ByteLevel', False)"),
        (dict(pre_tokenizer=dict(type="Whitespace")), "'Whitespace'"),
        (dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=True)), "True), expected"),
        (dict(pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, use_regex=False)), "no regular expression"),
        (dict(model=None), "no byte-level BPE"),
        (dict(added_tokens=[dict(content="a", id=400)]), "the added token 'a' has id 400, but"),
        (dict(added_tokens=[dict(content="<x>", id=0)]), "have the same id"),
        (dict(added_tokens=[dict(content="<x>", id="7")]), "has id '7'"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(vocabulary, change, words):
    saved_by_transformers(vocabulary, "saved")
    path = Path("saved/tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="saved/tokenizer.json") as error:
        tokenizers.get("saved")
    assert words in str(error.value) and "\n" not in str(error.value)


def command(*argv):
    return fastgpt.__main__.main([str(word) for word in argv])


def test_a_folder_s_vocabulary_goes_with_its_shards_and_its_model(vocabulary, capsys):
    from transformers import GPT2Tokenizer

    Path("a.txt").write_bytes(TEXT.encode())
    run("a.txt", "--tokenizer", vocabulary, "--out", "d", "--val", "0.2")
    own = tokenizers.get(vocabulary)
    assert whole("d") == [own.eot_token, *own.encode(TEXT)]
    fastgpt.train.main(["--data", "d", "--out", "model", *TINY])
    os.rename(vocabulary, "gone")
    assert json.loads(Path("model/config.json").read_text())["tokenizer"] == "vocab.json"
    model = gpt.GPT.from_pretrained("model")
    assert model.config.vocab_size == own.n_vocab
    assert GPT2Tokenizer.from_pretrained("model")(TEXT)["input_ids"] == own.encode(TEXT)
    fastgpt.train.main(["--resume", "--out", "model", "--steps", "7"])
    capsys.readouterr()
    assert command("generate", "--prompt", "the quick", "--model", "model", "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out.startswith("the quick")
    assert command("eval", "--model", "model", "--data", "d") == 0
    shards = capsys.readouterr().out
    assert "bits per byte" in shards
    assert command("eval", "--model", "model", "--data", "d", "--against", "int8") == 0
    assert "KL divergence" in capsys.readouterr().out
    assert command("quantize", "model", "--dtype", "int8", "--out", "packed") == 0
    assert command("generate", "--prompt", "the quick", "--model", "packed", "--max-new-tokens", "5") == 0
    fastgpt.train.main(["--data", "a.txt", "--init", "model", "--out", "tuned", "--steps", "1", "--sample", "1"])
    assert json.loads(Path("tuned/config.json").read_text())["tokenizer"] == "vocab.json"
    write_vocabulary("other", [("t", "h")])
    for argv, words in (
        (["train", "--resume", "--out", "model", "--tokenizer", "other"], "cannot change"),
        (["train", "--data", "d", "--out", "new", "--tokenizer", "bytes"], "--tokenizer is 'bytes', which is another"),
        (["train", "--data", "d", "--out", "new", "--tokenizer", "other"], "which is another"),
        (["eval", "--model", "model", "--data", "d", "--tokenizer", "bytes"], "which is another"),
        (["generate", "--model", "model", "--tokenizer", "words"], "'words', expected 'gpt2', 'bytes' or a folder"),
    ):
        refused(argv, words, capsys)
    assert not os.path.exists("new")


def test_a_pretrained_folder_s_own_files_serve_unless_its_config_or_the_user_names_another(vocabulary):
    def of_model(typed, folder, said, V=317):
        return tokenizers.of_model(SimpleNamespace(tokenizer=said, config=SimpleNamespace(vocab_size=V)), folder, typed)

    assert of_model(None, vocabulary, None).n_vocab == 317  # as Hugging Face's config has no such name
    assert of_model(None, vocabulary, "vocab.json").n_vocab == 317
    assert of_model(None, vocabulary, "bytes").name == "bytes"
    assert of_model("bytes", vocabulary, None).name == "bytes"
    assert of_model(vocabulary, "elsewhere", "bytes").n_vocab == 317
    with pytest.raises(ValueError, match="elsewhere lacks vocab.json and merges.txt"):
        of_model(None, "elsewhere", "vocab.json")
    with pytest.raises(ValueError, match="has 317 ids, the model only 316"):
        of_model(None, vocabulary, None, 316)
    Path(vocabulary, "model.safetensors").write_bytes(b"none")
    typed = dict(init=vocabulary)
    assert data.settle_tokenizer(typed, "out") == vocabulary and typed["tokenizer"] == "vocab.json"


def test_shards_say_which_tokenizer_a_run_takes(capsys):
    Path("a.txt").write_bytes(TEXT.encode())
    run("a.txt", "--tokenizer", "bytes", "--out", "d", "--val", "0.2", "--shard-size", "1000")
    fastgpt.train.main(["--data", "d", "--out", "model", *TINY])
    val = sum(shard["tokens"] for shard in json.loads(Path("d/meta.json").read_text())["shards"][::2])
    assert f"{len(TEXT.encode()) + 1 - val:,} tokens, {val:,} to validate" in capsys.readouterr().out
    assert command("eval", "--model", "model", "--data", "d") == 0
    out = capsys.readouterr().out
    loss = float(out.split("loss ")[1].split()[0])
    bits = float(out.split(" bits per byte")[0].split()[-1])
    assert bits == pytest.approx(loss / np.log(2), rel=0.01)
    before = Path("model/training.safetensors").read_bytes()
    Path("b.txt").write_bytes(TEXT[::-1].encode())
    run("b.txt", "--tokenizer", "bytes", "--out", "e", "--val", "0.2")
    fastgpt.train.main(["--resume", "--out", "model", "--data", "e", "--steps", "6"])
    assert "the text has changed" in capsys.readouterr().out
    assert gpt.load_tensors("model/model.safetensors")[0].keys() and before


# ---------------------------------------------------------------------------------------------------- bad input


def refused(argv, words, capsys):
    """One line on stderr with these words, status 1."""
    capsys.readouterr()
    try:
        status = command(*argv)
        said = capsys.readouterr().err
    except SystemExit as end:
        status, said = 1, f"{end.code}\n"
    assert status == 1 and said.count("\n") == 1 and words in said and "error: " in said, (argv, status, said)


def gz(x):
    return gzip.compress(x)


@pytest.mark.parametrize(
    "name, raw, words",
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"good \xff bad", "byte 5 is no UTF-8"),
        ("a.txt", b"x" * 300_000 + b"\xe6\x97", "byte 300,000 is no UTF-8"),
        ("a.txt.gz", b"plain", "a.txt.gz can't be read"),
        ("a.txt.gz", gz(b"words " * 1000)[:-9], "a.txt.gz can't be read"),
        ("a.txt.gz", gz(b"words " * 1000)[:30] + b"XXXX" + gz(b"words " * 1000)[34:], "a.txt.gz can't be read"),
        ("a.txt.gz", gz(b""), "it is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"words": 1}\n', "the line at byte 14: expected an object with a string `text`"),
        ("a.jsonl", b'{"text": 5}\n', "a string `text`"),
        ("a.jsonl", b'["text"]\n', "a string `text`"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "the line at byte 14"),
        ("a.jsonl", b'{"text": "\xff"}\n', "the line at byte 0"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "the line at byte 0"),
        ("a.jsonl", b"[" * 100_000, "the line at byte 0"),
        ("a.jsonl", b"\n\n", "no document in a.jsonl"),
    ],
)
def test_bad_texts_are_refused_and_leave_nothing(name, raw, words, capsys):
    Path(name).write_bytes(raw)
    refused(["prepare", name, "--tokenizer", "bytes", "--out", "d"], words, capsys)
    assert not os.path.exists("d")


@pytest.mark.parametrize(
    "argv, words",
    [
        ("nowhere --out d", "nowhere does not exist"),
        (". --out d", ". is a folder"),
        ("- - --out d", "given twice"),
        ("good --out d --shard-size 0", "--shard-size is 0"),
        ("good --out d --val 1", "--val is 1.0"),
        ("good --out d --val nan", "--val is nan"),
        ("good --out full", "which holds mine"),
        ("good --out good", "good"),
        ("good --out d --tokenizer words", "tokenizer is 'words', expected"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(argv, words, capsys):
    Path("good").write_text("text")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    refused(["prepare", "--tokenizer", "bytes", *argv.split()], words, capsys)
    assert not os.path.exists("d") and content("full") == {"mine": b"mine"}


@pytest.mark.parametrize(
    "name, raw, words",
    [
        ("a.bin", b"", "a.bin is empty"),
        ("a.bin", shard_bytes(some_tokens(99))[:500], "500 bytes, expected a shard's header"),
        ("a.bin", shard_bytes(some_tokens(99), magic=20240522), "has magic 20240522, expected 20240520 or 20240801"),
        ("a.bin", shard_bytes(some_tokens(99), version=2), "has version 2, expected 1"),
        ("a.bin", shard_bytes(some_tokens(99), magic=20240801), "has version 1, expected 7"),
        ("a.bin", shard_bytes(some_tokens(99), count=100), "holds 99 tokens, expected 100 by its header; it is cut"),
        ("a.bin", shard_bytes(some_tokens(99))[:-1], "holds 98.5 tokens"),
        ("a.bin", shard_bytes(some_tokens(99), count=98), "holds 99 tokens, expected 98"),
        ("a.bin", shard_bytes([], count=0), "holds no tokens"),
        ("a.bin", shard_bytes([1] * 99, count=-1), "expected -1"),
        ("a.bin", shard_bytes([*some_tokens(98), 257]), "has token 257, expected less than 257"),
        ("train.bin", shard_bytes(some_tokens(99), magic=5), "has magic 5"),
        ("train.bin", b"x" * 1025, "1,025 bytes, expected uint16"),
        ("train.bin", b"\xff\xff" * 1000, "has token 65535"),
        ("a.bin", shard_bytes(some_tokens(9, 99999), 20240801, 7, kind="I"), "uint32 tokens of an unknown"),
        ("a.txt", b"no shard", "without shards"),
    ],
)  # fmt: skip
def test_bad_shards_are_refused_before_the_first_step(name, raw, words, capsys):
    Path("d").mkdir()
    Path("d", name).write_bytes(raw)
    typed = [] if "unknown" in words else ["--tokenizer", "bytes"]
    refused(["train", "--data", "d", "--out", "new", *typed, *TINY], words, capsys)
    assert not os.path.exists("new")


def test_a_shard_alone_is_read_by_the_meta_beside_it():
    Path("a.txt").write_bytes(TEXT.encode())
    run("a.txt", "--tokenizer", "bytes", "--out", "d", "--val", "0.2", "--shard-size", "2000")
    assert data.tokenizer_of("d/train_000000.bin") == data.tokenizer_of("d") == "bytes"
    train, val = data.load_tokens("d/train_000000.bin", gpt.get_tokenizer("bytes"), 16)
    assert (len(train), len(val)) == (1440, 160)
    Path("d/other.bin").write_bytes(shard_bytes(some_tokens(100)))
    assert data.tokenizer_of("d/other.bin") == "gpt2"
    os.chdir("d")
    assert data.tokenizer_of("train_000000.bin") == "bytes"


def test_shards_that_do_not_fit_their_meta_are_refused(capsys):
    Path("a.txt").write_bytes(TEXT.encode())
    run("a.txt", "--tokenizer", "bytes", "--out", "d", "--val", "0.2", "--shard-size", "2000")
    shard, meta = Path("d/train_000000.bin"), Path("d/meta.json")
    good, about = shard.read_bytes(), meta.read_text()
    argv = ["train", "--data", "d", "--out", "new", *TINY]
    for path, raw, words in (
        (shard, good[:-2] + b"\0\0", "train_000000.bin is damaged: CRC-32"),
        (shard, shard_bytes(some_tokens(1500)), "holds 1,500 tokens, expected 1,600 by meta.json"),
        (shard, shard_bytes(some_tokens(1600), 20240801, 7, kind="I"), "uint32 tokens, expected uint16"),
        (shard, None, "which lacks train_000000.bin"),
        (meta, b"{", "meta.json is damaged"),
        (meta, b"[]", "meta.json is damaged"),
        (meta, about.replace('"tokenizer": "bytes"', '"tokenizer": 5').encode(), "tokenizer is 5"),
        (meta, about.replace('"train_0', '"../train_0').encode(), "a shard in it"),
    ):
        before = path.read_bytes()
        path.unlink() if raw is None else path.write_bytes(raw)
        refused(argv, words, capsys)
        path.write_bytes(before)
    fastgpt.train.main(argv[1:])
