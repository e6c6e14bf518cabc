"""Known mistakes of sampling and of the KV cache: what `wrong` is to the formulas."""

import math

import torch
from torch.nn.functional import pad

import gpt


def sampler(
    order=lambda logits: logits.sort(dim=-1, descending=True, stable=True),
    keep=lambda ordered, top_k: ordered[:, :top_k],
    weigh=lambda ordered, temperature: torch.softmax(
        (ordered.double() - ordered[:, :1].double()) / temperature, dim=-1
    ),
    cut=lambda probs, top_p: pad(probs.cumsum(-1)[:, :-1], (1, 0)) >= top_p,
    scale=lambda probs: probs.sum(-1, keepdim=True),
    draw=lambda rng, B: [rng.random() for _ in range(B)],
    right=True,
    greedy=lambda logits: logits.argmax(-1, keepdim=True),
    limits=lambda top_k, top_p: (top_k, top_p),
    last=lambda probs: probs.shape[-1] - 1,
):
    """gpt.py's sample, with one of its steps made in another way."""

    def sample(logits, temperature, top_k, top_p, rng):
        top_k, top_p = limits(top_k, top_p)
        if temperature == 0:
            return greedy(logits)
        ordered, tokens = order(logits)
        probs = weigh(keep(ordered, top_k), temperature)
        if top_p is not None:
            probs = probs.masked_fill(cut(probs, top_p), 0.0)
        sums = probs.cumsum(-1)
        u = torch.tensor(draw(rng, len(logits)), dtype=torch.float64)[:, None] * scale(probs)
        place = torch.searchsorted(sums, u, right=right)
        return tokens.gather(-1, torch.minimum(place, torch.as_tensor(last(probs))))

    return sample


def of_those_left(probs):
    return (probs > 0).sum(-1, keepdim=True) - 1


def last_of_equals(logits):
    return logits.shape[-1] - 1 - logits.flip(-1).argmax(-1, keepdim=True)


def equals_backwards(logits):
    values, tokens = logits.flip(-1).sort(dim=-1, descending=True, stable=True)
    return values, logits.shape[-1] - 1 - tokens


def by_token(sample_probs):
    """Draw by the running sum over the tokens' numbers, not over the order of their probabilities."""

    def sample(logits, temperature, top_k, top_p, rng):
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        probs = sample_probs(logits, temperature, top_k, top_p)
        sums = probs.cumsum(-1)
        u = torch.tensor([rng.random() for _ in logits], dtype=torch.float64)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, u, right=True).clamp(max=logits.shape[-1] - 1)

    return sample


def right_probs(logits, temperature, top_k, top_p):
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.double()
    if top_k is not None:
        ordered[:, top_k:] = -math.inf
    probs = torch.softmax((ordered - ordered[:, :1]) / temperature, dim=-1)
    if top_p is not None:
        probs[pad(probs.cumsum(-1)[:, :-1], (1, 0)) >= top_p] = 0.0
    return torch.zeros_like(probs).scatter(-1, tokens, probs)


def all_equals_of_the_kth(ordered, top_k):
    if top_k is None:
        return ordered
    return ordered.masked_fill(ordered < ordered[:, min(top_k, ordered.shape[1]) - 1, None], -math.inf)


def probs_times(ordered, temperature):
    """softmax first, temperature afterwards."""
    return torch.softmax(ordered.double(), dim=-1) / temperature


def top_p_on_all(logits, temperature, top_k, top_p):
    """top_p before top_k."""
    probs = right_probs(logits, temperature, None, top_p)
    if top_k is not None:
        _, tokens = logits.sort(dim=-1, descending=True, stable=True)
        probs = probs.scatter(-1, tokens[:, top_k:], 0.0)
    return probs


def in_order(probs_of):
    """Draw from probs_of(...), in the right order."""

    def sample(logits, temperature, top_k, top_p, rng):
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        _, tokens = logits.sort(dim=-1, descending=True, stable=True)
        sums = probs_of(logits, temperature, top_k, top_p).gather(-1, tokens).cumsum(-1)
        u = torch.tensor([rng.random() for _ in logits], dtype=torch.float64)[:, None] * sums[:, -1:]
        return tokens.gather(-1, torch.searchsorted(sums, u, right=True).clamp(max=logits.shape[-1] - 1))

    return sample


def untempered_top_p(logits, temperature, top_k, top_p):
    probs = right_probs(logits, temperature, top_k, None)
    if top_p is not None:
        probs = probs * (right_probs(logits, 1.0, top_k, top_p) > 0)
    return probs


