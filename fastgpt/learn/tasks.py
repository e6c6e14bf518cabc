"""The exercises' texts: what is to be written, the formula in words, shapes, hints, and the file to begin with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    name: str
    signature: str  # in Python
    about: str
    formula: str
    hints: tuple[str, ...]
    prototypes: tuple[str, ...]  # in C++: the forward, then its backward
    cpp: str  # what the C++ function's arguments are
    solution: tuple[str, ...]  # names in gpt.py
    inputs: tuple[str, ...] = ()  # the arguments that get gradients
    derivation: str = ""  # where the backward is derived: a header of csrc

    @property
    def function(self):
        return self.signature.partition("(")[0]

    @property
    def arguments(self):
        """Names, in order, without defaults."""
        inside = self.signature.partition("(")[2].rstrip(")")
        return tuple(part.partition("=")[0].strip() for part in inside.split(","))

    @property
    def gradients(self):
        return tuple(f"d{name}" for name in self.inputs)

    @property
    def cpp_function(self):
        return function_of(self.prototypes[0])


def function_of(prototype):
    return prototype.partition("(")[0].split()[-1].lstrip("*")


LINEAR_CPP = """x is M x K, weight N x K, out M x N, row after row. bias has N values, or is nullptr: then there is
none, and dbias is nullptr too. The backward sets all of dx, dweight and dbias."""

EXERCISES = {
    e.name: e
    for e in (
        Exercise(
            "linear",
            "linear(x, weight, bias=None)",
            "each output is a weighted sum of all inputs",
            """For each row x of K numbers and each output n of N:

    out[n] = x[0] * weight[n, 0] + ... + x[K-1] * weight[n, K-1] + bias[n]

Shapes: x (..., K), weight (N, K), bias (N) or None -> (..., N). "..." is any number of dimensions.""",
            (
                "One number of the result is the product of a row of x with a row of weight. Which matrix product has "
                "that number in row m and column n?",
                "A matrix product A @ B pairs rows of A with columns of B. So the rows of weight must become columns.",
                "x @ weight.T, and bias, if there is one, is added to each row.",
                "Backward: out[n] has x[k] times weight[n, k]. So dx[k] is the sum over n of dout[n] weight[n, k]: no "
                "transpose this time.",
                "Backward: a weight serves every row of x, so dweight[n, k] is the sum over all rows of "
                "dout[row, n] x[row, k], and dbias[n] the sum over all rows of dout[row, n]. All leading dimensions "
                "count as rows: flatten(0, -2).",
            ),
            (
                "void linear(const float* x, const float* weight, const float* bias, float* out, int64_t M, int64_t N, "
                "int64_t K)",
                "void linear_backward(const float* dout, const float* x, const float* weight, float* dx, float* "
                "dweight, float* dbias, int64_t M, int64_t N, int64_t K)",
            ),
            LINEAR_CPP,
            ("linear",),
            ("x", "weight", "bias"),
        ),
        Exercise(
            "gelu",
            "gelu(x)",
            "a gate for each number: large ones pass, negative ones nearly vanish",
            """For each number x by itself:

    out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))

