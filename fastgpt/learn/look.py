"""`fastgpt look`: open a model and see what happens in it while it reads a text.

Writes one page that needs no network; `--json` gives its numbers; look() shows the page in a notebook. What is computed
for a text of T tokens, with layers and heads counted from 0 as in model.h:

  loss        of each token but the first: -log of the probability that the model gave it, in nats
  lens        the logit lens (nostalgebraist 2020): ln_f and wte, which make logits of the last stream, applied to the
              residual stream after the embedding, after each attention and after each MLP
  attention   the weights of each head: row i holds what position i gives to the positions 0 to i, and sums to 1
  cost        of a part: the mean loss with the part switched off, less the mean loss, in nats a token. Off: it adds
              zeros to the stream: an attention or an MLP with its bias; a head without one, as c_proj's bias is of
              all heads. Always one part alone: two together need not cost the sum
  scores      of a head: its weight on keys of one kind, as a mean over the positions that have such keys.
              previous: the token before. first: the first token (positions from 1). same: earlier copies of the token
              ("duplicate token heads", Wang et al. 2022). induction: earlier tokens that came right after a copy
              ("prefix matching", Olsson et al. 2022). `uniform` is what equal weights would score on this text; a
              head's mark is the score that is furthest above it, by MARKED at least
  writes      the length (L2 norm) of what each part adds to the stream at each position; a head's is its share of
              c_proj's product. stream: the length of the sum so far
  neighbours  of a token: the rows of wte with the largest cosine to its own
"""

import argparse
import base64
import html
import json
import math
import os
import random
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gpt

from .. import ops

TEXT = "To be, or not to be, that is the question. To be, or not to be"
TOP = 5  # tokens that the lens shows, most probable first
NEIGHBOURS = 8
MARKED = 0.2  # how far a head's score is above that of equal weights, if the head gets the mark
LETTERS, PARAGRAPH, JUMP = "abcdefgh", 256, 0.15  # of the text that repeats
LARGEST = 16  # megabytes of attention weights that a page may hold
OURS = "<!-- written by fastgpt look -->"


# ------------------------------------------------------------------------------------------- What the model does


