"""fastgpt eval --choices: endings, their scores, which items are right, and two models beside each other."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgpt
import gpt
from fastgpt import __main__ as front
from fastgpt import choices

T = 24
SIZES = gpt.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=257)
BYTES = gpt.get_tokenizer("bytes")


def make_model(seed, ops=None):
    """Logits that differ by several nats."""
    torch.manual_seed(seed)
    model = gpt.GPT(SIZES, ops)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model.eval()


def make_items(n, seed=0):
    rng = random.Random(seed)

    def words(most):
        return " ".join("".join(rng.choices("abcdefg", k=rng.randint(1, 4))) for _ in range(rng.randint(1, most)))

    lines = [
        dict(ctx=words(8), endings=[words(3) for _ in range(rng.randint(2, 5))], label=rng.randint(0, 1))
        for _ in range(n)
    ]
    return [choices.make_item(i, line) for i, line in enumerate(lines, 1)], lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def plain_log_probability(model, row):
    """Token by token, one row, no padding, no batch."""
    total, first = 0.0, len(row.tokens) - row.n
    for at in range(first, len(row.tokens)):
        with torch.no_grad():
            logits = model(torch.from_numpy(row.tokens[None, :at]))[0, -1]
        total += float(logits.log_softmax(-1)[row.tokens[at]])
    return total


@pytest.fixture(scope="module")
def scored():
    """-> a model in float64, rows of 12 items, and their scores one by one"""
    model = make_model(1).double()
    items, _ = make_items(12)
    rows = [row for item in choices.encode(items, BYTES, T)[0] for row in item]
    return model, rows, torch.tensor([plain_log_probability(model, row) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("batch_size", (1, 3, 1000))
def test_scores_are_those_of_single_rows_whatever_the_batch(scored, batch_size):
    model, rows, expected = scored
    sums = choices.log_probabilities(model, rows, batch_size)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    assert len({len(row.tokens) for row in rows}) > 5  # there was something to fill up


@pytest.mark.parametrize("batch_size", (1, 7, 1000))
@pytest.mark.parametrize("kind", ("kernels", "decoder"))
def test_kernels_and_decoder_give_these_scores_in_float32(scored, kind, batch_size):
    _, rows, expected = scored
    model = make_model(1, fastgpt) if kind == "kernels" else fastgpt.Decoder(make_model(1))
    sums = choices.log_probabilities(model, rows, batch_size)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0)


def test_a_row_is_the_context_then_a_space_and_the_ending(gpt2_tokenizer_files):
    import tiktoken.registry

    tiktoken.registry.ENCODINGS.pop("gpt2", None)
    tokenizer = gpt.get_tokenizer("gpt2")
    item = choices.Item(1, "The cook lifts the lid. She", ["stirs the soup.", "climbs <|endoftext|> a roof"], 0)
    ((first, second),), cut = choices.encode([item], tokenizer, 1024)
    assert tokenizer.decode(first.tokens.tolist()) == "The cook lifts the lid. She stirs the soup."
    assert first.tokens.tolist()[-first.n :] == tokenizer.encode(" stirs the soup.") and first.n == 5 and cut == 0
    assert first.tokens[: -first.n].tolist() == second.tokens[: -second.n].tolist()
    assert tokenizer.eot_token not in second.tokens  # there it is only text


def test_a_long_context_is_cut_on_the_left_as_much_for_every_ending():
    item = choices.Item(1, "0123456789" * 5, ["abc", "abcdefgh"], 0)
    ((short, long),), cut = choices.encode([item], BYTES, T)
    assert bytes(long.tokens.tolist()) == b"4567890123456789 abcdefgh" and len(long.tokens) == T + 1
    assert bytes(short.tokens.tolist()) == b"4567890123456789 abc"
    assert cut == 1
    whole = choices.Item(1, "4567890123456789", ["abcdefgh"], 0)
    assert choices.encode([whole], BYTES, T)[1] == 0


def test_an_empty_context_is_endoftext():
    ((row, _),), _ = choices.encode([choices.Item(1, "", ["a", "b"], 0)], BYTES, T)
    assert row.tokens.tolist() == [256, ord(" "), ord("a")]


def test_the_sum_and_the_mean_may_choose_different_endings(monkeypatch):
    items = [choices.Item(1, "c", ["a", "abcdefg"], 1), choices.Item(2, "c", ["a", "b", "abc"], 1)]
    rows, _ = choices.encode(items, BYTES, T)
    assert [row.n for item in rows for row in item] == [2, 8, 2, 2, 4]
    sums = torch.tensor([-4.0, -8.0, -2.0, -1.0, -3.0])  # means: -2, -1; -1, -0.5, -0.75
    monkeypatch.setattr(choices, "log_probabilities", lambda *_: sums)
    right = choices.correct(None, items, rows, 1)
    assert right["acc"].tolist() == [False, True] and right["acc_norm"].tolist() == [True, True]


def test_standard_error_is_that_of_a_mean():
    right = np.array([True, False, False, True, True, False, True])
    assert choices.standard_error(right) == pytest.approx(right.std(ddof=1) / 7**0.5)
    assert np.isnan(choices.standard_error(right[:1]))


def test_mcnemar_counts_the_throws_of_a_coin_that_are_as_far_from_even():
    for n in range(1, 11):
        throws = [sum(throw) for throw in itertools.product((0, 1), repeat=n)]
        for won in range(n + 1):
            as_far = sum(abs(2 * x - n) >= abs(2 * won - n) for x in throws)
            assert choices.mcnemar(won, n - won) == pytest.approx(as_far / 2**n)
    assert choices.mcnemar(0, 0) == 1
    assert choices.mcnemar(5000, 5300) == pytest.approx(0.0032, abs=1e-4)  # normal distribution: z = 2.946


# ----------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """-> two models' folders, and 60 items"""
    tmp = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 1), ("two", 2)):
        make_model(seed).save_pretrained(str(tmp / name), tokenizer="bytes")
    return str(tmp / "one"), str(tmp / "two"), write(tmp / "items.jsonl", make_items(60)[1])


