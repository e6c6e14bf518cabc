"""fastgpt train --ops FILE: a GPT that is trained on functions of one's own."""

import sys
from pathlib import Path

import pytest
import torch

import gpt
from fastgpt.__main__ import main

RIGHT = Path(__file__).parent / "exercises" / "right.py"
SMALL = ["--n-layer", "1", "--n-embd", "16", "--block-size", "8", "--steps", "2", "--sample", "0"]


def run(*argv):
    try:
        return main(["train", *SMALL, *argv])
    except SystemExit as error:
        if isinstance(error.code, int):
            return error.code
        print(error.code, file=sys.stderr)  # as the interpreter does
        return 1


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)


def weights(out):
    return gpt.load_tensors(f"{out}/model.safetensors")[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*as ops")
def test_a_file_of_right_functions_trains_the_same_model_as_the_kernels():
    assert not run("--ops", str(RIGHT), "--out", "mine") and not run("--out", "kernels")
    mine, kernels = weights("mine"), weights("kernels")
    for name, x in kernels.items():
        torch.testing.assert_close(mine[name], x, atol=2e-5, rtol=1e-3)
    assert any(not torch.equal(mine[name], x) for name, x in kernels.items())  # other code, another rounding


@pytest.mark.slow
def test_the_file_is_what_the_model_is_trained_on(capsys):
    Path("mine.py").write_text("def gelu(x):\n    return 0 * x\n")
    assert not run("--ops=mine.py", "--out", "mine")
    moved = weights("mine")["transformer.h.0.mlp.c_fc.weight"]
    torch.manual_seed(gpt.TrainConfig.seed)
    start = gpt.GPT(gpt.GPTConfig(1, 4, 16, 8, 257)).h[0].mlp.c_fc.weight
    ratio = (moved.T if moved.shape != start.shape else moved) / start  # no gradient reaches it, only weight decay
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.flatten()[0].item()), atol=1e-5, rtol=0)
    assert not run("--ops", "mine.py", "--out", "mine", "--resume", "--steps", "3")
    assert "step 3:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, text, message",
    [
        ("missing.py", None, "missing.py is no file"),
        ("other.py", "x = 1\n", "other.py defines none of"),
        ("broken.py", "def gelu(x:\n", "broken.py: line 1: SyntaxError"),
        ("shape.py", "def gelu(x):\n    return x[:1]\n", "shape.py: gelu"),
        ("stops.py", "def gelu(x):\n    return x.detach()\n", "stops.py: gelu lets no gradient through to x"),
        ("text.txt", "gelu", "ends in '.txt', expected .py or .cpp"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_nothing_is_written(name, text, message, capsys):
    if text is not None:
        Path(name).write_text(text)
    assert run("--ops", name, "--out", "mine") == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("fastgpt train: error: ") and err.count("\n") == 1
    assert not Path("mine").exists()


def test_ops_needs_a_file(capsys):
    assert run("--ops") == 2
    assert "argument --ops: expected one argument" in capsys.readouterr().err
