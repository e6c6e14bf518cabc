"""fastgpt look: its numbers against the model and plain loops, its page in a browser without a network."""

import base64
import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import fastgpt
import gpt
from fastgpt.__main__ import main
from fastgpt.learn import look

TEXT = "abcab abcab, the cat"


def random_model(ops=None, n_layer=3, vocab_size=257, n_embd=48, seed=0):
    """Weights so large that heads differ and attention is far from uniform."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(n_layer, 4, n_embd, 40, vocab_size), ops)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.fixture
def model(ops):
    return random_model(ops)


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor(gpt.get_tokenizer("bytes").encode(TEXT))


@pytest.fixture
def flow(model, tokens):
    with torch.no_grad():
        return look.trace(model, tokens[None])


@pytest.fixture(scope="module")
def page():
    return look.look(random_model(), TEXT, "bytes")


# ------------------------------------------------------------------------------------------ What the model does


def test_the_trace_is_the_models_own_pass(model, flow, tokens):
    assert torch.equal(flow.logits, model(tokens[None])[0])


def test_the_last_row_of_the_lens_is_the_models_logits(model, flow, tokens):
    assert torch.equal(look.lens(model, flow.streams[-1]), model(tokens[None])[0])


def test_other_rows_of_the_lens_are_those_of_a_model_with_fewer_layers(model, flow, tokens):
    for layer in (1, 2):
        shorter = gpt.GPT(gpt.GPTConfig(layer, 4, 48, 40, 257), model.ops)
        shorter.load_state_dict({k: x for k, x in model.state_dict().items() if k in shorter.state_dict()})
        assert torch.equal(look.lens(model, flow.streams[2 * layer]), shorter(tokens[None])[0])


def test_parts_add_up_to_the_stream(model, flow, tokens):
    x = model.wte(tokens) + model.wpe.weight[: len(tokens)]
    assert torch.equal(x, flow.streams[0])
    for layer, block in enumerate(model.h):
        x = x + flow.attention[layer]
        assert torch.equal(x, flow.streams[2 * layer + 1])
        x = x + flow.mlp[layer]
        assert torch.equal(x, flow.streams[2 * layer + 2])
        heads = flow.heads[layer].sum(0) + block.attn.c_proj.bias
        torch.testing.assert_close(heads, flow.attention[layer])


def test_attention_rows_sum_to_one_and_see_no_future(flow):
    for weights in flow.weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        assert (weights >= 0).all() and not weights.triu(1).any()


def test_attention_weights_are_those_of_the_formula(model, tokens):
    """T is more than D = 12, so the identity goes through in two parts, the last of them padded."""
    x = model.h[0].ln_1(model.wte(tokens[None]) + model.wpe.weight[: len(tokens)])
    q, k, _ = gpt.split_heads(model.h[0].attn.c_attn(x), 4)
    expected = gpt.attend(q, k, torch.eye(len(tokens)).expand(1, 4, -1, -1))[0]
    with torch.no_grad():
        torch.testing.assert_close(look.trace(model, tokens[None]).weights[0], expected)


def test_attention_weights_of_a_formula_of_ones_own():
    def equal_weights(qkv, n_head, dropout=0.0, seed=0):
        q, k, v = gpt.split_heads(qkv, n_head)
        return gpt.merge_heads(gpt.attend(q * 0, k, v))

    weights = look.attention_weights(equal_weights, torch.randn(1, 7, 3 * 8), n_head=2)
    torch.testing.assert_close(weights, (torch.ones(2, 7, 7).tril() / torch.arange(1.0, 8.0)[:, None]))


def test_what_was_switched_off_is_on_again(model, tokens):
    before = model(tokens[None])
    with look.switched_off(model, "layer", 1):
        assert not torch.equal(model(tokens[None]), before)
    with pytest.raises(ZeroDivisionError), look.switched_off(model, "head", 1, 2):
        _ = 1 / 0
    look.examine(model.train(), tokens, "model")
    assert model.training
    assert torch.equal(model.eval()(tokens[None]), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_a_part_off_is_a_model_with_that_part_zeroed_by_hand(model, tokens):
    off, state, D = look.losses_off(model, tokens, "model"), model.state_dict(), 12

    def by_hand(*zeroed):
        changed = random_model(model.ops)
        changed.load_state_dict(state)
        for name, columns in zeroed:
            changed.get_parameter(name)[..., columns] = 0.0
        logits = changed(tokens[None])[0, :-1].double()
        return torch.log_softmax(logits, -1).gather(-1, tokens[1:, None])[:, 0].neg().tolist()

    everything = slice(None)
    for layer in range(3):
        parts = {
            kind: [(f"h.{layer}.{kind}.c_proj.{name}", everything) for name in ("weight", "bias")]
            for kind in ("attn", "mlp")
        }
        assert off["attention"][layer] == pytest.approx(by_hand(*parts["attn"]), abs=1e-5)
        assert off["mlp"][layer] == pytest.approx(by_hand(*parts["mlp"]), abs=1e-5)
        assert off["layer"][layer] == pytest.approx(by_hand(*parts["attn"], *parts["mlp"]), abs=1e-5)
        for head in range(4):
            hand = by_hand((f"h.{layer}.attn.c_proj.weight", slice(head * D, head * D + D)))
            assert off["head"][layer][head] == pytest.approx(hand, abs=1e-5)
            assert max(abs(a - b) for a, b in zip(hand, by_hand(), strict=True)) > 0.01  # or there is nothing to see


def test_losses_are_the_models(model, tokens):
    numbers = look.examine(model, tokens, "model")
    mean = model.loss(tokens[None, :-1], tokens[None, 1:]).item()
    assert np.mean(numbers["loss"]) == pytest.approx(mean, abs=1e-5)
    assert np.mean(numbers["loss"]) == pytest.approx(numbers["lens"][-1]["loss"])
    for head in numbers["heads"]:
        off = numbers["off"]["head"][head["layer"]][head["head"]]
        assert head["cost"] == pytest.approx(np.mean(off) - np.mean(numbers["loss"]), abs=1e-9)
    for row in numbers["lens"]:
        assert np.mean(-np.log(row["p"])) == pytest.approx(row["loss"])
        for p, rank, top, top_p, came in zip(
            row["p"], row["rank"], row["top"], row["top_p"], tokens[1:].tolist(), strict=False
        ):
            assert sorted(top_p, reverse=True) == top_p and (rank <= look.TOP) == (came in top)
            assert came not in top or top_p[top.index(came)] == p and top.index(came) == rank - 1


# --------------------------------------------------------------------------------------------------- The numbers


def score_by_hand(weights, tokens, counts):
    """counts(i, j): does the weight of position i on position j count?"""
    sums = []
    for i in range(len(tokens)):
        keys = [j for j in range(i + 1) if counts(i, j)]
        if keys:
            sums.append(sum(float(weights[i][j]) for j in keys))
    return sum(sums) / len(sums) if sums else None


COUNTS = {
    "previous": lambda t: lambda i, j: j == i - 1,
    "same": lambda t: lambda i, j: j < i and t[j] == t[i],
    "first": lambda t: lambda i, j: j == 0 and i > 0,
    "induction": lambda t: lambda i, j: 0 < j < i and t[j - 1] == t[i],
}


def test_scores_follow_their_definitions(model, flow, tokens):
    numbers, t = look.examine(model, tokens, "model"), tokens.tolist()
    for head in numbers["heads"]:
        weights = flow.weights[head["layer"]][head["head"]]
        for kind, counts in COUNTS.items():
            assert head[kind] == pytest.approx(score_by_hand(weights, t, counts(t)), abs=1e-6)
    equal = [[1 / (i + 1)] * (i + 1) for i in range(len(t))]
    for kind, value in look.uniform(tokens).items():
        assert value == pytest.approx(score_by_hand(equal, t, COUNTS[kind](t)), abs=1e-6)


@pytest.mark.parametrize("kind, source", [("previous", 9), ("first", 0), ("same", 5), ("induction", 6)])
def test_a_head_that_does_one_thing_scores_one_and_is_marked(kind, source):
    tokens = torch.tensor([*range(5), *range(5)])
    weights = torch.zeros(1, 10, 10)
    for i in range(10):
        keys = [j for j in range(i) if COUNTS[kind](tokens.tolist())(i, j)] or [i]
        weights[0, i, keys] = 1 / len(keys)
    scores = {name: look.score(weights, pattern)[0] for name, pattern in look.patterns(tokens).items()}
    assert scores[kind] == pytest.approx(1.0)
    assert look.mark(scores, look.uniform(tokens)) == kind


def test_equal_weights_get_no_mark_and_a_text_without_copies_no_score():
    tokens = torch.arange(9)
    base = look.uniform(tokens)
    assert base["same"] is None and base["induction"] is None and look.mark(base, base) is None
    assert base["first"] == pytest.approx(np.mean([1 / (i + 1) for i in range(1, 9)]))


def test_neighbours_have_the_largest_cosines(page):
    wte = random_model().wte.weight.detach().double().numpy()
    wte /= np.linalg.norm(wte, axis=1, keepdims=True)
    near = page.numbers["checkpoints"][0]["neighbours"]
    assert set(near) == set(page.numbers["tokens"])
    for token, pairs in near.items():
        cosines = wte @ wte[token]
        order = [i for i in np.argsort(-cosines) if i != token][: look.NEIGHBOURS]
        assert [i for i, _ in pairs] == order
        assert [cosine for _, cosine in pairs] == pytest.approx(cosines[order], abs=1e-6)


def test_lengths_of_writes(model, flow, tokens):
    numbers = look.examine(model, tokens, "model")
    for layer in range(3):
        assert numbers["writes"]["mlp"][layer] == pytest.approx(flow.mlp[layer].norm(dim=-1).tolist(), rel=1e-5)
        assert numbers["writes"]["head"][layer][2] == pytest.approx(
            flow.heads[layer][2].norm(dim=-1).tolist(), rel=1e-5
        )
    assert numbers["stream"][6] == pytest.approx(flow.streams[6].norm(dim=-1).tolist(), rel=1e-5)
    assert numbers["writes"]["wpe"] == pytest.approx(model.wpe.weight[: len(tokens)].norm(dim=-1).tolist(), rel=1e-5)


def test_tokens_are_spelled_so_that_one_sees_them(gpt2_tokenizer_files):
    tokenizer = gpt.get_tokenizer("bytes")
    spelled = "".join(look.spell(i, tokenizer) for i in tokenizer.encode("a é\n\t\x00\\"))
    assert spelled == "a␣\\xc3\\xa9\\n\\t\\x00\\" and look.spell(256, tokenizer) == "<|endoftext|>"
    assert look.spell(300, tokenizer) == "#300"
    tokenizer = gpt.get_tokenizer("gpt2")
    assert [look.spell(i, tokenizer) for i in tokenizer.encode(" the é\u202e")][:2] == ["␣the", "␣é"]
    assert all(look.spell(i, tokenizer).isprintable() and look.spell(i, tokenizer) for i in range(50257))


# ------------------------------------------------------------------------------------------------------ The page


def data_of(written):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', written, re.S)[1])


def test_the_page_holds_the_numbers(page):
    data, numbers = data_of(page.html), json.loads(page.json)
    assert data["tokens"] == numbers["tokens"] == list(TEXT.encode())
    [small], [whole] = data["checkpoints"], numbers["checkpoints"]
    assert small["off"]["head"][2][1] == pytest.approx(whole["off"]["head"][2][1], rel=1e-3)
    weights = np.frombuffer(base64.b64decode(small["attention"]), "<u2") / 65535
    flat = [w for layer in whole["attention"] for head in layer for row in head for w in row]
    assert len(weights) == 3 * 4 * 20 * 21 // 2 and abs(weights - flat).max() <= 0.51 / 65535


def test_the_page_asks_nobody(page):
    assert not re.search(
        r"https?:|src=|@import|url\(|fetch\(|XMLHttpRequest|import\(", page.html.split('<script id="data"')[0]
    )
    assert "default-src 'none'" in page.html


def test_a_text_with_html_in_it_does_not_end_its_element():
    text = "</script><b>&amp;{}<!--"
    written = look.look(random_model(), text, "bytes").html
    assert "".join(data_of(written)["spelled"][str(i)] for i in text.encode()) == text
    assert written.count("</script>") == 2 and written.count("<!--") == 1


def test_a_notebook_shows_the_page_as_it_is(page):
    shown = page._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1]) == page.html


def test_a_text_of_one_token_has_no_loss():
    one = look.look(random_model(), "a", "bytes").numbers["checkpoints"][0]
    assert one["loss"] == [] and one["lens"][-1]["loss"] is None and {h["cost"] for h in one["heads"]} == {None}
    assert one["attention"][0][0] == [[1.0]]


@pytest.mark.slow
def test_twelve_layers_of_twelve_heads_at_64_tokens_take_less_than_1_5_megabytes(gpt2_tokenizer_files):
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(12, 12, 48, 64, 50257), fastgpt)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    text = gpt.get_tokenizer("gpt2").decode(torch.randint(50000, (64,)).tolist())
    text = gpt.get_tokenizer("gpt2").decode(gpt.get_tokenizer("gpt2").encode(text)[:60])
    page = look.look(model, text)
    assert 55 <= len(page.numbers["tokens"]) <= 64 and len(page.html.encode()) < 1.5e6


def save_steps(folder, steps, **sizes):
    for step in steps:
        random_model(seed=step, **sizes).save_pretrained(folder / f"step-{step}", tokenizer="bytes")


def test_checkpoints_of_a_run_come_in_the_order_of_their_steps(tmp_path):
    save_steps(tmp_path, (9, 100, 10))
    (tmp_path / "step-x").mkdir()
    names = [c["name"] for c in look.look(str(tmp_path), "ab").numbers["checkpoints"]]
    assert names == ["step-9", "step-10", "step-100"]
    random_model().save_pretrained(tmp_path, tokenizer="bytes")
    save_steps(tmp_path / "other", (9,))
    last = look.look([str(tmp_path), str(tmp_path / "other" / "step-9")], "ab").numbers["checkpoints"]
    steps = [str(tmp_path / f"step-{n}") for n in (9, 10, 100)]
    assert [c["name"] for c in last] == [*steps, str(tmp_path), str(tmp_path / "other" / "step-9")]
    assert last[0] == last[4] | dict(name=last[0]["name"])


@pytest.mark.parametrize(
    "text, options, wrong",
    [
        ("", {}, "text is empty"),
        ("a" * 41, {}, "text has 41 tokens, expected at most the model's context of 40"),
        ("\ud800", {}, "text is not valid Unicode"),
        ("a", dict(tokenizer="words"), "expected 'gpt2' or 'bytes'"),
    ],
)
def test_a_bad_argument_is_named(text, options, wrong):
    with pytest.raises(ValueError, match=wrong):
        look.look(random_model(), text, **dict(tokenizer="bytes") | options)


def test_models_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="tokenizer bytes has 257 ids, expected at most the model's 97"):
        look.look(random_model(vocab_size=97), "a", "bytes")
    with pytest.raises(
        ValueError, match=r"checkpoint 1 has \(2, 4, 48, 257\).*expected \(3, 4, 48, 257\) as checkpoint 0"
    ):
        look.look([random_model(), random_model(n_layer=2)], "a", "bytes")
    damaged = random_model()
    damaged.ln_f.bias.data[3] = math.nan
    with pytest.raises(ValueError, match="the logits of checkpoint 0 are not finite"):
        look.look(damaged, "a", "bytes")
    monkeypatch.setattr(look, "LARGEST", 0.005)
    fits = int(
        re.search(
            r"expected at most 0.005: (\d+) tokens",
            str(pytest.raises(ValueError, look.look, random_model(), "a" * 40, "bytes").value),
        )[1]
    )
    assert look.look(random_model(), "a" * fits, "bytes")
    with pytest.raises(ValueError, match="expected at most"):
        look.look(random_model(), "a" * (fits + 1), "bytes")


# ------------------------------------------------------------------------------------------- A model that learned


def test_the_text_that_repeats_can_be_told_only_by_looking_back():
    """In each paragraph a letter is followed by one other, but for jumps; in the whole text by any other alike."""
    text, n = look.repeats(400 * look.PARAGRAPH, seed=0), look.PARAGRAPH
    followed = np.array([[text.count(a + b) for b in look.LETTERS] for a in look.LETTERS])
    shares = followed / followed.sum(1, keepdims=True)
    assert len(set(look.LETTERS)) == 8 and 0.07 < shares[~np.eye(8, dtype=bool)].min()
    assert shares[~np.eye(8, dtype=bool)].max() < 0.2 and shares.diagonal().max() < 0.04
    for i in range(0, len(text), n):
        part = text[i : i + n]
        assert all(max(part.count(a + b) for b in look.LETTERS) > 0.5 * part[:-1].count(a) for a in look.LETTERS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", (1, 2, 3))
def test_induction_heads_appear_on_text_that_repeats(tmp_path, seed):
    """None before; then one of layer 1, which needs layer 0 to tell each position what stood before it."""
    model = look.train_on_repeats(str(tmp_path), seed, steps=600, every=600)
    text = look.repeats(48, seed=0)
    before, after = look.look(str(tmp_path), text).numbers["checkpoints"]
    assert not any(head["mark"] == "induction" or head["induction"] > 0.2 for head in before["heads"])

    induction = max(after["heads"], key=lambda head: head["induction"])
    assert induction["mark"] == "induction" and induction["induction"] > 0.5 and induction["layer"] == 1
    previous = max(after["heads"], key=lambda head: head["previous"])
    assert previous["layer"] == 0 and previous["previous"] > 0.25 > 2 * before["heads"][0]["previous"]
    assert previous["cost"] > 0.05 and induction["cost"] > 0.3 and np.mean(after["loss"]) < math.log(8) - 0.7

    tokens = torch.tensor(gpt.get_tokenizer("bytes").encode(text))
    pattern = look.patterns(tokens)["induction"]
    with torch.no_grad(), look.switched_off(model, "attention", 0):
        scores = look.score(look.trace(model, tokens[None]).weights[1], pattern)
    assert scores[induction["head"]] < 0.25

    generator = torch.Generator().manual_seed(0)  # rings of six, where all text in training goes round eight:
    rings = torch.stack([torch.randperm(8, generator=generator)[:6] for _ in range(200)]) + ord("a")
    idx = rings.repeat(1, 3)  # no distance that was learned by heart helps
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(idx[:, :-1]).mT, idx[:, 1:], reduction="none").mean(0)
    assert loss[:5].mean() > 1.5 and loss[-6:].mean() < 0.7


# ------------------------------------------------------------------------------------------------- The command


def test_the_command_writes_a_page_or_prints_numbers(tmp_path, monkeypatch, capsys):
    random_model().save_pretrained(tmp_path / "out", tokenizer="bytes")
    monkeypatch.chdir(tmp_path)
    assert main(["look", "--text", TEXT]) == 0 and capsys.readouterr().out == ""
    assert data_of((tmp_path / "look.html").read_text())["tokens"] == list(TEXT.encode())
    assert main(["look", "--text", "a", "--json", "--model", "out"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tokens"] == [97] and printed.err == ""
    assert data_of((tmp_path / "look.html").read_text())["tokens"] == list(TEXT.encode())  # not written again
    assert main(["look", "--text", "ab", "--json", "numbers.json", "--out", "look.html"]) == 0
    assert json.loads((tmp_path / "numbers.json").read_text())["tokens"] == [97, 98]
    assert data_of((tmp_path / "look.html").read_text())["tokens"] == [97, 98]


@pytest.mark.parametrize(
    "argv, wrong",
    [
        (["--model", "nowhere", "--text", "a"], "'nowhere' is no folder and no model"),
        (["--text", ""], "text is empty"),
        (["--text", "a" * 41], "text has 41 tokens"),
        (["--text", "a", "--out", "notes.txt"], "notes.txt exists and is no page of fastgpt look"),
        (["--text", "a", "--out", "no/where.html"], "no/where.html"),
        (["--repeats", "out"], "out exists and is not empty"),
        (["--repeats", "new", "--model", "out"], "--model and --repeats are both given"),
    ],
)
def test_what_the_command_cannot_do_it_says_in_a_line(argv, wrong, tmp_path, monkeypatch, capsys):
    random_model().save_pretrained(tmp_path / "out", tokenizer="bytes")
    (tmp_path / "notes.txt").write_text("of mine")
    monkeypatch.chdir(tmp_path)
    assert main(["look", *argv]) == 1
    printed = capsys.readouterr()
    assert wrong in printed.err and len(printed.err.splitlines()) == 1 and printed.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out"]
    assert (tmp_path / "notes.txt").read_text() == "of mine"


# ------------------------------------------------------------------------------------------------- In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def in_browser(page, script, tmp_path, width=1280):
    """Run a script at the end of a copy of the page. -> what it returns, and the lines in the console"""
    path = tmp_path / "page.html"
    listener = "<script>const wrong = []; addEventListener('error', (e) => wrong.push(e.message));</script>"
    ending = f"<script>document.title = JSON.stringify({{value: (() => {{ {script} }})(), wrong}});</script>"
    path.write_text(page.html.replace("<head>", f"<head>{listener}", 1).replace("</body>", f"{ending}</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "--enable-logging=stderr",
        "--v=0",
    ]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    run = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    result = json.loads(html.unescape(re.search("<title>(.*?)</title>", run.stdout, re.S)[1]))
    assert result["wrong"] == [] and "CONSOLE" not in run.stderr, run.stderr
    return result["value"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_steps(folder, (0, 5, 10))
    return look.look(str(folder), TEXT)


PICTURES = """
    const pictures = () => ["attention", "loss"].map((id) => document.getElementById(id).toDataURL())
        .concat(["text", "lens", "map", "writes", "near"].map((id) => document.getElementById(id).innerHTML));
    const changed = (act) => { const before = pictures(); act(); return pictures().map((x, i) => +(x !== before[i])).join(""); };
    const press = (key, more = {}, target = document.body) =>
        target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
