"""`fastgpt cost`: know before you pay. Parameters, flops, bytes, hours and money of a GPT, by arithmetic alone.

Every figure follows from the inputs that the report shows, and every input is an option. The counts are exact for
GPT-2's architecture: the tests hold them against torch's own flop counter, against the tensors that autograd really
saves, and against some forty published figures. Times are estimates; `--measure` puts ten real steps beside them.

Any other model is known by its number of parameters alone: 2 N flops a token forward, 4 N backward (Kaplan et al.
2020, "Scaling Laws for Neural Language Models"). So are LLaMA's, whose parts are not GPT-2's.
"""

import argparse
import json
import math
import os
import statistics
import textwrap
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch

import gpt

from .. import bench, ops

# ------------------------------------------------------------------------------------------------------ models


@dataclass
class Model:
    """What the arithmetic needs to know of a model. Zeros stand for what is not known."""

    name: str
    parameters: float  # N
    n_layer: int = 0
    n_head: int = 0
    n_embd: int = 0  # C
    block_size: int = 0
    tokens: float | None = None  # it was trained on, where that is published
    weights: bool = False  # can they be had?
    config: gpt.GPTConfig | None = None  # GPT-2's architecture, so that all is known

    @property
    def shaped(self):
        """Is enough known to count attention?"""
        return bool(self.n_layer and self.n_embd and self.block_size)

    @property
    def in_products(self):
        """How many parameters a token meets in a matrix product: no bias, layer_norm or position."""
        c = self.config
        return 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd if c else self.parameters


def gpt2_like(name, config, **about):
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    return Model(name, sum(count_parameters(config).values()), **shape, config=config, **about)


def count_parameters(config):
    """Part by part; their sum is N."""
    C = config.n_embd
    return dict(
        wte=config.vocab_size * C,  # reads a token, and predicts one: the output has no weights of its own
        wpe=config.block_size * C,
        blocks=config.n_layer * (12 * C * C + 13 * C),  # c_attn 3 C^2, c_proj C^2, c_fc and c_proj 4 C^2 each
        ln_f=2 * C,
    )


def known_models():
    """The models that have a name here. Tokens as their papers say; OpenAI never published GPT-2's."""
    gpt3 = gpt.GPTConfig(n_layer=96, n_head=96, n_embd=12288, block_size=2048)  # Brown et al. 2020, table 2.1
    llama = dict(block_size=2048, weights=True)  # Touvron et al. 2023, table 2: N, sizes, tokens
    models = [gpt2_like(name, config, weights=True) for name, config in gpt.SIZES.items()]
    models.append(gpt2_like("gpt3", gpt3, tokens=300e9))
    models.append(Model("llama-7b", 6.7e9, 32, 32, 4096, tokens=1.0e12, **llama))
    models.append(Model("llama-65b", 65.2e9, 80, 64, 8192, tokens=1.4e12, **llama))
    return {model.name: model for model in models}