This is the tanh form of GELU, the one GPT-2's weights were trained with. Shapes: x of any shape -> the same.""",
            (
                "There is no sum and no neighbour here: the whole formula works number by number. Write it down as it "
                "stands, with torch.tanh, math.sqrt and math.pi.",
                "sqrt(2 / pi) is one number, 0.79788...: the root is of the whole quotient.",
                "0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))",
                "Backward: out is a product of x / 2 and 1 + t with t = tanh(u). Both factors depend on x, so there "
                "are two terms: (1 + t) / 2, and x / 2 times the slope of t.",
                "Backward: the slope of tanh(u) is 1 - tanh(u)^2, times that of u itself: sqrt(2 / pi) * "
                "(1 + 3 * 0.044715 * x^2). At the end, everything is multiplied by dout.",
            ),
            (
                "void gelu(const float* x, float* out, int64_t n)",
                "void gelu_backward(const float* dout, const float* x, float* dx, int64_t n)",
            ),
            "All arrays hold n numbers. The backward sets dx.",
            ("gelu",),
            ("x",),
            "gelu.h",
        ),
        Exercise(
            "layer_norm",
            "layer_norm(x, weight, bias, eps=1e-5)",
            "brings each position to mean 0 and variance 1, then scales and shifts it",
            """For the C numbers x[0] ... x[C-1] of one position:

    mean     = the mean of x
    variance = the mean of (x - mean)^2
    out      = (x - mean) / sqrt(variance + eps) * weight + bias

Shapes: x (..., C), weight (C), bias (C) -> (..., C). Each position has a mean and a variance of its own.""",
            (
                "Mean and variance are taken over the last dimension alone. keepdim=True keeps it, of size 1, so that "
                "x - mean fits together.",
                "The variance is a mean of C squares: divided by C. torch.var divides by C - 1 unless it is told "
                "otherwise.",
                "eps stands under the root, beside the variance.",
                "centered = x - x.mean(-1, keepdim=True); variance = centered.square().mean(-1, keepdim=True); the "
                "rest is the third line of the formula.",
                "Backward: with xhat = (x - mean) / sqrt(variance + eps), out = xhat * weight + bias. So dweight is "
                "the sum over all positions of dout * xhat, and dbias that of dout.",
                "Backward: x reaches the result by three ways: directly, through the mean, through the variance. With "
                "g = dout * weight: dx = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(variance + eps).",
            ),
            (
                "void layer_norm(const float* x, const float* weight, const float* bias, float* out, int64_t rows, "
                "int64_t C, float eps)",
                "void layer_norm_backward(const float* dout, const float* x, const float* weight, float* dx, "
                "float* dweight, float* dbias, int64_t rows, int64_t C, float eps)",
            ),
            """x, out, dout and dx are rows x C, row after row: a row is a position. weight and bias have C values.
The backward sets all of dx, dweight and dbias.""",
            ("layer_norm",),
            ("x", "weight", "bias"),
            "layer_norm.h",
        ),
        Exercise(
            "linear_gelu",
            "linear_gelu(x, weight, bias=None)",
            "linear and gelu in one: the pass over memory that a fused kernel saves",
            """    out = gelu(linear(x, weight, bias)), each as in the exercise of its name

Shapes: x (..., K), weight (N, K), bias (N) or None -> (..., N). Written as one function it can be fused: gelu is
applied to a number of the product as soon as that number is there, and not in a second pass over memory.""",
            (
                "Get it right first: linear, then gelu on its result.",
                "To fuse: compute a row, or a block, of the product, add the bias, apply gelu while the block is still "
                "in the processor's cache, then go to the next. In C++ that is one line inside the loop.",
                "Backward: call u the result of linear, before gelu. du = dout * gelu'(u); with du in dout's place, "
                "the rest is linear's backward. gelu' is taken at u, not at the result.",
                "Backward: u is not given. Either compute it again, or store it in the forward.",
            ),
            (
                "void linear_gelu(const float* x, const float* weight, const float* bias, float* out, int64_t M, "
                "int64_t N, int64_t K)",
                "void linear_gelu_backward(const float* dout, const float* x, const float* weight, const float* bias, "
                "float* dx, float* dweight, float* dbias, int64_t M, int64_t N, int64_t K)",
            ),
            LINEAR_CPP,
            ("linear_gelu", "linear", "gelu"),
            ("x", "weight", "bias"),
        ),
        Exercise(
            "attention",
            "attention(qkv, n_head)",
            "each position takes a weighted mean of the values at the positions up to its own",
            """qkv holds three blocks of C channels side by side: queries, keys, values. A block holds n_head heads of
D = C / n_head channels, one after another. In each sequence and each head, for query i and key j:

    score[i, j]  = (query[i] . key[j]) / sqrt(D)           only for j <= i: no position sees a later one
    weight[i, j] = exp(score[i, j]) / sum over j of exp(score[i, j])
    out[i]       = sum over j of weight[i, j] * value[j]

and the heads' results stand side by side again. Shapes: qkv (B, T, 3C) -> (B, T, C). exp must not overflow: subtract
the largest score of a row first, which changes no weight (torch.softmax does).""",
            (
                "q, k, v = qkv.chunk(3, dim=-1) gives (B, T, C) each. Heads want a dimension of their own: "
                "x.unflatten(-1, (n_head, -1)) is (B, T, H, D); with transpose(1, 2) it is (B, H, T, D), and every "
                "matrix product then runs within a head.",
                "scores = q @ k.transpose(-2, -1) / math.sqrt(D) is (B, H, T, T): queries down, keys across.",
                "The mask: torch.ones(T, T, dtype=torch.bool).triu(1) is True where the key comes after the query. "
                "scores.masked_fill(mask, -math.inf), before the softmax: exp(-inf) is 0. A score of 0 would still "
                "count.",
                "softmax over the keys, dim=-1; then weights @ v is (B, H, T, D). Back: transpose(1, 2).flatten(2).",
                "Backward, within a head, P the weights: dv = P^T dout, dP = dout v^T, and through the softmax "
                "dS = P * (dP - sum over keys of P * dP).",
                "Backward: dq = dS k / sqrt(D), dk = dS^T q / sqrt(D). Put the heads and then dq, dk, dv side by side "
                "as they stood in qkv.",
            ),
            (
                "void attention(const float* qkv, float* out, int64_t B, int64_t T, int64_t H, int64_t D)",
                "void attention_backward(const float* dout, const float* qkv, float* dqkv, int64_t B, int64_t T, "
                "int64_t H, int64_t D)",
            ),
            """qkv and dqkv are B x T x 3 H D, out and dout B x T x H D. Query channel d of head h at position t of
sequence b is qkv[(b * T + t) * 3 * H * D + h * D + d]; the key's is H * D further on, the value's 2 * H * D.
The backward sets all of dqkv.""",
            ("attention", "attend", "split_heads", "merge_heads"),
            ("qkv",),
            "attention.h",
        ),
        Exercise(
            "lm_loss",
            "lm_loss(hidden, weight, targets)",
            "how surprised the model is by the tokens that came: cross-entropy in nats",
            """For each position, with a row of C numbers in hidden and the token that came in targets:

    logit[v] = hidden . weight[v]                              for each token v of V
    nll      = log(sum over v of exp(logit[v])) - logit[target]

The loss is the mean of nll over the positions whose target is not -1; those with -1 do not count at all.
Shapes: hidden (B, T, C), weight (V, C), targets (B, T) integers -> one number. exp must not overflow:
log(sum(exp(logit))) is m + log(sum(exp(logit - m))) with m the largest logit (torch.logsumexp does that).""",
            (
                "logits = hidden @ weight.T is (B, T, V). logits.logsumexp(-1) is (B, T).",
                "The logit of the target: logits.gather(-1, index) with index of shape (B, T, 1). -1 is no index: put "
                "0 there first, torch.where(targets != -1, targets, 0), and drop the result afterwards.",
                "The mean divides by the number of targets that count: (targets != -1).sum(), not by B * T.",
                "Backward, for a position that counts: dlogit[v] = (softmax(logit)[v] - (1 if v is the target else 0)) "
                "/ count * dout. For -1: zeros.",
                "Backward: logits came from a linear, so dhidden = dlogits @ weight and dweight = the sum over all "
                "positions of dlogits^T hidden.",
            ),
            (
                "void lm_loss(const float* hidden, const float* weight, const int64_t* targets, float* out, "
                "int64_t rows, int64_t C, int64_t V)",
                "void lm_loss_backward(const float* dout, const float* hidden, const float* weight, "
                "const int64_t* targets, float* dhidden, float* dweight, int64_t rows, int64_t C, int64_t V)",
            ),
            """hidden is rows x C, weight V x C, targets has a token or -1 for each row; out and dout are one number.
The backward sets all of dhidden and dweight.""",
            ("lm_loss",),
            ("hidden", "weight"),
            "loss.h",
        ),
        Exercise(
            "sampling",
            "sample(logits, temperature, top_k, top_p, rng)",
            "how the next token is drawn: temperature, top-k, top-p",
            """For each row of V logits, by these lines, so that the same seed draws the same token:

    1. temperature 0: the token with the largest logit, the first of equals. No random number is used.
    2. Order the tokens from the largest to the smallest logit, equals by their number.
    3. Of them, keep the first top_k (None: all).
    4. Their probabilities: the softmax of logit / temperature, in float64.
    5. top_p (None: all): drop a token if the probabilities of those before it add up to top_p or more.
    6. u = rng.random() * (the sum of the probabilities that are left). One random number a row, row after row.
    7. The first token, in that order, for which the running sum of probabilities is larger than u.

Shapes: logits (B, V) -> tokens (B, 1), int64. rng is a random.Random.""",
            (
                "logits.sort(dim=-1, descending=True, stable=True) gives the ordered logits and the tokens they belong "
                "to. stable=True keeps equals in order.",
                "Softmax: subtract a row's largest logit before dividing by the temperature, or exp overflows; "
                ".double() makes it float64.",
                "The sum of those before: probs.cumsum(-1) minus the token's own, or the sums shifted by one place. "
                "The first token is never dropped: before it there is nothing.",
                "torch.searchsorted(sums, u, right=True) finds the first sum larger than u; tokens.gather(-1, place) "
                "turns the place into a token.",
            ),
            (
                "int64_t sample(const float* logits, int64_t V, double temperature, int64_t top_k, double top_p, "
                "double u)",
            ),
            """One row of V logits -> the token. u is the random number, 0 <= u < 1; multiply it by the sum that is
left. top_k is V and top_p is 2 where there is no limit.""",
            ("sample",),
        ),
        Exercise(
            "kv-cache",
            "KVCache()",
            "attention for new positions only: keys and values of the past are kept",
            """A sequence comes in pieces. For each piece, attention(qkv, n_head) gives the results at its positions,
which see all positions before them, those of earlier pieces too:

    keep the keys and values of the piece, after those that are there
    attend as in the exercise `attention`, the new queries to all keys so far: query i of the piece stands at
    position past + i, and sees the keys at positions 0 ... past + i

However a sequence is cut, the results side by side are those of one pass. Shapes: qkv (B, t, 3C) -> (B, t, C),
with t new positions. Each layer has a cache of its own, and a new text a new one.""",
            (
                "Keep k and v in self, None at first; torch.cat((self.k, k), dim=...) along positions puts the new "
                "ones after the old. Queries need not be kept: nobody asks them again.",
                "The mask: with Tq queries and Tk keys the queries are the last Tq of Tk positions. "
                "torch.ones(Tq, Tk, dtype=torch.bool).triu(Tk - Tq + 1) is True where the key comes after the query.",
                "With one new position there is nothing to hide. With several, within the piece there is.",
            ),
            (
                "void cached_attention(const float* qkv, float* keys, float* values, float* out, int64_t B, int64_t t, "
                "int64_t past, int64_t room, int64_t H, int64_t D)",
            ),
            """qkv is B x t x 3 H D and out B x t x H D, as in attention. keys and values are yours: B x room x H D
each; what you write there is still there at the next call. past positions came before; past + t <= room.""",
            ("KVCache", "attend"),
        ),
    )
}

