"""fastgpt ablate: each variant is what its title says and GPT-2 elsewhere; runs that go on; verdicts by Student's t."""

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastgpt
import gpt
from fastgpt.__main__ import main
from fastgpt.learn import ablate, experiment, trials

VARIANTS = ablate.VARIANTS
CONFIG = gpt.GPTConfig(n_layer=2, n_head=4, n_embd=48, block_size=40, vocab_size=257)
C, T, L, V, H = 48, 40, 2, 257, 4
D = C // H
pytestmark = pytest.mark.usefixtures("one_thread")


def build(name, ops=fastgpt.ops, seed=1, **sizes):
    torch.manual_seed(seed)
    return VARIANTS[name].build(replace(CONFIG, **sizes), ops)


def tokens(seed=2, B=3, n=T):
    return torch.randint(257, (B, n), generator=torch.Generator().manual_seed(seed))


def packed(seed=3, n=T, **parts):
    """Random queries, keys and values, or those given. -> (1, n, 3C)"""
    random = torch.Generator().manual_seed(seed)
    return torch.cat([parts.get(name, torch.randn(1, n, C, generator=random)) for name in "qkv"], -1)


def by_hand(qkv, bias):
    """softmax(Q K^T / sqrt(D) + bias) V, head by head."""
    heads = []
    for h in range(H):
        q, k, v = (x[0, :, h * D : (h + 1) * D] for x in qkv.chunk(3, -1))
        heads.append(torch.softmax(q @ k.T / math.sqrt(D) + bias[h], -1) @ v)
    return torch.cat(heads, -1)[None]


CAUSAL = torch.full((T, T), -math.inf).triu(1)

# ------------------------------------------------------------------------------------------------ All variants