def places(sample):
    """The place in the order instead of the token that stands there."""

    def wrong(logits, temperature, top_k, top_p, rng):
        token = sample(logits, temperature, top_k, top_p, rng)
        if temperature == 0:
            return token
        _, tokens = logits.sort(dim=-1, descending=True, stable=True)
        return (tokens == token).long().argmax(-1, keepdim=True)

    return wrong


def greedy_always(logits, temperature, top_k, top_p, rng):
    return logits.argmax(-1, keepdim=True)


def with_random_number_when_greedy(logits, temperature, top_k, top_p, rng):
    if temperature == 0:
        for _ in logits:
            rng.random()
    return gpt.sample(logits, temperature, top_k, top_p, rng)


SAMPLING = {
    "the most likely token is always taken: nothing is drawn": greedy_always,
    "at temperature 0, the last of equal logits is taken; it is the first": sampler(greedy=last_of_equals),
    "at temperature 0, a random number is used up; none is needed": with_random_number_when_greedy,
    "equal logits are ordered by falling numbers; they are ordered by rising ones (stable=True)": (
        sampler(order=equals_backwards)
    ),
    "the tokens are ordered from the smallest logit to the largest; it is the other way": (
        sampler(
            order=lambda logits: logits.sort(dim=-1, stable=True), weigh=lambda x, t: torch.softmax(x.double() / t, -1)
        )
    ),
    "the running sum follows the tokens' numbers; it goes from the most likely token to the least": (
        by_token(right_probs)
    ),
    "the temperature is not used": sampler(weigh=lambda x, t: torch.softmax(x.double(), -1)),
    "the logits are multiplied by the temperature; they are divided": (
        sampler(weigh=lambda x, t: torch.softmax(x.double() * t, -1))
    ),
    "the temperature divides the probabilities; it divides the logits, before the softmax": (
        sampler(weigh=probs_times)
    ),
    "top_k is not used": sampler(limits=lambda top_k, top_p: (None, top_p)),
    "top_k keeps one token too few": sampler(limits=lambda k, p: (k and max(k - 1, 1), p)),
    "top_k keeps one token too many": sampler(limits=lambda k, p: (k and k + 1, p)),
    "top_k keeps all tokens that equal the k-th; of equals it keeps the first, k tokens in all": (
        sampler(keep=all_equals_of_the_kth)
    ),
    "top_p is not used": sampler(limits=lambda top_k, top_p: (top_k, None)),
    "top_p drops the token that reaches p; it is the last one that stays": (
        sampler(cut=lambda probs, p: (probs.cumsum(-1) >= p).index_fill(-1, torch.tensor([0]), False))
    ),
    "top_p drops a token only if those before it add up to more than p; it is p or more": (
        sampler(cut=lambda probs, p: pad(probs.cumsum(-1)[:, :-1], (1, 0)) > p)
    ),
    "top_p keeps one token too many": (
        sampler(cut=lambda probs, p: pad(probs.cumsum(-1)[:, :-2], (2, 0))[:, : probs.shape[1]] >= p)
    ),
    "top_p is a floor for single probabilities; it bounds the sum of those before": (
        sampler(cut=lambda probs, p: (probs < p).index_fill(-1, torch.tensor([0]), False))
    ),
    "top_p comes before top_k, so that its sums count tokens that top_k drops; top_k comes first": (
        in_order(top_p_on_all)
    ),
    "top_p measures probabilities without the temperature; it comes after": in_order(untempered_top_p),
    "the random number is not multiplied by the sum that is left after top_p": (
        sampler(scale=lambda probs: torch.ones_like(probs[:, :1]))
    ),
    "the random number is not multiplied by the sum that is left after top_p (beyond it, the last that is left)": (
        sampler(scale=lambda probs: torch.ones_like(probs[:, :1]), last=of_those_left)
    ),
    "all rows share one random number; each row has its own": (sampler(draw=lambda rng, B: [rng.random()] * B)),
    "the rows take their random numbers in the wrong order: the first row first": (
        sampler(draw=lambda rng, B: [rng.random() for _ in range(B)][::-1])
    ),
    "1 - rng.random() is used; it is rng.random()": sampler(draw=lambda rng, B: [1 - rng.random() for _ in range(B)]),
    "rng.uniform over another range, or a second random number, is used: one rng.random() a row": (
        sampler(draw=lambda rng, B: [(rng.random(), rng.random())[1] for _ in range(B)])
    ),
    "the result is the place in the order; it is the token that stands there": places(gpt.sample),
}


# ---------------------------------------------------------------------------------------------------- KV cache


