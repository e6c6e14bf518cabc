"""Known wrong formulas of attention; see wrong.py."""

import math

import torch

import gpt

from .gradients import change, slope, takes_gradient_of


def softmax_over(dim):
    return lambda scores, hidden: torch.softmax(scores.masked_fill(hidden, -math.inf), dim)


keys_softmax = softmax_over(-1)


def filled(value):
    return lambda scores, hidden: torch.softmax(scores.masked_fill(hidden, value), -1)


def attention_with(
    split=gpt.split_heads,
    scale=lambda D, C: math.sqrt(D),
    hidden=lambda query, key: key > query,
    weigh=keys_softmax,
    merge=gpt.merge_heads,
    mean=lambda weights, v: weights @ v,
):
    """attention with one of its steps made in another way."""

    def attention(qkv, n_head):
        q, k, v = split(qkv, n_head)
        T, D = q.shape[-2:]
        position = torch.arange(T)
        scores = q @ k.transpose(-2, -1) / scale(D, D * n_head)
        return merge(mean(weigh(scores, hidden(position[:, None], position)), v))

    return attention


def softmax_then_mask(scores, hidden):
    return torch.softmax(scores, -1).masked_fill(hidden, 0.0)


def interleaved_heads(qkv, n_head):  # channel c belongs to head c % H
    return [x.unflatten(-1, (-1, n_head)).permute(0, 3, 1, 2) for x in qkv.chunk(3, dim=-1)]


def interleave_back(y):
    return y.permute(0, 2, 3, 1).flatten(2)


def heads_of_positions(qkv, n_head):  # view(B, H, T, D) without the transpose
    return [x.contiguous().view(x.shape[0], n_head, x.shape[1], -1) for x in qkv.chunk(3, dim=-1)]


def not_transposed_back(y):
    return y.reshape(y.shape[0], y.shape[2], -1)


def threes_in_each_head(qkv, n_head):  # head by head q, k, v: GPT-NeoX's order
    return [x.squeeze(-2).transpose(1, 2) for x in qkv.unflatten(-1, (n_head, 3, -1)).chunk(3, dim=-2)]


def threes_in_each_channel(qkv, n_head):
    return [x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.unflatten(-1, (-1, 3)).unbind(-1)]


def in_order(*order):
    return lambda qkv, n_head: [gpt.split_heads(qkv, n_head)[i] for i in order]


def one_head(qkv, n_head):
    return gpt.split_heads(qkv, 1)


def without_row_sum(scores, hidden):
    """Softmax, whose gradient takes the sum below the line as a constant: dS = P * dP."""
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True).detach())


def gradients_of(q_way=lambda q: q, k_way=lambda k: k, v_way=lambda v: v):
    """The right values; the gradients of q, k or v in another way."""

    def split(qkv, n_head):
        q, k, v = gpt.split_heads(qkv, n_head)
        return q_way(q), k_way(k), v_way(v)

    return attention_with(split)


def scaled_gradient(x):
    return slope(x, math.sqrt(x.shape[-1]))


def exchanged(qkv, n_head):
    q, k, v = gpt.split_heads(qkv, n_head)
    return takes_gradient_of(q, k), takes_gradient_of(k, q), v


def transposed_weights(weights, v):
    """The right values; dv = P dout instead of P^T dout."""
    return weights @ v.detach() + weights.detach().transpose(-2, -1) @ change(v)