PYTHON = '''"""{name}: {about}.

{formula}

    fastgpt exercise check {file}    is it right, and if not, what is wrong
    fastgpt exercise hint {file}     a hint; each time one more
"""

import math

import torch

'''

STEP_2 = """

# Step 2, if you like: the gradients by your own hand. Until you write this, autograd finds them.
# dout is the gradient of the loss with respect to the result of {function}; what you return is that with respect to
# each input.


def {function}_backward({arguments}):  # -> {gradients}
    raise NotImplementedError  # TODO
"""

KV_CACHE = '''
class KVCache:
    """The keys and values of one layer at all positions so far."""

    def __init__(self):
        raise NotImplementedError  # TODO

    def attention(self, qkv, n_head):  # (B, t, 3C) -> (B, t, C)
        raise NotImplementedError  # TODO
'''

CPP = """// {name}: {about}.
//
{comment}
//
//     fastgpt exercise check {file}    is it right, and if not, what is wrong
//     fastgpt exercise hint {file}     a hint; each time one more

#include <cmath>
#include <cstdint>

{cpp}
extern "C" {forward} {{
    // TODO{result}
}}
"""

CPP_STEP_2 = """
// Step 2: the gradients. dout is the gradient of the loss with respect to the result; what is set is that with respect
// to each input. Until you write it, training takes gpt.py's formula for it.
extern "C" {backward} {{
    // TODO
}}
"""