def choose_model(options):
    """The model that the command line means: a name, a folder, N, or what `fastgpt train` trains."""
    sizes = {f.name: f for f in fields(gpt.GPTConfig)}
    typed = {key: value for key, value in vars(options).items() if key in sizes and value is not None}
    if options.parameters:
        expect(options.model is None, f"--parameters and {options.model!r} are two models, expected one")
        typed.pop("vocab_size", None)
        return Model("the model", options.parameters, **typed)
    known = known_models()
    if options.model is None:
        train = gpt.TrainConfig()
        train = {key: getattr(train, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
        name = "the small model" if not typed else "the model"
        return gpt2_like(name, gpt.GPTConfig(**train | dict(vocab_size=257) | typed))
    if os.path.isdir(options.model):
        model = gpt2_like(options.model, gpt.GPT.from_pretrained(options.model).config, weights=True)
    else:
        expect(options.model in known, f"model is {options.model!r}, expected a folder or one of {', '.join(known)}")
        model = known[options.model]
    if not typed:
        return model
    expect(model.config, f"{model.name} is known by its number of parameters alone: no size of it can change")
    return gpt2_like(f"{model.name} with other sizes", replace(model.config, **typed))


def expect(good, message):
    if not good:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------------- flops

COUNTS = {
    "square": "attention's full square: how published utilisations are reckoned (PaLM, nanoGPT)",
    "causal": "its causal half alone: what the kernels compute",
    "6N": "6 N, the rule of thumb: no attention, every parameter",
}


def flops(model, count):
    """Flops of one token's forward, the mean over a window. The backward takes twice as many.

    A multiply-add is two. Only matrix products count: each weight once, and in attention two products (the scores, the
    sum of values) of C for each key. Backward: a product has two gradients, each a product of the same size.
    """
    if count == "6N":
        return 2 * model.parameters
    T = model.block_size
    keys = T if count == "square" else (T + 1) / 2
    return 2 * model.in_products + 4 * model.n_layer * model.n_embd * keys


def training_flops(model, tokens, count):
    """Forward and backward. Without a known shape there is no attention to count."""
    return tokens * 3 * flops(model, count if model.shaped else "6N")


# ------------------------------------------------------------------------------------------------------- bytes

BYTES = {  # of a parameter: weight, gradient, optimizer
    "float32": (4, 4, 8),  # AdamW's two moments
    "mixed": (2, 2, 12),  # 16 bits, with a float32 copy beside the moments (Rajbhandari et al. 2020, "ZeRO")
}


def saved(config, B, T):
    """Bytes saved for the backward, op by op: {op: (by the kernels, by gpt.py's formulas)}. float32, no dropout.

    A tensor that two ops save is counted where it is first. ops.py says what a kernel saves; for a formula it is what
    autograd needs of each step: a product both operands, a square its input, a root, tanh or softmax its result.
    """
    C, H, V, n = config.n_embd, config.n_head, config.vocab_size, B * T
    x = 4 * n * C  # bytes of a (B, T, C) tensor
    norm = x + 4 * 2 * n, 2 * x + 4 * n  # x, mean, 1/deviation; centered, normalized, deviation
    block = {
        "ln_1": norm,
        "attn.c_attn": (x, x),
        "attention": (4 * x + 4 * 2 * n * H, 3 * x + 4 * n * H * T + T * T),  # qkv, out, 2 a row; q, k, v, probs, mask
        "attn.c_proj": (0, x),  # its input is attention's out
        "ln_2": norm,
        "mlp.c_fc": (x, x),
        "gelu": (4 * x, 4 * 4 * x),  # its input; and tanh, x / 2, 1 + tanh
        "mlp.c_proj": (4 * x, 4 * x),
    }
    ends = {
        "wte": (8 * n, 8 * n),  # the tokens, int64
        "ln_f": norm,
        "lm_loss": (x + 4 * V * C, x + 4 * n * V + 13 * n + 8),  # both gradients; hidden, logits, logsumexp, targets
    }
    return {op: (config.n_layer * ours, config.n_layer * eager) for op, (ours, eager) in block.items()} | ends


def memory(model, B, precision):
    """Bytes of each kind, for a batch of B windows."""
    weight, gradient, optimizer = BYTES[precision]
    N, C, L = model.parameters, model.n_embd, model.n_layer
    result = dict(weights=weight * N, gradients=gradient * N, optimizer=optimizer * N)
    if C and L:
        result["kv_token"] = 2 * L * C * weight  # a key and a value in every layer
        result["kv_window"] = result["kv_token"] * model.block_size
    if model.config:
        table = saved(model.config, B, model.block_size)
        result["saved_kernels"], result["saved_formulas"] = (
            sum(column) for column in zip(*table.values(), strict=True)
        )
    return result


# ---------------------------------------------------------------------------------------------- time and money


@dataclass
class Accelerator:
    """Peak of dense products in 16 bits, its memory; what share of the peak and at what price, each (low, high)."""

    tflops: float
    gbs: float  # bytes read from its memory, 10^9 a second
    gigabytes: float
    utilisation: tuple
    price: tuple | None  # dollars an hour for one
    source: str


GUESS = (0.3, 0.5)  # no figure at hand of a GPT's training on it
ACCELERATORS = {
    "V100": Accelerator(
        125, 900, 32, (0.20, 0.30), (1.50, 3.06),
        "NVIDIA's datasheet (SXM2). Lambda 2020 reckons with 28 TFLOP/s, 22 %, at $1.50 reserved for three years; "
        "AWS p3 was $3.06 on demand",
    ),
    "A100": Accelerator(
        312, 2039, 80, (0.30, 0.60), (1.29, 1.75),
        "NVIDIA's datasheet (SXM, 80 GB). nanoGPT's notebook 30-37 %, llm.c up to 60 %; llm.c 2024: $1.29 for one, "
        "$14 for eight",
    ),
    "H100": Accelerator(
        989, 3350, 80, (0.40, 0.50), (3.00, 3.50),
        "NVIDIA's datasheet (SXM; its 1,979 are with sparsity). Llama 3 38-43 %, llm.c about 50 %; eight for $24 "
        "(nanochat 2026) and $28 (llm.c 2024)",
    ),
    "H200": Accelerator(989, 4800, 141, GUESS, None, "NVIDIA's datasheet (SXM, without sparsity)"),
    "B200": Accelerator(2250, 7700, 180, GUESS, None, "NVIDIA's datasheet (HGX, without sparsity)"),
    "T4": Accelerator(65, 320, 16, GUESS, None, "NVIDIA's datasheet"),
    "RTX4090": Accelerator(165.2, 1008, 24, GUESS, None, "NVIDIA's Ada white paper (float32 sums, without sparsity)"),
    "TPUv3": Accelerator(123, 900, 32, GUESS, (8, 8), "Google Cloud's documentation, a chip; nanochat: $8 in 2019"),
    "TPUv4": Accelerator(275, 1200, 32, (0.46, 0.46), None, "Google Cloud's documentation, a chip; PaLM 46.2 %"),
}  # fmt: skip


def accelerator(name, options):
    """As listed, with what was typed on top; with --peak, one that is not listed."""
    if name not in ACCELERATORS:
        expect(options.peak, f"--accelerator is {name!r}, expected one of {', '.join(ACCELERATORS)}, or its --peak")
    a = ACCELERATORS.get(name) or Accelerator(options.peak, 0, 0, GUESS, None, "as typed")
    typed = dict(tflops=options.peak, utilisation=options.utilisation, price=options.price)
    return replace(a, **{key: value for key, value in typed.items() if value})


def train_there(name, work, options, hours=None):
    """Seconds and dollars for so many flops on an accelerator, each from the best case to the worst."""
    a = accelerator(name, options)
    rate = a.tflops * 1e12 * options.count
    if hours:
        used, seconds = (work / (hours * 3600) / rate,) * 2, (hours * 3600,) * 2
    else:
        used, seconds = a.utilisation, (work / rate / a.utilisation[1], work / rate / a.utilisation[0])
    source = a.source + ("; 30-50 % is a guess" if used == GUESS and not options.utilisation else "")
    row = dict(machine=name, count=options.count, tflops=a.tflops, gigabytes=a.gigabytes, utilisation=used)
    return row | dict(seconds=seconds, price=a.price, money=pay(seconds, options.count, a.price), source=source)


def train_here(model, tokens, options, limits, measured=None):
    """On this machine: its multiply-adds a second, as just measured, times the share that training reaches of them."""
    work, rate = training_flops(model, tokens, "causal"), limits["gflops"] * 1e9
    used, seconds = options.share, (work / rate / options.share[1], work / rate / options.share[0])
    if measured:
        seconds = (tokens / measured["tokens_per_second"],) * 2
        used = (work / seconds[0] / rate,) * 2
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    row = dict(machine="here", count=1, tflops=rate / 1e12, gigabytes=gigabytes, utilisation=used)
    return row | dict(seconds=seconds, price=options.price_here, money=pay(seconds, 1, options.price_here))


def pay(seconds, count, price):
    return price and tuple(s / 3600 * count * p for s, p in zip(seconds, price, strict=True))


def write_there(model, options, gbs, weight, price, count):
    """Token after token, each of which reads all the weights once: seconds and dollars at best."""
    seconds = (options.write * weight * model.parameters / (gbs * 1e9 * count),) * 2
    return dict(seconds=seconds, money=pay(seconds, count, price))


def ways(model, options, limits, measured):
    """From scratch, by fine-tuning, or as it is: for each the tokens, the time here and on one accelerator."""
    name = options.accelerator[-1]
    ready = model if model.weights else known_models()["gpt2"]
    rows = []
    for way, subject, tokens in (("scratch", model, options.tokens), ("tune", ready, options.tune)):
        here = train_here(subject, tokens, options, limits, measured if subject is model else None)
        there = train_there(name, training_flops(subject, tokens, options.flops), options)
        rows.append(dict(way=way, model=subject.name, tokens=tokens, here=here, there=there))
    a, weight = accelerator(name, options), BYTES[options.precision][0]
    here = write_there(ready, options, limits["gbs"], weight, options.price_here, 1)
    there = write_there(ready, options, a.gbs, 2, a.price, options.count) if a.gbs else None  # in 16 bits
    return [*rows, dict(way="use", model=ready.name, tokens=options.write, here=here, there=there)]


# -------------------------------------------------------------------------------------------------- Chinchilla

FITS = {  # L(N, D) = E + A / N^alpha + B / D^beta, in nats a token
    "Hoffmann et al. 2022 (Chinchilla), approach 3": dict(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "Besiroglu et al. 2024, its correction": dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}
FITTED = (70e6, 16e9, 5e9, 500e9)  # their smallest and largest N, smallest and largest D


def fitted_loss(fit, N, D):
    return fit["E"] + fit["A"] / N ** fit["alpha"] + fit["B"] / D ** fit["beta"]


def optimum(fit, work):
    """(N, D) of the lowest loss that the fit has for so many flops, where flops = 6 N D."""
    a, b = fit["alpha"], fit["beta"]
    N = (a * fit["A"] / (b * fit["B"])) ** (1 / (a + b)) * (work / 6) ** (b / (a + b))
    return N, work / 6 / N


def chinchilla(model, D):
    """What each fit says of this N and D, and of the best use of the same flops."""
    N = model.parameters
    rows = []
    for name, fit in FITS.items():
        best = optimum(fit, 6 * N * D)
        row = dict(fit=name, loss=fitted_loss(fit, N, D), best=best, best_loss=fitted_loss(fit, *best))
        rows.append(row)
    inside = FITTED[0] <= N <= FITTED[1] and FITTED[2] <= D <= FITTED[3]
    return dict(inside=inside, rows=rows)


# ------------------------------------------------------------------------------------------------ this machine

STEPS = 10


def saved_bytes(model, idx, targets):
    """Bytes of all that autograd keeps between forward and backward, each once, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x  # held, so that no other takes its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.loss(idx, targets)
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in parameters)


def measure(model, options):
    """Train ten steps on random tokens, on the kernels. -> what was predicted, as it came out"""
    config, B, T = model.config, options.batch_size, model.block_size
    expect(config, f"--measure: {model.name} has not GPT-2's architecture, expected one that can be trained here")
    sizes = memory(model, B, "float32")
    need = sum(sizes[key] for key in ("weights", "gradients", "optimizer", "saved_kernels"))
    have = free_memory()
    expect(need < have, f"--measure: ten steps need {need / 1e9:,.1f} GB, this machine has {have / 1e9:,.1f} GB free")
    bench.keep_memory()
    torch.manual_seed(0)
    network = gpt.GPT(config, ops)
    train = gpt.TrainConfig(batch_size=B, accumulate=options.accumulate)
    optimizer = gpt.make_optimizer(network, train.lr, train.beta2, train.weight_decay)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=T + 10_000)
    idx, targets = (x.clone() for x in gpt.random_batch(tokens, B, T, torch.Generator().manual_seed(0)))
    times = []
    for step in range(STEPS + 2):  # the first two find memory and caches cold
        gpt.progress(f"step {step + 1} of {STEPS + 2}")
        start = time.perf_counter()
        gpt.train_step(network, optimizer, tokens, step, train)
        times.append(time.perf_counter() - start)
    gpt.progress("")
    low, middle, high = statistics.quantiles(times[2:], n=4)
    result = dict(seconds=middle, spread=(high - low) / 2 / middle)
    result["tokens_per_second"] = B * T * options.accumulate / middle
    result["parameters"] = sum(p.numel() for p in network.parameters())
    result["saved_kernels"] = saved_bytes(network, idx, targets)
    if need + sizes["saved_formulas"] < have:
        formulas = gpt.GPT(config)
        formulas.load_state_dict(network.state_dict())
        result["saved_formulas"] = saved_bytes(formulas, idx, targets)
    return result


def free_memory():
    """Bytes that a new program can have."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def estimate(options):
    """All that the report shows, as a dictionary. Tokens that were not typed are filled in."""
    model = choose_model(options)
    options = argparse.Namespace(**vars(options))
    options.tokens, why = tokens_to_train_on(model, options)
    limits = bench.limits()
    measured = measure(model, options) if options.measure else None
    work = training_flops(model, options.tokens, options.flops)
    rows = [train_here(model, options.tokens, options, limits, measured)]
    rows += [train_there(name, work, options, options.hours) for name in options.accelerator]
    sizes = memory(model, options.batch_size, options.precision)
    held = sum(sizes[key] for key in ("weights", "gradients", "optimizer")) / 1e9
    for row in rows:
        row["least"] = math.ceil(held / row["gigabytes"]) if row["gigabytes"] else None
    return dict(
        about=bench.about(),
        inputs=vars(options) | dict(tokens_are=why),
        model=asdict(model),
        parameters=count_parameters(model.config) if model.config else {},
        flops={count: flops(model, count) for count in (COUNTS if model.shaped else ["6N"])},
        work=work,
        counted=options.flops if model.shaped else "6N",
        bytes=sizes,
        limits=limits,
        predicted=predict(model, options, limits) if measured else None,
        measured=measured,
        training=rows,
        ways=ways(model, options, limits, measured),
        chinchilla=chinchilla(model, options.tokens),
    )


def tokens_to_train_on(model, options):
    """How many, and why so many."""
    if options.tokens:
        return options.tokens, "--tokens"
    if model.tokens and not options.steps:
        return model.tokens, "as published"
    if options.steps or not (options.model or options.parameters):
        steps, T = options.steps or gpt.TrainConfig.steps, model.block_size
        windows = options.batch_size * options.accumulate
        expect(T, "--steps needs a --block-size to be so many tokens")
        return steps * windows * T, f"fastgpt train: {steps} steps of {windows} windows of {T}"
    return 20 * model.parameters, "20 a parameter, the rule of Hoffmann et al. 2022"


def predict(model, options, limits):
    """What `measure` will find, reckoned before."""
    sizes = memory(model, options.batch_size, "float32")
    tokens = options.batch_size * options.accumulate * model.block_size
    seconds = train_here(model, tokens, options, limits)["seconds"][0]
    result = dict(parameters=model.parameters, seconds=seconds, tokens_per_second=tokens / seconds)
    return result | {key: sizes[key] for key in ("saved_kernels", "saved_formulas")}


# ------------------------------------------------------------------------------------------------------ report


def digits(x):
    """Three that count."""
    return f"{x:,.0f}" if x >= 99.95 else f"{x:#.3g}"


def in_units(low, high, units):
    """Two numbers in the unit that suits the larger, "1.20-3.40 hours", or one if they are equal."""
    low, high = sorted((low, high))
    scale, unit = next((pair for pair in units if high >= pair[0]), units[-1])
    numbers = "-".join(dict.fromkeys(digits(x / scale) for x in (low, high)))
    return f"{numbers} {unit}".strip()


TIMES = ((365 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "min"), (1, "s"))
AMOUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1, ""))
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))


