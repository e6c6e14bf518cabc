"""What a formula may lose to rounding: a sample of the errors that its own arithmetic can make.

In float32 every operation rounds. Here the formula runs in float64, and after each operation of its forward and of its
backward a random number is added, spread evenly, with the standard deviation of what the operation loses in float32:

    an operation on each value z     u |z|; if it multiplies, 2^-126 more: what is less may have become 0
    a sum of n values                u sqrt(s_2^2 + ... + s_n^2), s_k the sum of the first k, for values in any order
    a sum of n products a b          as a sum, and u |a b| for each product

For bfloat16 products each operand of a product errs first, by what rounding it to bfloat16 may do: 2^-8 / sqrt(3).

Rounding to float32 changes a value of 1 by at most 2^-24; u = 2^-24 / sqrt(3) is the standard deviation of an error
spread evenly over that range. Equal values get equal errors, as from true rounding, so the random number is a hash of
the value, the operation and the run. Some tens of runs, side by side, show how far results in float32 can lie from the
truth, element by element: errors that cancel, cancel here too. Nothing in it depends on a processor, a number of
threads or a library's order of summation: it is a property of the formula and of its inputs.
(Monte Carlo arithmetic: Parker 1997; Vignes 2004, "Discrete Stochastic Arithmetic for Validating Numerical Software".)
"""

import math

import torch
from torch._decomp import decomposition_table
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

UNIT, BFLOAT16_UNIT, TINY = 2.0**-24 / math.sqrt(3.0), 2.0**-8 / math.sqrt(3.0), 2.0**-126

aten = torch.ops.aten


def _operations(names):
    return {getattr(aten, name) for name in names.split() if hasattr(aten, name)}


# Results that are values which were there before, or exact.
EXACT = _operations("""
    _reshape_alias _to_copy _unsafe_view abs amax amin arange argmax cat ceil clamp clone constant_pad_nd copy detach
    embedding empty empty_like expand eye fill flip floor full full_like gather index index_select lift_fresh linspace
    masked_fill max maximum min minimum neg new_empty new_empty_strided new_full new_ones new_zeros ones ones_like rand
    randint randn relu repeat roll round scalar_tensor scatter select_backward select_scatter sgn sign slice_backward
    slice_scatter sort stack threshold_backward topk tril triu trunc unfold_backward where zero zeros zeros_like
""")
SUMS = _operations("sum mean")
PRODUCTS = _operations("mm bmm mv dot")
SCATTERED = _operations("scatter_add index_add index_put _index_put_impl embedding_dense_backward")
UNDERFLOWING = _operations("mul div pow exp exp2")
ONE_ROUNDING = _operations("add sub rsub mul div pow sqrt rsqrt reciprocal exp exp2 log log2 sin cos tanh sigmoid erf")


UNKNOWN = "check: the formula calls {}, whose rounding is not known here; expected it in other operations"


def sum_error(total, squares, n):
    """sqrt(s_2^2 + ... + s_n^2) for n values with this sum and this sum of squares, in the mean over all orders.

    k of the n, drawn at random, have a sum whose square is on average
    k/n squares + k(k-1) / (n(n-1)) (total^2 - squares); added up over k = 2 .. n, that is what stands here.
    """
    mean_square = (n + 1) / 3 * total.square() + ((n + 1) / 6 - 1 / n) * squares
    return mean_square.clamp_(min=0).sqrt_()


def _power_of_two(x):
    """Is x one number, and a power of two? Multiplying by it does not round."""
    if isinstance(x, torch.Tensor) and x.numel() != 1:
        return False
    return math.frexp(abs(float(x)))[0] == 0.5


