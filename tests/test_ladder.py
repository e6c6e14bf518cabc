"""fastgpt ladder: its counts against counts by dictionary, its top against gpt.GPT, its columns against hand-made models."""

import json
import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastgpt
import gpt
from fastgpt.__main__ import main
from fastgpt.learn import climb, experiment, ladder

RUNGS = ladder.RUNGS
COUNTS = {1: 0, 2: 1, 3: 3}  # counting rungs, and how many bytes of the past each looks at
SEES = COUNTS | {0: 0, 4: 1, 5: 8}  # the others see the whole window
pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)


def random_text(n, seed, letters="abc d\n"):
    """Letters that hang on the two before them, so that contexts matter."""
    rng, text = np.random.default_rng(seed), [0, 1]
    favourites = rng.integers(0, len(letters), (len(letters), len(letters)))
    while len(text) < n:
        text.append(int(favourites[text[-2], text[-1]] if rng.random() < 0.6 else rng.integers(len(letters))))
    return "".join(letters[i] for i in text)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(random_text(4000, seed=3))
    return str(path)


def rung(number, ops=gpt, seed=1, **sizes):
    torch.manual_seed(seed)
    return RUNGS[number](
        gpt.GPTConfig(**dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=257) | sizes), ops
    )


def fitted(number, tokens, **sizes):
    model = rung(number, **sizes)
    if number in COUNTS:
        model.fit(tokens, None, "")
    return model


# ----------------------------------------------------------------------------------------------------- Counting


def counts_by_dictionary(tokens, longest):
    table = defaultdict(Counter)
    for i in range(1, len(tokens)):
        for n in range(min(1, longest), longest + 1):
            if i >= n:
                table[tuple(tokens[i - n : i])][tokens[i]] += 1
    return table


