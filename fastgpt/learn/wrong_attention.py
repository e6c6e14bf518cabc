"""Known wrong formulas of attention and of the loss; see wrong.py."""

import math

import torch

import gpt

from .gradients import change, slope, takes_gradient_of

# --------------------------------------------------------------------------------------------------- attention


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

# ----------------------------------------------------------------------------------------------------- lm_loss


def losses(hidden, weight, targets, last=False):
    """nll at each position, and which positions count."""
    keep = targets != -1
    logits = hidden @ weight.T
    index = torch.where(keep, targets, weight.shape[0] - 1 if last else 0)
    nll = logits.logsumexp(-1) - logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return nll, keep


def mean_with(divide, last=False):
    """The loss whose mean is divide(nll, keep). A target of -1 is taken for token 0, or for the last one."""
    return lambda hidden, weight, targets: divide(*losses(hidden, weight, targets, last))


def kept(nll, keep):
    return torch.where(keep, nll, 0.0)


def of_logits(change_logits):
    """The loss of other logits."""

    def lm_loss(hidden, weight, targets):
        keep = targets != -1
        logits = change_logits(hidden @ weight.T)
        target = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
        return kept(logits.logsumexp(-1) - target, keep).sum() / keep.sum()

    return lm_loss


def of_targets(change_targets):
    return lambda hidden, weight, targets: gpt.lm_loss(hidden, weight, change_targets(targets))


def shifted(by):
    def shift(targets):
        rolled = targets.roll(by, -1)
        rolled[..., -1 if by < 0 else 0] = -1
        return rolled

    return shift


def times(factor):
    return lambda hidden, weight, targets: factor(hidden, weight, targets) * gpt.lm_loss(hidden, weight, targets)


def backward_times(factor):
    """The right value; the gradient comes out times factor(targets)."""
    return lambda hidden, weight, targets: slope(gpt.lm_loss(hidden, weight, targets), factor(targets))


def softmax_alone(hidden, weight, targets):
    """The right value; dlogits = softmax(logits) / count, without the 1 at the target."""
    keep = targets != -1
    total = kept((hidden @ weight.T).logsumexp(-1), keep).sum() / keep.sum()
    return gpt.lm_loss(hidden, weight, targets).detach() + change(total)


def softmax_nowhere(hidden, weight, targets):
    """The right value; dlogits = -1 at the target / count, without the softmax."""
    keep = targets != -1
    logits = hidden @ weight.T
    target = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    return gpt.lm_loss(hidden, weight, targets).detach() - change(kept(target, keep).sum() / keep.sum())


def gradients_at_ignored(hidden, weight, targets):
    """The right value; positions with -1 get a gradient as if their target were token 0."""
    nll, keep = losses(hidden, weight, targets)
    return gpt.lm_loss(hidden, weight, targets).detach() + change(nll.sum() / keep.sum())


def gradients_at_ignored_softmax(hidden, weight, targets):
    """The right value; positions with -1 get the softmax as their gradient, no 1 being subtracted anywhere."""
    nll, keep = losses(hidden, weight, targets)
    lse = (hidden @ weight.T).logsumexp(-1)
    return gpt.lm_loss(hidden, weight, targets).detach() + change(torch.where(keep, nll, lse).sum() / keep.sum())


