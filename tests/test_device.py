"""Training on torch's own functions and on other devices. Without a GPU: on the CPU, and on fake tensors that are on one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgpt.train
import gpt
from fastgpt import device, metrics, torch_ops
from fastgpt.device import Place

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --steps 6 --eval-every 3 --sample 3 --warmup 2".split()
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def train(data):
    def run(out, *more):
        fastgpt.train.main(["--out", str(out), "--data", data, *TINY, *more])

    return run


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return gpt.load_tensors(out / "training.safetensors")[0]


def assert_close(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], **tolerance)


def assert_same(a, b):
    assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- torch's functions


@pytest.mark.parametrize("bias", (True, False))
def test_torchs_functions_are_the_formulas(bias):
    """In float64, where no more than rounding's last digits may differ; gradients too."""
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64, requires_grad=True)

    targets = torch.tensor([[3, -1, 5], [0, 6, -1]])
    x, weight, b = normal(2, 3, 12), normal(7, 12), normal(7) if bias else None
    for name, inputs, rest in (
        ("layer_norm", (x, normal(12), normal(12)), ()),
        ("gelu", (x,), ()),
        ("linear", (x, weight, b), ()),
        ("linear_gelu", (x, weight, b), ()),
        ("attention", (x,), (2,)),
        ("lm_loss", (x, weight), (targets,)),
    ):
        results = []
        for ops in (gpt, torch_ops):
            out = getattr(ops, name)(*inputs, *rest)
            leaves = [x for x in inputs if x is not None]
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_model_on_torchs_functions_is_a_gpt2_to_the_files_and_uses_all_of_them(small, tmp_path):
    model = gpt.GPT(small, torch_ops)
    assert model.ops.linear_gelu is torch_ops.linear_gelu and gpt.own_formulas(model.ops) == {}


def test_ops_torch_trains_the_same_model_as_the_kernels(train, tmp_path, capsys):
    train(tmp_path / "torch", "--ops", "torch", "--accumulate", "2")
    train(tmp_path / "kernels", "--accumulate", "2")
    assert_close(tmp_path / "torch", tmp_path / "kernels", rtol=1e-3, atol=2e-5)
    assert 0 < rows(tmp_path / "torch")[-1]["mfu"] < 1
    capsys.readouterr()
    train(tmp_path / "torch", "--resume", "--steps", "7")
    assert "last digits may differ: torch" in (said := capsys.readouterr().out) and "fastgpt.torch_ops on" in said


@pytest.mark.slow
@pytest.mark.parametrize("more", ((), ("--dtype", "bfloat16")), ids=("float32", "bfloat16"))
def test_a_run_on_torchs_functions_goes_on_as_if_it_had_never_stopped(train, tmp_path, more):
    """With dropout, whose numbers are torch's own."""
    more = ("--ops", "torch", "--dropout", "0.2", *more)
    train(tmp_path / "whole", *more)
    train(tmp_path / "parts", *more, "--steps", "6", "--eval-every", "2")
    os.rename(tmp_path / "parts", tmp_path / "first")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError, match="killed"):
        real = gpt.train_step
        patch.setattr(gpt, "train_step", lambda *args: real(*args) if args[3] < 4 else {}["killed"])
        train(tmp_path / "parts", *more)
    train(tmp_path / "parts", "--resume", *more)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_bfloat16_is_autocast_around_the_loss(small):
    idx = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    idx, targets = idx[:, :-1], idx[:, 1:]
    torch.manual_seed(0)
    model = gpt.GPT(small, torch_ops)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gpt.GPT.loss(model, idx, targets)
    plain = gpt.GPT.loss(model, idx, targets)
    Place(CPU, autocast=True).settle(model, None, None)
    assert model.loss(idx, targets) == expected != plain


def test_a_place_without_anything_special_leaves_the_model_alone(small):
    model = gpt.GPT(small)
    assert Place(CPU).settle(model, "optimizer", None) == (model, "optimizer") and "loss" not in vars(model)


