"""`fastgpt ablate`: break GPT-2 in twenty ways, mend it in some, and find out which differences are real.

A variant is a function (config, ops) -> model of some lines, with what the literature found beside it. To add your own,
write one below under @variant: gpt.py's modules are the parts, and `replaced(ops, ...)` exchanges a formula. Whatever
keeps the five formulas runs on the kernels.

Each variant is trained with several seeds. The same seed gives the same batches and, where the layers are the same, the
same first weights, so its loss minus GPT-2's is a paired difference: what both have in common cancels out. The interval
around their mean is Student's, at 95 %. A difference is real to us if it does not hold zero, and if the difference is
larger than that of `same`, which is GPT-2 from other first weights: the noise floor, measured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import gpt

from . import ladder
from .experiment import replaced


@dataclass
class Variant:
    name: str
    build: Callable  # (config, ops) -> model
    found: str  # in the literature
    source: str
    options: dict  # of gpt.TrainConfig, where they are other than GPT-2's


VARIANTS: dict[str, Variant] = {}


def variant(name, found, source, **options):
    """Enter a function into the registry."""

    def enter(build):
        VARIANTS[name] = Variant(name, build, found, source, options)
        return build

    return enter


@variant("gpt2", "", "Radford et al. 2019")
def gpt2(config, ops):
    """what all others are compared with"""
    return gpt.GPT(config, ops)


@variant("same", "", "what equals differ by, here")
def same(config, ops):
    """GPT-2 again, from other first weights: a difference of this size means nothing"""
    torch.rand(1)  # the generator is one number further
    return gpt.GPT(config, ops)


# ------------------------------------------------------------------------------------------------------ Positions


@variant("rope", "27.5 BLEU against 27.3 with sinusoids, translation", "Su et al. 2021 (RoFormer)")
def rope(config, ops):
    """rotary: queries and keys turn by an angle that grows with the position; nothing is added"""
    D = config.n_embd // config.n_head
    gpt.expect(D % 2 == 0, f"rope: n_embd / n_head is {D}, expected an even number: two channels turn together")
    turns = torch.exp(1j * torch.outer(torch.arange(config.block_size), 10000.0 ** (-torch.arange(0, D, 2) / D)))

    def turn(x):  # (B, H, T, D): two channels are a point in the plane; turns is (T, D / 2)
        points = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(points * turns[: x.shape[2]]).flatten(-2)

    def attention(qkv, n_head, dropout=0.0, seed=0):
        q, k, v = gpt.split_heads(qkv, n_head)
        return ops.attention(torch.cat([gpt.merge_heads(x) for x in (turn(q), turn(k), v)], -1), n_head)

    return no_positions(config, replaced(ops, attention=attention))


@variant("alibi", "trained at 1024, as good at 2048 as sinusoids trained there", "Press et al. 2021 (ALiBi)")
def alibi(config, ops):
    """a score falls with the distance of its key, in each head at another rate"""
    distance = torch.arange(config.block_size)[None, :] - torch.arange(config.block_size)[:, None]
    slopes = 2.0 ** (-8 * torch.arange(1, config.n_head + 1) / config.n_head)
    bias = (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)  # (H, T, T)

    def attention(qkv, n_head, dropout=0.0, seed=0):
        q, k, v = gpt.split_heads(qkv, n_head)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias[:, : q.shape[2], : q.shape[2]]
        return gpt.merge_heads(torch.softmax(scores, -1) @ v)

    return no_positions(config, replaced(ops, attention=attention))


@variant("sinusoids", "25.7 BLEU with learned positions, 25.8 with sinusoids", "Vaswani et al. 2017, table 3")
def sinusoids(config, ops):
    """positions are sines and cosines, not learned; as large as wpe's first values"""
    model, C = gpt.GPT(config, ops), config.n_embd
    angles = torch.outer(torch.arange(config.block_size), 10000.0 ** (-torch.arange(0, C, 2) / C))
    table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :C]  # its mean square is 1 / 2
    model.wpe.weight = nn.Parameter(0.02 * math.sqrt(2) * table, requires_grad=False)
    return model


