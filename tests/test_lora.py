"""Adapters: they begin as nothing, alone are trained, go on exactly, and are PEFT's in their files."""

import json

import pytest
import torch

import fastgpt
import fastgpt.__main__
import fastgpt.train
import gpt
from fastgpt import lora

TINY = "--batch-size 4 --steps 6 --eval-every 3 --sample 1 --warmup 2".split()
SIZES = "--n-layer 2 --n-head 2 --n-embd 16 --block-size 16".split()
FOUR = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def base(data, tmp_path):
    gpt.main(["train", "--out", str(tmp_path / "base"), "--data", data, *TINY, *SIZES])
    return str(tmp_path / "base")


@pytest.fixture
def tune(data, base):
    def run(out, *more, ops=fastgpt):
        argv = ["--out", str(out), "--data", data, "--init", base, "--lora", "3", "--lr", "0.01", *TINY, *more]
        fastgpt.train.main(argv, ops)

    return run


def perturbed(model):
    """As after training: B is no longer zero."""
    for module in lora.adapters(model).values():
        module.lora_B.data.normal_(0.0, 0.1)
    return model


def tokens(config):
    return torch.randint(config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(0))


def test_a_new_adapter_changes_no_bit(small, ops):
    torch.manual_seed(0)
    model = gpt.GPT(small, ops)
    idx = tokens(small)
    before, loss = model(idx), model.loss(idx, idx)
    lora.adapt(model, 4, 8.0)
    assert len(lora.adapters(model)) == 4 * small.n_layer
    assert torch.equal(before, model(idx)) and torch.equal(loss, model.loss(idx, idx))


def test_adapters_alone_get_gradients(small, ops):
    model = perturbed(lora.adapt(gpt.GPT(small, ops), 4, 8.0))
    idx = tokens(small)
    model.loss(idx, idx).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name), name
        assert p.grad is None or p.grad.abs().max() > 0, name


def test_merged_weights_compute_what_the_adapters_did(small):
    """In float64, where only a wrong formula could tell them apart."""
    torch.manual_seed(0)
    model = perturbed(lora.adapt(gpt.GPT(small), 4, 8.0).double())
    plain = gpt.GPT(small).double()
    plain.load_state_dict(model.state_dict())
    idx = tokens(small)
    torch.testing.assert_close(plain(idx), model(idx), rtol=1e-11, atol=1e-13)
    fresh = lora.adapt(gpt.GPT(small).double(), 4, 8.0)
    assert not torch.allclose(fresh(idx), model(idx), rtol=1e-3)


def test_kernels_train_adapters_as_the_formulas_do(small):
    models = {}
    for name, ops in (("formulas", None), ("kernels", fastgpt), ("truth", None)):
        torch.manual_seed(0)
        models[name] = perturbed(lora.adapt(gpt.GPT(small, ops), 4, 8.0))
    models["truth"].double()
    idx, grads = tokens(small), {}
    for name, model in models.items():
        model.loss(idx, idx).backward()
        grads[name] = torch.cat([p.grad.double().flatten() for p in gpt.trained(model).values()])
    errors = {name: (grads[name] - grads["truth"]).norm() for name in ("formulas", "kernels")}
    assert errors["kernels"] <= 2 * errors["formulas"] and errors["formulas"] < 1e-4 * grads["truth"].norm()


def test_training_leaves_the_base_as_it_was_and_saves_it_merged(tune, base, tmp_path):
    tune(tmp_path / "out", "--lora-alpha", "6")
    saved, _ = gpt.load_tensors(tmp_path / "out" / "training.safetensors")
    assert all("lora_" in name for name in saved) and len(saved) == 3 * 2 * 4 * 2  # weights and moments; A and B
    original = gpt.GPT.from_pretrained(base).state_dict()
    merged = gpt.GPT.from_pretrained(str(tmp_path / "out")).state_dict()
    for name, x in original.items():
        place = name.removesuffix(".weight")
        if f"{place}.lora_A" in saved:
            x = x + 6 / 3 * saved[f"{place}.lora_B"] @ saved[f"{place}.lora_A"]
            assert saved[f"{place}.lora_B"].abs().max() > 0
        assert torch.equal(x, merged[name]), name
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[-1]["validation"] < rows[2]["validation"] and rows[0]["mfu"] is None


def test_a_resumed_run_equals_one_in_one_go(tune, tmp_path, monkeypatch):
    tune(tmp_path / "whole", "--dropout", "0.1")
    real = gpt.train_step

    def interrupted(*args):
        if args[3] == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(gpt, "train_step", interrupted)
        tune(tmp_path / "parts", "--dropout", "0.1")
    fastgpt.train.main(["--resume", "--out", str(tmp_path / "parts")])
    for name in ("training.safetensors", "model.safetensors", "adapter_model.safetensors"):
        a, b = (gpt.load_tensors(tmp_path / run / name)[0] for run in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())