def loss_by_dictionary(table, a, tokens, T, longest):
    """Windows of T, as the GPT reads them: at a window's start the past is shorter."""
    total = 0.0
    for i in range(1, len(tokens)):
        past = min((i - 1) % T + 1, longest)
        seen = table[tuple(tokens[i - past : i])]
        total -= math.log((seen[tokens[i]] + a) / (seen.total() + 257 * a))
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("number, longest", COUNTS.items())
@pytest.mark.parametrize("seed, n, T", [(0, 900, 64), (1, 1500, 7), (2, 700, 2)])
def test_counting_rungs_reach_the_loss_of_counts_by_dictionary(number, longest, seed, n, T):
    train, val = tokens_of(random_text(n, seed)), tokens_of(random_text(n // 3, seed + 10, "abc d\ne"))
    model = fitted(number, train, block_size=T)
    ids, held = train.tolist(), train.tolist()[n * 9 // 10 :]
    before = counts_by_dictionary(ids[: n * 9 // 10], longest)
    a = min((1.0, 0.1, 0.01, 0.001), key=lambda a: loss_by_dictionary(before, a, held, T, longest))
    expected = loss_by_dictionary(counts_by_dictionary(ids, longest), a, val.tolist(), T, longest)
    assert model.a == a
    assert experiment.val_loss(model, val) == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number, longest", COUNTS.items())
def test_counting_rungs_reach_the_loss_of_counts_by_dictionary_on_the_default_text(number, longest):
    train, val = gpt.load_tokens(None, ladder.Uniform.tokenizer, 64)
    expected = loss_by_dictionary(
        counts_by_dictionary(train.tolist(), longest), fitted(number, train).a, val.tolist(), 64, longest
    )
    assert climb.nats_a_byte(fitted(number, train), None) == pytest.approx(expected, abs=5e-5)


def test_what_is_added_to_the_counts_is_chosen_without_the_validation_text(monkeypatch):
    train, seen = tokens_of(random_text(2000, seed=4)), []
    monkeypatch.setattr(experiment, "val_loss", lambda model, tokens: seen.append(tokens) or 1.0)
    fitted(3, train)
    assert all(np.array_equal(tokens, train[1800:]) for tokens in seen) and len(seen) == 4


# ------------------------------------------------------------------------------------------------- Every rung


@pytest.mark.parametrize("number", range(12))
def test_the_loss_of_a_rung_is_that_of_its_own_predictions(number):
    model = fitted(number, tokens_of(random_text(3000, seed=5)))
    idx = torch.from_numpy(tokens_of(random_text(80, seed=6)).astype(np.int64)).view(2, 40)
    targets = idx.roll(-1, 1)
    targets[0, 3:9] = -1  # to be ignored
    probabilities = torch.softmax(model(idx).detach().double(), -1)
    if number in COUNTS:
        torch.testing.assert_close(model(idx).exp().sum(-1), torch.ones(2, 40))  # as they are, without softmax
    nll = -probabilities.gather(-1, targets.clamp(min=0)[..., None]).log()[..., 0]
    assert model.loss(idx, targets).item() == pytest.approx(nll[targets != -1].mean().item(), rel=1e-5)


@pytest.mark.parametrize("number", range(12))
def test_a_rung_looks_back_as_far_as_it_says_and_never_ahead(number):
    model = fitted(number, tokens_of(random_text(3000, seed=7)))
    idx = torch.from_numpy(tokens_of(random_text(40, seed=8)).astype(np.int64))[None]
    t, sees = 30, SEES.get(number, 31)  # position t sees bytes t - sees + 1 to t
    with torch.no_grad():
        for changed in (*range(t - 10, t + 3), 0):
            other = idx.clone()
            other[0, changed] = idx[0, changed] + (1 if chr(idx[0, changed]) == "a" else -1)  # another that occurs
            same = torch.allclose(model(idx)[0, t], model(other)[0, t], atol=1e-6)
            assert same != (t - sees < changed <= t), changed


def test_each_rung_inherits_the_one_before_and_is_at_most_15_lines():
    for one, before in zip(RUNGS[1:], RUNGS[:-1], strict=True):
        assert one.__mro__[1] is before
    lines = [experiment.lines_of(one) for one in RUNGS]
    assert len(RUNGS) == 13 and all(1 <= n <= 15 for n in lines)
    assert lines[7] == 1 and experiment.lines_of(ladder.PairCounts) == 2  # sizes; def, return


@pytest.mark.parametrize("ops", [gpt, fastgpt.ops], ids=["gpt.py", "kernels"])
def test_the_top_rung_is_gpt_bit_for_bit_in_weights_logits_and_gradients(ops):
    top = rung(10, ops, block_size=40, n_embd=48)
    torch.manual_seed(1)
    model = gpt.GPT(top.config, ops)
    idx = torch.randint(257, (3, 37))
    pairs = list(zip(top.named_parameters(), model.named_parameters(), strict=True))
    assert torch.equal(top(idx), model(idx))
    for one in (top, model):
        one.loss(idx, idx.roll(-1, 1)).backward()
    for (name, p), (other, q) in pairs:
        assert name == other and torch.equal(p, q) and torch.equal(p.grad, q.grad), name


def test_rungs_below_the_top_have_the_parameters_that_their_titles_say():
    C, V, T = 128, 257, 64
    tables, block = (2 * V + T) * C, 12 * C * C + 13 * C  # input, output, positions; of a block with two layer_norms
    expected = {
        4: 2 * V * C,
        5: 2 * V * C + 8 * C * C + C,
        6: tables + 4 * C * C + 4 * C,
        7: tables + 4 * C * C + 4 * C,
        8: tables + block - 4 * C,
        9: tables + 4 * block + 2 * C,
        10: tables + 4 * block + 2 * C - V * C,
    }
    assert {n: sum(p.numel() for p in rung(n).parameters()) for n in expected} == expected


def test_a_rung_trains_as_fastgpt_train_does():
    train, _ = gpt.load_tokens(None, ladder.Uniform.tokenizer, 64)
    args = SimpleNamespace(block_size=64, batch_size=12)
    top, _ = climb.fitted(10, args, train, 2, 0, "")
    config = gpt.TrainConfig(steps=2)
    torch.manual_seed(config.seed)
    model = gpt.GPT(ladder.CONFIG, fastgpt.ops)
    optimizer = gpt.make_optimizer(model, config.lr, config.beta2, config.weight_decay)
    for step in range(2):
        gpt.train_step(model, optimizer, train, step, config)
    for p, q in zip(top.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------- The columns


class LooksBack(ladder.Uniform):
    """What a perfect copier says: the letter `by` before."""

    by = climb.LENGTH

    def forward(self, idx):
        back = idx.roll(self.by - 1, 1)  # of what comes next
        return 20.0 * torch.nn.functional.one_hot(back, 257)


def test_second_copy_is_zero_for_who_looks_back_and_chance_for_who_guesses():
    config = gpt.GPTConfig(1, 1, 8, 64, 257)
    assert climb.second_copy(LooksBack(config, gpt)) < 1e-4
    wrong = LooksBack(config, gpt)
    wrong.by = climb.LENGTH - 1
    assert climb.second_copy(wrong) > 10
    assert climb.second_copy(ladder.Uniform(config, gpt)) == pytest.approx(math.log(257))
    counts = fitted(1, climb.repeats(4096, seed=0))
    assert climb.second_copy(counts) == pytest.approx(climb.CHANCE, abs=0.01)


def test_strings_repeat_four_times_and_are_others_than_those_of_the_test():
    strings = climb.repeats(50, seed=0).reshape(50, climb.COPIES, climb.LENGTH)
    assert (strings == strings[:, :1]).all() and len(np.unique(strings[:, 0], axis=0)) == 50
    test = climb.repeats(256, seed=1).reshape(256, -1)
    train = climb.repeats(4096, seed=0).reshape(4096, -1)
    assert not {row.tobytes() for row in test} & {row.tobytes() for row in train}


@pytest.mark.slow
def test_attention_learns_to_copy_and_a_window_of_eight_bytes_does_not():
    args = SimpleNamespace(block_size=64, batch_size=12)
    strings = climb.repeats(4096, seed=0)
    assert climb.second_copy(climb.fitted(6, args, strings, 450, 0, "")[0]) < 0.7
    assert climb.second_copy(climb.fitted(5, args, strings, 200, 0, "")[0]) > 2.2


def test_loss_is_by_the_byte_whatever_the_tokens_are(gpt2_tokenizer_files, text_file):
    tokenizer = gpt.get_tokenizer("gpt2")
    _, val = gpt.load_tokens(text_file, tokenizer, 8)
    config = gpt.GPTConfig(1, 1, 8, 8, 50257)
    one_nat = SimpleNamespace(
        config=config, tokenizer=tokenizer, training=False, eval=int, train=int, loss=lambda *_: torch.tensor(1.0)
    )
    one_nat.train = lambda *_: None
    expected = (len(val) - 1) / len(tokenizer.decode(val[1:].tolist()).encode())
    assert climb.nats_a_byte(one_nat, text_file) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- Command line


def test_the_table_the_figures_and_the_plot(text_file, tmp_path, capsys):
    figures, plot = tmp_path / "ladder.json", tmp_path / "ladder.png"
    argv = ["ladder", "--only", "1,4,7", "--steps", "3", "--seeds", "2", "--data", text_file]
    assert main([*argv, "--json", str(figures), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    results = json.loads(figures.read_text())
    assert results["settings"] == dict(data=text_file, steps=3, seeds=2, block_size=64, batch_size=12)
    assert [r["rung"] for r in results["rows"]] == [1, 4, 7]
    for r in results["rows"]:
        assert r["loss"] == pytest.approx(sum(r["losses"]) / len(r["losses"]))
        assert r["bits"] == pytest.approx(r["loss"] / math.log(2)) and f"{r['loss']:.4f}" in out and r["what"] in out
    count, pairs, heads = results["rows"]
    assert count["spread"] is None and count["parameters"] == 6  # letters that occur
    assert len(pairs["losses"]) == 2 and pairs["spread"] == pytest.approx(np.std(pairs["losses"], ddof=1))
    assert heads["lines"] == 1 and heads["seconds"] > 0 and 0 < len(heads["sample"]) <= 92
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))


def test_who_is_ahead_is_said_by_the_figures(capsys):
    rows = [dict(rung=3, loss=1.9), dict(rung=10, loss=1.8)]
    assert "GPT-2 is ahead by 0.1000" in climb.notes(rows, 5)[-1]
    assert "counting is ahead by 0.1000" in climb.notes([rows[0], dict(rung=10, loss=2.0)], 5)[-1]


def test_two_rungs_are_compared_without_training(capsys):
    assert main(["ladder", "6", "7"]) == 0
    out = capsys.readouterr().out
    assert "-    sizes = dict(n_layer=1, n_head=1)\n+    sizes = dict(n_layer=1, n_head=4)\n" in out
    main(["ladder", "9", "10"])
    out = capsys.readouterr().out
    assert "+        return self.wte.weight" in out and "-        return self.lm_head" in out


def test_definitions_of_a_rung_are_all_that_it_is_made_of():
    namespace = vars(ladder).copy()
    exec("class Flat(nn.Module):\n" + "\n".join(experiment.definitions(ladder.GPT2)), namespace)
    config, idx, logits = gpt.GPTConfig(1, 1, 48, 40, 257), torch.randint(257, (2, 9)), []
    for cls in (ladder.GPT2, namespace["Flat"]):
        torch.manual_seed(2)
        logits.append(cls(config, gpt)(idx))
    assert torch.equal(*logits)


def test_pretrained_weights_are_a_rung(text_file, tmp_path, capsys):
    torch.manual_seed(3)
    model = gpt.GPT(gpt.GPTConfig(1, 2, 32, 24, 257))
    model.save_pretrained(tmp_path / "model", tokenizer="bytes")
    argv = ["ladder", "--only", "12", "--pretrained", str(tmp_path / "model"), "--data", text_file]
    assert main([*argv, "--json", str(tmp_path / "f.json")]) == 0
    row = json.loads((tmp_path / "f.json").read_text())["rows"][0]
    _, val = gpt.load_tokens(text_file, gpt.get_tokenizer("bytes"), 24)
    assert row["loss"] == pytest.approx(gpt.evaluate(model, val, 8), rel=1e-4)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["13"], "'13' is no rung, expected one of: 0 Uniform, "),
        (["-1"], "'-1' is no rung"),
        (["six", "7"], "'six' is no rung"),
        (["6"], "RUNG is 6, expected two to compare"),
        (["6", "7", "8"], "RUNG is 6 7 8, expected two to compare"),
        (["6", "7", "--only", "3"], "expected two to compare, or --only to train some"),
        (["--only", "3,99"], "'99' is no rung"),
        (["--only", "3,"], "'' is no rung"),
        (["--only", "12"], "rung 12 needs weights: --pretrained FOLDER"),
        (["--only", "12", "--pretrained", "nowhere"], "nowhere"),
        (["--data", "nowhere.txt"], "--data is 'nowhere.txt', expected a readable text file"),
        (["--data", "empty.txt"], "expected more than 128 in each"),
        (["--steps", "0"], "0, expected 1 to"),
        (["--seeds", "many"], "invalid integer value: 'many'"),
        (["--plot", "ladder.txt"], "--plot is 'ladder.txt', expected a name that ends in"),
        (["--json", "no/folder/f.json"], "no/folder/f.json"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.setattr(climb, "measure", lambda *_: pytest.fail("trained"))
    try:
        status = main(["ladder", *argv])
    except SystemExit as error:
        status = error.code
    err = capsys.readouterr().err
    assert status in (1, 2) and message in err and "Traceback" not in err
    assert err.count("\n") == 1 or status == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty.txt"]


def test_a_text_too_large_to_count_is_refused_and_one_to_learn_from_is_not(text_file, monkeypatch, capsys):
    monkeypatch.setattr(climb, "MOST", 100)
    assert main(["ladder", "--only", "3", "--data", text_file]) == 1
    assert "--data has 3,600 bytes to train on, expected at most 100: counting takes memory" in capsys.readouterr().err
    assert main(["ladder", "--only", "4", "--data", text_file, "--steps", "1", "--seeds", "1"]) == 0


def test_figures_that_cannot_be_written_leave_the_old_ones_whole(tmp_path):
    path = tmp_path / "figures.json"
    experiment.write_json(path, dict(a=1))
    with pytest.raises(ValueError):
        experiment.write_json(path, dict(a=math.nan))

    def dies(name):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        experiment.write_whole(path, dies)
    assert json.loads(path.read_text()) == dict(a=1) and len(list(tmp_path.iterdir())) == 1