@variant("no-positions", "competitive: a causal model finds out where it is", "Haviv et al. 2022")
def no_positions(config, ops):
    """the mask alone tells the first byte from the tenth"""
    model = gpt.GPT(config, ops)
    model.wpe.weight = nn.Parameter(torch.zeros_like(model.wpe.weight), requires_grad=False)
    return model


# -------------------------------------------------------------------------------------------------- Normalization


@variant("rmsnorm", "as good as layer_norm, 7 to 64 % faster", "Zhang and Sennrich 2019")
def rmsnorm(config, ops):
    """divide by the root of the mean square; no mean, no bias"""

    def rms_norm(x, weight, bias, eps=1e-5):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    model = gpt.GPT(config, replaced(ops, layer_norm=rms_norm))
    for layer in model.modules():
        if getattr(layer, "formula", None) is rms_norm:
            layer.bias = None
    return model


@variant("no-norm", "possible, even 10,000 layers, with other initial values", "Zhang et al. 2019 (Fixup), images")
def no_norm(config, ops):
    """leave every layer_norm out"""
    model = gpt.GPT(config, ops)
    for block in model.h:
        block.ln_1 = block.ln_2 = nn.Identity()
    model.ln_f = nn.Identity()
    return model


@variant("post-norm", "needs warm-up: large gradients near the output at first", "Xiong et al. 2020")
def post_norm(config, ops):
    """normalize the residual stream itself, as the first transformer did"""

    def forward(block, x):
        x = block.ln_1(x + block.attn(x))
        return block.ln_2(x + block.mlp(x))

    model = with_blocks(gpt.GPT(config, ops), forward)
    model.ln_f = nn.Identity()
    return model


# ------------------------------------------------------------------------------------------------------------ MLP


@variant("swiglu", "log-perplexity 1.636 against gelu's 1.679", "Shazeer 2020, T5")
def swiglu(config, ops):
    """gelu(linear) becomes silu(linear) * linear; 8/3 C wide, so that the parameters are as many"""
    model, C, width = gpt.GPT(config, ops), config.n_embd, round(8 * config.n_embd / 3)

    def forward(mlp, x):
        gate, value = mlp.c_fc(x).chunk(2, -1)
        return mlp.c_proj(nn.functional.silu(gate) * value)

    for block in model.h:
        block.mlp.c_fc = gpt.Layer(ops.linear, gpt.normal(2 * width, C))
        block.mlp.c_proj = gpt.Layer(ops.linear, gpt.normal(C, width, 2 * config.n_layer))
        block.mlp.forward = partial(forward, block.mlp)
    return model


@variant("relu", "log-perplexity 1.677 against gelu's 1.679", "Shazeer 2020, T5")
def relu(config, ops):
    """max(x, 0) in gelu's place"""
    return gpt.GPT(config, replaced(ops, gelu=torch.relu))


@variant("relu-squared", "one of two changes that make up most of Primer's gain", "So et al. 2021 (Primer)")
def relu_squared(config, ops):
    """max(x, 0) ** 2 in gelu's place"""
    return gpt.GPT(config, replaced(ops, gelu=lambda x: torch.relu(x).square()))


@variant("no-mlp", "two thirds of all parameters, which work like a memory", "Geva et al. 2021; no ablation")
def no_mlp(config, ops):
    """positions exchange information, and none thinks for itself"""
    model = with_blocks(gpt.GPT(config, ops), lambda block, x: x + block.attn(block.ln_1(x)))
    for block in model.h:
        del block.ln_2, block.mlp
    return model


# ------------------------------------------------------------------------------------------- Attention, residuals


