"""fastgpt cost: counts against torch's own, estimates against what others published."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
import gpt
from fastgpt import __main__ as front
from fastgpt.learn import cost


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """A machine whose speed is known: 0.5 TFLOP/s, 50 GB/s."""
    known = dict(gflops=500.0, gbs=50.0)
    monkeypatch.setattr(cost.bench, "limits", lambda: known)
    return known


def estimate(line):
    return cost.estimate(cost.make_parser().parse_args(line.split()))


def best(key):
    """The last machine's figure, where the command line leaves no range."""

    def get(results):
        low, high = results["training"][-1][key]
        assert low == pytest.approx(high)
        return low

    return get


hours = SimpleNamespace(of=lambda r: best("seconds")(r) / 3600)
days = SimpleNamespace(of=lambda r: best("seconds")(r) / 86400)
years = SimpleNamespace(of=lambda r: best("seconds")(r) / 86400 / 365)
money = SimpleNamespace(of=best("money"))
used = SimpleNamespace(of=best("utilisation"))
parameters = SimpleNamespace(of=lambda r: r["model"]["parameters"])
work = SimpleNamespace(of=lambda r: r["work"])
petaflop_days = SimpleNamespace(of=lambda r: r["work"] / 1e15 / 86400)


def window(count, factor=1):
    return SimpleNamespace(of=lambda r: factor * r["flops"][count] * r["model"]["block_size"])


def size(*keys):
    return SimpleNamespace(of=lambda r: sum(r["bytes"][key] for key in keys))


def fit(key, i=0):
    return SimpleNamespace(
        of=lambda r: r["chinchilla"]["rows"][0][key][i] if key == "best" else r["chinchilla"]["rows"][0][key]
    )


NANOGPT = "nanoGPT, transformer_sizing.ipynb"
SCALING = "nanoGPT, scaling_laws.ipynb"
LLMC = "llm.c, scripts/run_gpt2_{}.sh"
BROWN = "Brown et al. 2020, table D.1 (N, petaflop/s-days, flops) and 2.1 (shapes)"
LAMBDA = "Lambda, OpenAI's GPT-3 Language Model: A Technical Overview, 2020"
LLAMA = "Touvron et al. 2023, section 2.4 (380 tokens a second and GPU: 48 %, 21 days) and table 15 (hours)"
KARPATHY = "Karpathy, nanochat discussion 481, 2026: 32 TPU v3, 168 hours, $8 an hour each; 3.04 hours of 8 H100 at $24"
A100x8 = "--accelerator A100 --count 8"

