"""GPT-2's formulas as torch ops: each kernel is declared, and one small engine runs them all.

Every function takes and returns what gpt.py's function of the same name does, for float32 and float64 tensors on the
CPU. Tensors cross into C++ as NumPy arrays that share their memory; the last dimension must be contiguous, the other
strides are free, and nothing is converted or copied. Errors name the argument, what came and what was expected:
TypeError for what is no tensor or has another dtype, ValueError for the rest.

Gradients are first derivatives; a second differentiation raises NotImplementedError, and so do torch.func's transforms.
torch.autocast changes nothing here: float32 stays float32. With bfloat16=True, float32 operands of matrix products
are rounded to bfloat16 on their way into the kernel, where the processor has an instruction for that; fastgpt.bfloat16
holds these functions under their own names.
"""

from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _kernels

FEW_ROWS = 32  # from here on, linear copies weight into panels
_library = torch.library.Library("fastgpt", "DEF")


class _Op:
    """A function of csrc/bindings.cpp, in the two forms in which torch meets it.

    op         torch.ops.fastgpt.<name> with a fake and an autograd formula: for torch.compile, export, opcheck
    eager      the same as a torch.autograd.Function: forward and backward cost 20 us less than through the dispatcher,
               a tenth of the time that layer_norm of 1024 x 768 takes

    schema     name, arguments and results in torch's words. The function in C++, <name> or <name>_forward, takes the
               same arguments, but for those that say which results are wanted (for_...), and then an array to write
               into for each result
    outputs    (arguments) -> a tensor for each result, empty if it isn't wanted: the allocation, and the fake
    saved      names of the arguments and results that the backward needs, tensors first
    gradients  the backward's op, (dout, *saved) -> gradients of the first arguments; or a function of (needed, dout,
               *saved), with a bool for each argument in `needed`; or None, for a backward: no second derivative
    run        what to run instead of C++
    """

    def __init__(self, schema, outputs, saved=(), gradients=None, run=None):
        self.name, self.outputs, self.run = schema.partition("(")[0], outputs, run or self._call_cpp
        self.gradients = (lambda needed, *saved: gradients(*saved)) if isinstance(gradients, _Op) else gradients
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.op = getattr(torch.ops.fastgpt, self.name).default
        self.arguments, self.results = self.op._schema.arguments, self.op._schema.returns
        self.tensors = [i for i, a in enumerate(self.arguments) if "Tensor" in str(a.type)]
        self.n_passed = sum(not a.name.startswith("for_") for a in self.arguments)
        places = [[x.name for x in (*self.arguments, *self.results)].index(name) for name in saved]
        self.saved_tensors = [i for i in places if i in self.tensors or i >= len(self.arguments)]
        self.saved_numbers = [i for i in places if i not in self.saved_tensors]
        self.function = run or getattr(_kernels, self.name if gradients is None else f"{self.name}_forward")

        def forward(ctx, *args):  # a setup_context would have the arguments bound to names at every call: 20 us
            output = self.run(*args)
            self._save(ctx, args, output)
            return output

        methods = dict(forward=staticmethod(forward), backward=staticmethod(self._differentiate))
        self.eager = type(self.name, (torch.autograd.Function,), methods).apply
        _library.impl(self.name, self.run, "CPU")
        torch.library.register_fake(self.op, outputs, lib=_library)
        torch.library.register_autograd(self.op, self._differentiate, setup_context=self._save, lib=_library)

    def __call__(self, *args):
        try:
            return (self.op if _traced(args[0]) else self.eager if torch.is_grad_enabled() else self.run)(*args)
        except (AttributeError, RuntimeError, TypeError):
            for argument, x in zip(self.arguments, args, strict=True):
                _refuse_what_is_no_array(self.name, argument, x)
            raise

    def _call_cpp(self, *args):
        arrays = list(args[: self.n_passed])
        if self.gradients is None and not (args[0].is_contiguous() or args[0].stride(-1) == 1):
            arrays[0] = args[0].contiguous()  # autograd may hand over an expanded scalar
        for i in self.tensors:
            arrays[i] = _array(arrays[i])
        try:
            outputs = self.outputs(*args)
        except Exception:  # nothing to allocate: C++ says what is wrong with the arguments
            self.function(*arrays, *(np.empty(0, bool) for _ in self.results))
            raise
        self.function(*arrays, *map(Tensor.numpy, _tuple(outputs)))
        return outputs

    def _save(self, ctx, inputs, output):
        values = (*inputs, *_tuple(output))
        ctx.save_for_backward(*map(values.__getitem__, self.saved_tensors))
        ctx.numbers = [values[i] for i in self.saved_numbers] if self.saved_numbers else ()
        ctx.mark_non_differentiable(*values[len(inputs) + 1 :])
        ctx.set_materialize_grads(False)  # else each output that has no gradient gets one, of zeros, at every call

    def _differentiate(self, ctx, dout, *_):
        if self.gradients is None:
            op = self.name.removesuffix("_backward")
            raise NotImplementedError(f"fastgpt.{op} has no second derivative; gpt.py's formula has one")
        needed, saved = ctx.needs_input_grad, (*ctx.saved_tensors, *ctx.numbers)
        grads = () if dout is None else _tuple(self.gradients(needed, dout, *saved))
        return grads + (None,) * (len(self.arguments) - len(grads))


