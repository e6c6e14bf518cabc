"""Weights to and from transformers' GPT-2: the same logits, loss, gradients and greedy tokens."""

import json

import pytest
import torch

import gpt

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=48, n_positions=40, vocab_size=97, initializer_range=0.15,
        bos_token_id=96, eos_token_id=96, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():  # nothing may be zero or one, or a forgotten tensor would not show
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape)
    return model


def test_their_weights_in_our_model(theirs, ops, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = gpt.GPT.from_pretrained(str(tmp_path), ops)
    tokens = torch.randint(97, (2, 41), generator=torch.Generator().manual_seed(1))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-5, atol=1e-5)

    loss = ours.loss(idx, targets)
    expected = torch.nn.functional.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    grads = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        grad = grads.pop(name)
        torch.testing.assert_close(p.grad, grad.T if name.endswith(TRANSPOSED) else grad, rtol=1e-4, atol=1e-6)
    assert not grads

    greedy = theirs.generate(idx[:, :5], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(idx[:, :5], 30, temperature=0), greedy)


def test_our_weights_in_their_model(ops, tmp_path):
    torch.manual_seed(0)
    ours = gpt.GPT(gpt.GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=24, vocab_size=60), ops)
    for p in ours.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    ours.save_pretrained(str(tmp_path))
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    idx = torch.randint(60, (3, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs.eval()(idx).logits, ours(idx), rtol=1e-5, atol=1e-5)
    again = gpt.GPT.from_pretrained(str(tmp_path), ops)
    for (name, a), b in zip(again.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("prefix", ("", "transformer."))
@pytest.mark.parametrize("masks", (False, True))
@pytest.mark.parametrize("head", (False, True))
def test_every_spelling_of_the_keys_loads(theirs, prefix, masks, head, tmp_path):
    theirs.save_pretrained(tmp_path)
    state = {k.removeprefix("transformer."): v.clone() for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    if masks:
        for i in range(3):
            state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
            state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    state = {prefix + k: v for k, v in state.items()}
    if head:
        state["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
    safetensors_torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    idx = torch.arange(40)[None]
    expected = theirs(idx).logits
    torch.testing.assert_close(gpt.GPT.from_pretrained(str(tmp_path))(idx), expected, rtol=1e-5, atol=1e-5)


def test_an_untied_head_is_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = theirs.lm_head.weight.detach() + 1
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        gpt.GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "key, value",
    [("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False), ("n_inner", 100),
     ("scale_attn_by_inverse_layer_idx", True), ("model_type", "llama")],
)  # fmt: skip
def test_another_model_than_gpt2_is_refused(theirs, key, value, tmp_path):
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"from_pretrained: .*{key} is"):
        gpt.GPT.from_pretrained(str(tmp_path))


def test_safetensors_files_are_the_librarys(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.c": torch.arange(7), "empty": torch.zeros(0, 4), "one": torch.tensor(2.5)}
    tensors |= {
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "flag": torch.tensor([True, False]),
    }
    gpt.save_tensors(tmp_path / "ours", tensors, {"step": "7"})
    theirs = safetensors_torch.load_file(tmp_path / "ours")
    safetensors_torch.save_file(tensors, tmp_path / "theirs", metadata={"step": "7"})
    ours, metadata = gpt.load_tensors(tmp_path / "theirs")
    assert metadata == {"step": "7"}
    for name, x in tensors.items():
        for other in (theirs[name], ours[name]):
            assert other.dtype == x.dtype and torch.equal(other, x)


@pytest.mark.parametrize("damage", ("cut", "header", "empty", "missing"))
def test_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    gpt.save_tensors(path, {"a": torch.randn(100)})
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-4], "header": data[:8] + b"!" + data[9:], "empty": b"", "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match="x.safetensors can't be read"):
        gpt.load_tensors(path)
