"""Known wrong formulas of lm_loss; see wrong.py."""

import math

import torch

import gpt

from .gradients import change, slope


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