def duration(seconds):
    return in_units(*seconds, TIMES) if max(seconds) >= 1 else "under 1 s"


def amount(x):
    return in_units(x, x, AMOUNTS)


def size(x):
    return in_units(x, x, SIZES)


def dollars(pair):
    if pair is None:
        return "-"
    if max(pair) < 0.01:
        return "under 1 cent"
    if max(pair) < 1:
        return "$" + "-".join(dict.fromkeys(f"{x:.2f}" for x in pair))
    return "$" + in_units(*pair, ((1e6, "M"), (1e3, "k"), (1, "")))


def percent(pair):
    return "-".join(dict.fromkeys(f"{100 * x:.0f}" if x >= 0.095 else digits(100 * x) for x in pair)) + " %"


def report(results):
    """The report's paragraphs, each a list of lines."""
    parts = (about_model, about_flops, about_bytes, about_steps, about_training, about_ways, about_loss)
    texts = [[line for text in part(results) for line in wrapped(text)] for part in parts]
    return [lines for lines in texts if lines]


def wrapped(text):
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(text, 100, subsequent_indent=indent) if len(text) > 100 else [text]


def about_model(results):
    model, config = results["model"], results["model"]["config"]
    words = dict(n_layer="layers", n_head="heads", n_embd="channels (C)", block_size="positions (T)")
    shape = [f"{model[key]:,} {word}" for key, word in words.items() if model[key]]
    if config:
        shape.append(f"a vocabulary of {config['vocab_size']:,} (V)")
    yield f"{model['name']}: {', '.join(shape)}" if shape else model["name"]
    yield ""
    yield f"{'parameters (N)':<54}{model['parameters']:>22,.0f}"
    if not config:
        yield "  as stated; how they are spread over its parts is not known here"
        return
    C, L = config["n_embd"], config["n_layer"]
    titles = dict(wte="wte: V C, reads a token and predicts the next", wpe="wpe: T C, positions")
    titles |= dict(blocks=f"{L} x (12 C^2 + 13 C), {12 * C * C + 13 * C:,} a block", ln_f="ln_f: 2 C")
    for part, n in results["parameters"].items():
        yield f"  {titles[part]:<52}{n:>22,}{100 * n / model['parameters']:>8.1f} %"