def test_the_files_have_pefts_names_and_shapes(tune, tmp_path):
    tune(tmp_path / "out")
    tensors, _ = gpt.load_tensors(tmp_path / "out" / "adapter_model.safetensors")
    shapes = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
    expected = {}
    for i in range(2):
        for name, (N, K) in shapes.items():
            prefix = f"base_model.model.transformer.h.{i}.{name}"
            expected |= {f"{prefix}.lora_A.weight": (3, K), f"{prefix}.lora_B.weight": (N, 3)}
    assert {name: tuple(x.shape) for name, x in tensors.items()} == expected
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 3.0, True)
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]


def test_a_run_without_adapters_leaves_no_files_of_one_that_had_some(tune, data, tmp_path):
    tune(tmp_path / "out")
    assert {*lora.FILES} <= {path.name for path in (tmp_path / "out" / "best").iterdir()}
    fastgpt.train.main(["--out", str(tmp_path / "out"), "--data", data, *TINY, *SIZES, "--overwrite"])
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name in lora.FILES]


def test_merge_makes_the_model_that_training_saved(tune, tmp_path, capsys):
    tune(tmp_path / "out")
    assert fastgpt.__main__.main(["merge", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 0
    a, b = (gpt.load_tensors(tmp_path / run / "model.safetensors")[0] for run in ("out", "merged"))
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    assert gpt.GPT.from_pretrained(str(tmp_path / "merged")).tokenizer == "bytes"
    assert fastgpt.__main__.main(["merge", str(tmp_path / "out"), "--out", str(tmp_path / "merged")]) == 1
    assert "holds a model" in capsys.readouterr().err


def test_what_cannot_be_is_refused(tune, data, base, tmp_path):
    out = tmp_path / "out"
    cases = [
        (["--lora", "0"], "--lora is 0"),
        (["--lora", "17"], "--lora is 17"),
        (["--lora-alpha", "0"], "--lora-alpha is 0"),
        (["--lora-alpha", "nan"], "--lora-alpha is nan"),
    ]
    for more, words in cases:
        with pytest.raises(SystemExit, match=words):
            tune(out, *more)
    for argv, words in ((["--lora", "2"], "expected --init"), (["--lora-alpha", "2"], "nothing without --lora")):
        with pytest.raises(SystemExit, match=words):
            fastgpt.train.main(["--out", str(out), "--data", data, *argv])
    assert not out.exists()
    tune(out)
    with pytest.raises(SystemExit, match="--lora is 4, but was 3"):
        fastgpt.train.main(["--out", str(out), "--resume", "--lora", "4"])
    gpt.main(["train", "--out", base, "--data", data, *TINY, *SIZES, "--seed", "5", "--overwrite"])
    with pytest.raises(SystemExit, match="has other weights than when it was adapted"):
        fastgpt.train.main(["--out", str(out), "--resume", "--steps", "9"])


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(r=4), "expected finite floats of shape"),
        (dict(use_dora=True), "use_dora is True, expected False"),
        (dict(use_rslora=True), "use_rslora is True"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(rank_pattern={"c_attn": 8}), "rank_pattern"),
        (dict(r="many"), "no adapter's configuration"),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit_is_refused(small, tmp_path, change, words):
    lora.save(lora.adapt(gpt.GPT(small), 3, 3.0), tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        lora.load(gpt.GPT(small), tmp_path)


def test_an_adapter_for_another_shape_or_of_other_parts_is_refused(small, tmp_path):
    lora.save(lora.adapt(gpt.GPT(small), 3, 3.0), tmp_path, "base")
    for other in (dict(n_embd=32), dict(n_layer=1)):
        with pytest.raises(ValueError, match="adapter_model.safetensors doesn't fit the model"):
            lora.load(gpt.GPT(gpt.replace(small, **other)), tmp_path)
    tensors, about = gpt.load_tensors(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.transformer.wte.lora_embedding_A"] = torch.zeros(3, 97)
    gpt.save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(ValueError, match="it has wte"):
        lora.load(gpt.GPT(small), tmp_path)


@pytest.mark.slow
def test_peft_computes_the_same_logits_both_ways(small, tmp_path):
    """Our adapter in PEFT, and PEFT's, in some of the layers alone, in ours."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = gpt.GPT(small)
    model.save_pretrained(tmp_path / "base")
    idx = tokens(small)
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(base(idx).logits, model(idx), rtol=1e-4, atol=1e-5)
    lora.save(perturbed(lora.adapt(model, 3, 6.0)), tmp_path / "ours", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx), rtol=1e-4, atol=1e-5)

    config = peft.LoraConfig(r=5, lora_alpha=20, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")  # fmt: skip
    theirs = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0.0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora.load(gpt.GPT.from_pretrained(str(tmp_path / "base")), tmp_path / "theirs")
    assert {name.split(".", 2)[2] for name in lora.adapters(ours)} == {"attn.c_attn", "mlp.c_fc"}
    torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(idx).logits, ours(idx), rtol=1e-2)