def _traced(x):
    """Is x something other than a tensor with values of its own?"""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta


def _tuple(x):
    return x if type(x) is tuple else (x,)


def _array(x):
    return x if x is None else x.detach().numpy() if x.requires_grad else x.numpy()


_KINDS = {  # of arguments: their types, and what an error calls them
    "Tensor": (Tensor, "a tensor"),
    "Optional[Tensor]": ((Tensor, type(None)), "a tensor"),
    "int": (Integral, "an int"),
    "float": (Real, "a number"),
    "bool": (bool, "a bool"),
}


def _refuse_what_is_no_array(op, argument, x):
    """What C++ can't see: that x is no tensor, or one whose memory NumPy can't share."""
    (types, expected), what = _KINDS[str(argument.type)], f"{op}: {argument.name}"
    if not isinstance(x, types):
        raise TypeError(f"{what} is {type(x).__name__}, expected {expected}")
    if not isinstance(x, Tensor):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise NotImplementedError(f"fastgpt.{op} does not run inside torch.func's transforms; gpt.py's formula does")
    if x.device.type not in ("cpu", "meta") or x.layout is not torch.strided:
        raise ValueError(f"{what} is a {x.layout} tensor on {x.device}, expected a dense one on the CPU")
    dtype, known = str(x.dtype).removeprefix("torch."), "int64" if argument.name == "targets" else "float32 or float64"
    if not hasattr(np, dtype):
        raise TypeError(f"{what} has dtype {dtype}, expected {known}")