def about_flops(results):
    yield f"{'flops a token':<32}{'forward':>22}{'backward':>22}{'both':>22}"
    titles = dict(square="attention's full square", causal="its causal half", **{"6N": "6 N, the rule of thumb"})
    for count, n in results["flops"].items():
        yield f"  {titles[count]:<30}{n:>22,.0f}{2 * n:>22,.0f}{3 * n:>22,.0f}"


def about_bytes(results):
    options, model = results["inputs"], results["model"]
    T = model["block_size"]
    yield f"bytes, {options['precision']}"
    titles = dict(
        weights="weights",
        gradients="gradients",
        optimizer="AdamW's two moments" + (" and float32 weights" if options["precision"] == "mixed" else ""),
        saved_kernels=f"saved for the backward, batch of {options['batch_size']}: kernels",
        saved_formulas="the same by gpt.py's formulas",
        kv_token="keys and values of a token",
        kv_window=f"keys and values of a window of {T:,}",
    )
    for key, title in titles.items():
        if key in results["bytes"]:
            n = results["bytes"][key]
            yield f"  {title:<52}{n:>22,.0f}{size(n):>12}"


def about_steps(results):
    predicted, measured = results["predicted"], results["measured"]
    if not measured:
        return
    yield f"{f'{STEPS} steps here, on the kernels':<54}{'predicted':>22}{'measured':>22}"
    titles = dict(parameters="parameters", saved_kernels="bytes saved for the backward: kernels")
    titles |= dict(saved_formulas="bytes saved for the backward: formulas", tokens_per_second="tokens a second")
    for key, title in titles.items():
        found = f"{measured[key]:,.0f}" if key in measured else "too large"
        yield f"  {title:<52}{predicted[key]:>22,.0f}{found:>22}"
    times = [f"{1e3 * predicted['seconds']:,.1f} ms", f"{1e3 * measured['seconds']:,.1f} ms ±{measured['spread']:.0%}"]
    yield f"  {'a step':<52}{times[0]:>22}{times[1]:>22}"


