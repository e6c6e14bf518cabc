"""fastgpt.check itself: no false alarm in random cases, formulas of one's own, and a table that can be read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
import gpt
from fastgpt import check
from fastgpt.rounding import Rounding, sum_error


@pytest.mark.slow
@settings(max_examples=3 * settings.default.max_examples)
@given(seed=st.integers(0, 2**62))
def test_random_cases_of_all_ops_pass(seed):
    """Random op, shape, strides, scale and dtype, on every instruction set: `fastgpt check --random` runs many more."""
    failed, tensors = check.run_random(1, seed)
    assert tensors and not failed, failed


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotary_attention(qkv, n_head):
    q, k, v = (x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
    T, D = q.shape[-2:]
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(D // 2) / (D // 2))

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    return gpt.attend(turn(q), turn(k), v).transpose(1, 2).flatten(2)


def test_an_op_of_ones_own_is_held_against_its_own_formula():
    inputs = dict(x=torch.randn(5, 48), weight=torch.randn(48))
    good = lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight  # noqa: E731
    bad = lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight  # noqa: E731
    rows = check.compare("rms_norm", inputs=inputs, kernel=good, formula=rms_norm)
    assert [r.tensor for r in rows] == ["out", "dx", "dweight"] and all(r.ok for r in rows)
    assert not all(r.ok for r in check.compare("rms_norm", inputs=inputs, kernel=bad, formula=rms_norm))


def test_attention_of_ones_own_is_checked_by_the_same_call():
    args = dict(inputs=dict(qkv=torch.randn(2, 20, 48)), options=dict(n_head=2), formula=rotary_attention)
    assert all(r.ok for r in check.compare("attention", kernel=rotary_attention, **args))
    assert not any(r.ok for r in check.compare("attention", **args))  # the kernel has no rotary positions


def test_other_orders_of_summation_are_no_fault():
    """The formula with its terms in another order, and in pieces."""
    inputs, _ = check.make_inputs("linear", (33, 300, 40))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for kernel in (
        lambda x, weight, bias: gpt.linear(x[:, order], weight[:, order], bias),
        lambda x, weight, bias: sum(a @ b.T for a, b in zip(x.split(7, 1), weight.split(7, 1), strict=True)) + bias,
    ):
        assert all(r.ok for r in check.compare("linear", inputs=inputs, kernel=kernel))


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(op="rmsnorm", shape=(3, 4)), "op is 'rmsnorm' without formula=, expected one of layer_norm, gelu"),
        (dict(op="rmsnorm", formula=rms_norm), "op is 'rmsnorm' without kernel="),
        (dict(op="rmsnorm", formula=rms_norm, kernel=rms_norm, shape=(3, 4)), "op is 'rmsnorm' without inputs="),
        (dict(op="gelu"), "neither shape= nor inputs= is given for gelu"),
        (dict(op="gelu", shape=(3,), dtype=torch.float16), "dtype is torch.float16, expected torch.float32"),
    ],
)
def test_compare_says_what_is_missing(args, message):
    with pytest.raises(ValueError, match=message):
        check.compare(**args)


def test_a_formula_of_unknown_rounding_is_refused_by_name():
    with pytest.raises(ValueError, match="the formula calls aten.linalg_.*, whose rounding is not known"):
        check.compare(
            "inverse", inputs=dict(x=torch.eye(3)), formula=lambda x: torch.linalg.inv(x), kernel=torch.inverse
        )


def test_the_model_of_a_sum_is_the_mean_over_all_orders():
    import itertools

    x = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    orders = torch.stack([x[list(order)].cumsum(0)[1:].square().sum() for order in itertools.permutations(range(4))])
    assert sum_error(x.sum(), x.square().sum(), 4).item() == pytest.approx(orders.mean().sqrt().item())
    assert sum_error(x[:1].sum(), x[:1].square().sum(), 1).item() == 0


def test_noise_is_even_and_equal_for_equal_values_of_a_run():
    x = torch.randn(8, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[:1].expand(8, 4000)
    first, again = Rounding(8), Rounding(8)
    noise = first.noise(x) / first.unit
    assert torch.equal(noise, again.noise(x) / again.unit)  # no state but the count of operations
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.08  # each run has its own
    same = first.noise(torch.ones(8, 5, dtype=torch.float64))
    assert (same == same[:, :1]).all() and len(same[:, 0].unique()) == 8


def test_the_truth_is_the_same_for_any_number_of_threads(threads):
    inputs, options = check.make_inputs("attention", (1, 40, 2, 16))
    truths = []
    for n in (1, 2):
        threads(n)
        truths.append(check.find_truth(gpt.attention, inputs, options))
    for name, x in truths[0].deviation.items():
        torch.testing.assert_close(x, truths[1].deviation[name], rtol=1e-6, atol=0)


def test_the_table_fits_100_columns(capsys):
    check.report(check.compare_models(gpt.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=9)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and "bound" in lines[0]
    assert all(line.endswith("  ok") for line in lines[1:-1])


def test_random_cases_as_a_command(capsys):
    with pytest.raises(SystemExit) as status:
        check.main(["--random", "4", "--seed", "3"])
    assert status.value.code == 0
    assert capsys.readouterr().out.startswith("4 random cases on ")
    with pytest.raises(SystemExit) as status:
        check.main(["--random", "0"])
    assert status.value.code == 2


def test_a_fault_in_a_random_case_is_reported(monkeypatch):
    monkeypatch.setattr(check.ops, "gelu", lambda x: gpt.gelu(x) * (1 + 1e-5))
    failed, _ = check.run_random(12, 1)
    assert failed and all("gelu" in r.op for r in failed)


@pytest.mark.slow
def test_fastgpt_is_checked_in_float64_too():
    for op in check.CASES:
        assert all(r.ok for r in check.compare(op, check.CASES[op][2], dtype=torch.float64))
    wrong = lambda x: fastgpt.gelu(x.float()).double()  # noqa: E731
    assert not any(r.ok for r in check.compare("gelu", (65, 48), kernel=wrong, dtype=torch.float64))