def cache(
    append=lambda old, new: new if old is None else torch.cat((old, new), 2),
    hidden=lambda Tq, Tk: torch.ones(Tq, Tk, dtype=torch.bool).triu(Tk - Tq + 1),
    keys=None,
    values=None,
    shared=False,
):
    """attention of pieces, with one of a cache's steps made in another way: (qkv, n_head, cuts) -> (B, T, C)."""

    def pieces(qkv, n_head, cuts):
        k = v = None
        results = []
        for piece in qkv.split(list(cuts), dim=1):
            q, new_k, new_v = gpt.split_heads(piece, n_head)
            k, v = (keys or append)(k, new_k), (values or append)(v, new_v)
            (Tq, D), Tk = q.shape[-2:], k.shape[-2]
            scores = q @ k.transpose(-2, -1) / math.sqrt(D)
            if (mask := hidden(Tq, Tk)) is not None:
                scores = scores.masked_fill(mask, -math.inf)
            results.append(gpt.merge_heads(torch.softmax(scores, -1) @ v))
        return torch.cat(results, 1)

    return pieces


def kept_too_late(qkv, n_head, cuts):
    k = v = None
    results = []
    for piece in qkv.split(list(cuts), dim=1):
        q, new_k, new_v = gpt.split_heads(piece, n_head)
        if k is None:
            results.append(gpt.attention(piece, n_head))
            k, v = new_k, new_v
        else:
            weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)
            results.append(gpt.merge_heads(weights @ v))
            k, v = torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)
    return torch.cat(results, 1)


def only_new(old, new):
    return new


def stale(old, new):
    """The first piece for ever."""
    return new if old is None else old


def over_the_start(old, new):
    """Written from position 0 on, over what was there."""
    if old is None or old.shape[2] <= new.shape[2]:
        return new
    return torch.cat((new, old[:, :, new.shape[2] :]), 2)


def in_front(old, new):
    return new if old is None else torch.cat((new, old), 2)


def last_only(old, new):
    """Of a piece, its last position alone is kept."""
    return new if old is None else torch.cat((old, new[:, :, -1:]), 2)


def queries_from_0(Tq, Tk):
    """The mask of queries that stand at positions 0 ... Tq - 1."""
    return torch.ones(Tq, Tk, dtype=torch.bool).triu(1)


def without_itself(Tq, Tk):
    return torch.ones(Tq, Tk, dtype=torch.bool).triu(Tk - Tq)


def without_newest(Tq, Tk):
    """The past alone is seen by a single new query."""
    return without_itself(Tq, Tk) if Tk > Tq else queries_from_0(Tq, Tk)


KV_CACHE = {
    "the past is forgotten: each piece sees only itself": cache(append=only_new),
    "the cache is stale: new keys and values are not kept, each piece sees those of the first": (
        cache(append=stale, hidden=lambda Tq, Tk: None if Tq != Tk else queries_from_0(Tq, Tk))
    ),
    "the cache is stale: new keys and values are not kept, so that some new queries find none (NaN)": (
        cache(append=stale)
    ),
    "new keys and values are kept after attending, not before: a later piece sees the past and not itself": (
        kept_too_late
    ),
    "new keys and values are written over the oldest, from position 0 on; they come after the past": (
        cache(append=over_the_start)
    ),
    "new keys and values are put before the old ones; they come after": cache(append=in_front),
    "new keys are put before the old ones; they come after": cache(keys=in_front),
    "new values are put before the old ones; they come after": cache(values=in_front),
    "of each later piece only the last position is kept": (
        cache(append=last_only, hidden=lambda Tq, Tk: torch.ones(Tq, Tk, dtype=torch.bool).triu(max(Tk - Tq, 0) + 1))
    ),
    "the mask takes the new queries for positions 0, 1, ...; they stand at past + 0, past + 1, ...": (
        cache(hidden=queries_from_0)
    ),
    "there is no mask within a piece: its positions see later ones of the piece": cache(hidden=lambda Tq, Tk: None),
    "there is no mask in later pieces: positions see later ones of their piece": (
        cache(hidden=lambda Tq, Tk: queries_from_0(Tq, Tk) if Tq == Tk else None)
    ),
    "the mask is off by one: a query does not see its own position": cache(hidden=without_itself),
    "in later pieces, a query does not see its own position: the mask is off by one": cache(hidden=without_newest),
    "the mask is off by one: a query sees one position of the future": (
        cache(hidden=lambda Tq, Tk: torch.ones(Tq, Tk, dtype=torch.bool).triu(Tk - Tq + 2))
    ),
    "the scores are not divided by sqrt(D)": lambda qkv, n_head, cuts: cache()(
        torch.cat(
            (qkv[..., : qkv.shape[-1] // 3] * math.sqrt(qkv.shape[-1] // 3 // n_head), qkv[..., qkv.shape[-1] // 3 :]),
            -1,
        ),
        n_head,
        cuts,
    ),
}