def about_training(results):
    options, about = results["inputs"], results["about"]
    yield f"training from scratch on {amount(options['tokens'])} tokens ({options['tokens_are']})"
    yield f"{results['work']:.3g} flops, by {COUNTS[results['counted']]}"
    yield ""
    yield f"  {'machine':<9}{'count':>7}{'least':>9}{'TFLOP/s':>9}{'used':>9}{'$/hour':>12}{'time':>20}{'money':>20}"
    for row in results["training"]:
        price = "-" if row["price"] is None else in_units(*row["price"], ((1, ""),))
        texts = f"{row['machine']:<9}{row['count']:>7,}{row['least'] or '-':>9}{digits(row['tflops']):>9}"
        texts += f"{percent(row['utilisation']):>9}{price:>12}"
        yield f"  {texts}{duration(row['seconds']):>20}{dollars(row['money']):>20}"
    if any(row["utilisation"][1] > 1 for row in results["training"]):
        yield "  More than 100 % used: nothing can be so fast. Fewer tokens, more hours or a higher --count."
    yield ""
    yield "  least: how many hold weights, gradients and AdamW's moments. used: of the peak, by large models;"
    yield "    a small one, or small batches, may reach a tenth of that. Times and money from best to worst."
    here = f"here: {about['cpu']}, {about['isa']}, {about['threads']} threads; its multiply-adds measured now, "
    here += "the share as ten steps gave it" if results["measured"] else "the share a guess: --measure finds it"
    yield f"  {here}"
    yield from (f"  {row['machine']}: {row['source']}" for row in results["training"][1:])


