"""fastgpt generate: what it shows and when, on a model that recites a text, byte by byte."""

import io
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastgpt
import gpt
from fastgpt import __main__ as front
from fastgpt import decoder as decoding
from fastgpt.generate import Text


def reciter(script, folder, block_size=None):
    """A saved model whose most likely token after position p is script[p], whatever came before."""
    script = script.encode() if isinstance(script, str) else script
    config = gpt.GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=block_size or len(script) + 1, vocab_size=257)
    torch.manual_seed(0)
    model = gpt.GPT(config)
    with torch.no_grad():
        for layer in (model.h[0].attn.c_proj, model.h[0].mlp.c_proj):
            layer.weight.zero_()  # x stays wte[id] + wpe[position]
        for p, byte in enumerate(script[: config.block_size]):
            model.wpe.weight[p] = 20 * model.wte.weight[byte]
    model.save_pretrained(str(folder), tokenizer="bytes")
    return str(folder)


class Shown(io.StringIO):
    """What is written, piece by piece."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        if text:
            self.pieces.append(text)
        return super().write(text)


def run(monkeypatch, *argv):
    """-> what it shows after the prompt "\\n", in pieces, and the lines on stderr"""
    shown, errors = Shown(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", errors)
    assert front.main(["generate", "--temperature", "0", *argv]) == 0
    return shown.pieces, errors.getvalue().splitlines()


def generate(monkeypatch, tmp_path, script, *argv):
    n = str(len(script.encode()))
    return run(monkeypatch, "--model", reciter(script, tmp_path), "--max-new-tokens", n, *argv)


def test_a_stream_shows_whole_characters_as_they_come(monkeypatch, tmp_path):
    pieces, _ = generate(monkeypatch, tmp_path, "aé€😀b")
    assert [piece for piece in pieces if piece.strip()] == ["a", "é", "€", "😀", "b"]


def test_a_character_that_is_cut_off_shows_at_the_end(monkeypatch, tmp_path):
    pieces, _ = run(monkeypatch, "--model", reciter("a€", tmp_path), "--max-new-tokens", "3")
    assert "".join(pieces) == "\na\ufffd\n"


def test_a_stop_string_is_held_back_while_it_may_still_come(monkeypatch, tmp_path):
    pieces, _ = generate(monkeypatch, tmp_path, "EN. EEND, and more", "--stop", "END")
    assert "".join(pieces) == "\nEN. E\n"  # EN was held, shown, and the last END never
    assert "EN." in pieces and "E" in pieces


def test_the_first_of_several_stop_strings_ends_the_text(monkeypatch, tmp_path):
    pieces, _ = generate(monkeypatch, tmp_path, "one, zwö; three", "--stop", "; t", "--stop", "wö")
    assert "".join(pieces) == "\none, z\n"


def test_generation_ends_with_the_stop_string(monkeypatch, tmp_path):
    _, errors = generate(monkeypatch, tmp_path, "one. two. three.", "--stop", ".", "--logprobs")
    assert sum(" b'" in line for line in errors) == len("one.")


def test_a_held_end_is_shown_when_no_more_tokens_come(monkeypatch, tmp_path):
    pieces, _ = generate(monkeypatch, tmp_path, "the EN", "--stop", "END")
    assert "".join(pieces) == "\nthe EN\n"


@given(text=st.text("ab é"), stop=st.text("ab é", min_size=1, max_size=4), cuts=st.lists(st.integers(1, 4)))
def test_what_is_shown_is_the_text_before_the_stop_string_however_tokens_cut_it(text, stop, cuts):
    shown, data, whole = Text((stop,)), text.encode(), ""
    expected = text.partition(stop)[0]
    for cut in [*cuts, len(data)]:
        whole += shown.add(data[:cut])
        data = data[cut:]
        assert expected.startswith(whole) and shown.text == whole
    assert whole + shown.add(b"", final=True) == expected
    assert shown.stopped == (stop in text)


def test_logprobs_are_gpt_pys(monkeypatch, tmp_path):
    model = gpt.GPT(gpt.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257)).eval()
    with torch.no_grad():
        model.wte.weight *= 20
    model.save_pretrained(str(tmp_path), tokenizer="bytes")
    _, errors = run(monkeypatch, "--model", str(tmp_path), "--max-new-tokens", "12", "--logprobs", "--prompt", "abc")
    idx = model.generate(torch.tensor([list(b"abc")]), 12, temperature=0)
    with torch.no_grad():
        expected = model(idx)[0, 2:-1].log_softmax(-1).gather(-1, idx[0, 3:, None])[:, 0]
    lines = [line.split(maxsplit=1) for line in errors if re.match(r" *-?\d+\.\d{4} b", line)]
    assert [eval(text) for _, text in lines] == [bytes([i]) for i in idx[0, 3:].tolist()]
    torch.testing.assert_close(torch.tensor([float(number) for number, _ in lines]), expected, rtol=0, atol=2e-4)


def test_samples_share_one_prefill_and_are_gpt_pys(monkeypatch, tmp_path):
    folder, prefills = reciter("to be or not to be", tmp_path, 40), []
    prefill = decoding.Sequences._prefill

    def counted(self, window, *rest):
        prefills.append(window.shape)
        return prefill(self, window, *rest)

    monkeypatch.setattr(decoding.Sequences, "_prefill", counted)
    prompt = "a prompt of some length"
    how = ["--samples", "3", "--seed", "4", "--temperature", "1.5", "--max-new-tokens", "9", "--prompt", prompt]
    pieces, errors = run(monkeypatch, "--model", folder, *how, "--logprobs")
    assert prefills == [(1, len(prompt))]
    model = gpt.GPT.from_pretrained(folder)
    rows = model.generate(torch.tensor([list(prompt.encode())] * 3), 9, temperature=1.5, top_k=200, seed=4).tolist()
    decode = gpt.get_tokenizer("bytes").decode
    assert "".join(pieces) == "".join(f"{decode(row)}\n---\n" for row in rows)
    assert [line.split()[0] for line in errors if " b" in line] == ["0"] * 9 + ["1"] * 9 + ["2"] * 9


def test_stats_tell_prefill_decode_context_and_a_window_that_slides(monkeypatch, tmp_path):
    folder = reciter("x" * 24, tmp_path, 24)
    _, errors = run(monkeypatch, "--model", folder, "--max-new-tokens", "10", "--stats", "--prompt", "0123456789")
    text = "\n".join(errors)
    assert re.search(r"^prefill: 10 tokens, once for all samples: [\d,.]+ tokens/s$", text, re.M)
    assert re.search(r"^decode: [\d,.]+ tokens/s in float32; [\d.]+ GB/s of weights, .* \d+% of the", text, re.M)
    assert "context: 20 of 24 positions, keys and values in float32" in text and "slid" not in text
    _, errors = run(monkeypatch, "--model", folder, "--max-new-tokens", "20", "--stats", "--prompt", "0123456789")
    assert any(line.startswith("the window slid for 5 tokens, each a whole pass: ") for line in errors)


def test_a_stream_left_in_the_middle_harms_no_other(tmp_path):
    decoder = fastgpt.Decoder(reciter("abcdefghijklmnop", tmp_path))
    start = torch.tensor([[1], [2]])
    expected = decoder.generate(start, 12, temperature=0.9, seed=1)
    left = decoder.stream(start, 12, temperature=0.9, seed=2)
    assert len([next(left) for _ in range(5)]) == 5
    among = []
    for new in decoder.stream(start, 12, temperature=0.9, seed=1):  # while another one is under way
        among.append(new)
        next(left, None)
        if len(among) == 4:
            left.close()
    assert torch.equal(torch.stack(among, 1), expected[:, 1:])
    assert torch.equal(decoder.generate(start, 12, temperature=0.9, seed=1), expected)


def test_a_reader_that_raises_in_the_middle_leaves_the_decoder_free(tmp_path):
    decoder = fastgpt.Decoder(reciter("abcdefgh", tmp_path))

    def each(logits, new):
        raise RuntimeError("the reader's own")

    with pytest.raises(RuntimeError, match="the reader's own"):
        next(decoder.stream(torch.tensor([[1]]), 5, each=each))
    assert decoder.generate(torch.tensor([[1]]), 5, temperature=0).tolist() == [[1, *b"abcde"]]