"""


@pytest.mark.slow
@browser
def test_clicks_and_keys_change_the_pictures(three, tmp_path):
    script = """
        const click = (query) => document.querySelector(query).click();
        click("#text [data-token='3']");
        return {
            token: changed(() => click("#text [data-token='10']")),
            head: changed(() => click("#map [data-layer='1'][data-head='2']")),
            again: changed(() => click("#map [data-layer='1'][data-head='2']")),
            off: changed(() => click("#switches [data-off='mlp']")),
            left: changed(() => press("ArrowLeft")),
            up: changed(() => press("ArrowUp", { shiftKey: true })),
            page: changed(() => press("ArrowUp")),
            map: changed(() => press("ArrowRight", {}, document.getElementById("map"))),
            lens: changed(() => press("ArrowUp", {}, document.getElementById("lens"))),
            previous: changed(() => press("p")),
            nothing: changed(() => press("0")),
            canvas: changed(() => document.getElementById("attention").dispatchEvent(
                new MouseEvent("click", { bubbles: true, clientX: 200, clientY: 5 + document.getElementById("attention").getBoundingClientRect().top }))),
            status: document.getElementById("status").textContent,
            alone: performance.getEntriesByType("resource").length,
        };
    """
    seen = in_browser(three, PICTURES + script, tmp_path)
    # attention, loss, text, lens, map, writes, near
    assert seen["token"] == "1111011" and seen["head"][0] == seen["head"][1] == seen["head"][4] == "1"
    assert seen["again"] == "0000000" == seen["page"] and seen["off"] == "0100100"
    assert seen["left"] == "1111011" and seen["up"][0] == "1" and seen["map"][0] == "1"
    assert seen["lens"] == "0001000" and seen["previous"] == "1111111" and seen["nothing"][1] == "1"
    assert seen["canvas"][0] == "1" and "layer 0, head 3, position 0 ‘a’" in seen["status"] and seen["alone"] == 0


@pytest.mark.slow
@browser
def test_the_slider_shows_the_numbers_of_each_checkpoint(three, tmp_path):
    script = """
        const slider = document.getElementById("slider");
        return [0, 1, 2].map((i) => { slider.value = i; slider.dispatchEvent(new Event("input"));
            return [document.getElementById("step").textContent, document.getElementById("about").textContent]; });
    """
    seen = in_browser(three, script, tmp_path)
    for (name, about), checkpoint in zip(seen, three.numbers["checkpoints"], strict=True):
        assert name == checkpoint["name"] and f"mean loss of {np.mean(checkpoint['loss']):.3f}" in about


@pytest.mark.slow
@browser
def test_the_tables_hold_what_the_pictures_show(page, tmp_path):
    script = """
        const rows = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].map((r) => [...r.cells].map((c) => c.textContent));
        document.querySelector("#text [data-token='7']").click();
        document.querySelector("#map [data-layer='2'][data-head='1']").click();
        return { attention: rows("attention-table"), loss: rows("loss-table"), map: rows("map-table"), lens: rows("lens"),
            alt: [...document.querySelectorAll("canvas")].map((c) => c.ariaLabel) };
    """
    seen, [numbers] = in_browser(page, script, tmp_path), page.numbers["checkpoints"]
    weights = numbers["attention"][2][1][7]
    assert [float(row[2]) for row in seen["attention"]] == pytest.approx(weights, abs=1e-4)
    assert [float(row[3]) for row in seen["loss"]] == pytest.approx(numbers["off"]["head"][2][1], abs=2e-3)
    assert (
        len(seen["map"]) == 13
        and seen["map"][0][0] == max((h["cost"], f"{h['layer']}.{h['head']}") for h in numbers["heads"])[1]
    )
    spelled = page.numbers["spelled"]
    for cells, row in zip(seen["lens"], numbers["lens"], strict=True):
        assert cells[2:] == [spelled[top[0]] for top in row["top"]]
    assert "Position 7" in seen["alt"][0] and f"{max(weights):.3f}" in seen["alt"][0] and "head 2.1" in seen["alt"][1]


@pytest.mark.slow
@browser
@pytest.mark.parametrize("width", (500, 1280))
def test_the_page_is_as_wide_as_the_window(page, tmp_path, width):
    script = "return [document.documentElement.scrollWidth, innerWidth];"
    inside, window = in_browser(page, script, tmp_path, width)
    assert inside <= window == width


@pytest.mark.slow
@browser
@pytest.mark.parametrize("text", ("a", "ab", "</script><b>&amp;{}\n\x00\u202eé"))
def test_short_and_odd_texts_are_shown(text, tmp_path):
    shown = look.look(random_model(), text, "bytes")
    script = """
        const text = () => [...document.querySelectorAll("#text .token")].map((e) => e.textContent).join("");
        press("ArrowLeft"); press("a"); press("ArrowRight");
        document.getElementById("loss").click(); document.getElementById("attention").click();
        return text();
    """
    expected = "".join(look.spell(i, gpt.get_tokenizer("bytes")) for i in text.encode())
    assert in_browser(shown, PICTURES + script, tmp_path) == expected