# What was published: command line, which figure, its value, the margin, the source. Margins: 0 where both are counts;
# half a digit of a rounded figure; for times, the spread of a utilisation or step time given with one or two digits.
PUBLISHED = [
    ("gpt2", parameters, 124_439_808, 0, "transformers, openai-community/gpt2"),
    ("gpt2-medium", parameters, 354_823_168, 0, "transformers, openai-community/gpt2-medium"),
    ("gpt2-large", parameters, 774_030_080, 0, "transformers, openai-community/gpt2-large"),
    ("gpt2-xl", parameters, 1_557_611_200, 0, "transformers, openai-community/gpt2-xl"),
    ("gpt2", size("weights"), 497_759_232, 0, "OpenAI, gpt-2/models/124M/model.ckpt.data-00000-of-00001"),
    ("gpt2-xl", size("weights"), 6.23e9, 0.001, "OpenAI, gpt-2/models/1558M/model.ckpt.data-00000-of-00001, 6.23 GB"),
    ("gpt2", window("square"), 291_648_307_200, 0, f"{NANOGPT}: forward_total"),
    ("gpt2", window("square", 2), 583_296_614_400, 0, f"{NANOGPT}: backward_total"),
    ("gpt2", size("weights", "optimizer"), 1_542_470_366, 0.035, f"{NANOGPT}: a checkpoint, with 3 % of other things"),
    # nanoGPT's model has no biases: 0.1 % fewer parameters
    (f"--parameters 124337664 --tokens 300e9 {A100x8} --utilisation 0.3", days, 3.46, 0.002, f"{NANOGPT}: time needed"),
    ("gpt2 --tokens 102400 --accelerator A100 --hours 0.00020972222", used, 0.3714, 0.0002, f"{NANOGPT}: 0.755 s a step"),
    (f"gpt2 --tokens 300e9 {A100x8} --utilisation 0.3", days, 4, 0.03, "nanoGPT, README: about 4 days"),
    (f"gpt2 --tokens 9890693120 {A100x8} --utilisation 0.6", hours, 94.3 / 60, 0.02, LLMC.format("124M")),
    (f"gpt2 --tokens 9890693120 {A100x8} --utilisation 0.6 --price 1.75", money, 20, 0.1, LLMC.format("124M")),
    (f"gpt2-medium --tokens 31457280000 {A100x8} --utilisation 0.6", hours, 13.7, 0.05, LLMC.format("350M")),
    (f"gpt2-medium --tokens 31457280000 {A100x8} --utilisation 0.6 --price 1.75", money, 200, 0.05, LLMC.format("350M")),
    (f"gpt2-large --tokens 150e9 {A100x8} --utilisation 0.6", hours, 135, 0.08, LLMC.format("774M")),
    (f"gpt2-large --tokens 150e9 {A100x8} --utilisation 0.6 --price 1.75", money, 2000, 0.05, LLMC.format("774M")),
    ("gpt2-xl --tokens 33554432000 --accelerator H100 --count 8 --utilisation 0.5", hours, 24, 0.02, LLMC.format("1558M")),
    (
        "gpt2-xl --tokens 33554432000 --accelerator H100 --count 8 --utilisation 0.5 --price 3.5",
        money, 672, 0.02, LLMC.format("1558M"),
    ),
    ("gpt2-xl --accelerator TPUv3 --count 32 --hours 168", money, 43_000, 0.001, KARPATHY),
    ("--parameters 1e9 --accelerator H100 --count 8 --hours 3.04 --price 3", money, 73, 0.007, KARPATHY),
    ("gpt3", parameters, 174_600e6, 0.0001, BROWN),
    ("gpt3 --flops 6N", work, 3.14e23, 0.002, BROWN),
    ("gpt3 --flops 6N", petaflop_days, 3.64e3, 0.002, BROWN),
    ("--n-layer 32 --n-head 32 --n-embd 4096 --block-size 2048 --vocab-size 50257", parameters, 6_660e6, 0.0008, BROWN),
    ("--n-layer 32 --n-head 32 --n-embd 2560 --block-size 2048 --vocab-size 50257", parameters, 2_650e6, 0.001, BROWN),
    ("gpt3 --flops 6N --accelerator V100 --utilisation 0.224", years, 355, 0.003, f"{LAMBDA}: 28 TFLOP/s"),
    ("gpt3 --flops 6N --accelerator V100 --utilisation 0.224 --price 1.5", money, 4.6e6, 0.02, f"{LAMBDA}: $1.50 an hour"),
    (
        "--parameters 175e9 --tokens 300e9 --accelerator A100 --count 1024 --utilisation 0.3365",
        days, 34, 0.005, "Narayanan et al. 2021, section 5.1: 140 TFLOP/s, a quarter of it for recomputation",
    ),
    ("llama-65b --accelerator A100 --count 2048 --utilisation 0.4766 --flops 6N", days, 21, 0.02, LLAMA),
    ("llama-65b --accelerator A100 --count 1 --utilisation 0.4766 --flops 6N", hours, 1_022_362, 0.002, LLAMA),
    (
        "--parameters 540.35e9 --n-layer 118 --n-embd 12288 --block-size 2048 --tokens 238.3e3 --accelerator TPUv4"
        " --count 6144 --hours 0.000277778",
        used, 0.462, 0.002, "Chowdhery et al. 2022 (PaLM), section 4.1: 238.3 thousand tokens a second, 46.2 %",
    ),
    ("--parameters 405e9 --tokens 15.6e12", work, 3.8e25, 0.003, "Llama team 2024, The Llama 3 Herd of Models, section 3.2"),
    ("--parameters 70e9 --tokens 1.4e12", work, 5.76e23, 0.022, "Hoffmann et al. 2022, section 4: Gopher's budget"),
    ("--parameters 399.54e6 --tokens 14.43e9", fit("loss"), 2.76, 0.002, f"{SCALING}: closest model found"),
    ("--parameters 399.54e6 --tokens 14.43e9", fit("best"), 399.54e6, 0.01, f"{SCALING}: closest model found"),
    ("--parameters 399.54e6 --tokens 14.43e9", fit("best", 1), 14.43e9, 0.01, f"{SCALING}: closest model found"),
    ("gpt2-xl --precision mixed", size("weights", "gradients", "optimizer"), 24e9, 0.04, "Rajbhandari et al. 2020 (ZeRO), 3.1"),
    (
        "--n-layer 40 --n-head 40 --n-embd 5120 --block-size 2048 --precision mixed",
        size("kv_token"), 800 * 1024, 0, "Kwon et al. 2023 (vLLM), section 3: OPT-13B, 800 KB a token",
    ),
    (
        "--n-layer 40 --n-head 40 --n-embd 5120 --block-size 2048 --precision mixed",
        size("kv_window"), 1.6e9, 0.05, "Kwon et al. 2023 (vLLM), section 3: 1.6 GB for a request",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "line, figure, published, margin, source", PUBLISHED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_published_figures_are_met(line, figure, published, margin, source):
    assert figure.of(estimate(line)) == pytest.approx(published, rel=margin, abs=0), source


def test_gpt3s_price_is_a_range_that_holds_what_is_told_of_it():
    """Its assumptions are V100's line: 20-30 % used, $1.50-3.06 an hour. $4.6 M: Lambda 2020. Some $10 M: widely told."""
    low, high = estimate("gpt3 --accelerator V100")["training"][-1]["money"]
    assert low < 4.6e6 < 10e6 < high and high / low < 4


# -------------------------------------------------------------------------------------------- against torch


@pytest.fixture(params=[(1, 1, 8, 1, 5), (2, 4, 48, 40, 97), (3, 2, 64, 33, 257)], ids=str)
def config(request):
    n_layer, n_head, n_embd, block_size, vocab_size = request.param
    return gpt.GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size)


def batch(config, B):
    torch.manual_seed(0)
    return [torch.randint(config.vocab_size, (B, config.block_size)) for _ in range(2)]


def test_parameters_are_those_of_the_model_part_by_part(config):
    model = gpt.GPT(config)
    counted = cost.count_parameters(config)
    for part, module in dict(wte=model.wte, wpe=model.wpe, blocks=model.h, ln_f=model.ln_f).items():
        assert counted[part] == sum(p.numel() for p in module.parameters()), part
    assert cost.gpt2_like("", config).parameters == sum(p.numel() for p in model.parameters())


def test_flops_are_those_that_torch_counts(config):
    """The formulas compute the full square. torch counts what matrix products it sees."""
    model, B = gpt.GPT(config), 3
    idx, targets = batch(config, B)
    with FlopCounterMode(display=False) as forward:
        loss = model.loss(idx, targets)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    mine = cost.flops(cost.gpt2_like("", config), "square") * B * config.block_size
    assert forward.get_total_flops() == mine
    assert backward.get_total_flops() == 2 * mine


def test_the_causal_half_is_a_mean_over_the_keys_that_each_position_sees(config):
    model = cost.gpt2_like("", config)
    square = cost.flops(model, "square") - 2 * model.in_products
    half = cost.flops(model, "causal") - 2 * model.in_products
    T = config.block_size
    assert half / square == pytest.approx(sum(range(1, T + 1)) / T**2)


@pytest.mark.parametrize("B", (2, 5))
def test_saved_bytes_are_those_that_autograd_keeps(config, ops, B):
    table = cost.saved(config, B, config.block_size)
    ours, eager = (sum(column) for column in zip(*table.values(), strict=True))
    found = cost.saved_bytes(gpt.GPT(config, ops), *batch(config, B))
    if config.block_size == 1:  # one position: some copies are views, and torch keeps less
        assert found <= (eager if ops is None else ours)
    else:
        assert found == (eager if ops is None else ours)


def test_saved_bytes_do_not_count_twice_what_two_ops_keep():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    model = SimpleNamespace(parameters=lambda: [weight], loss=lambda x, _: ((x @ weight) * (x * weight)).sum())
    assert cost.saved_bytes(model, torch.ones(3, 3), None) == 4 * 9 * 3  # x once, its two products


def test_bytes_of_weights_gradients_and_moments_are_the_tensors(config):
    model = gpt.GPT(config)
    optimizer = gpt.make_optimizer(model, 1e-3, 0.99, 0.1)
    model.loss(*batch(config, 2)).backward()
    optimizer.step()
    sizes = cost.memory(cost.gpt2_like("", config), 2, "float32")
    assert sizes["weights"] == sum(p.nbytes for p in model.parameters())
    assert sizes["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert sizes["optimizer"] == sum(x.nbytes for x in moments)


# ------------------------------------------------------------------------------------------ time and money


def test_hours_and_utilisation_are_two_sides_of_one_figure():
    there = estimate("gpt2 --accelerator A100 --count 3 --utilisation 0.25")["training"][-1]
    back = estimate(f"gpt2 --accelerator A100 --count 3 --hours {there['seconds'][0] / 3600}")["training"][-1]
    assert back["utilisation"][0] == pytest.approx(0.25)


def test_a_range_of_inputs_gives_a_range_from_best_to_worst():
    row = estimate("gpt2 --accelerator A100 --utilisation 0.2:0.4 --price 1:3")["training"][-1]
    assert row["seconds"][1] == pytest.approx(2 * row["seconds"][0])
    assert row["money"][1] == pytest.approx(6 * row["money"][0])


@pytest.mark.parametrize("option, factor", [("--count 4", 4), ("--peak 1248", 4), ("--tokens 622199040", 4)])
def test_time_there_follows_each_input(option, factor):
    line = "gpt2 --accelerator A100 --utilisation 0.5"
    times = [estimate(more)["training"][-1]["seconds"][0] for more in (line, f"{line} {option}")]
    assert times[0] == pytest.approx(factor * times[1])


def test_an_accelerator_that_is_not_listed_has_the_peak_that_is_typed():
    row = estimate("--parameters 1e9 --tokens 1e9 --accelerator mine --peak 100 --utilisation 0.5")["training"][-1]
    assert row["machine"] == "mine" and row["seconds"][0] == pytest.approx(6e18 / 50e12)


def test_time_here_is_flops_over_the_share_of_what_was_measured(limits):
    results = estimate("gpt2 --share 0.25 --price-here 0.1 --tokens 1e9")
    row = results["training"][0]
    assert row["seconds"][0] == pytest.approx(3e9 * results["flops"]["causal"] / (0.25 * 500e9))
    assert row["money"][0] == pytest.approx(row["seconds"][0] / 3600 * 0.1)


def test_how_many_it_takes_to_hold_a_model():
    rows = {row["machine"]: row for row in estimate("gpt3 --precision mixed")["training"]}
    assert rows["A100"]["least"] == math.ceil(16 * 174_604_259_328 / 80e9) == 35
    assert estimate("gpt2")["training"][-1]["least"] == 1


def test_weights_that_nobody_can_have_are_not_fine_tuned():
    assert [row["model"] for row in estimate("gpt3")["ways"]] == ["gpt3", "gpt2", "gpt2"]
    assert [row["model"] for row in estimate("")["ways"]] == ["the small model", "gpt2", "gpt2"]
    assert [row["model"] for row in estimate("gpt2-large")["ways"]] == ["gpt2-large"] * 3


def test_three_ways_cost_what_their_tokens_cost():
    results = estimate("gpt2-xl --tune 2e6 --write 3e6 --accelerator A100 --utilisation 0.4 --price 2")
    scratch, tune, use = results["ways"]
    assert scratch["there"]["money"] == results["training"][-1]["money"]
    assert tune["there"]["money"][0] / scratch["there"]["money"][0] == pytest.approx(2e6 / results["inputs"]["tokens"])
    assert use["here"]["seconds"][0] == pytest.approx(3e6 * 4 * 1_557_611_200 / 50e9)
    assert use["there"]["seconds"][0] == pytest.approx(3e6 * 2 * 1_557_611_200 / 2039e9)


def test_without_a_model_the_tokens_are_those_of_train():
    train = gpt.TrainConfig()
    tokens = estimate("")["inputs"]["tokens"]
    assert tokens == train.steps * train.batch_size * train.block_size
    assert estimate("--steps 10 --batch-size 3 --accumulate 2 --block-size 32")["inputs"]["tokens"] == 10 * 3 * 2 * 32
    assert estimate("gpt2")["inputs"]["tokens"] == 20 * 124_439_808
    assert estimate("gpt3")["inputs"]["tokens"] == 300e9


def test_the_optimum_of_a_fit_is_its_lowest_loss_for_that_work():
    for f in cost.FITS.values():
        N, D = cost.optimum(f, 1e21)
        assert 6 * N * D == pytest.approx(1e21)
        lowest = cost.fitted_loss(f, N, D)
        assert all(cost.fitted_loss(f, N * x, D / x) > lowest for x in (0.9, 1.1))


# ------------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize("B", (1, 4))
def test_measured_counts_equal_the_predicted_and_time_follows_the_steps(B, capsys):
    results = estimate(f"--measure --n-layer 2 --n-embd 32 --block-size 16 --batch-size {B} --accumulate 2")
    predicted, measured = results["predicted"], results["measured"]
    for key in ("parameters", "saved_kernels", "saved_formulas"):
        assert measured[key] == predicted[key], key
    assert measured["tokens_per_second"] == pytest.approx(B * 16 * 2 / measured["seconds"])
    tokens, here = results["inputs"]["tokens"], results["training"][0]
    assert here["seconds"][0] == pytest.approx(tokens / measured["tokens_per_second"])
    cost.main("--measure --n-layer 1 --n-embd 32 --block-size 16 --batch-size 4".split())
    assert "10 steps here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, why", [("gpt3 --measure", "GB free"), ("llama-65b --measure", "not GPT-2's architecture")]
)
def test_measure_refuses_what_cannot_be_trained_here(line, why, capsys):
    assert front.main(["cost", *line.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastgpt cost: error: --measure: ") and why in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------- as a command

LINES = (
    "", "gpt2", "gpt2-xl --accelerator V100,T4,H200,B200,TPUv3,TPUv4,RTX4090", "gpt3 --count 1024", "llama-65b",
    "--parameters 540e9", "--parameters 540e9 --block-size 2048 --steps 3", "--n-layer 1 --n-head 1 --n-embd 1",
    "gpt2 --hours 0.001 --tokens 1e15", "gpt2 --n-layer 1 --precision mixed",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_report_fits_a_terminal(line, capsys):
    assert front.main(["cost", *line.split()]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and not re.search(r"\b(nan|inf)\b", out)
    for word in ("parameters (N)", "flops a token", "weights", "three ways to a model", "no forecast"):
        assert word in out


@pytest.mark.parametrize("line", LINES)
def test_json_holds_what_the_report_shows(line, capsys):
    assert front.main(["cost", "--json", *line.split()]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["model"]["parameters"] > 0 and results["training"][0]["machine"] == "here"
    assert results["inputs"]["tokens"] > 0 and results["about"]["cpu"]


def test_every_input_stands_in_the_report(capsys):
    line = "gpt2 --tokens 7e9 --tune 8e6 --write 9e6 --accelerator mine --peak 77 --count 5 --utilisation 0.23"
    cost.main(f"{line} --price 1.11:2.22 --share 0.31 --price-here 0.44 --batch-size 13".split())
    out = capsys.readouterr().out
    for text in (
        "7.00 B",
        "8.00 M",
        "9.00 M",
        "mine",
        "77.0",
        " 5 ",
        "23 %",
        "1.11-2.22",
        "31 %",
        "0.44",
        "batch of 13",
    ):
        assert text in out, text


def test_more_than_the_peak_is_called_impossible(capsys):
    cost.main("gpt2 --accelerator A100 --hours 0.1".split())
    assert "nothing can be so fast" in capsys.readouterr().out


def test_bytes_get_no_figure_from_chinchillas_fit(capsys):
    cost.main([])
    assert "no figure" in capsys.readouterr().out
    cost.main(["gpt2-xl", "--tokens", "10e9"])
    out = capsys.readouterr().out
    assert "Hoffmann et al. 2022" in out and "Besiroglu et al. 2024" in out and "Extrapolated" not in out


def test_a_folder_is_a_model(tmp_path, small, capsys):
    torch.manual_seed(0)
    gpt.GPT(small).save_pretrained(tmp_path)
    results = estimate(str(tmp_path))
    assert results["model"]["config"] == vars(small)
    assert results["model"]["parameters"] == sum(p.numel() for p in gpt.GPT(small).parameters())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert front.main(["cost", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "line, says",
    [
        ("gpt5", "model is 'gpt5', expected a folder or one of gpt2, gpt2-medium"),
        ("--accelerator X100", "--accelerator is 'X100', expected one of V100, A100"),
        ("--n-head 3", "n_embd=128 is not a multiple of n_head=3"),
        ("gpt2 --parameters 1e9", "--parameters and 'gpt2' are two models, expected one"),
        ("llama-65b --n-layer 2", "no size of it can change"),
        ("--parameters 1e9 --steps 3", "--steps needs a --block-size"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_line(line, says, capsys):
    assert front.main(["cost", *line.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastgpt cost: error: ") and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    ["--tokens 0", "--tokens nan", "--tokens many", "--count 1.5", "--count 0", "--utilisation 1.1", "--utilisation 0",
     "--utilisation 0.5:0.2", "--price -1", "--price inf", "--peak inf", "--flops 8N", "--hours 0", "--n-layer 0", "a b"],
)  # fmt: skip
def test_bad_numbers_are_refused_by_name(line, capsys):
    with pytest.raises(SystemExit) as status:
        front.main(["cost", *line.split()])
    err = capsys.readouterr().err
    assert status.value.code == 2 and line.split()[0] in err or "unrecognized arguments: b" in err


def test_help_and_version_are_those_of_a_command(capsys):
    for option, text in (("--help", "usage: fastgpt cost"), ("--version", "fastgpt ")):
        with pytest.raises(SystemExit) as status:
            front.main(["cost", option])
        assert not status.value.code and capsys.readouterr().out.startswith(text)


def test_kernels_save_less_than_the_formulas():
    sizes = estimate("gpt2")["bytes"]
    assert sizes["saved_kernels"] < sizes["saved_formulas"] / 3 and fastgpt.attention