def plain_right(folder, lines):
    """Which items this model gets right, by sums."""
    model, right = gpt.GPT.from_pretrained(folder).double(), []
    for line in lines:
        rows = choices.encode([choices.make_item(1, line)], BYTES, T)[0][0]
        right.append(int(np.argmax([plain_log_probability(model, row) for row in rows])) == line["label"])
    return np.array(right)


def test_the_command_prints_both_accuracies(folders, capsys):
    one, _, path = folders
    assert front.main(["eval", one, "--choices", path, "--limit", "25", "--batch-size", "5"]) == 0
    first, cut, titles, figures = capsys.readouterr().out.splitlines()
    right = plain_right(one, make_items(60)[1][:25])
    assert 0.1 < right.mean() < 0.9
    n = choices.encode(make_items(25)[0], BYTES, T)[1]
    assert n > 2 and cut == f"{n} contexts were too long for {T} positions and were cut on the left"
    assert first.startswith("25 items; by chance 0.3") and titles.split() == ["acc", "acc_norm"]
    assert figures.split()[:4] == [one, f"{right.mean():.4f}", "±", f"{choices.standard_error(right):.4f}"]


@pytest.mark.slow
def test_two_models_are_compared_item_by_item(folders, capsys):
    one, two, path = folders
    assert front.main(["eval", one, "--choices", path, "--against", two, "float32"]) == 0
    *_, titles, base, other, same, _ = capsys.readouterr().out.splitlines()
    a, b = (plain_right(folder, make_items(60)[1]) for folder in (one, two))
    won, lost = int((b & ~a).sum()), int((a & ~b).sum())
    assert won != lost and min(won, lost) > 0
    assert titles.split() == ["acc", "won", "lost", "p", "acc_norm", "won", "lost", "p"]
    assert base.split()[:3] == [one, "float32", f"{a.mean():.4f}"]
    p = f"{choices.mcnemar(won, lost):.4f}"
    assert other.split()[:2] == [two, f"{b.mean():.4f}"] and other.split()[4:7] == [str(won), str(lost), p]
    assert same.split()[4:7] == ["0", "0", "1.0000"] == same.split()[-3:]
    assert len({len(line) for line in (titles, other, same)}) == 1  # columns stand below each other