def about_ways(results):
    first = results["ways"][0]["there"]
    machine = f"{first['count']:,} {first['machine']}"
    yield f"{'three ways to a model':<38}{'tokens':>10}{'here':>14}{machine:>20}{'money':>16}"
    titles = dict(scratch="train {} from scratch", tune="fine-tune {}", use="use {} as it is, to write")
    for row in results["ways"]:
        title, here, there = titles[row["way"]].format(row["model"]), duration(row["here"]["seconds"]), row["there"]
        texts = (duration(there["seconds"]), dollars(there["money"])) if there else ("-", "-")
        yield f"  {title:<36}{amount(row['tokens']):>10}{here:>14}{texts[0]:>20}{texts[1]:>16}"
    if results["ways"][1]["model"] != results["model"]["name"]:
        yield "  There are no weights to start from for this model: the second and third way take gpt2's."
    yield "  Writing reads all weights for each token: at best at the speed of the memory, one text at a time."


def about_loss(results):
    model, D = results["model"], results["inputs"]["tokens"]
    yield f"{'nats a token by a fit of 2022, no forecast':<54}{'here':>10}{'at best with the same 6 N D':>35}"
    if model["config"] and model["config"]["vocab_size"] < 10_000:
        yield f"  It says nothing of a vocabulary of {model['config']['vocab_size']:,}, such as bytes: no figure."
        return
    for row in results["chinchilla"]["rows"]:
        N, tokens = (amount(x) for x in row["best"])
        best = f"{row['best_loss']:.2f}: N {N}, D {tokens}"
        yield f"  {row['fit']:<52}{row['loss']:>10.2f}{best:>35}"
    if not results["chinchilla"]["inside"]:
        tried = f"N of {amount(FITTED[0])} to {amount(FITTED[1])}, D of {amount(FITTED[2])} to {amount(FITTED[3])}"
        yield f"  Extrapolated: fitted to {tried}, not to {amount(model['parameters'])} and {amount(D)}."