ATTENTION = {
    "the mask hides the position itself; a position sees itself and all before: triu(1), not triu(0) (NaN)": (
        attention_with(hidden=lambda query, key: key >= query)
    ),
    "the mask hides the position itself; a position sees itself and all before: triu(1), not triu(0)": (
        attention_with(hidden=lambda query, key: key >= query, weigh=filled(-1e30))
    ),
    "the mask shows one position of the future: triu(2) instead of triu(1)": (
        attention_with(hidden=lambda query, key: key > query + 1)
    ),
    "there is no mask: positions see the future": attention_with(hidden=lambda query, key: key > query + 10**9),
    "the mask is turned around: positions see the future and not the past": (
        attention_with(hidden=lambda query, key: key < query)
    ),
    "hidden scores are set to 0 or multiplied by 0; exp(0) = 1 still counts: set them to -inf before the softmax": (
        attention_with(weigh=filled(0.0))
    ),
    "hidden scores are set to -1, which still counts: set them to -inf before the softmax": (
        attention_with(weigh=filled(-1.0))
    ),
    "hidden scores are set to -10, which still counts: set them to -inf before the softmax": (
        attention_with(weigh=filled(-10.0))
    ),
    "the mask comes after the softmax: the rows no longer sum to 1; set scores to -inf before": (
        attention_with(weigh=softmax_then_mask)
    ),
    "the softmax runs over the queries (dim=-2); each query's weights sum to 1 over the keys (dim=-1)": (
        attention_with(weigh=softmax_over(-2))
    ),
    "the softmax runs over the heads (dim=1); it runs over the keys (dim=-1)": attention_with(weigh=softmax_over(-3)),
    "there is no softmax: the masked scores themselves are the weights": (
        attention_with(weigh=lambda scores, hidden: scores.masked_fill(hidden, 0.0))
    ),
    "exp(score) is not divided by its sum": (
        attention_with(weigh=lambda scores, hidden: torch.exp(scores.masked_fill(hidden, -math.inf)))
    ),
    "the softmax is applied twice": (
        attention_with(weigh=lambda scores, hidden: torch.softmax(softmax_over(-1)(scores, hidden), -1))
    ),
    "the heads are interleaved, channel c to head c % n_head; a head has D neighbouring channels": (
        attention_with(interleaved_heads, merge=interleave_back)
    ),
    "the heads are split as interleaved (channel c to head c % n_head); a head has D neighbouring channels": (
        attention_with(interleaved_heads)
    ),
    "the heads' results are put together interleaved; they stand one after another": (
        attention_with(merge=interleave_back)
    ),
    "view(B, n_head, T, D) mixes positions and heads: view(B, T, n_head, D), then transpose(1, 2)": (
        attention_with(heads_of_positions)
    ),
    "view(B, n_head, T, D) and back mixes positions and heads: view(B, T, n_head, D), then transpose(1, 2)": (
        attention_with(heads_of_positions, merge=not_transposed_back)
    ),
    "the heads are not transposed back before they are put together: transpose(1, 2), then flatten": (
        attention_with(merge=not_transposed_back)
    ),
    "qkv is read as q, k, v within each head; it holds all queries, then all keys, then all values": (
        attention_with(threes_in_each_head)
    ),
    "qkv is read as q, k, v within each channel; it holds all queries, then all keys, then all values": (
        attention_with(threes_in_each_channel)
    ),
    "all channels are taken as one head": attention_with(one_head),
    "queries and keys are exchanged: qkv holds q, then k, then v": attention_with(in_order(1, 0, 2)),
    "keys and values are exchanged: qkv holds q, then k, then v": attention_with(in_order(0, 2, 1)),
    "queries and values are exchanged: qkv holds q, then k, then v": attention_with(in_order(2, 1, 0)),
    "qkv is taken as k, v, q; it holds q, then k, then v": attention_with(in_order(2, 0, 1)),
    "qkv is taken as v, q, k; it holds q, then k, then v": attention_with(in_order(1, 2, 0)),
    "the queries stand for the keys, too: the scores are q @ q.T": attention_with(in_order(0, 0, 2)),
    "the keys stand for the values, too": attention_with(in_order(0, 1, 1)),
    "the scores are divided by D; it is sqrt(D)": attention_with(scale=lambda D, C: D),
    "the scores are not divided by sqrt(D)": attention_with(scale=lambda D, C: 1.0),
    "the scores are divided by sqrt(C); it is sqrt(D), D = C / n_head the size of a head": (
        attention_with(scale=lambda D, C: math.sqrt(C))
    ),
    "the scores are multiplied by sqrt(D); they are divided": attention_with(scale=lambda D, C: 1 / math.sqrt(D)),
    "the scores are divided by sqrt(3C); it is sqrt(D)": attention_with(scale=lambda D, C: math.sqrt(3 * C)),
    "the scores are divided by D^(1/4); it is sqrt(D)": attention_with(scale=lambda D, C: D**0.25),
    "the scores are divided by sqrt(n_head); it is sqrt(D)": attention_with(scale=lambda D, C: math.sqrt(C // D)),
    "the weights are divided by sqrt(D) after the softmax; the scores are, before": (
        lambda qkv, n_head: (
            attention_with(scale=lambda D, C: 1.0)(qkv, n_head) / math.sqrt(qkv.shape[-1] // 3 // n_head)
        )
    ),
    "the weights are transposed when they meet the values": (
        attention_with(mean=lambda weights, v: weights.transpose(-2, -1) @ v)
    ),
    "the backward of the softmax lacks a term: dS = P * (dP - sum(P * dP)), not P * dP": (
        attention_with(weigh=without_row_sum)
    ),
    "dq lacks the factor 1 / sqrt(D)": gradients_of(q_way=scaled_gradient),
    "dk lacks the factor 1 / sqrt(D)": gradients_of(k_way=scaled_gradient),
    "dq and dk lack the factor 1 / sqrt(D)": gradients_of(q_way=scaled_gradient, k_way=scaled_gradient),
    "dq and dk are exchanged": attention_with(exchanged),
    "dv is P @ dout; it is P^T @ dout: what key j gets from the queries i": attention_with(mean=transposed_weights),
    "dq is zero": gradients_of(q_way=lambda q: q.detach()),
    "dk is zero": gradients_of(k_way=lambda k: k.detach()),
    "dv is zero": gradients_of(v_way=lambda v: v.detach()),
    "dq and dk are zero: no gradient goes through the softmax": (
        gradients_of(q_way=lambda q: q.detach(), k_way=lambda k: k.detach())
    ),
    "dqkv has the wrong sign": lambda qkv, n_head: gpt.attention(slope(qkv, -1), n_head),
}