@pytest.mark.slow
@pytest.mark.parametrize("what", ("torch", "file"))
def test_own_functions_stand_beside_torchs_where_those_are_asked_for(what, tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("import torch\ndef gelu(x):\n    return x.sigmoid() * x\n")
    monkeypatch.setattr(device, "find", lambda name: GPU)
    monkeypatch.setattr(device, "Place", lambda *args: SimpleNamespace(args=args))
    typed = dict(device="cuda", dtype="bfloat16", ops="torch" if what == "torch" else str(path))
    ops, place = fastgpt.train.choose(typed, fastgpt)
    assert place.args == (GPU, True, False) and not typed
    assert ops.attention is torch_ops.attention
    assert (ops.gelu is torch_ops.gelu) is (what == "torch")
    (tmp_path / "mine.cpp").write_text("nothing")
    with pytest.raises(ValueError, match="expected a Python file: C"):
        fastgpt.train.choose(dict(device="cuda", ops=str(tmp_path / "mine.cpp")), fastgpt)


# ------------------------------------------------------------------------------------------------------- compilation


def compiled_by(backend, monkeypatch):
    """torch.compile with another backend. -> how many graphs it was given, as a list that grows"""
    graphs, real = [], torch.compile
    inner = torch._dynamo.lookup_backend(backend)

    def count(graph, inputs, **options):
        graphs.append(graph)
        return inner(graph, inputs, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=count))
    return graphs


@pytest.mark.slow
def test_a_compiled_run_is_one_graph_and_the_same_model(train, tmp_path, monkeypatch):
    """Also with dropout: its seed, an int, ends no graph. Compilation to machine code is inductor's."""
    graphs = compiled_by("aot_eager", monkeypatch)
    train(tmp_path / "compiled", "--ops", "torch", "--compile")
    assert len(graphs) == 2  # the trial's and the loss
    train(tmp_path / "plain", "--ops", "torch")
    assert_close(tmp_path / "compiled", tmp_path / "plain", rtol=1e-3, atol=2e-5)
    train(tmp_path / "dropout", "--ops", "torch", "--compile", "--dropout", "0.1", "--n-layer", "2")
    assert len(graphs) <= 4


@pytest.mark.slow
def test_compiled_machine_code_trains_the_same_model(train, tmp_path):
    torch._dynamo.reset()
    train(tmp_path / "compiled", "--ops", "torch", "--compile")
    train(tmp_path / "plain", "--ops", "torch")
    assert_close(tmp_path / "compiled", tmp_path / "plain", rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_without_a_compiler_nothing_begins(out, tmp_path):
    argv = [sys.executable, "-m", "fastgpt", "train", "--ops", "torch", "--compile", "--out", out]
    env = dict(CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), PYTHONPATH=str(Path(gpt.__file__).parent))
    result = subprocess.run(argv, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "error: --compile: torch.compile does not work here (InvalidCxxCompiler: " in result.stderr
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------- other devices


@pytest.mark.slow
def test_no_operation_of_a_step_mixes_devices():
    """Nor of what goes there and comes back: with and without adapters and dropout."""
    argv = [sys.executable, Path(__file__).parent / "fake_device.py"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.count("\n") == 4, result.stderr


class CopyOnTheCPU(Place):
    """As if the CPU were another device: the model is copied, trained there and fetched."""

    def __init__(self, device, *rest):
        super().__init__(device, *rest)
        self.away = True

    limit = staticmethod(lambda ops: metrics.limit())


@pytest.mark.parametrize("more", ((), ("--dropout", "0.1", "--accumulate", "2")), ids=("plain", "dropout"))
def test_a_copy_that_is_trained_and_fetched_gives_the_bits_of_the_model_itself(
    train, tmp_path, monkeypatch, capsys, more
):
    more = ("--ops", "torch", *more)
    train(tmp_path / "itself", *more)
    said = capsys.readouterr().out
    monkeypatch.setattr(device, "Place", CopyOnTheCPU)
    train(tmp_path / "copy", *more)
    told = capsys.readouterr().out
    assert said.split("saved in")[1].split("\n")[1:] == told.split("saved in")[1].split("\n")[1:]  # the sample
    assert_same(tmp_path / "itself", tmp_path / "copy")
    best = [gpt.load_tensors(tmp_path / name / "best" / "model.safetensors")[0] for name in ("itself", "copy")]
    assert all(torch.equal(x, best[1][name]) for name, x in best[0].items())
    for name in ("loss", "norm", "validation"):
        assert [row[name] for row in rows(tmp_path / "itself")] == [row[name] for row in rows(tmp_path / "copy")]


def test_a_run_goes_from_one_device_to_another_and_back_and_says_so(train, tmp_path, monkeypatch, capsys):
    train(tmp_path / "whole", "--ops", "torch", "--steps", "9")
    real = gpt.train_step
    for last, place, more in ((4, CopyOnTheCPU, ()), (7, Place, ("--resume",)), (99, CopyOnTheCPU, ("--resume",))):
        with monkeypatch.context() as patch:
            patch.setattr(device, "Place", place)
            patch.setattr(Place, "__str__", lambda place: type(place).__name__)
            patch.setattr(gpt, "train_step", lambda *args, last=last: real(*args) if args[3] < last else {}["killed"])
            try:
                train(tmp_path / "parts", "--ops", "torch", "--steps", "9", *more)
            except KeyError:
                assert last < 99
        said = capsys.readouterr().out
    assert "fastgpt.torch_ops on CopyOnTheCPU, it was" in said and said.splitlines()[1].endswith("on Place")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_an_adapter_is_trained_in_a_copy_and_fetched(train, tmp_path, monkeypatch):
    train(tmp_path / "base")
    more = ("--ops", "torch", "--init", str(tmp_path / "base"), "--lora", "2")
    train(tmp_path / "itself", *more)
    monkeypatch.setattr(device, "Place", CopyOnTheCPU)
    train(tmp_path / "copy", *more)
    assert_same(tmp_path / "itself", tmp_path / "copy")
    merged = [gpt.load_tensors(tmp_path / name / "model.safetensors")[0] for name in ("itself", "copy")]
    assert all(torch.equal(x, merged[1][name]) for name, x in merged[0].items())


# ------------------------------------------------------------------------------------------------- what is not there


@pytest.fixture
def gpus(monkeypatch):
    """A function: as if torch were built for such devices, and found so many."""

    def have(kind, count):
        built = torch.device(kind)
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available=False: built if count or not check_available else None,
        )
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)

    chosen = have.chosen = []
    return have