# ------------------------------------------------------------------------------------------------ command line


def number(least, whole=False):
    """For argparse: a number of at least so much and at most 1e18; "1e9" and "1,000" too."""

    def parse(text):
        value = float(text.replace(",", ""))
        if not least <= value <= 1e18 or whole and value != int(value):
            raise ValueError
        return int(value) if whole else value

    parse.__name__ = f"{'whole ' if whole else ''}number (at least {least:g})"
    return parse


def span(most):
    """For argparse: "0.3" or, from low to high, "0.3:0.5". -> (low, high)"""

    def parse(text):
        low, _, high = text.partition(":")
        pair = float(low), float(high or low)
        if not 1e-9 <= pair[0] <= pair[1] <= most:
            raise ValueError
        return pair

    parse.__name__ = f"number or LOW:HIGH (above 0, at most {most:g})"
    return parse


def names(text):
    """For argparse: accelerators, whatever the case."""
    known = {name.lower(): name for name in ACCELERATORS}
    return [known.get(name.strip().lower(), name.strip()) for name in text.split(",")]


def make_parser():
    whole, positive, train = number(1, whole=True), number(1e-9), gpt.TrainConfig
    parser = argparse.ArgumentParser(prog="fastgpt cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"fastgpt {bench.version()}")
    add = parser.add_argument
    add("model", nargs="?", help=f"{', '.join(known_models())}, or a folder; without one, what `fastgpt train` trains")
    for key, what in dict(layer="blocks", head="heads in each block", embd="channels").items():
        add(f"--n-{key}", type=whole, metavar="N", help=what)
    add("--block-size", type=whole, metavar="T", help="positions in a window")
    add("--vocab-size", type=whole, metavar="V", help="different tokens")
    add("--parameters", type=positive, metavar="N", help="any other model, by its number of parameters (6.7e9)")
    add("--tokens", type=positive, metavar="D", help="to train on, from scratch")
    add("--tune", type=positive, metavar="D", default=1e6, help="tokens to fine-tune on (default: 1e6)")
    add("--write", type=positive, metavar="D", default=1e6, help="tokens to write with it as it is (default: 1e6)")
    add("--steps", type=whole, metavar="N", help=f"of `fastgpt train`, instead of --tokens (default: {train.steps})")
    add("--batch-size", type=whole, metavar="B", default=train.batch_size, help="windows (default: %(default)s)")
    add("--accumulate", type=whole, metavar="N", default=1, help="batches in a step (default: 1)")
    add("--precision", choices=BYTES, default="float32", help="of the bytes (default: float32)")
    what = f"{', '.join(ACCELERATORS)}, or another with its --peak; several with commas (default: V100,A100,H100)"
    add("--accelerator", type=names, metavar="NAME", default=["V100", "A100", "H100"], help=what)
    add("--count", type=whole, metavar="N", default=1, help="how many of them (default: 1)")
    add("--peak", type=positive, metavar="TFLOPS", help="TFLOP/s of one, instead of the listed ones")
    add("--utilisation", "--utilization", type=span(1), metavar="X", help="share of the peak: 0.3, or 0.3:0.5")
    add("--price", type=span(1e9), metavar="X", help="dollars an hour for one: 1.5, or 1.5:3")
    add("--hours", type=positive, metavar="X", help="that the training took there: finds the utilisation")
    add("--flops", choices=COUNTS, default="square", help="by which to reckon there (default: square)")
    add("--share", type=span(1), metavar="X", help="of this machine's multiply-adds (default: 0.6)", default=(0.6, 0.6))
    add("--price-here", type=span(1e9), metavar="X", help="dollars an hour for this machine")
    add("--measure", action="store_true", help=f"time {STEPS} steps here, and count what they save")
    add("--json", action="store_true", help="print all numbers as JSON")
    return parser


def main(argv=None):
    """The command. -> its status"""
    results = estimate(make_parser().parse_args(argv))
    if results["inputs"]["json"]:
        print(json.dumps(results, indent=2))
    else:
        print("\n\n".join("\n".join(lines) for lines in report(results)))
    return 0
