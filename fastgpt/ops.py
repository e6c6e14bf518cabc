"""The five formulas of gpt.py as fused kernels, each a torch.library op with a fake and an autograd formula.

Every function takes and returns what gpt.py's function of the same name does, for float32 and float64 tensors on the
CPU. Tensors cross into C++ as NumPy arrays that share their memory; the last dimension must be contiguous, the other
strides are free, and nothing is converted or copied. Errors name the argument, what came and what was expected:
TypeError for what is no tensor or has another dtype, ValueError for the rest.

Gradients are first derivatives; a second differentiation raises NotImplementedError, and so do torch.func's transforms.
torch.autocast changes nothing here: float32 stays float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _kernels

_DTYPES = (torch.float32, torch.float64)
_library = torch.library.Library("fastgpt", "DEF")


class _Kernel:
    """One kernel, forward and backward, in the two forms in which torch meets it.

    op      torch.ops.fastgpt.<name> with a fake and an autograd formula: for torch.compile, export, opcheck
    eager   the same functions as a torch.autograd.Function: forward and backward cost 20 us less than through the
            dispatcher, a tenth of the time that layer_norm of 1024 x 768 takes
    """

    def __init__(self, forward, backward, forward_fake, backward_fake, setup_context, gradients):
        """gradients(ctx, dout) -> a gradient for each argument. `backward` is None where other kernels' make them."""
        name = forward.__name__.lstrip("_").removesuffix("_forward")
        self.name, self.forward, self.backward = name, forward, backward
        self.op = self._define(name, forward, forward_fake)

        def setup(ctx, inputs, output):
            setup_context(ctx, inputs, output)
            ctx.set_materialize_grads(False)  # else each output that has no gradient gets one, of zeros, at every call

        def differentiate(ctx, dout, *_):
            return (None,) * len(ctx.needs_input_grad) if dout is None else gradients(ctx, dout)

        torch.library.register_autograd(f"fastgpt::{name}", differentiate, setup_context=setup, lib=_library)
        if backward:
            self.backward_op = self._define(f"{name}_backward", backward, backward_fake)
            torch.library.register_autograd(f"fastgpt::{name}_backward", self._refuse, lib=_library)

        def run(ctx, *args):  # a setup_context of its own would have the arguments bound to names at every call: 20 us
            output = forward(*args)
            setup(ctx, args, output)
            return output

        methods = dict(forward=staticmethod(run), backward=staticmethod(differentiate))
        self.eager = type(name, (torch.autograd.Function,), methods).apply

    def __call__(self, tensors, *others):
        """All outputs. `tensors` are the arguments that are tensors, by name; `others` come after them."""
        x, *more = tensors.values()
        try:
            if _traced(x):
                return self.op(x, *more, *others)
            return (self.eager if torch.is_grad_enabled() else self.forward)(x, *more, *others)
        except (AttributeError, RuntimeError, TypeError):  # what NumPy can't take says so in its own words: find better
            _check(self.name, **tensors)
            raise

    @staticmethod
    def _define(name, function, fake):
        schema = name + torch.library.infer_schema(function, mutates_args=())
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CPU")
        torch.library.register_fake(f"fastgpt::{name}", fake, lib=_library)
        return getattr(torch.ops.fastgpt, name).default

    def _refuse(self, ctx, *grads):
        raise NotImplementedError(f"fastgpt.{self.name} has no second derivative; gpt.py's formula has one")

    def differentiate(self, dout, *args):
        """The backward. With create_graph, through the op, which refuses a second differentiation."""
        return (self.backward_op if torch.is_grad_enabled() or _traced(dout) else self.backward)(dout, *args)


def _traced(x):
    """Is x something other than a tensor with values of its own?"""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta


def _array(x):
    return x.detach().numpy()


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(op, **tensors):
    """What C++ can't tell from an array: that these are tensors, on the CPU, in a dtype that NumPy knows."""
    for name, x in tensors.items():
        if x is None and name == "bias" and op.startswith("linear"):
            continue
        if isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise NotImplementedError(
                f"fastgpt.{op} does not run inside torch.func's transforms (grad, vmap, jvp): call it under plain "
                "autograd, one batch at a time, or use gpt.py's formula"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a tensor")
        if x.device.type not in ("cpu", "meta") or x.layout is not torch.strided:
            raise ValueError(f"{op}: {name} is a {x.layout} tensor on {x.device}, expected a dense one on the CPU")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected torch.float32 or torch.float64")


def _expect(op, name, x, dtype, shape):
    if x.dtype is not dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {dtype}")
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


def _check_matrix(op, name, matrix, rows, x):
    """A (rows, K) matrix for the last dimension of x."""
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: the input has shape {tuple(x.shape)}, expected at least one channel")
    if matrix.dim() != 2 or matrix.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: {name} has shape {tuple(matrix.shape)}, expected ({rows}, {x.shape[-1]})")
    _expect(op, name, matrix, x.dtype, matrix.shape)


def _rows_adjacent(grad):
    """A gradient as the kernels read it. Autograd may hand over an expanded scalar; only then is it copied."""
    return grad if grad.is_contiguous() or grad.stride(-1) == 1 else grad.contiguous()


# ------------------------------------------------------------------------------------------------- layer_norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of the last dimension to mean 0 and variance 1, then scaled and shifted (Ba, Kiros and Hinton 2016).

    (..., C), (C,), (C,) -> (..., C), float32 or float64. Of x only the last dimension must be contiguous.
    One read of x; saves each row's mean and reciprocal deviation. The backward fuses dx, dweight and dbias.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices.
    """
    return _layer_norm(dict(x=x, weight=weight, bias=bias), eps)[0]


def _layer_norm_fake(x, weight, bias, eps):
    return _like(x), x.new_empty((2, *x.shape[:-1]))


def _layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, stats = _layer_norm_fake(x, weight, bias, eps)
    _kernels.layer_norm_forward(_array(x), _array(weight), _array(bias), eps, out.numpy(), stats.numpy())
    return out, stats


def _layer_norm_backward_fake(dout, x, weight, stats):
    return _like(x), _like(weight), _like(weight)


def _layer_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads = _layer_norm_backward_fake(dout, x, weight, stats)
    inputs = (_array(_rows_adjacent(dout)), _array(x), _array(weight), _array(stats))
    _kernels.layer_norm_backward(*inputs, *(grad.numpy() for grad in grads))
    return grads


def _layer_norm_setup(ctx, inputs, output):
    x, weight, _, _ = inputs
    _, stats = output
    ctx.save_for_backward(x, weight, stats)
    ctx.mark_non_differentiable(stats)


def _layer_norm_gradients(ctx, dout):
    return *_layer_norm.differentiate(dout, *ctx.saved_tensors), None


_layer_norm = _Kernel(
    _layer_norm_forward,
    _layer_norm_backward,
    _layer_norm_fake,
    _layer_norm_backward_fake,
    _layer_norm_setup,
    _layer_norm_gradients,
)

# ------------------------------------------------------------------------------------------------------- gelu


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), value by value (Hendrycks and Gimpel 2016). Any shape.

    float32 or float64; only the last dimension must be contiguous. Saves x alone.
    Raises TypeError or ValueError for other dtypes, strides or devices.
    """
    if isinstance(x, Tensor) and x.dim() == 0:
        return gelu(x.unsqueeze(0)).squeeze(0)
    return _gelu(dict(x=x))


def _gelu_forward(x: Tensor) -> Tensor:
    out = _like(x)
    _kernels.gelu_forward(_array(x), out.numpy())
    return out


def _gelu_backward(dout: Tensor, x: Tensor) -> Tensor:
    dx = _like(x)
    _kernels.gelu_backward(_array(_rows_adjacent(dout)), _array(x), dx.numpy())
    return dx


def _gelu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gelu_gradients(ctx, dout):
    return _gelu.differentiate(dout, *ctx.saved_tensors)


_gelu = _Kernel(_gelu_forward, _gelu_backward, _like, lambda dout, x: _like(x), _gelu_setup, _gelu_gradients)

# -------------------------------------------------------------------------------------------------- attention


def attention(qkv: Tensor, n_head: int, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Causal softmax(Q K^T / sqrt(D)) V in each head, in tiles: no T x T tensor (Dao 2023, "FlashAttention-2").

    (B, T, 3C) -> (B, T, C), float32 or float64; qkv holds queries, keys and values side by side, as one projection
    wrote them, and gets its gradient in the same form. `dropout` zeroes that share of the attention weights and scales
    the others up; which ones follows from `seed` (0 <= seed < 2**63) exactly as in gpt.py's dropout_mask.
    Saves `out` and two numbers a query and head: its largest score, in base 2, and 1 / the sum of its exponentials.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices, or if 3 * n_head doesn't divide 3C.
    """
    for name, number in (("n_head", n_head), ("seed", seed)):
        if not isinstance(number, int):
            raise TypeError(f"attention: {name} is {type(number).__name__}, expected an int")
    if not 0 <= seed < 2**63:
        raise ValueError(f"attention: seed is {seed}, expected 0 <= seed < 2**63")
    return _attention(dict(qkv=qkv), n_head, dropout, seed)[0]


def _attention_fake(qkv, n_head, dropout, seed):
    B, T, channels = qkv.shape
    return qkv.new_empty(B, T, channels // 3), qkv.new_empty(2, B, n_head, T)


def _attention_forward(qkv: Tensor, n_head: int, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    packed = _array(qkv)
    if qkv.dim() != 3 or n_head < 1:  # no shape to allocate: only the error
        _kernels.attention_forward(packed, n_head, dropout, seed, packed, packed)
    out, stats = _attention_fake(qkv, n_head, dropout, seed)
    _kernels.attention_forward(packed, n_head, dropout, seed, out.numpy(), stats.numpy())
    return out, stats


def _attention_backward_fake(dout, qkv, out, stats, n_head, dropout, seed):
    return _like(qkv)


def _attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, n_head: int, dropout: float, seed: int
) -> Tensor:
    dqkv = _like(qkv)
    inputs = (_array(_rows_adjacent(dout)), _array(qkv), _array(out), _array(stats))
    _kernels.attention_backward(*inputs, n_head, dropout, seed, dqkv.numpy())
    return dqkv


def _attention_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)
    ctx.options = inputs[1:]
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx, dout):
    return _attention.differentiate(dout, *ctx.saved_tensors, *ctx.options), None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt.py's attend, for the few new queries of a cache: there, the time is the time to read keys and values once."""
    past = k.shape[-2] - q.shape[-2]
    mask = None if q.shape[-2] == 1 else torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(past)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, mask)


attention.attend = attend  # type: ignore[attr-defined]  # a cache of keys and values asks for it

_attention = _Kernel(
    _attention_forward,
    _attention_backward,
    _attention_fake,
    _attention_backward_fake,
    _attention_setup,
    _attention_gradients,
)

# ----------------------------------------------------------------------------------------------------- linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., K), (N, K), (N,) -> (..., N).

    float32 or float64; of x and weight only the last dimension must be contiguous. Blocks and loops as in BLIS (Van Zee
    and van de Geijn 2015). Fewer than FEW_ROWS rows go to torch's F.linear: there, the time is the time to read weight
    once, and copying it into panels, which pays for itself over many rows, would only add to it.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices.
    """
    try:
        if _few(x, weight, bias):
            return _few_rows(x, weight, bias)
        return _linear(dict(x=x, weight=weight, bias=bias))
    except (AttributeError, IndexError, RuntimeError):
        _check_linear("linear", x, weight, bias)
        raise


FEW_ROWS = 32


def _few(x, weight, bias):
    if torch.is_autocast_enabled("cpu"):  # F.linear would compute in bfloat16
        return False
    few = x.dtype in _DTYPES and x.numel() < FEW_ROWS * x.shape[-1] and (bias is None or bias.dim() == 1)
    return few and (bias is None or bias.shape == weight.shape[:1])


def _few_rows(x, weight, bias):
    """F.linear with the bias added last: torch adds every product to it, and rounds to its last digit each time."""
    out = F.linear(x, weight)
    return out if bias is None else out + bias


def _check_linear(op, x, weight, bias):
    """What torch or NumPy refused, in our words."""
    _check(op, x=x, weight=weight, bias=bias)
    _check_matrix(op, "weight", weight, "N", x)
    if bias is not None:
        _expect(op, "bias", bias, x.dtype, weight.shape[:1])


def _linear_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _linear_fake(x, weight, bias)
    _kernels.linear_forward(_array(x), _array(weight), None if bias is None else _array(bias), out.numpy())
    return out


def _linear_backward_fake(dout, x, weight, for_x, for_weight):
    return _like(x) if for_x else x.new_empty(0), _like(weight) if for_weight else x.new_empty(0)


def _linear_backward(dout: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool) -> tuple[Tensor, Tensor]:
    dx, dweight = _linear_backward_fake(dout, x, weight, for_x, for_weight)
    inputs = (_array(_rows_adjacent(dout)), _array(x), _array(weight))
    _kernels.linear_backward(*inputs, dx.numpy() if for_x else None, dweight.numpy() if for_weight else None)
    return dx, dweight


def _linear_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _linear_gradients(ctx, dout):
    return _linear_grads(dout, *ctx.saved_tensors, ctx.needs_input_grad)


def _linear_grads(dout, x, weight, needed):
    for_x, for_weight, for_bias, *_ = needed
    dx, dweight = _linear.differentiate(dout, x, weight, for_x, for_weight)
    dbias = dout.reshape(-1, dout.shape[-1]).sum(0) if for_bias else None
    return dx if for_x else None, dweight if for_weight else None, dbias


_linear = _Kernel(
    _linear_forward, _linear_backward, _linear_fake, _linear_backward_fake, _linear_setup, _linear_gradients
)


# ------------------------------------------------------------------------------------------------ linear_gelu


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(linear(x, weight, bias)) in one pass: (..., K), (N, K), (N,) -> (..., N).

    gelu is applied to each tile of the product while it is in the cache. Saves x, weight and linear's result; without
    gradients, not even that exists. dtypes, strides and errors are linear's.
    """
    try:
        if _few(x, weight, bias):
            return gelu(_few_rows(x, weight, bias))
        keep = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        return _linear_gelu(dict(x=x, weight=weight, bias=bias), keep)[0]
    except (AttributeError, IndexError, RuntimeError):
        _check_linear("linear_gelu", x, weight, bias)
        raise


def _linear_gelu_fake(x, weight, bias, keep):
    out = _linear_fake(x, weight, bias)
    return out, torch.empty_like(out) if keep else x.new_empty(0)


def _linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    out, inner = _linear_gelu_fake(x, weight, bias, keep)
    bias = None if bias is None else _array(bias)
    _kernels.linear_forward(_array(x), _array(weight), bias, (inner if keep else out).numpy(), out.numpy())
    return out, inner


def _linear_gelu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _linear_gelu_gradients(ctx, dout):
    x, weight, inner = ctx.saved_tensors
    dinner = _gelu.differentiate(dout, inner)
    return *_linear_grads(dinner, x, weight, ctx.needs_input_grad), None


linear_gelu.stands_for = (linear, gelu)  # type: ignore[attr-defined]  # who replaces one of them replaces this

_linear_gelu = _Kernel(_linear_gelu_forward, None, _linear_gelu_fake, None, _linear_gelu_setup, _linear_gelu_gradients)

# ---------------------------------------------------------------------------------------------------- lm_loss


def lm_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of softmax(hidden @ weight.T) over the targets that aren't -1.

    (B, T, C), (V, C), int64 (B, T) -> (), float32 or float64; of hidden and weight only the last dimension must be
    contiguous. The logits never exist whole: of V = 50257, at most 56 MiB at a time. With gradients wanted, the forward
    makes them too, while it has the logits (as Liger-Kernel does), and the backward only multiplies: so a forward that
    no backward follows belongs under torch.no_grad(). nan if no target counts.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices, or a target that is no token.
    """
    try:
        wanted = torch.is_grad_enabled()
        for_hidden, for_weight = wanted and hidden.requires_grad, wanted and weight.requires_grad
        if targets.dtype is not torch.int64 or targets.shape != hidden.shape[:-1]:
            raise RuntimeError
        return _lm_loss(dict(hidden=hidden, weight=weight), targets.contiguous(), for_hidden, for_weight)[0]
    except (AttributeError, RuntimeError):
        _check("lm_loss", hidden=hidden, weight=weight)
        _check_matrix("lm_loss", "weight", weight, "V", hidden)
        if not isinstance(targets, Tensor):
            raise TypeError(f"lm_loss: targets is {type(targets).__name__}, expected a tensor") from None
        _expect("lm_loss", "targets", targets, torch.int64, hidden.shape[:-1])
        raise


def _lm_loss_fake(hidden, weight, targets, for_hidden, for_weight):
    grads = (_like(x) if wanted else x.new_empty(0) for x, wanted in ((hidden, for_hidden), (weight, for_weight)))
    return hidden.new_empty(()), *grads


def _lm_loss_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss, dhidden, dweight = _lm_loss_fake(hidden, weight, targets, for_hidden, for_weight)
    grads = dhidden.numpy() if for_hidden else None, dweight.numpy() if for_weight else None
    loss.fill_(_kernels.lm_loss(_array(hidden), _array(weight), _array(targets), *grads))
    return loss, dhidden, dweight


def _lm_loss_backward_fake(dloss, dhidden, dweight):
    return _like(dhidden), _like(dweight)


def _lm_loss_backward(dloss: Tensor, dhidden: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    return dhidden * dloss, dweight * dloss


def _lm_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _lm_loss_gradients(ctx, dloss):
    grads = ctx.saved_tensors
    if torch.is_grad_enabled() or _traced(dloss) or dloss.item() != 1.0:
        grads = _lm_loss.differentiate(dloss, *grads)
    for_hidden, for_weight, *_ = ctx.needs_input_grad
    return grads[0] if for_hidden else None, grads[1] if for_weight else None, None, None, None


_lm_loss = _Kernel(
    _lm_loss_forward, _lm_loss_backward, _lm_loss_fake, _lm_loss_backward_fake, _lm_loss_setup, _lm_loss_gradients
)