def _like(x, wanted=True):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _wants_gradient(x):
    return torch.is_grad_enabled() and getattr(x, "requires_grad", False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of the last dimension to mean 0 and variance 1, then scaled and shifted (Ba, Kiros and Hinton 2016).

    (..., C), (C,), (C,) -> (..., C), float32 or float64. Of x only the last dimension must be contiguous.
    One read of x; saves each row's mean and reciprocal deviation. The backward fuses dx, dweight and dbias.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices.
    """
    return _layer_norm(x, weight, bias, eps)[0]


_layer_norm_backward = _Op(
    "layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor stats) -> (Tensor, Tensor, Tensor)",
    outputs=lambda dout, x, weight, stats: (_like(x), _like(weight), _like(weight)),
)
_layer_norm = _Op(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor stats)",
    outputs=lambda x, weight, bias, eps: (_like(x), x.new_empty((2, *x.shape[:-1]))),
    saved=("x", "weight", "stats"),
    gradients=_layer_norm_backward,
)


def gelu(x: Tensor) -> Tensor:
    """x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), value by value (Hendrycks and Gimpel 2016). Any shape.

    float32 or float64; only the last dimension must be contiguous. Saves x alone.
    Raises TypeError or ValueError for other dtypes, strides or devices.
    """
    if isinstance(x, Tensor) and x.dim() == 0:
        return gelu(x.unsqueeze(0)).squeeze(0)
    return _gelu(x)


_gelu_backward = _Op("gelu_backward(Tensor dout, Tensor x) -> Tensor", lambda dout, x: _like(x))
_gelu = _Op("gelu(Tensor x) -> Tensor", _like, saved=("x",), gradients=_gelu_backward)


def attention(qkv: Tensor, n_head: int, dropout: float = 0.0, seed: int = 0, *, bfloat16: bool = False) -> Tensor:
    """Causal softmax(Q K^T / sqrt(D)) V in each head, in tiles: no T x T tensor (Dao 2023, "FlashAttention-2").

    (B, T, 3C) -> (B, T, C), float32 or float64; qkv holds queries, keys and values side by side, as one projection
    wrote them, and gets its gradient in the same form. `dropout` zeroes that share of the attention weights and scales
    the others up; which ones follows from `seed` (0 <= seed < 2**63) exactly as in gpt.py's dropout_mask.
    Saves `out` and two numbers a query and head: its largest score, in base 2, and 1 / the sum of its exponentials.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices, or if 3 * n_head doesn't divide 3C.
    """
    return _attention(qkv, n_head, dropout, seed, bfloat16)[0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt.py's attend, for the few new queries of a cache: there, the time is the time to read keys and values once."""
    past = k.shape[-2] - q.shape[-2]
    mask = (
        None if q.shape[-2] == 1 else torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(past)
    )
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, mask)


attention.attend = attend  # type: ignore[attr-defined]  # a cache of keys and values asks for it

_attention_backward = _Op(
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor stats, int n_head, float dropout, int seed,"
    " bool bfloat16) -> Tensor",
    outputs=lambda dout, qkv, *_: _like(qkv),
)
_attention = _Op(
    "attention(Tensor qkv, int n_head, float dropout, int seed, bool bfloat16) -> (Tensor out, Tensor stats)",
    outputs=lambda qkv, n_head, *_: (
        qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
        qkv.new_empty(2, qkv.shape[0], n_head, qkv.shape[1]),
    ),
    saved=("qkv", "out", "stats", "n_head", "dropout", "seed", "bfloat16"),
    gradients=_attention_backward,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, bfloat16: bool = False) -> Tensor:
    """x @ weight.T + bias: (..., K), (N, K), (N,) -> (..., N).

    float32 or float64; of x and weight only the last dimension must be contiguous. Blocks and loops as in BLIS (Van Zee
    and van de Geijn 2015). Fewer than FEW_ROWS rows go to torch's F.linear: there, the time is the time to read weight
    once, and copying it into panels, which pays for itself over many rows, would only add to it.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices.
    """
    out = None if bfloat16 else _few_rows(x, weight, bias)
    return _linear(x, weight, bias, bfloat16) if out is None else out


def _few_rows(x, weight, bias):
    """By F.linear; None if the kernel is to compute it, or to say what is wrong with it.

    The bias is added last: F.linear would add every product to it, and round to its last digit each time.
    """
    try:
        few = x.numel() < FEW_ROWS * x.shape[-1] and x.dtype in (torch.float32, torch.float64) and weight.dim() == 2
        if not few or torch.is_autocast_enabled("cpu"):  # with which F.linear would compute in bfloat16
            return None
        if bias is None:
            return F.linear(x, weight)
        return F.linear(x, weight) + bias if bias.shape == weight.shape[:1] and bias.dtype is x.dtype else None
    except (AttributeError, IndexError, RuntimeError):
        return None