@contextmanager
def switched_off(model, kind, layer, head=None):
    """Within, one part of the model writes zeros to the residual stream. kind: head, attention, mlp or layer (both)."""
    block = model.h[layer]

    def write_nothing(module, args, output):
        return torch.zeros_like(output)

    def drop_head(module, args):
        y = args[0].clone()  # (1, T, C), the heads side by side
        y.unflatten(-1, (model.config.n_head, -1))[..., head, :] = 0.0
        return (y,)

    if kind == "head":
        handles = [block.attn.c_proj.register_forward_pre_hook(drop_head)]
    else:
        parts = dict(attention=[block.attn], mlp=[block.mlp], layer=[block.attn, block.mlp])[kind]
        handles = [part.register_forward_hook(write_nothing) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Trace:
    """All that one pass of T tokens writes and reads."""

    logits: torch.Tensor  # (T, V)
    streams: list  # 2 n_layer + 1 of (T, C): the residual stream after the embedding, each attention, each MLP
    attention: list  # n_layer of (T, C): what each attention writes
    mlp: list  # n_layer of (T, C)
    heads: list  # n_layer of (H, T, C): what each head writes; with c_proj's bias they add up to the attention's
    weights: list  # n_layer of (H, T, T)


def trace(model, idx):
    """Run the model on idx (1, T) and keep what flows through it."""
    seen, handles = {}, []

    def keep(key, module, before=False):
        def hook(module, args, output=None):
            seen[key] = args[0] if before else output

        handles.append((module.register_forward_pre_hook if before else module.register_forward_hook)(hook))

    for i, block in enumerate(model.h):
        keep(("stream", 2 * i), block.ln_1, before=True)
        keep(("stream", 2 * i + 1), block.ln_2, before=True)
        keep(("qkv", i), block.attn.c_attn)
        keep(("heads", i), block.attn.c_proj, before=True)
        keep(("attention", i), block.attn)
        keep(("mlp", i), block.mlp)
    layers, H = range(len(model.h)), model.config.n_head
    keep(("stream", 2 * len(layers)), model.ln_f, before=True)
    try:
        logits = model(idx)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(
        logits=logits[0],
        streams=[seen["stream", i][0] for i in range(2 * len(layers) + 1)],
        attention=[seen["attention", i][0] for i in layers],
        mlp=[seen["mlp", i][0] for i in layers],
        heads=[head_writes(seen["heads", i][0], model.h[i].attn.c_proj.weight, H) for i in layers],
        weights=[attention_weights(model.ops.attention, seen["qkv", i], H) for i in layers],
    )


def head_writes(y, weight, n_head):
    """c_proj's product, head by head: (T, C), (C, C) -> (H, T, C)"""
    return torch.einsum("thd,chd->htc", y.unflatten(-1, (n_head, -1)), weight.unflatten(-1, (n_head, -1)))


def attention_weights(formula, qkv, n_head):
    """The weights that any formula of attention gives the positions: (1, T, 3C) -> (H, T, T).

    It is linear in the values, so columns of the identity as values bring the weights out, D at a time.
    """
    T, C = qkv.shape[1], qkv.shape[2] // 3
    D, columns = C // n_head, []
    for some in torch.eye(T).to(qkv).split(D, dim=1):  # (T, D); the last may have fewer columns
        v = F.pad(some, (0, D - some.shape[1])).repeat(1, n_head)  # (T, C), the same for each head
        y = formula(torch.cat((qkv[..., : 2 * C], v[None]), dim=-1), n_head)
        columns.append(y[0].unflatten(-1, (n_head, D))[..., : some.shape[1]])
    return torch.cat(columns, dim=-1).transpose(0, 1)


def lens(model, stream):
    """Logits that the model would give if this were its last residual stream: (T, C) -> (T, V)"""
    return model.ops.linear(model.ln_f(stream[None]), model.wte.weight)[0]


def token_losses(logits, tokens):
    """-log p of each token but the first, in nats: (T, V), (T) -> (T - 1), float64"""
    return F.cross_entropy(logits[:-1].double(), tokens[1:], reduction="none")


def patterns(tokens):
    """Which keys (columns) are of each kind for each query (row): {name: (T, T) booleans}"""
    query, key = torch.arange(len(tokens))[:, None], torch.arange(len(tokens))
    same = (tokens[:, None] == tokens) & (key < query)
    after_same = F.pad(same, (1, 0))[:, :-1] & (key < query)  # the key before this one is a copy of the query
    return dict(previous=key == query - 1, same=same, first=(key == 0) & (query > 0), induction=after_same)


def score(weights, pattern):
    """The weight on a pattern's keys, as a mean over the rows that have any: (H, T, T), (T, T) -> H floats or Nones"""
    rows = pattern.any(-1)
    sums = (weights.double() * pattern).sum(-1)[:, rows]  # (H, rows)
    return sums.mean(-1).tolist() if rows.any() else [None] * len(weights)


def nearest(wte, ids):
    """The rows of wte with the largest cosine to those of ids: {id: [[id, cosine], ...]}"""
    unit = F.normalize(wte, dim=-1)
    cosines = unit[ids] @ unit.T
    cosines[torch.arange(len(ids)), ids] = -2.0  # not itself
    top = cosines.topk(min(NEIGHBOURS, len(wte) - 1), dim=-1)
    rows = zip(ids.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {i: [list(pair) for pair in zip(near, cosine, strict=True)] for i, near, cosine in rows}


# --------------------------------------------------------------------------------------------------- The numbers


@torch.no_grad()
def examine(model, tokens, name):
    """All numbers of one checkpoint, as lists and dicts. tokens: (T) int64"""
    training = model.training
    model.eval()
    try:
        flow = trace(model, tokens[None])
        if not flow.logits.isfinite().all():
            raise ValueError(f"look: the logits of {name} are not finite; are the weights damaged, or diverged?")
        loss, off = token_losses(flow.logits, tokens), losses_off(model, tokens, name)
        T = len(tokens)
        checkpoint = dict(
            name=name,
            loss=loss.tolist(),
            lens=[lens_row(lens(model, x), tokens) for x in flow.streams],
            off=off,
            heads=describe_heads(flow, tokens, loss, off["head"]),
            writes=dict(
                wte=lengths(model.wte(tokens)),
                wpe=lengths(model.wpe.weight[:T]),
                attention=[lengths(x) for x in flow.attention],
                mlp=[lengths(x) for x in flow.mlp],
                head=[lengths(x) for x in flow.heads],
            ),
            stream=[lengths(x) for x in flow.streams],
            neighbours=nearest(model.wte.weight, tokens.unique()),
            attention=[[triangle(head) for head in layer.tolist()] for layer in flow.weights],
        )
    finally:
        model.train(training)
    return checkpoint


def losses_off(model, tokens, name):
    """The loss of each token with one part switched off: {kind: n_layer lists}, {"head": n_layer of n_head lists}"""
    off, heads = {}, range(model.config.n_head)

    def losses(*part):
        with switched_off(model, *part):
            return token_losses(model(tokens[None])[0], tokens).tolist()

    for layer in range(len(model.h)):
        gpt.progress(f"{name}: layer {layer} of {len(model.h)}, each part switched off once")
        for kind in ("attention", "mlp", "layer"):
            off.setdefault(kind, []).append(losses(kind, layer))
        off.setdefault("head", []).append([losses("head", layer, head) for head in heads])
    gpt.progress("")
    return off


def describe_heads(flow, tokens, loss, off):
    """One dict for each head: layer, head, cost, the four scores and the mark, or None"""
    kinds, heads = patterns(tokens), []
    for layer, weights in enumerate(flow.weights):
        scores = {kind: score(weights, pattern) for kind, pattern in kinds.items()}
        for head in range(len(weights)):
            own = {kind: values[head] for kind, values in scores.items()}
            cost = (loss.new_tensor(off[layer][head]) - loss).mean().item() if len(loss) else None
            heads.append(dict(layer=layer, head=head, cost=cost, mark=mark(own, uniform(tokens)), **own))
    return heads


def uniform(tokens):
    """What a head with equal weights on all positions so far scores on this text."""
    weights = torch.ones(len(tokens), len(tokens)).tril() / torch.arange(1, len(tokens) + 1)[:, None]
    return {kind: score(weights[None], pattern)[0] for kind, pattern in patterns(tokens).items()}


def mark(scores, base):
    above = {kind: scores[kind] - base[kind] for kind in scores if scores[kind] is not None}
    best = max(above, key=above.__getitem__, default=None)
    return best if best is not None and above[best] >= MARKED else None


def lens_row(logits, tokens):
    """What one depth would say: the most probable tokens, and probability and rank (from 1) of the one that came."""
    probs = torch.softmax(logits.double(), dim=-1)  # (T, V)
    top = probs.topk(min(TOP, probs.shape[1]), dim=-1)
    came = probs[:-1].gather(-1, tokens[1:, None])  # (T - 1, 1)
    rank = (probs[:-1] > came).sum(-1) + 1
    loss = token_losses(logits, tokens).mean().item() if len(tokens) > 1 else None
    return dict(
        loss=loss, top=top.indices.tolist(), top_p=top.values.tolist(), p=came[:, 0].tolist(), rank=rank.tolist()
    )


def lengths(x):
    """(..., C) -> nested lists of L2 norms"""
    return x.double().norm(dim=-1).tolist()


def triangle(rows):
    return [row[: i + 1] for i, row in enumerate(rows)]


def spell(token, tokenizer):
    """A token as a reader can see it: spaces as ␣, what has no glyph or is part of a character as an escape."""
    try:
        raw = tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return f"#{token}"  # a row of wte beyond the tokenizer's ids
    text = raw.decode("utf-8", errors="backslashreplace")
    return "".join("␣" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


# ------------------------------------------------------------------------------------------------------ The page


@dataclass
class Page:
    """What look() gives: `.numbers`, `.html`, `.save(path)`; a notebook shows it as the last value of a cell."""

    numbers: dict

    @cached_property
    def html(self):
        template = Path(__file__).with_name("look.html").read_text(encoding="utf-8")
        data = json.dumps(packed(self.numbers), separators=(",", ":"), ensure_ascii=False)
        return template.replace("{}", data.replace("<", "\\u003c"), 1)  # no text ends the element that it stands in

    @property
    def json(self):
        return json.dumps(rounded(self.numbers, 8))

    def save(self, path):
        """Write the page: whole, or not at all, and never over a file that is no such page."""
        expect_ours(path)
        write_whole(path, self.html)

    def _repr_html_(self):
        style = "width: 100%; height: 90vh; border: 0"
        srcdoc = html.escape(self.html)
        return f'<iframe title="fastgpt look" sandbox="allow-scripts" style="{style}" srcdoc="{srcdoc}"></iframe>'


def packed(numbers):
    """The numbers as the page holds them: four digits; attention weights in 16 bits each, as base64."""
    small = []
    for checkpoint in numbers["checkpoints"]:
        rest = {key: x for key, x in checkpoint.items() if key != "attention"}
        rows = (row for layer in checkpoint["attention"] for head in layer for row in head)
        weights = np.concatenate([np.array(row) for row in rows])
        parts = np.round(weights * 65535).clip(0, 65535).astype("<u2").tobytes()
        small.append(rounded(rest, 4) | dict(attention=base64.b64encode(parts).decode()))
    return numbers | dict(checkpoints=small)


def rounded(x, digits):
    if isinstance(x, dict):
        return {key: rounded(value, digits) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def look(models, text, tokenizer=None):
    """Open a model, or several checkpoints of one run, while it reads `text`. -> Page

    models: a folder, a name like "gpt2", a gpt.GPT; or a list of those, or a dict {name: model}, all of one size.
    tokenizer: "bytes" or "gpt2", for a model that names none. Raises ValueError for a text that is empty or longer than
    the model's context, for models that are not alike, and for a page of more than LARGEST megabytes.
    """
    if not isinstance(models, dict):
        models = models if isinstance(models, (list, tuple)) else [models]
        named = [(str(m) if not isinstance(m, gpt.GPT) else f"checkpoint {i}", m) for i, m in enumerate(models)]
        models = dict(find_checkpoints(named))
    checkpoints, first, config, tokens = [], None, None, None
    for name, source in models.items():
        model = source if isinstance(source, gpt.GPT) else gpt.GPT.from_pretrained(source, ops)
        if config is None:
            config = model.config
            encoding = gpt.get_tokenizer(tokenizer or getattr(model, "tokenizer", None) or "gpt2")
            tokens = encode(text, encoding, config)
            expect_fits(config, len(tokens), len(models))
            first = name
        sizes = [(c.n_layer, c.n_head, c.n_embd, c.vocab_size) for c in (model.config, config)]
        if sizes[0] != sizes[1]:
            what = "layers, heads, channels and tokens"
            raise ValueError(f"look: {name} has {sizes[0]} {what}, expected {sizes[1]} as {first} has")
        checkpoints.append(examine(model, tokens, name))
    ids = {*tokens.tolist()}
    for checkpoint in checkpoints:
        ids |= {i for row in checkpoint["lens"] for top in row["top"] for i in top}
        ids |= {i for near in checkpoint["neighbours"].values() for i, _ in near}
    about = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    return Page(
        dict(
            model=about | dict(tokenizer=encoding.name),
            tokens=tokens.tolist(),
            spelled={i: spell(i, encoding) for i in sorted(ids)},
            uniform=uniform(tokens),
            checkpoints=checkpoints,
        )
    )


def encode(text, tokenizer, config):
    """-> (T) int64"""
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(
            f"look: tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, expected at most the model's "
            f"{config.vocab_size}"
        )
    if not text:
        raise ValueError("look: text is empty, expected at least one token")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"look: text is not valid Unicode ({error.reason})") from error
    ids = tokenizer.encode(text, allowed_special="all")
    if len(ids) > config.block_size:
        raise ValueError(
            f"look: text has {len(ids)} tokens, expected at most the model's context of {config.block_size}"
        )
    return torch.tensor(ids)


def expect_fits(config, T, n):
    """Attention weights are most of a page: n_layer n_head T (T + 1) / 2 of each checkpoint, at 8/3 bytes."""
    each = config.n_layer * config.n_head * n * 8 / 3e6
    if each * T * (T + 1) / 2 > LARGEST:
        fits = int(((8 * LARGEST / each + 1) ** 0.5 - 1) / 2)
        raise ValueError(
            f"look: text has {T} tokens, whose attention weights in {n} checkpoint{'s' * (n > 1)} take "
            f"{each * T * (T + 1) / 2:.0f} MB, expected at most {LARGEST}: {fits} tokens, or fewer checkpoints"
        )


def find_checkpoints(named):
    """Replace a folder that holds step-N folders by those, in order, and by its own weights, if it has any."""
    for name, source in named:
        if isinstance(source, gpt.GPT) or not os.path.isdir(source):
            yield name, source
            continue
        steps = [path for path in Path(source).iterdir() if re.fullmatch(r"step-\d+", path.name)]
        for path in sorted(steps, key=lambda path: int(path.name[5:])):
            yield (path.name if len(named) == 1 else str(path)), str(path)
        if not steps or os.path.exists(os.path.join(source, "model.safetensors")):
            yield name, source


def write_whole(path, text):
    """The file is then all of the text, or what it was before."""
    temporary = f"{path}.tmp"
    try:
        Path(temporary).write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def expect_ours(path):
    """Find out now, and not after the work, that a file must not or cannot be written."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            if OURS.encode() not in file.read(200):
                raise ValueError(f"look: {path} exists and is no page of fastgpt look, expected another name")
    else:
        Path(path).touch()
        os.remove(path)


# ---------------------------------------------------------------------------------------- A model to look into


def repeats(n, seed):
    """n characters of text that repeats. Each paragraph has the LETTERS in an order of its own and goes round and round
    in it, now and then with a jump to any of them. Only looking back tells which letter follows which."""
    rng, text = random.Random(seed), ""
    while len(text) < n:
        order, at = rng.sample(LETTERS, len(LETTERS)), 0
        for _ in range(PARAGRAPH):
            at = rng.randrange(len(LETTERS)) if rng.random() < JUMP else (at + 1) % len(LETTERS)
            text += order[at]
    return text[:n]


def train_on_repeats(out, seed=1, steps=600, every=50):
    """Train two layers of two heads on repeats(), with a checkpoint in out/step-N each `every` steps. -> the model"""
    if os.path.exists(out) and os.listdir(out):
        raise ValueError(f"look: {out} exists and is not empty: open it with --model, or take another folder")
    tokenizer = gpt.get_tokenizer("bytes")
    tokens = np.array(tokenizer.encode(repeats(400_000, seed)), np.uint16)
    config = gpt.TrainConfig(
        n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=16, steps=steps, lr=3e-3, warmup=50, seed=seed
    )
    torch.manual_seed(seed)
    sizes = (config.n_layer, config.n_head, config.n_embd, config.block_size, tokenizer.n_vocab)
    model = gpt.GPT(gpt.GPTConfig(*sizes), ops)
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= math.sqrt(768 / config.n_embd)  # N(0, 0.02) is meant for the 768 channels of the smallest GPT-2
    optimizer = gpt.make_optimizer(model, config.lr, config.beta2, config.weight_decay)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            model.save_pretrained(os.path.join(out, f"step-{step}"), tokenizer=tokenizer.name)
        if step < steps:
            loss = gpt.train_step(model, optimizer, tokens, step, config)
            gpt.progress(f"step {step + 1} of {steps}: loss {loss:.3f}")
    gpt.progress("")
    return model


# ------------------------------------------------------------------------------------------------ The command line


def main(argv=None):
    """The command line: writes a page, or prints its numbers. -> the status"""
    parser = argparse.ArgumentParser(
        prog="fastgpt look",
        description="Open a model: a page that shows what happens in it while it reads a text.",
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        metavar="DIR",
        help="folder with a checkpoint or with folders step-N, or gpt2, ...; several times for several checkpoints of "
        "one run (default: out)",
    )
    add("--text", metavar="TEXT", help=f"what it reads (default: {TEXT!r})")
    add("--tokenizer", choices=("bytes", "gpt2"), help="if the model names none (default: gpt2)")
    add("--out", metavar="FILE", help="the page (default: look.html)")
    add("--json", nargs="?", const="-", metavar="FILE", help="write the numbers here; without FILE, print them")
    add("--repeats", metavar="DIR", help="first train a small model on text that repeats, into DIR/step-N; 10 seconds")
    args = parser.parse_args(argv)
    out = args.out or (None if args.json else "look.html")
    if out:
        expect_ours(out)
    if args.repeats:
        if args.model:
            raise ValueError("look: --model and --repeats are both given, expected one of them")
        train_on_repeats(args.repeats)
    text = args.text if args.text is not None else repeats(48, seed=0) if args.repeats else TEXT
    models = args.model or [args.repeats or "out"]
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"fastgpt look: {message}", file=sys.stderr)
        page = look(models, text, args.tokenizer)
    if args.json == "-":
        print(page.json)
    elif args.json:
        write_whole(args.json, page.json + "\n")
    if out:
        page.save(out)
        print(f"{out}: {len(page.html.encode()) / 1e6:.2f} MB; open it in a browser", file=sys.stderr)
    return 0