def test_hellaswags_fields_are_read_and_empty_lines_are_none(tmp_path):
    path = tmp_path / "items.jsonl"
    parts = dict(ctx_a="A man sits.", ctx_b="he", endings=["runs.", "sleeps."], label="1", ind=3, split="val")
    whole = dict(ctx="A man sits. he", endings=["runs.", "sleeps."], label=1)
    path.write_text(f"\n{json.dumps(parts)}\r\n  \n{json.dumps(whole)}")
    a, b = choices.read(str(path))
    assert (a.line, b.line) == (2, 4) and vars(a) | dict(line=4) == vars(b)
    path.write_text(json.dumps(parts | dict(ctx_b="")))
    assert choices.read(str(path))[0].context == "A man sits."
    path.write_text(f"{json.dumps(whole)}\nno item")
    assert len(choices.read(str(path), limit=1)) == 1  # what comes later is not read


GOOD = dict(ctx="c", endings=["a", "b"], label=0)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 of items.jsonl is no item (Expecting property name"),
        ("[1, 2]", "(expected an object with ctx, endings and label)"),
        (b'"\xff"', "line 2 of items.jsonl is no item ('utf-8' codec can't decode"),
        (dict(endings=["a", "b"], label=0), "(ctx is None, expected a text, or ctx_a and ctx_b)"),
        (GOOD | dict(ctx=3), "(ctx is 3, expected a text"),
        (GOOD | dict(ctx="\ud800"), "surrogates not allowed"),
        (dict(ctx="c", label=0), "(endings is None, expected a list of two or more)"),
        (GOOD | dict(endings=["a"]), "(endings is ['a'], expected a list of two or more)"),
        (GOOD | dict(endings=["a", " "]), "(ending 1 is ' ', expected a text that isn't empty)"),
        (GOOD | dict(endings=["a", 4]), "(ending 1 is 4, expected a text"),
        (GOOD | dict(label=2), "(label is 2, expected 0 <= label < 2, the number of endings)"),
        (GOOD | dict(label=-1), "(label is -1, expected"),
        (GOOD | dict(label=""), "(label is '', expected"),  # as in HellaSwag's test set
        (GOOD | dict(label=True), "(label is True, expected"),
        (dict(ctx="c", endings=["a", "b"]), "(label is None, expected"),
        (GOOD | dict(endings=["a", "b" * 24]), "ending 1 of line 2 has 25 tokens, expected at most 24, the model's"),
    ],
)
def test_a_line_that_is_no_item_is_named(folders, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    line = json.dumps(line) if isinstance(line, dict) else line
    Path("items.jsonl").write_bytes(b"%s\n%s\n" % (json.dumps(GOOD).encode(), line if isinstance(line, bytes) else line.encode()))  # fmt: skip
    refused(["eval", folders[0], "--choices", "items.jsonl"], message, capsys)


def refused(argv, message, capsys):
    assert front.main(argv) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("fastgpt eval: error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--choices", "nothing.jsonl"], "--choices is 'nothing.jsonl', expected a readable JSONL file"),
        (["--choices", "."], "--choices is '.', expected a readable JSONL file"),
        (["--choices", "empty.jsonl"], "--choices is 'empty.jsonl', which has no items"),
        (["--choices", "{items}", "--limit", "0"], "--limit is 0, expected limit >= 1"),
        (["--limit", "3"], "--limit is 3, expected --choices with it"),
        (["--choices", "{items}", "--data", "x"], "--choices and --data: expected one of them"),
        (["--choices", "{items}", "--stride", "3"], "--choices and --stride: expected one of them"),
        (["--choices", "{items}", "--all"], "--choices and --all: expected one of them"),
        (["--choices", "{items}", "--tokenizer", "words"], "expected 'gpt2', 'bytes' or a folder"),
        (["--choices", "{items}", "--against", "int3"], "int3"),
        (["--choices", "{items}", "--model", "missing"], "expected one of them"),
    ],
)
def test_bad_input_is_one_line_and_status_1(folders, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n \n")
    refused(["eval", folders[0], *(word.format(items=folders[2]) for word in argv)], message, capsys)


@pytest.mark.parametrize("against", ([], ["--against", "int8"]))
def test_logits_that_are_not_finite_are_an_error(folders, tmp_path, capsys, against):
    model = make_model(1)
    model.ln_f.weight.data.fill_(1e38)
    model.wte.weight.data.mul_(1e3)
    model.save_pretrained(str(tmp_path), tokenizer="bytes")
    for argv in (["--choices", folders[2]], []):
        refused(["eval", str(tmp_path), *argv, *against], "the logits are not finite", capsys)
