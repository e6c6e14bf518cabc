"""GPT-2's formulas in bfloat16 products: twice as many multiply-adds a second as in float32.

    model = gpt.GPT(gpt.GPTConfig(), ops=fastgpt.bfloat16)

Each function takes and returns what fastgpt's function of the same name does, float32 tensors, and has gradients like
it. Only the operands of matrix products are rounded to bfloat16, to nearest, while the kernel packs them; sums,
softmax, norms, gelu and the loss are float32, and so are parameters, optimizer and files. docs/parity.md holds the
errors to those of the formula under torch.autocast.

It needs a processor with AVX-512 BF16, AMX or ARM's BF16 (`fastgpt info` tells); elsewhere calls raise ValueError.
"""

from torch import Tensor

from . import ops
from .ops import gelu, layer_norm

__all__ = ["attention", "gelu", "layer_norm", "linear", "linear_gelu", "lm_loss"]


def attention(qkv: Tensor, n_head: int, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """fastgpt.attention in bfloat16 products: (B, T, 3C) -> (B, T, C), float32."""
    return ops.attention(qkv, n_head, dropout, seed, bfloat16=True)


attention.attend = ops.attend  # type: ignore[attr-defined]  # a cache reads keys and values once: no product to speed up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """fastgpt.linear in bfloat16 products: (..., K), (N, K), (N,) -> (..., N), float32."""
    return ops.linear(x, weight, bias, bfloat16=True)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """fastgpt.linear_gelu in bfloat16 products: (..., K), (N, K), (N,) -> (..., N), float32."""
    return ops.linear_gelu(x, weight, bias, bfloat16=True)


linear_gelu.stands_for = (linear, gelu)  # type: ignore[attr-defined]  # who replaces one of them replaces this


def lm_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """fastgpt.lm_loss in bfloat16 products: (B, T, C), (V, C), int64 (B, T) -> (), float32."""
    return ops.lm_loss(hidden, weight, targets, bfloat16=True)