def test_each_process_takes_the_gpu_of_its_number(gpus, monkeypatch):
    gpus("cuda", 2)
    assert device.find("cuda") == GPU and device.find("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.find("cuda") == torch.device("cuda", 1)
    assert gpus.chosen == [0, 1, 1]
    assert device.find("cpu") == CPU
    with pytest.raises(ValueError, match="--device is 'cuda:0' for several processes, expected cpu or cuda"):
        device.find("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match="--device is 'cuda': this process would take GPU 2, expected 0 to 1, or fewer"
    ):
        device.find("cuda")


@pytest.mark.parametrize(
    "have, name, message",
    [
        (None, "gpu", "--device is 'gpu', expected cpu, cuda, cuda:N or mps"),
        (None, "cuda:", "expected cpu, cuda, cuda:N or mps"),
        (None, "meta", "expected cpu, cuda, cuda:N or mps"),
        (("cuda", 0), "cuda", "--device is 'cuda', but torch {} finds no GPU, expected cpu"),
        (("cuda", 1), "cuda:1", "--device is 'cuda:1': this process would take GPU 1, expected 0 to 0"),
        (("cuda", 1), "mps", "--device is 'mps', but torch {} was built without mps, expected cuda or cpu"),
        (("mps", 1), "cuda", "--device is 'cuda', but torch {} was built without cuda, expected mps or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_one_line_and_nothing_is_written(train, out, gpus, have, name, message):
    if have:
        gpus(*have)
    with pytest.raises(SystemExit) as end:
        train(out, "--device", name)
    assert message.format(torch.__version__) in end.value.code and "\n" not in end.value.code
    assert not out.exists()


def test_bfloat16_that_a_gpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="--dtype is bfloat16, which cuda:0 lacks, expected float32"):
        Place(GPU, autocast=True)
    with pytest.raises(ValueError, match="--dtype is bfloat16, which mps lacks"):  # nor has torch an mps here
        Place(torch.device("mps"), autocast=True)


def test_options_that_do_not_go_together_are_one_line(train, out):
    for more, message in (
        (("--compile",), "--compile is for torch's functions, expected --ops torch with it"),
        (("--dtype", "bfloat16", "--ops", "mine.py"), "--dtype is bfloat16 with --ops mine.py, expected float32"),
    ):
        with pytest.raises(SystemExit) as end:
            train(out, *more)
        assert message in end.value.code and "\n" not in end.value.code and not out.exists()