@variant("no-attention", "a letter after one letter: 3.32 bits", "Shannon 1951, English in 27 letters")
def no_attention(config, ops):
    """each position thinks for itself, of itself"""
    model = with_blocks(gpt.GPT(config, ops), lambda block, x: x + block.mlp(block.ln_2(x)))
    for block in model.h:
        del block.ln_1, block.attn
    return model


@variant("one-head", "0.9 BLEU worse than the best number of heads", "Vaswani et al. 2017, table 3")
def one_head(config, ops):
    """as many channels, but one softmax for all of them"""
    return gpt.GPT(replace(config, n_head=1), ops)


@variant("no-scale", "large scores would leave softmax tiny gradients", "Vaswani et al. 2017; their reason, no figure")
def no_scale(config, ops):
    """scores as they are: queries longer by sqrt(D) undo the division"""
    C = config.n_embd
    scale = torch.ones(3 * C)
    scale[:C] = math.sqrt(C // config.n_head)
    return gpt.GPT(config, replaced(ops, attention=lambda qkv, n_head, *dropout: ops.attention(qkv * scale, n_head)))


@variant("no-residual", "34 layers are worse than 18, with residuals better", "He et al. 2016, images")
def no_residual(config, ops):
    """each layer hands on its own output alone"""
    return with_blocks(gpt.GPT(config, ops), lambda block, x: block.mlp(block.ln_2(block.attn(block.ln_1(x)))))


@variant("no-mask", "would let each word see itself, so BERT hides its targets", "Devlin et al. 2019")
def no_mask(config, ops):
    """every position sees the whole window, the byte that it is to predict too"""

    def attention(qkv, n_head, dropout=0.0, seed=0):
        q, k, v = gpt.split_heads(qkv, n_head)
        return gpt.merge_heads(nn.functional.scaled_dot_product_attention(q, k, v))

    return gpt.GPT(config, replaced(ops, attention=attention))


# ------------------------------------------------------------------------------- Output, initial values, training


@variant("untied", "tying improves small models and saves parameters", "Press and Wolf 2017, LSTMs")
class Untied(gpt.GPT):
    """the output has weights of its own"""

    def __init__(self, config, ops):
        super().__init__(config, ops)
        self.head = nn.Parameter(gpt.normal(config.vocab_size, config.n_embd))

    def forward(self, idx):
        return self.ops.linear(self.hidden(idx), self.head)

    def loss(self, idx, targets):
        return self.ops.lm_loss(self.hidden(idx), self.head, targets)


@variant("plain-init", "GPT-2's values are given without a comparison", "Radford et al. 2019")
def plain_init(config, ops):
    """begin as torch's own layers do: N(0, 1) for embeddings, a uniform distribution for matrices"""
    model = gpt.GPT(config, ops)
    ladder.plain(model)
    return model


@variant("no-warm-up", "not needed where the layer_norm comes first", "Xiong et al. 2020", warmup=0)
def no_warm_up(config, ops):
    """the highest learning rate from the first step on"""
    return gpt.GPT(config, ops)


@variant("no-lr-decay", "a cosine more than 25 % too long costs", "Hoffmann et al. 2022", steps=10**9)
def no_lr_decay(config, ops):
    """the highest learning rate to the last step: the cosine is too long to come down"""
    return gpt.GPT(config, ops)


@variant(
    "no-weight-decay",
    "decay apart from the gradient generalizes better",
    "Loshchilov and Hutter 2019, images",
    weight_decay=0.0,
)
def no_weight_decay(config, ops):
    """AdamW without its W"""
    return gpt.GPT(config, ops)


def with_blocks(model, forward):
    """The model with another way through its blocks: forward(block, x), (B, T, C) -> (B, T, C)."""
    for block in model.h:
        block.forward = partial(lambda block, x, cache=None: forward(block, x), block)
    return model


def main(argv=None):
    """The command line, in trials.py: it trains the variants and prints which differences are real."""
    from . import trials

    trials.main(argv)