def python_file(exercise, file):
    """What `start` writes."""
    text = PYTHON.format(name=exercise.name, about=exercise.about, formula=exercise.formula, file=file)
    if exercise.name == "kv-cache":
        return text + KV_CACHE
    text += f"\ndef {exercise.signature}:\n    raise NotImplementedError  # TODO\n"
    if not exercise.inputs:
        return text
    arguments = exercise.signature.partition("(")[2].rstrip(")")
    returned = ", ".join(exercise.gradients)
    return text + STEP_2.format(function=exercise.function, arguments=f"dout, {arguments}", gradients=returned)


def cpp_file(exercise, file):
    """What `start --cpp` writes."""

    def comment(text):
        return "\n".join(f"// {line}".rstrip() for line in text.splitlines())

    text = CPP.format(
        name=exercise.name,
        about=exercise.about,
        comment=comment(exercise.formula),
        file=file,
        cpp=comment(exercise.cpp),
        forward=wrapped(exercise.prototypes[0]),
        result="\n    return -1;" if exercise.prototypes[0].startswith("int64_t") else "",
    )
    if len(exercise.prototypes) > 1:
        text += CPP_STEP_2.format(backward=wrapped(exercise.prototypes[1]))
    return text


def wrapped(prototype):
    """A long prototype in lines of at most 100 characters, the arguments below each other."""
    head, _, arguments = prototype.partition("(")
    indent = " " * (len('extern "C" ') + len(head) + 1)
    lines = [f"{head}("]
    for i, argument in enumerate(arguments.rstrip(")").split(", ")):
        if len(indent if i == 0 else "") + len(lines[-1]) + len(argument) > 96 and i:
            lines[-1] = lines[-1].rstrip()
            lines.append(indent)
        lines[-1] += argument + (", " if i < arguments.count(",") else ")")
    return "\n".join(lines)
