"""fastgpt bench --generate: what it reports, and that other programs are given the same model."""

import json

import pytest
import torch

import gpt
from fastgpt import __main__ as front
from fastgpt import bench_generate, peers


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(n_layer=3, n_head=4, n_embd=256, block_size=128, vocab_size=1003)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 5 if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    return model


FLOAT = [(program, dtype) for program, dtype in bench_generate.RIVALS["float32"]]
SMALLER = [rival for dtype in ("bfloat16", "int8", "int4") for rival in bench_generate.RIVALS[dtype]]


def peer_of(program, model, dtype, folder):
    try:
        return program(model, dtype, str(folder))
    except peers.Missing as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("program, dtype", FLOAT, ids=str)
def test_other_programs_give_the_same_tokens(model, program, dtype, tmp_path):
    """So they have the same weights and do the same work. Twice: no text leaves anything for the next."""
    peer = peer_of(program, model, dtype, tmp_path)
    prompt = bench_generate.prompt_of(model.config, 20)
    expected = model.generate(torch.tensor([prompt]), 24, temperature=0)[0, 20:].tolist()
    assert len(set(expected)) > 8
    for _ in range(2):
        assert list(peer.stream(prompt, 24)) == expected


@pytest.mark.parametrize("program, dtype", SMALLER, ids=str)
def test_other_programs_in_smaller_dtypes_begin_alike(model, program, dtype, tmp_path):
    try:
        peer = peer_of(program, model, dtype, tmp_path)
    except ValueError as error:
        pytest.skip(f"not on this processor: {error}")
    prompt = bench_generate.prompt_of(model.config, 20)
    with torch.no_grad():
        best = model(torch.tensor([prompt]))[0, -1].topk(10).indices.tolist()
    tokens = list(peer.stream(prompt, 24))
    assert tokens[0] in best and len(tokens) == 24


def absent(model, dtype, folder):
    peers.need("no_such_package")


def broken(model, dtype, folder):
    raise RuntimeError("its own reason.\nand more")


@pytest.mark.slow
def test_the_report_names_what_is_missing_and_is_written(tmp_path, monkeypatch, capsys):
    rivals = {"float32": [(absent, "float32"), (broken, "float32")], "int8": [(absent, "int8")]}
    monkeypatch.setattr(bench_generate, "RIVALS", rivals)
    figures, report, picture = (str(tmp_path / name) for name in ("figures.json", "report.md", "plot.png"))
    argv = ["bench", "--generate", "--quick", "--seconds", "0.001", "--json", figures, "--markdown", report]
    argv += [
        "--plot",
        picture,
        "--only",
        "decode float32",
        "prefill int8",
        "batch bf",
        "context int4",
        "lookup",
        "small",
    ]
    for _ in range(2):
        assert not front.main([*argv, "first int8"])
    out = capsys.readouterr().out
    assert "Not measured: absent float32: pip install no_such_package." in out
    assert "Not measured: broken float32: failed, its own reason." in out
    with open(figures, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    assert [r["name"] for r in rows if r["case"] == "decode float32"] == ["fastgpt float32"]
    assert all(r["share"] > 0 for r in rows if r["name"].startswith("fastgpt, batch"))
    assert 0 < rows[0]["share"] and all(r["value"] > 0 for r in rows)
    ratios = {r["case"]: r["ratio"] for r in rows if r["ratio"]}
    assert ratios["batch of 8, bfloat16"] > 1 and ratios["lookup, float32"] > 1
    with open(report, encoding="utf-8") as file:
        text = file.read()
    assert text.count("## Generation: ") == 1 and "| fastgpt float32 | float32 |" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_conversion_that_is_cut_short_is_made_again(tmp_path):
    def write(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write("half")
            if not made:
                made.append(path)
                raise KeyboardInterrupt

    made: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        peers.once(str(tmp_path), "model.bin", write)
    path = peers.once(str(tmp_path), "model.bin", write)
    assert path == str(tmp_path / "model.bin") and (tmp_path / "model.bin").read_text() == "half"


@pytest.mark.parametrize("only", ("nothing", "decode x"))
def test_an_unknown_case_is_refused(only, capsys):
    assert front.main(["bench", "--generate", "--quick", "--only", only]) == 1
    assert f"--only is {only!r}, expected the beginning of one of: decode float32, " in capsys.readouterr().err
