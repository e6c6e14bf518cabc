"""A right answer to every exercise, with gradients by hand, as a learner might write it."""

import math

import torch


def linear(x, weight, bias=None):
    out = torch.einsum("...k,nk->...n", x, weight)
    return out if bias is None else out + bias


def linear_backward(dout, x, weight, bias=None):
    rows, drows = x.flatten(0, -2), dout.flatten(0, -2)
    return dout @ weight, drows.T @ rows, None if bias is None else drows.sum(0)


def gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_backward(dout, x):
    t = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return dout * ((1 + t) / 2 + x / 2 * (1 - t) * (1 + t) * inner)


def layer_norm(x, weight, bias, eps=1e-5):
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
    return (x - mean) * torch.rsqrt(variance + eps) * weight + bias


def layer_norm_backward(dout, x, weight, bias, eps=1e-5):
    centered = x - x.mean(-1, keepdim=True)
    rstd = 1 / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    xhat, g = centered * rstd, dout * weight
    dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx, (dout * xhat).flatten(0, -2).sum(0), dout.flatten(0, -2).sum(0)


def linear_gelu(x, weight, bias=None):
    return gelu(linear(x, weight, bias))


def linear_gelu_backward(dout, x, weight, bias=None):
    return linear_backward(gelu_backward(dout, linear(x, weight, bias)), x, weight, bias)


def heads(x, n_head):
    B, T, C = x.shape
    return x.view(B, T, n_head, C // n_head).transpose(1, 2)


def weights_of(q, k):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    Tq, Tk = scores.shape[-2:]
    seen = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
    return torch.softmax(torch.where(seen, scores, float("-inf")), dim=-1)


def together(y):
    return y.transpose(1, 2).flatten(2)


def attention(qkv, n_head):
    q, k, v = (heads(x, n_head) for x in qkv.split(qkv.shape[-1] // 3, dim=-1))
    return together(weights_of(q, k) @ v)


def attention_backward(dout, qkv, n_head):
    q, k, v = (heads(x, n_head) for x in qkv.split(qkv.shape[-1] // 3, dim=-1))
    dout, P = heads(dout, n_head), weights_of(q, k)
    dP = dout @ v.mT
    dS = P * (dP - (P * dP).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return torch.cat([together(dS @ k), together(dS.mT @ q), together(P.mT @ dout)], dim=-1)


def lm_loss(hidden, weight, targets):
    logits = (hidden @ weight.T)[targets != -1]
    return -torch.log_softmax(logits, -1)[torch.arange(len(logits)), targets[targets != -1]].mean()


def lm_loss_backward(dout, hidden, weight, targets):
    keep = targets != -1
    dlogits = torch.softmax(hidden @ weight.T, -1)
    dlogits -= torch.nn.functional.one_hot(targets.clamp(min=0), len(weight))
    dlogits *= keep[..., None] * dout / keep.sum()
    return dlogits @ weight, dlogits.flatten(0, -2).T @ hidden.flatten(0, -2)


def sample(logits, temperature, top_k, top_p, rng):
    tokens = []
    for row in logits.double().tolist():
        order = sorted(range(len(row)), key=lambda token: -row[token])
        if temperature == 0:
            tokens.append(order[0])
            continue
        order = order[:top_k]
        scaled = torch.tensor([row[token] - row[order[0]] for token in order], dtype=torch.float64) / temperature
        probs, left, total = torch.softmax(scaled, 0).tolist(), [], 0.0
        for p in probs:
            if top_p is not None and total >= top_p:
                break
            left.append(p)
            total += p
        u, total, place = rng.random() * total, 0.0, 0
        for place, p in enumerate(left):  # noqa: B007
            total += p
            if total > u:
                break
        tokens.append(order[place])
    return torch.tensor(tokens)[:, None]


class KVCache:
    def __init__(self):
        self.k = self.v = None

    def attention(self, qkv, n_head):
        q, k, v = (heads(x, n_head) for x in qkv.chunk(3, dim=-1))
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return together(weights_of(q, self.k) @ self.v)
