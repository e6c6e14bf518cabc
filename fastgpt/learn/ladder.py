"""`fastgpt ladder`: from counting to GPT-2 in twelve steps, each a class that changes one thing in the one before.

Read the classes from top to bottom: what a class does not say, the one above it says. Then let them race:

    fastgpt ladder                     trains all on Python's own help texts and prints what each one reaches
    fastgpt ladder 6 7                 what differs between two rungs, as a diff
    fastgpt ladder --only 3,10 --data FILE --steps 2000

Before you expect too much: on tiny Shakespeare, counts of four bytes beat a GPT of 0.8 million parameters that was
trained for 2000 steps. The third command shows it. What makes attention win is more steps, more context, a larger
model, and above all text that repeats: that is the last column, for which every rung is also trained on strings of
random letters that are each written four times. Counting finds nothing to count there; attention looks back.

Sources: Bengio et al. 2003 "A Neural Probabilistic Language Model" for rung 5, Vaswani et al. 2017 for 6 to 8, Radford
et al. 2019 for 9 to 12. The climb from counts to a transformer follows Karpathy's makemore (2022).
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gpt

from . import experiment

CONFIG = gpt.GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=257)  # as in `fastgpt train`

# ------------------------------------------------------------------------------------------------------- Counting


def nothing(self, *_):
    """What a rung needs not do."""


class Uniform(nn.Module):
    """any byte is as likely as any other"""

    sizes: dict[str, int] = {}  # which of the configuration's sizes a rung changes
    tokenizer = gpt.get_tokenizer("bytes")
    build = initialize = fit = nothing  # layers, their first weights, learning from (tokens, config, title)

    def __init__(self, config, ops):
        super().__init__()
        self.config, self.ops = replace(config, **self.sizes), ops
        self.build()
        self.initialize()

    def forward(self, idx):  # (B, T) -> (B, T, V), log probabilities up to a constant
        return torch.zeros(*idx.shape, self.config.vocab_size)

    def loss(self, idx, targets):
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)


class ByteCounts(Uniform):
    """how often is each byte?"""

    longest = 1  # bytes of the past that are looked at

    def past(self, idx):  # (B, T) -> (B, T), the same number for what counts as the same past
        return torch.zeros_like(idx)

    def fit(self, tokens, config, title):
        self.a, self.table = choose_a(self, tokens), count(tokens, self.past, self.longest)

    def forward(self, idx):
        (pasts, counts), past = self.table, self.past(idx).contiguous()
        row = torch.searchsorted(pasts, past).clamp(max=len(pasts) - 1)
        seen = torch.where((pasts[row] == past)[..., None], counts[row], 0) + self.a  # (B, T, V)
        return torch.log(seen / seen.sum(-1, keepdim=True))


class PairCounts(ByteCounts):
    """which byte follows which?"""

    def past(self, idx):
        return idx


class FourByteCounts(PairCounts):
    """which byte follows which three?"""

    longest = 3

    def past(self, idx):
        idx = F.pad(idx + 1, (2, 0))  # 0 is what stood before the window
        return (idx[:, :-2] * 258 + idx[:, 1:-1]) * 258 + idx[:, 2:]


def count(tokens, past, longest):
    """How often each byte follows each past of 1 to `longest` bytes: pasts (N), ordered, and counts (N, V)."""
    tokens, V = torch.from_numpy(tokens.astype(np.int64)), CONFIG.vocab_size
    windows = [tokens.unfold(0, n + 1, 1) for n in range(1, longest + 1)]  # each (len(tokens) - n, n + 1)
    pasts, following = (torch.cat(x) for x in zip(*((past(x[:, :-1])[:, -1], x[:, -1]) for x in windows), strict=True))
    seen = pasts.bincount() > 0
    cells = (seen.cumsum(0) - 1)[pasts] * V + following  # a row for each past that occurs
    return seen.nonzero()[:, 0], cells.bincount(minlength=int(seen.sum()) * V).view(-1, V).float()


def choose_a(model, tokens):
    """What to add to each count, so that the unseen is not impossible: the best on the last tenth of `tokens`."""
    cut, losses = len(tokens) * 9 // 10, {}
    model.table = count(tokens[:cut], model.past, model.longest)
    for model.a in (1.0, 0.1, 0.01, 0.001):
        losses[model.a] = experiment.val_loss(model, tokens[cut:])
    return min(losses, key=losses.get)


# ------------------------------------------------------------------------------------------------------- Learning


class LearnedPairs(FourByteCounts):
    """pairs again, by gradient descent"""

    def build(self):
        self.wte = nn.Embedding(self.config.vocab_size, self.config.n_embd)

    def initialize(self):
        self.lm_head = nn.Parameter(uniform(self.config.vocab_size, self.config.n_embd))
        plain(self)

    def head(self):  # (V, C)
        return self.lm_head

    def hidden(self, idx):  # (B, T) -> (B, T, C)
        return self.wte(idx)

    def forward(self, idx):
        return self.ops.linear(self.hidden(idx), self.head())

    def loss(self, idx, targets):
        return self.ops.lm_loss(self.hidden(idx), self.head(), targets)

    fit = experiment.train


class LastEight(LearnedPairs):
    """an MLP over the last 8 bytes"""

    def build(self):
        super().build()
        self.fc = gpt.Layer(self.ops.linear, uniform(self.config.n_embd, 8 * self.config.n_embd))

    def hidden(self, idx):
        x = F.pad(self.wte(idx), (0, 0, 7, 0))  # (B, 7 + T, C), zeros before the window
        return torch.tanh(self.fc(x.unfold(1, 8, 1).flatten(2)))  # (B, T, C * 8) -> (B, T, C)


class OneHead(LastEight):
    """one attention head, positions"""

    sizes = dict(n_layer=1, n_head=1)

    def build(self):
        self.wte = nn.Embedding(self.config.vocab_size, self.config.n_embd)
        self.wpe = nn.Embedding(self.config.block_size, self.config.n_embd)
        self.attn = gpt.Attention(self.config, self.ops)

    def hidden(self, idx):
        return self.layers(self.wte(idx) + self.wpe.weight[: idx.shape[1]])

    def layers(self, x):  # (B, T, C) -> (B, T, C)
        return self.attn(x)


class FourHeads(OneHead):
    """four heads"""

    sizes = dict(n_layer=1, n_head=4)


class OneBlock(FourHeads):
    """a block: residuals and an MLP"""

    def build(self):
        super().build()
        self.mlp = gpt.MLP(self.config, self.formulas())

    def formulas(self):
        return experiment.replaced(self.ops, linear_gelu=lambda *args: torch.relu(self.ops.linear(*args)))

    def layers(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class FourBlocks(OneBlock):
    """layer_norm, and so depth"""

    sizes = dict(n_layer=4, n_head=4)

    def build(self):
        self.wte = nn.Embedding(self.config.vocab_size, self.config.n_embd)
        self.wpe = nn.Embedding(self.config.block_size, self.config.n_embd)
        self.h = nn.ModuleList(gpt.Block(self.config, self.formulas()) for _ in range(self.config.n_layer))
        self.ln_f = gpt.Layer(self.ops.layer_norm, torch.ones(self.config.n_embd))

    def layers(self, x):
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT2(FourBlocks):
    """GPT-2: initial values, tied, gelu"""

    def formulas(self):
        return self.ops

    def initialize(self):  # the blocks have theirs: gpt.normal
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def head(self):
        return self.wte.weight


class LargerGPT2(GPT2):
    """more layers, channels, context"""

    sizes = dict(n_layer=6, n_head=6, n_embd=192, block_size=128)


class Pretrained(LargerGPT2):
    """weights that others paid for"""

    sizes: dict[str, int] = {}
    fit = nothing

    @classmethod
    def load(cls, path, ops):
        model = gpt.GPT.from_pretrained(path, ops)
        rung = cls(model.config, model.ops)
        rung.load_state_dict(model.state_dict())
        rung.tokenizer = gpt.get_tokenizer(model.tokenizer or "gpt2")
        return rung


def uniform(n_out, n_in):
    """The weights that torch's own nn.Linear begins with."""
    return torch.empty(n_out, n_in).uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in))


def plain(model):
    """Begin as torch's own layers do, instead of as GPT-2: N(0, 1) for embeddings, `uniform` for other matrices."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, gpt.Layer) and module.weight.dim() == 2:
            module.weight.data = uniform(*module.weight.shape)


RUNGS = (Uniform, ByteCounts, PairCounts, FourByteCounts, LearnedPairs, LastEight, OneHead, FourHeads, OneBlock)
RUNGS += (FourBlocks, GPT2, LargerGPT2, Pretrained)  # type: ignore[assignment]


def main(argv=None):
    """The command line, in climb.py: it trains the rungs and prints what each one reaches."""
    from . import climb

    climb.main(argv)