def _squared(x):
    return x.square() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _one(x):
    return torch.ones_like(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


class Rounding(TorchDispatchMode):
    """Inside it, operations on float64 tensors err at random as those of float32 may. unit=0 only counts values.

    bfloat16: operands of matrix products err as if rounded to bfloat16.
    """

    def __init__(self, runs=1, first=0, unit=UNIT, bfloat16=False):
        super().__init__()
        self.runs, self.first, self.unit, self.values, self.operations = runs, first, unit, 0, 0
        self.bfloat16 = bfloat16

    def noise(self, x):
        """u sqrt(3) times numbers in [-1, 1), a hash of each value of x, of the operation and of the run."""
        self.operations += 1
        return self._hash(x, self.operations).mul_(self.unit)

    def operand(self, x):
        """x as a product in bfloat16 sees it: the same in each product, so the operation does not count."""
        error = x + x.sign().mul_(TINY / BFLOAT16_UNIT)
        return self._hash(x, 0).mul_(BFLOAT16_UNIT).mul_(error).nan_to_num_(0.0, 0.0, 0.0).add_(x)

    def _hash(self, x, operation):
        """sqrt(3) times numbers in [-1, 1)."""
        h = x.float().view(torch.int32) if x.dim() else x.float().reshape(1).view(torch.int32).reshape(())
        if x.dim() and x.shape[0] % self.runs == 0:  # vmap keeps the runs slowest
            run = torch.arange(x.shape[0]) // max(x.shape[0] // self.runs, 1) + self.first
            h = h ^ (run * 0x5BD1E995).to(torch.int32).view(-1, *(1,) * (x.dim() - 1))
        h = h ^ (operation * 0x27D4EB2F & 0x7FFFFFFF)
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):  # a mixing function (Wellons, "lowbias32")
            h = (h ^ (h >> shift & (1 << 32 - shift) - 1)).mul_(factor)
        return h.to(x.dtype).mul_(math.sqrt(3.0) * 2.0**-31)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, kwargs = func.overloadpacket, kwargs or {}
        known = EXACT | SUMS | PRODUCTS | SCATTERED | ONE_ROUNDING
        in_place = func._schema.is_mutable
        if op not in known and not func.is_view and not in_place and func in decomposition_table:
            with self:  # softmax, layer_norm and their like: operation by operation
                return decomposition_table[func](*args, **kwargs)
        if op in PRODUCTS and self.bfloat16 and self.unit:
            args = (*map(self.operand, args[:2]), *args[2:])
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (tuple, list)) else (out,)
        if op in EXACT or func.is_view or not any(torch.is_tensor(x) and x.is_floating_point() for x in outs):
            return out
        if not isinstance(out, torch.Tensor):
            raise ValueError(UNKNOWN.format(func))
        self.values += out.numel()
        if not self.unit or not out.numel():
            return out
        if op is aten.mul and any(_power_of_two(x) for x in args[:2]) or op is aten.div and _power_of_two(args[1]):
            return out
        noise = self.noise(out)
        if op in SUMS | PRODUCTS | SCATTERED or op is aten.cumsum:
            out_with_error = noise.mul_(self._error(func, out, args, kwargs)).nan_to_num_(0.0, 0.0, 0.0).add_(out)
        elif op in ONE_ROUNDING or torch.Tag.pointwise in func.tags:
            error = out if op not in UNDERFLOWING else out + out.sign().mul_(TINY / UNIT)
            out_with_error = noise.mul_(error).nan_to_num_(0.0, 0.0, 0.0).add_(out)
        else:
            raise ValueError(UNKNOWN.format(func))
        return out.copy_(out_with_error) if in_place else out_with_error

    def _error(self, func, out, args, kwargs):
        """The standard deviation of a sum's error, in units of u."""
        op = func.overloadpacket
        if op in PRODUCTS:
            squares = func(*(x.square() for x in args[:2]))
            return sum_error(out, squares, max(args[0].shape[-1], 1)).hypot(squares.sqrt_())
        if op is aten.cumsum:
            return out.square().cumsum(args[1]).sqrt_()
        if op in SCATTERED:
            squares, n = (func(*map(change, args), **kwargs) for change in (_squared, _one))
            return sum_error(out, squares, n.clamp_(min=1))
        n = args[0].numel() // out.numel() or 1
        scale = n if op is aten.mean else 1
        error = sum_error(out * scale, aten.sum(args[0].square(), *args[1:], **kwargs), n) / scale
        return error if _power_of_two(scale) else error.hypot(out)


class FoldedProducts(TorchFunctionMode):
    """x @ matrix as one matrix product, whatever x's leading dimensions: as torch does it, except under vmap.

    There each leading index would have a product of its own, and the gradient of `matrix` would be a sum of short sums.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and not kwargs:
            x, matrix = args
            if x.dim() > 2 and matrix.dim() == 2:
                return (x.flatten(0, -2) @ matrix).unflatten(0, x.shape[:-1])
        return func(*args, **(kwargs or {}))