LM_LOSS = {
    "the mean is over all positions; those with target -1 don't count: divide by (targets != -1).sum()": (
        mean_with(lambda nll, keep: kept(nll, keep).sum() / keep.numel())
    ),
    "the losses are summed; it is their mean": mean_with(lambda nll, keep: kept(nll, keep).sum()),
    "the sum is divided by B; it is divided by the number of targets that count": (
        mean_with(lambda nll, keep: kept(nll, keep).sum() / keep.shape[0])
    ),
    "the sum is divided by T; it is divided by the number of targets that count": (
        mean_with(lambda nll, keep: kept(nll, keep).sum() / keep.shape[-1])
    ),
    "this is the mean of each sequence's mean; it is the mean over all targets that count": (
        mean_with(lambda nll, keep: (kept(nll, keep).sum(-1) / keep.sum(-1)).mean())
    ),
    "a target of -1 is taken for the last token (a negative index counts from the end); it does not count": (
        mean_with(lambda nll, keep: nll.mean(), last=True)
    ),
    "a target of -1 is taken for the last token in the sum; it does not count": (
        mean_with(lambda nll, keep: nll.sum() / keep.sum(), last=True)
    ),
    "a target of 0 does not count, either; only -1 doesn't": of_targets(lambda t: torch.where(t == 0, -1, t)),
    "a target of -1 is taken for token 0; it does not count": mean_with(lambda nll, keep: nll.mean()),
    "a target of -1 is taken for token 0 in the sum; it does not count": (
        mean_with(lambda nll, keep: nll.sum() / keep.sum())
    ),
    "the loss is in bits (log2); it is in nats (log)": times(lambda *_: 1 / math.log(2)),
    "the loss is in powers of ten (log10); it is in nats (log)": times(lambda *_: 1 / math.log(10)),
    "the sign is wrong: the loss is -log p": times(lambda *_: -1.0),
    "the loss is divided by V, too": times(lambda hidden, weight, targets: 1 / weight.shape[0]),
    "the softmax is applied twice: the loss takes logits, not probabilities": (
        of_logits(lambda logits: torch.softmax(logits, -1))
    ),
    "the logits are divided by sqrt(C)": lambda hidden, weight, targets: gpt.lm_loss(
        hidden / math.sqrt(hidden.shape[-1]), weight, targets
    ),
    "the softmax runs over the positions; it runs over the tokens": (
        lambda hidden, weight, targets: loss_over_positions(hidden, weight, targets)
    ),
    "the softmax runs over the positions (dim=1); it runs over the tokens (dim=-1)": (
        lambda hidden, weight, targets: loss_over_positions(hidden, weight, targets, False)
    ),
    "targets are shifted by one to the left: they come shifted already": of_targets(shifted(-1)),
    "targets are shifted by one to the right: they come shifted already": of_targets(shifted(1)),
    "the log of the sum is missing: the loss is -logit[target]": (
        lambda hidden, weight, targets: target_alone(hidden, weight, targets)
    ),
    "the largest logit stands for log(sum(exp(logit)))": (
        lambda hidden, weight, targets: target_alone(hidden, weight, targets) + largest_alone(hidden, weight, targets)
    ),
    "the largest logit is subtracted and not added again": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden, weight, targets) - largest_alone(hidden, weight, targets)
    ),
    "this is the mean of p(target); it is the mean of -log p(target)": (
        mean_with(lambda nll, keep: kept(torch.exp(-nll), keep).sum() / keep.sum())
    ),
    "this is -log of the mean probability; it is the mean of -log p": (
        mean_with(lambda nll, keep: -torch.log(kept(torch.exp(-nll), keep).sum() / keep.sum()))
    ),
    "this is the perplexity, exp(loss); it is the loss itself": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden, weight, targets).exp()
    ),
    "the gradients are those of the sum; the loss is a mean: divide by the number of targets that count": (
        backward_times(lambda targets: (targets != -1).sum())
    ),
    "the gradients are divided by all positions; those with target -1 don't count": (
        backward_times(lambda targets: (targets != -1).sum() / targets.numel())
    ),
    "the gradients have the wrong sign": backward_times(lambda targets: -1.0),
    "dlogits lacks the 1 that is subtracted at the target: it is softmax - one-hot": softmax_alone,
    "dlogits lacks the softmax: it is softmax - one-hot": softmax_nowhere,
    "positions with target -1 get a gradient, as if it were token 0; theirs is zero": gradients_at_ignored,
    "positions with target -1 get a gradient, the softmax; theirs is zero": gradients_at_ignored_softmax,
    "dweight is zero: no gradient goes back to the weight": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden, weight.detach(), targets)
    ),
    "dhidden is zero: no gradient goes back to hidden": (
        lambda hidden, weight, targets: gpt.lm_loss(hidden.detach(), weight, targets)
    ),
}


def loss_over_positions(hidden, weight, targets, all_rows=True):
    keep = targets != -1
    logits = hidden @ weight.T
    rows = logits.flatten(0, -2) if all_rows else logits
    target = logits.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    sums = rows.logsumexp(-2, keepdim=True)
    sums = sums.expand(rows.shape).reshape(logits.shape)
    sums = sums.gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    return kept(sums - target, keep).sum() / keep.sum()


def target_alone(hidden, weight, targets):
    keep = targets != -1
    target = (hidden @ weight.T).gather(-1, torch.where(keep, targets, 0).unsqueeze(-1)).squeeze(-1)
    return -kept(target, keep).sum() / keep.sum()


def largest_alone(hidden, weight, targets):
    keep = targets != -1
    return kept((hidden @ weight.T).amax(-1), keep).sum() / keep.sum()
