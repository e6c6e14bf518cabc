"""How probable models find a text: the loss over sliding windows, and what two models predict at each token.

A window of T begins every `stride` tokens. Of each but the first only the last `stride` targets count, so every token
but the first counts once, and after the first window each has T - stride + 1 tokens or more before it. With stride T
the windows are gpt.py's: the first token of each sees one token alone, so the loss is higher than that of the same
model in use.
"""

import math

import numpy as np
import torch

import gpt

from .decoder import Decoder
from .packed import expect

ROWS = 64  # positions whose logits are compared at once, in float64: 26 MB of GPT-2's vocabulary
MANY = 512  # positions whose logits are computed at once, in float32: 103 MB


def windows(tokens, T, stride, batch_size=1):
    """Batches of windows: idx (B, T) and targets (B, T), -1 where they don't count."""
    last = len(tokens) - 1
    n = 1 + math.ceil(max(0, last - T) / stride)
    for first in range(0, n, batch_size):
        gpt.progress(f"window {first + 1:,} of {n:,}")
        starts = torch.arange(first, min(first + batch_size, n))[:, None] * stride
        at = (starts + torch.arange(T + 1)).clamp(max=last)  # the last window may reach past the end
        rows = torch.from_numpy(np.asarray(tokens[at.numpy()], np.int64))
        new = (at[:, :-1] < last) & ((starts == 0) | (torch.arange(T) >= T - stride))
        yield rows[:, :-1], rows[:, 1:].where(new, -1)
    gpt.progress("")


@torch.no_grad()
def mean_loss(model, tokens, stride, batch_size):
    """Nats a token of a gpt.GPT; with stride T, gpt.evaluate's to the bit."""
    total, count = 0.0, 0
    for idx, targets in windows(tokens, model.config.block_size, stride, batch_size):
        first = counted(targets.amax(0)).start  # no window counts what comes before
        loss = model.ops.lm_loss(model.hidden(idx)[:, first:], model.wte.weight, targets[:, first:])
        kept = int((targets != -1).sum())
        total, count = total + float(loss) * kept, count + kept
    check_finite(math.isfinite(total))
    return total / count


def counted(targets):
    """Which part of a row counts: (T,) -> a slice."""
    places = (targets != -1).nonzero().flatten()
    return slice(int(places[0]), int(places[-1]) + 1)


def check_finite(good):
    expect(good, "the logits are not finite; are the weights damaged, or diverged?")


def nll(logits, targets):
    """-log p(target) in nats, in float64: (n, V), (n,) -> (n,)."""
    pieces = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    x = torch.cat([torch.nn.functional.cross_entropy(x.double(), y, reduction="none") for x, y in pieces])
    check_finite(x.isfinite().all())
    return x


@torch.no_grad()
def nll_of_batch(model, idx, targets):
    """nll of a gpt.GPT or a Decoder, row by row, of the targets that count: (B, T), (B, T) -> (n,)."""
    if isinstance(model, Decoder):
        parts = [counted(row) for row in targets]
        logits = (model.logits(row[None, : part.stop])[0, part] for row, part in zip(idx, parts, strict=True))
        return torch.cat([nll(x, row[part]) for x, row, part in zip(logits, targets, parts, strict=True)])
    keep = targets != -1
    pieces = zip(model.hidden(idx)[keep].split(MANY), targets[keep].split(MANY), strict=True)
    return torch.cat([nll(model.ops.linear(x, model.wte.weight), y) for x, y in pieces])


def compare(base, others, tokens, T, stride=None):
    """What decoders predict of each token.

    -> nll of base (n,), and for each other a dict: its nll, kl, and same, whether the most likely token is that of base
    """
    base_nll, results = [], [dict(nll=[], kl=[], same=[]) for _ in others]
    for idx, (targets,) in windows(tokens, T, stride or T):
        part = counted(targets)
        logits = base.logits(idx)[0, part]
        base_nll.append(nll(logits, targets[part]))
        for other, result in zip(others, results, strict=True):
            its_logits = other.logits(idx)[0, part]
            result["nll"].append(nll(its_logits, targets[part]))
            result["kl"] += kl_divergence(logits, its_logits)
            result["same"].append(logits.argmax(-1) == its_logits.argmax(-1))
    return torch.cat(base_nll), [{name: torch.cat(x) for name, x in result.items()} for result in results]


def kl_divergence(p_logits, q_logits):
    """sum_v p_v (log p_v - log q_v) in nats, in pieces: 0 where both predict the same, whatever the text says."""
    pieces = []
    for p, q in zip(p_logits.split(ROWS), q_logits.split(ROWS), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        pieces.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))  # below 0 by rounding alone
    return pieces
