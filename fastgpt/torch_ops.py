"""GPT-2's formulas as torch's own fused functions, on whatever device their tensors are.

    from fastgpt import torch_ops
    model = gpt.GPT(gpt.GPTConfig(), ops=torch_ops).to("cuda")

`fastgpt train --device cuda` runs on them, and `fastgpt bench` measures the kernels against them. Each function takes
and returns what gpt.py's function of the same name does; docs/training.md tells of dropout.
"""

import torch.nn.functional as F

from gpt import merge_heads, split_heads

from .ops import attend


def layer_norm(x, weight, bias, eps=1e-5):
    """(..., C), (C,), (C,) -> (..., C)"""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def gelu(x):
    """In GPT-2's tanh approximation. Any shape."""
    return F.gelu(x, approximate="tanh")


def linear(x, weight, bias=None):
    """(..., K), (N, K), (N,) -> (..., N)"""
    return F.linear(x, weight, bias)


def linear_gelu(x, weight, bias=None):
    """Two functions: torch has none for both. (..., K), (N, K), (N,) -> (..., N)"""
    return gelu(linear(x, weight, bias))


linear_gelu.stands_for = (linear, gelu)  # type: ignore[attr-defined]


def attention(qkv, n_head, dropout=0.0, seed=0):
    """torch's fused attention, and the transposes that it needs around it. (B, T, 3C) -> (B, T, C)

    `dropout` draws from the generator of the device; `seed` has no effect.
    """
    q, k, v = split_heads(qkv, n_head)
    return merge_heads(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True))


attention.attend = attend  # type: ignore[attr-defined]  # gpt.KVCache calls it


def lm_loss(hidden, weight, targets):
    """(B, T, C), (V, C), (B, T) -> (): the mean over the targets that aren't -1; NaN without any"""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), targets.flatten(), ignore_index=-1)