ATTENTION = 4 * C * C + 4 * C
PARAMETERS = dict(  # how many more than GPT-2, of those that are trained
    {"rope": -T * C, "alibi": -T * C, "sinusoids": -T * C, "no-positions": -T * C, "untied": V * C},
    **{"rmsnorm": -(2 * L + 1) * C, "no-norm": -(2 * L + 1) * 2 * C, "post-norm": -2 * C},
    **{"no-mlp": -L * (8 * C * C + 7 * C), "no-attention": -L * (ATTENTION + 2 * C)},
    **{"swiglu": L * (3 * 128 * C + 2 * 128 + C - 8 * C * C - 5 * C)},
)
OTHER_WEIGHTS = dict(  # where the first weights of a variant are not GPT-2's
    {"same": (".weight",), "plain-init": (".weight",), "swiglu": ("mlp.c_fc", "mlp.c_proj"), "untied": ("head",)},
    **dict.fromkeys(("rope", "alibi", "sinusoids", "no-positions"), ("wpe",)),
)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs_on_formulas_and_kernels_alike_and_all_its_weights_get_gradients(name):
    idx, losses = tokens(), []
    for ops in (gpt, fastgpt.ops):
        model = build(name, ops)
        loss = model.loss(idx[:, :-1], idx[:, 1:].contiguous())
        loss.backward()
        for parameter, p in model.named_parameters():
            assert not p.requires_grad or p.grad.isfinite().all() and p.grad.any(), parameter
        losses.append(loss.item())
        nll = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        assert nll.item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and math.isfinite(losses[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_gpt2s_first_weights_and_their_number_but_where_it_says(name):
    model, gpt2 = build(name), dict(build("gpt2").named_parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count - sum(p.numel() for p in gpt2.values()) == PARAMETERS.get(name, 0)
    for parameter, p in model.named_parameters():
        if not any(part in parameter for part in OTHER_WEIGHTS.get(name, ())):
            assert torch.equal(p, gpt2[parameter]), parameter
    assert build("swiglu", n_embd=128).h[0].mlp.c_fc.weight.numel() == 2 * 341 * 128  # of 8/3 128 = 341.3


@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_variant_without_a_mask_sees_what_is_to_come(name):
    val = tokens(B=1)[0].numpy().astype(np.uint16)
    assert trials.is_causal(build(name), val) == (name != "no-mask")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_takes_3_to_12_lines_and_names_its_source(name):
    v = VARIANTS[name]
    assert 3 <= experiment.lines_of(v.build) + 2 <= 12
    assert v.source and v.build.__doc__ and (v.found or name in ("gpt2", "same"))
    assert VARIANTS[name].options.keys() <= {"warmup", "steps", "weight_decay"}


# --------------------------------------------------------------------------------------------------- Positions


def attention_of(name, qkv, ops=gpt):
    return build(name, ops).h[0].attn.formula(qkv, H)


@pytest.mark.slow
def test_rope_makes_scores_of_the_distance_alone_and_keeps_lengths():
    given = []
    ops = experiment.replaced(gpt, attention=lambda qkv, n_head: given.append(qkv) or qkv[..., :C])
    one = torch.randn(1, 1, C, generator=torch.Generator().manual_seed(5))
    v = torch.randn(1, T, C)
    attention_of("rope", packed(q=one.expand(1, T, C), k=one.flip(-1).expand(1, T, C), v=v), ops)
    q, k, values = gpt.split_heads(given[0], H)
    scores = (q @ k.transpose(-2, -1))[0]  # (H, T, T); the same query and key stand at every position
    for distance in range(T):
        diagonal = scores.diagonal(-distance, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert (scores[:, 9, 9] - scores[:, 9, 4]).abs().min() > 1e-3  # and the distance matters
    torch.testing.assert_close(q[0].norm(dim=-1), one.view(H, 1, D).norm(dim=-1).expand(H, T))
    assert torch.equal(gpt.merge_heads(values), v)
    x, y = q[0, 0, 0, :2].tolist()  # the fastest pair turns by one radian a position
    expected = [x * math.cos(7) - y * math.sin(7), x * math.sin(7) + y * math.cos(7)]
    torch.testing.assert_close(q[0, 0, 7, :2], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_rope_refuses_an_odd_head_size():
    with pytest.raises(ValueError, match="rope: n_embd / n_head is 3, expected an even number"):
        build("rope", n_embd=12)


def test_alibi_lowers_a_score_by_its_distance_at_a_rate_for_each_head():
    steps = torch.arange(T)[:, None] - torch.arange(T)  # how far back
    bias = torch.stack([CAUSAL - slope * steps for slope in (1 / 4, 1 / 16, 1 / 64, 1 / 256)])
    torch.testing.assert_close(attention_of("alibi", packed()), by_hand(packed(), bias), atol=1e-5, rtol=1e-4)


def test_sinusoids_are_those_of_the_paper_as_large_as_the_first_values_of_wpe_and_stay():
    model = build("sinusoids")
    table = [[f(t / 10000 ** (2 * i / C)) for i in range(C // 2) for f in (math.sin, math.cos)] for t in range(T)]
    torch.testing.assert_close(model.wpe.weight, 0.02 * math.sqrt(2) * torch.tensor(table), atol=1e-6, rtol=1e-4)
    assert not model.wpe.weight.requires_grad
    assert model.wpe.weight.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.01)


def test_without_positions_one_layer_cannot_tell_the_order_of_the_past():
    for name, same in (
        ("no-positions", True),
        ("gpt2", False),
        ("rope", False),
        ("alibi", False),
        ("sinusoids", False),
    ):
        model, idx = build(name, n_layer=1), tokens(B=1)
        for block in model.h:
            block.attn.c_attn.weight.data *= 20  # attention that is far from a plain mean
        other = idx.clone()
        other[0, :-1] = idx[0, :-1].flip(0)
        assert torch.allclose(model(idx)[:, -1], model(other)[:, -1], atol=1e-5) == same, name


# --------------------------------------------------------------------------------------- Norms, MLP, residuals


def test_rmsnorm_divides_by_the_root_of_the_mean_square_and_subtracts_no_mean():
    layer, x = build("rmsnorm").ln_f, torch.randn(5, C) + 3
    layer.weight.data = torch.rand(C)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
    torch.testing.assert_close(layer(x), expected)


def test_norms_are_where_the_title_says():
    block, x = build("post-norm").h[0], 5 * torch.randn(2, 7, C) + 1
    out = block(x)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(-1, unbiased=False), torch.ones(2, 7), atol=1e-3, rtol=0)
    middle = block.ln_1(x + block.attn(x))
    torch.testing.assert_close(out, block.ln_2(middle + block.mlp(middle)))
    block = build("no-norm").h[0]
    middle = x + block.attn(x)
    torch.testing.assert_close(block(x), middle + block.mlp(middle))
    assert not [name for name, _ in build("no-norm").named_parameters() if "ln" in name]


def test_activations_are_those_of_the_title():
    x = torch.randn(4, C)
    for name, f in (("relu", torch.relu), ("relu-squared", lambda h: torch.relu(h) ** 2)):
        mlp = build(name).h[1].mlp
        h = f(x @ mlp.c_fc.weight.T + mlp.c_fc.bias)
        torch.testing.assert_close(mlp(x), h @ mlp.c_proj.weight.T + mlp.c_proj.bias)
    mlp = build("swiglu").h[1].mlp
    gate, value = mlp.c_fc.weight.chunk(2)
    h = F.silu(x @ gate.T) * (x @ value.T)
    torch.testing.assert_close(mlp(x), h @ mlp.c_proj.weight.T)
    deviation = mlp.c_proj.weight.std().item()
    assert deviation == pytest.approx(0.02 / math.sqrt(2 * L), rel=0.05)  # as GPT-2's


def test_parts_that_are_left_out_are_out():
    x, gpt2 = torch.randn(2, 9, C), build("gpt2").h[0]
    torch.testing.assert_close(build("no-mlp").h[0](x), x + gpt2.attn(gpt2.ln_1(x)))
    torch.testing.assert_close(build("no-attention").h[0](x), x + gpt2.mlp(gpt2.ln_2(x)))
    torch.testing.assert_close(build("no-residual").h[0](x), gpt2.mlp(gpt2.ln_2(gpt2.attn(gpt2.ln_1(x)))))


# ------------------------------------------------------------------------------------------ Attention, training


def test_scores_are_not_scaled_not_masked_or_all_in_one_head():
    q, k, v = gpt.split_heads(packed(), H)
    unscaled = gpt.merge_heads(torch.softmax(q @ k.transpose(-2, -1) + CAUSAL, -1) @ v)
    torch.testing.assert_close(attention_of("no-scale", packed()), unscaled, atol=1e-5, rtol=1e-4)
    unmasked = by_hand(packed(), torch.zeros(H, 1, 1))
    torch.testing.assert_close(attention_of("no-mask", packed()), unmasked, atol=1e-5, rtol=1e-4)
    assert build("one-head").h[0].attn.n_head == 1 and build("gpt2").h[0].attn.n_head == 4


def test_untied_output_has_weights_of_its_own_and_gpt2s_loss_if_they_are_equal():
    model, idx = build("untied"), tokens()
    assert not torch.equal(model.head, model.wte.weight)
    model.head.data = model.wte.weight.data.clone()
    assert torch.equal(model.loss(idx, idx), build("gpt2").loss(idx, idx))


def test_plain_init_is_that_of_torchs_own_layers():
    model = build("plain-init", n_embd=96)
    assert model.wte.weight.std().item() == pytest.approx(1, rel=0.05)
    for layer, n in ((model.h[1].attn.c_proj, 96), (model.h[0].mlp.c_proj, 4 * 96)):
        assert layer.weight.abs().max().item() == pytest.approx(n**-0.5, rel=0.01) and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.05)
    assert (model.ln_f.weight == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, rates, decay",
    [
        ("gpt2", (1e-5, 1e-3, 1e-4), 0.1),
        ("no-warm-up", (1e-3, None, 1e-4), 0.1),
        ("no-lr-decay", (1e-5, 1e-3, 1e-3), 0.1),
        ("no-weight-decay", (1e-5, 1e-3, 1e-4), 0.0),
    ],
)
def test_training_differs_where_the_title_says(name, rates, decay, monkeypatch):
    steps, seen = 300, []

    def step(model, optimizer, tokens, step, config):
        seen.append(gpt.learning_rate(step, config.steps, config.warmup, config.lr))
        assert optimizer.param_groups[0]["weight_decay"] == decay and optimizer.param_groups[1]["weight_decay"] == 0
        return 0.0

    monkeypatch.setattr(gpt, "train_step", step)
    val = tokens(B=1, n=300)[0].numpy().astype(np.uint16)
    trials.measure(VARIANTS[name], gpt.TrainConfig(n_layer=1, n_embd=8, block_size=8, steps=steps), val, val, "")
    assert len(seen) == steps
    for rate, expected in zip((seen[0], seen[99], seen[-1]), rates, strict=True):
        assert expected is None or rate == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------ Figures and verdicts


def test_intervals_are_students():
    quantiles = {2: 12.7062, 3: 4.30265, 5: 2.77645, 10: 2.26216, 400: 1.96593}  # of 0.975, from tables
    for n, t in quantiles.items():
        values = [(-1) ** i * 1.0 for i in range(n)]
        deviation = np.std(values, ddof=1)
        mean, half = trials.interval([value + 5 for value in values])
        assert mean == pytest.approx(5 + np.mean(values)) and half == pytest.approx(t * deviation / n**0.5, rel=1e-3)
    assert trials.interval([0.25]) == (0.25, None)


def runs_of(losses, causal=True):
    seeds = {str(i): dict(loss=x, parameters=50, causal=causal, end=x, sample="") for i, x in enumerate(losses)}
    return dict(seeds=seeds, time=1.5, code="")


@pytest.mark.parametrize(
    "losses, causal, verdict, difference",
    [
        ([1.50, 1.61, 1.70], True, "better", -0.0967),
        ([1.70, 1.81, 1.90], True, "worse", 0.1033),
        ([1.70, 1.69, 1.70], True, "within noise", -0.0033),
        ([0.10, 0.10, 0.10], False, "sees the answer", -1.6),
        ([1.50, None, 1.70], True, "diverged", None),
    ],
)
def test_the_verdict_is_that_of_paired_differences(losses, causal, verdict, difference):
    baseline = runs_of([1.6, 1.7, 1.8])["seeds"]
    row = trials.compare(VARIANTS["relu"], runs_of(losses, causal), baseline)
    assert row["verdict"] == verdict and row["parameters"] == 1
    assert row["difference"] == (None if difference is None else pytest.approx(difference, abs=1e-4))
    floor = trials.compare(VARIANTS["relu"], runs_of(losses, causal), baseline, floor=0.2)["verdict"]
    assert floor == ("within noise" if verdict in ("better", "worse") else verdict)  # smaller than the floor
    if verdict == "better":  # the seeds differ by 0.1, the differences between pairs hardly
        assert row["interval"] < 0.02
    assert trials.compare(VARIANTS["relu"], runs_of([1.0]), runs_of([1.6])["seeds"])["verdict"] == "one seed"


@pytest.mark.slow
def test_the_noise_floor_is_the_far_end_of_the_interval_of_what_is_the_same(tmp_path, capsys):
    path = tmp_path / "a.json"
    assert ablate_command(path, "--only", "same,relu", "--seeds", "3") == 0
    same, relu = json.loads(path.read_text())["rows"]
    assert same["floor"] == relu["floor"] == pytest.approx(abs(same["difference"]) + same["interval"])
    assert same["verdict"] == "within noise" and f"is at most {same['floor']:.4f}" in capsys.readouterr().out
    loss = {n: [one["loss"] for one in seeds.values()] for n, seeds in seeds_in(path).items()}
    assert loss["same"] != loss["gpt2"]


def test_the_loss_after_a_window_is_that_of_its_last_byte():
    model, row = build("gpt2"), tokens(B=1, n=200)[0]
    starts = np.linspace(0, 200 - T - 1, 5).astype(int)
    with torch.no_grad():
        nll = [F.cross_entropy(model(row[None, s : s + T])[0, -1], row[s + T]).item() for s in starts]
    assert trials.loss_at_the_end(model, row.numpy().astype(np.uint16), 5) == pytest.approx(np.mean(nll), rel=1e-5)


@pytest.mark.slow
def test_without_a_mask_the_loss_collapses_and_what_comes_after_the_window_stays_unknown(tmp_path, capsys):
    path = tmp_path / "a.json"
    sizes = "--n-layer 1 --n-embd 64 --block-size 16 --batch-size 32 --lr 5e-3 --steps 200 --seeds 1".split()
    assert main(["ablate", "--only", "no-mask", "--json", str(path), *sizes]) == 0
    runs = {name: run["seeds"]["1337"] for name, run in json.loads(path.read_text())["runs"].items()}
    assert runs["no-mask"]["loss"] < 0.5 * runs["gpt2"]["loss"]
    assert runs["no-mask"]["end"] > runs["gpt2"]["end"] + 0.2
    out = capsys.readouterr().out
    assert "sees the answer" in out and runs["no-mask"]["sample"] in out


# ------------------------------------------------------------------------------------------------ Command line

SMALL = ["--n-layer", "1", "--n-embd", "16", "--block-size", "16", "--steps", "3"]


def ablate_command(path, *argv):
    return main(["ablate", "--json", str(path), *SMALL, *argv])


def seeds_in(path):
    return {name: run["seeds"] for name, run in json.loads(path.read_text())["runs"].items()}


@pytest.mark.slow
def test_runs_go_on_where_they_were_and_end_as_if_they_had_never_stopped(tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert ablate_command(whole, "--only", "relu,rope", "--seeds", "2") == 0
    measure, done = trials.measure, []

    def interrupted(v, config, *others):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((v.name, config.seed))
        return measure(v, config, *others)

    monkeypatch.setattr(trials, "measure", interrupted)
    assert ablate_command(parts, "--only", "relu,rope", "--seeds", "2") == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert sum(map(len, seeds_in(parts).values())) == 3
    done = done[:0]
    assert ablate_command(parts, "--only", "relu", "--seeds", "2") == 0  # fewer is a beginning, too
    assert done == [("gpt2", 1338), ("relu", 1338)]
    done = done[:0]
    assert ablate_command(parts, "--only", "relu,rope", "--seeds", "2") == 0
    assert done == [("rope", 1338)]
    assert seeds_in(parts) == seeds_in(whole)
    rows = [json.loads(path.read_text())["rows"] for path in (whole, parts)]
    assert [r | dict(time=0) for r in rows[0]] == [r | dict(time=0) for r in rows[1]]
    capsys.readouterr()
    monkeypatch.setattr(trials, "step_times", lambda *_: pytest.fail("measured again"))
    assert ablate_command(parts, "--only", "relu,rope", "--seeds", "2") == 0
    assert "6 runs of 3 steps, 6 done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_variant_whose_code_has_changed_is_trained_again(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    ablate_command(path, "--only", "relu", "--seeds", "1")
    changed = replace(VARIANTS["relu"], options=dict(warmup=1))
    monkeypatch.setitem(VARIANTS, "relu", changed)
    trained, measure = [], trials.measure
    monkeypatch.setattr(trials, "measure", lambda v, *others: trained.append(v.name) or measure(v, *others))
    ablate_command(path, "--only", "relu", "--seeds", "1")
    assert trained == ["relu"]


@pytest.mark.slow
def test_the_table_holds_the_figures_and_others_findings_and_the_plot_is_drawn(tmp_path, capsys):
    path, plot = tmp_path / "a.json", tmp_path / "a.png"
    assert ablate_command(path, "--only", "relu,no-mask", "--seeds", "2", "--plot", str(plot)) == 0
    out, results = capsys.readouterr().out, json.loads(path.read_text())
    assert "6 runs of 3 steps, 0 done; 6 to do, some " in out
    relu, no_mask = results["rows"]
    losses = {name: [one["loss"] for one in seeds.values()] for name, seeds in seeds_in(path).items()}
    assert relu["difference"] == pytest.approx(np.mean(np.subtract(losses["relu"], losses["gpt2"])))
    assert f"{relu['difference']:+.4f}" in out and f"{relu['interval']:.4f}" in out and relu["time"] > 0
    assert no_mask["verdict"] == "sees the answer" and "Shazeer 2020, T5" in out
    assert plot.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_a_variant_that_diverges_says_so_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def diverges(config, ops):
        """weights that are too large"""
        model = gpt.GPT(config, ops)
        model.wte.weight.data *= math.inf
        return model

    monkeypatch.setitem(VARIANTS, "relu", replace(VARIANTS["relu"], build=diverges))
    assert ablate_command(tmp_path / "a.json", "--only", "relu,one-head", "--seeds", "2") == 0
    assert [r["verdict"] for r in json.loads((tmp_path / "a.json").read_text())["rows"]][0] == "diverged"
    assert "diverged" in capsys.readouterr().out


def test_another_variant_is_a_function_under_a_decorator(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "VARIANTS", VARIANTS.copy())

    @ablate.variant("wider", "more is more", "nobody", lr=2e-3)
    def wider(config, ops):
        """twice as many channels"""
        return gpt.GPT(replace(config, n_embd=2 * config.n_embd), ops)

    v = ablate.VARIANTS["wider"]
    assert v.options == dict(lr=2e-3) and v.build(CONFIG, gpt).config.n_embd == 96


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only", "rope,lstm"], "'lstm' is no variant, expected some of: gpt2, same, rope"),
        (["--only", ","], "'' is no variant"),
        (["--steps", "0"], "0, expected 1 to"),
        (["--n-head", "5"], "n_embd=16 is not a multiple of n_head=5"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--data", "nowhere.txt"], "--data is 'nowhere.txt'"),
        (["--plot", "a.xyz"], "--plot is 'a.xyz', expected a name that ends in"),
        (["--json", "no/a.json"], "no/a.json"),
        (["--json", "broken.json"], "--json is 'broken.json', which holds no runs of fastgpt ablate"),
        (["--json", "list.json"], "--json is 'list.json', which holds no runs of fastgpt ablate"),
        (["--json", "half.json"], "--json is 'half.json', which holds no runs of fastgpt ablate"),
        (["--json", "other.json"], "with runs of steps 9 instead of 3: take another file, or remove it"),
    ],
)
def test_bad_input_is_one_line_and_files_stay_as_they_are(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, val = gpt.load_tokens(None, trials.TOKENIZER, 16)
    settings = trials.OPTIONS | dict(n_layer=1, n_embd=16, block_size=16, steps=9)
    text = f"{len(train) + len(val)} bytes with CRC-32 {zlib.crc32(val, zlib.crc32(train)):08x}"
    half = dict(settings=settings, runs=dict(gpt2=dict(code="", time=None, seeds={"1": dict(parameters=3)})))
    other = dict(settings=dict(text=text) | settings, runs={})
    contents = {"broken.json": "{", "list.json": "[]", "half.json": json.dumps(half), "other.json": json.dumps(other)}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(trials, "measure", lambda *_: pytest.fail("trained"))
    try:
        status = main(["ablate", *SMALL, *argv])
    except SystemExit as error:
        status = error.code
    err = capsys.readouterr().err
    assert status in (1, 2) and message in err and "Traceback" not in err
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == contents