def _linear_gradients(needed, dout, x, weight, bfloat16):
    for_x, for_weight, for_bias, *_ = needed
    dbias = dout.reshape(-1, dout.shape[-1]).sum(0) if for_bias else None
    return *_linear_backward(dout, x, weight, bfloat16, for_x, for_weight), dbias


_linear_backward = _Op(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, bool bfloat16, bool for_x, bool for_weight)"
    " -> (Tensor, Tensor)",
    outputs=lambda dout, x, weight, bfloat16, for_x, for_weight: (_like(x, for_x), _like(weight, for_weight)),
)
_linear = _Op(
    "linear(Tensor x, Tensor weight, Tensor? bias, bool bfloat16) -> Tensor",
    outputs=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    saved=("x", "weight", "bfloat16"),
    gradients=_linear_gradients,
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, bfloat16: bool = False) -> Tensor:
    """gelu(linear(x, weight, bias)) in one pass: (..., K), (N, K), (N,) -> (..., N).

    gelu is applied to each tile of the product while it is in the cache. Saves x, weight and linear's result; without
    gradients, not even that exists. dtypes, strides and errors are linear's.
    """
    out = None if bfloat16 else _few_rows(x, weight, bias)
    if out is not None:
        return gelu(out)
    return _linear_gelu(x, weight, bias, bfloat16, any(map(_wants_gradient, (x, weight, bias))))[0]


linear_gelu.stands_for = (linear, gelu)  # type: ignore[attr-defined]  # who replaces one of them replaces this
_linear_gelu = _Op(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool bfloat16, bool for_inner) -> (Tensor out, Tensor inner)",
    outputs=lambda x, weight, bias, bfloat16, for_inner: (out := _linear.outputs(x, weight), _like(out, for_inner)),
    saved=("x", "weight", "inner", "bfloat16"),
    gradients=lambda needed, dout, x, weight, inner, bfloat16: _linear_gradients(
        needed, _gelu_backward(dout, inner), x, weight, bfloat16
    ),
)


def lm_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, bfloat16: bool = False) -> Tensor:
    """Mean cross-entropy in nats of softmax(hidden @ weight.T) over the targets that aren't -1.

    (B, T, C), (V, C), int64 (B, T) -> (), float32 or float64; of hidden and weight only the last dimension must be
    contiguous. The logits never exist whole: of V = 50257, at most 56 MiB at a time, or 112 of bfloat16
    products. With gradients wanted, the forward makes them too, while it has the logits (as Liger-Kernel does), and the
    backward only multiplies: so a forward that no backward follows belongs under torch.no_grad(). nan if no target
    counts.
    Raises TypeError or ValueError for other dtypes, shapes, strides or devices, or a target that is no token.
    """
    targets = targets.contiguous() if isinstance(targets, Tensor) else targets
    return _lm_loss(hidden, weight, targets, bfloat16, _wants_gradient(hidden), _wants_gradient(weight))[0]


def _lm_loss_gradients(needed, dloss, *grads):
    scaled = torch.is_grad_enabled() or _traced(dloss) or dloss.item() != 1.0
    return _lm_loss_backward(dloss, *grads) if scaled else grads


_lm_loss_backward = _Op(
    "lm_loss_backward(Tensor dloss, Tensor dhidden, Tensor dweight) -> (Tensor, Tensor)",
    outputs=lambda dloss, *grads: tuple(map(_like, grads)),
    run=lambda dloss, *grads: tuple(grad * dloss for grad in grads),
)
_lm_loss = _Op(
    "lm_loss(Tensor hidden, Tensor weight, Tensor targets, bool bfloat16, bool for_hidden, bool for_weight)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight)",
    outputs=lambda x, weight, targets, bfloat16, for_x, for_weight: (
        x.new_empty(()),
        _like(x, for_x),
        _like(weight, for_weight),
    ),
    saved=("dhidden", "dweight"),
    gradients=_lm_loss_gradients,
)
