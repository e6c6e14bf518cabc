"""`fastgpt compare`: a model for a text in four ways, on one budget: one table, one picture.

    as it is       a pretrained model, not trained
    from scratch   its sizes, random weights
    fine-tuned     all of its weights trained
    LoRA           its weights frozen, adapters trained beside them (lora.py)

Each training is a run of `fastgpt train` in a process of its own, so that its peak memory is its own. All have the
same text, held-out part and seed, hence the same batches. The budget is in seconds of training, so that a cheaper step
counts. A learning rate that falls to the end must know the last step: a step of each kind is timed first, in turns, and
the number of steps follows. The table has the seconds that they took. What the budget leaves out: evaluations,
checkpoints, and the training of the pretrained model.
"""

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import safetensors
import torch

import gpt

from . import _kernels, bench, bfloat16, data, evaluate, lora, metrics, ops, plot, train
from . import tokenizer as tokenizers
from .learn import experiment

NAME = "compare.json"  # in --out, beside a folder for each training
AS_IT_IS, TRAINED = "as it is", ("scratch", "finetuned", "lora")
MAX_WINDOWS = 256  # of the evaluations during a run


@dataclass
class CompareConfig(gpt.Options):
    """Compare four ways to a model on one budget: from scratch, fine-tuned, LoRA adapters, and pretrained as it is."""

    init: str | None = gpt.option(None, "the pretrained model: a folder, or gpt2, gpt2-medium, ...")
    data: str | None = gpt.option(None, "text file in UTF-8, or shards; without it, Python's own help texts")
    tokenizer: str | None = gpt.option(None, "bytes, gpt2 or a folder, if the model names none")
    out: str = gpt.option("compare", "folder for the runs and the results")
    budget: float | None = gpt.option(None, "seconds of training for each (default: 60)", "0 < budget < inf")
    steps: int | None = gpt.option(None, "steps for each, in place of --budget", "1 <= steps <= 1_000_000_000")
    lora: int = gpt.option(8, "rank of the adapters", "lora >= 1")
    lora_alpha: float | None = gpt.option(None, "their weight is X / rank (default: the rank)", "0 < lora_alpha < inf")
    lr_scratch: float = gpt.option(1e-3, "highest learning rate from scratch", "0 < lr_scratch < inf")
    lr_finetuned: float = gpt.option(3e-4, "that of all pretrained weights", "0 < lr_finetuned < inf")
    lr_lora: float = gpt.option(3e-3, "that of the adapters", "0 < lr_lora < inf")
    batch_size: int = gpt.option(12, "windows in a batch", "1 <= batch_size <= 100_000")
    accumulate: int = gpt.option(1, "batches in a step", "1 <= accumulate <= 100_000")
    eval_every: int | None = gpt.option(None, "steps between evaluations (default: a tenth)", "eval_every >= 1")
    dropout: float = gpt.option(0.0, "share of channels and attention weights set to zero", "0 <= dropout < 1")
    dtype: str = gpt.option("float32", "of the operands of matrix products", "dtype in ('float32', 'bfloat16')")
    prompt: str = gpt.option("\n", "text that each model continues at the end")
    sample: int = gpt.option(100, "tokens that each adds to it", "0 <= sample <= 1_000_000")
    seed: int = gpt.option(1337, "of all randomness", "0 <= seed < 2**32")

    def __post_init__(self):
        super().__post_init__()
        gpt.expect(self.init, "--init is missing, expected the pretrained model: a folder, or gpt2, gpt2-medium, ...")
        both = self.budget is not None and self.steps is not None
        gpt.expect(not both, f"--budget is {self.budget} and --steps {self.steps}, expected one of them")
        if self.dtype == "bfloat16":
            _kernels.expect_bfloat16("--dtype bfloat16")
        if self.budget is self.steps is None:
            self.budget = 60.0

    def ops(self):
        return bfloat16 if self.dtype == "bfloat16" else ops

    def alpha(self):
        return float(self.lora) if self.lora_alpha is None else self.lora_alpha

    def title(self, way):
        return dict(scratch="from scratch", finetuned="fine-tuned", lora=f"LoRA, rank {self.lora}").get(way, way)


OWN = dict(  # options that one way alone depends on
    scratch=("lr_scratch",), finetuned=("lr_finetuned",), lora=("lr_lora", "lora", "lora_alpha")
)  # fmt: skip


class Results:
    """compare.json: what was asked for, steps of each way, figures of those that are done. Replaced as a whole."""

    def __init__(self, typed, again=()):
        """Go on with what --out holds, with its options, or begin. again: ways to train once more"""
        out = typed.get("out", "compare")
        self.path, self.saved = os.path.join(out, NAME), {}
        if os.path.exists(self.path):
            with gpt.reported_as(f"--out is {out!r}, whose {NAME} is damaged"):
                self.saved = json.loads(Path(self.path).read_text(encoding="utf-8"))
                before, self.ways, self.steps = (self.saved[x] for x in ("settings", "ways", "steps"))
                _ = CompareConfig(**before), self.saved["base"], self.saved["text"]
            expect_same(typed, before, again)
            self.config = CompareConfig(**before | dict(typed, out=out))
            return
        there = sorted(os.listdir(out)) if os.path.isdir(out) else []
        held = ", ".join(there[:3]) + (", ..." if there[3:] else "")
        gpt.expect(not there, f"--out is {out!r}, which holds {held} and no {NAME}: take another folder")
        self.config, self.ways, self.steps = CompareConfig(**typed), {}, {}

    def forget(self, way):
        """A way is to be trained again."""
        self.ways.pop(way, None)
        self.steps.pop(way, None)
        self.save()
        shutil.rmtree(self.folder(way), ignore_errors=True)

    def settle(self, **found):
        """The base and the text are what they were."""
        for key, words in (("base", "the weights of --init have changed"), ("text", "the text of --data has changed")):
            was, now = self.saved.get(key, found[key]), found[key]
            gpt.expect(was == now, f"{words}: {now}, expected {was}; take another --out")
        self.saved |= found
        self.save()

    def add(self, way, figures):
        self.ways[way] = figures
        self.save()

    def save(self):
        self.saved |= dict(about=bench.about(), settings=asdict(self.config), steps=self.steps, ways=self.ways)
        experiment.write_json(self.path, self.saved)

    def folder(self, way):
        return os.path.join(self.config.out, way)


def expect_same(typed, before, again):
    free = {"out", *(name for way in again for name in OWN[way])}
    for name, x in before.items():
        way = next((way for way, names in OWN.items() if name in names), None)
        rest = f"--again {way} trains that way anew" if way else "take another --out"
        same = name in free or typed.get(name, x) == x
        gpt.expect(same, f"--{gpt.dashed(name)} is {typed.get(name)!r}, but was {x!r}: {rest}")


# ---------------------------------------------------------------------------------------------------- the ways


def tokenizer_of(model, config):
    """-> the tokenizer, and its name for `fastgpt train`. ValueError if another is typed than the model's own"""
    names = config.init if model.tokenizer == tokenizers.OWN else model.tokenizer
    known = names or (config.init if tokenizers.has_files(config.init) else None)
    tokenizer = tokenizers.of_model(model, config.init, config.tokenizer)
    if config.tokenizer and known:
        same = tokenizers.fingerprint(tokenizer) == tokenizers.fingerprint(tokenizers.get(known))
        gpt.expect(same, f"--tokenizer is {config.tokenizer!r}, expected {known!r}, with which --init was trained")
    return tokenizer, config.tokenizer or known or "gpt2"


def options(way, config, steps, sizes, tokenizer):
    """How `fastgpt train` is called for this way: {option: value}."""
    common = dict(data=config.data, tokenizer=tokenizer, dtype=config.dtype, steps=steps, seed=config.seed, sample=0)
    common |= dict(batch_size=config.batch_size, accumulate=config.accumulate, dropout=config.dropout)
    common |= dict(warmup=min(100, steps // 10), eval_every=config.eval_every or -(-steps // 10))
    own = dict(
        scratch=dict(lr=config.lr_scratch, **{name: getattr(sizes, name) for name in gpt.SHAPE}),
        finetuned=dict(lr=config.lr_finetuned, init=config.init),
        lora=dict(lr=config.lr_lora, init=config.init, lora=config.lora, lora_alpha=config.alpha()),
    )
    return common | own[way]


def time_steps(config, tokens):
    """Median seconds of a step that trains all weights, and of one that trains adapters: they take turns."""
    steps = {}
    for way in ("finetuned", "lora"):
        model = gpt.GPT.from_pretrained(config.init, config.ops(), config.dropout).train()
        if way == "lora":
            lora.adapt(model, config.lora, config.alpha())
        how = gpt.TrainConfig(batch_size=config.batch_size, accumulate=config.accumulate)
        optimizer = gpt.make_optimizer(model, how.lr, how.beta2, how.weight_decay)
        steps[way] = partial(gpt.train_step, model, optimizer, tokens, 0, how)
    times = bench.interleaved(steps, min(config.budget / 20, 10), least=2)
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def plan(results, tokens):
    """How many steps each way takes that is not done."""
    config, missing = results.config, [way for way in TRAINED if way not in results.steps]
    if missing and config.steps is None:
        times = results.saved["step_seconds"] = time_steps(config, tokens)
        ms = {way: f"{seconds * 1e3:,.1f} ms" for way, seconds in times.items()}
        print(f"timed in turns, a step takes {ms['finetuned']} for all weights, {ms['lora']} for adapters", flush=True)
        for way in missing:
            results.steps[way] = max(1, round(config.budget / times["lora" if way == "lora" else "finetuned"]))
    results.steps |= {way: config.steps for way in missing if config.steps is not None}
    results.save()


def in_own_process(argv):
    """`fastgpt train` with these arguments, its lines passed on. -> the most MiB that it held

    It ends when this process does, or is interrupted: its standard input is then closed (child).
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from fastgpt import compare; compare.child({argv!r})"
    env = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONIOENCODING="utf-8")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    process = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, **pipes)
    try:
        end = relay(process)
    except KeyboardInterrupt:
        process.stdin.close()
        relay(process)
        raise
    finally:
        process.stdin.close()
        process.stdout.close()
        status = process.wait()
    if status or "peak" not in end:
        raise ValueError(end.get("error", f"its process ended with status {status}"))
    return end["peak"]


def relay(process):
    """Pass a process's lines on. -> what the last one says, as child() writes it"""
    end = {}
    for line in process.stdout:
        if line.startswith("{"):
            end = json.loads(line)
        elif line.strip():
            print(f"    {line}", end="", flush=True)
    return end


def child(argv):
    """In a process of its own: train; at the end a line of JSON with the peak memory, or the error."""
    threading.Thread(target=stop_with_parent, daemon=True).start()
    end = {}
    try:
        train.main(argv)
    except SystemExit as exit:
        if not isinstance(exit.code, str):
            raise
        end = dict(error=exit.code.removeprefix("fastgpt train: error: "))
    print(json.dumps(end or dict(peak=bench.peak_memory())), flush=True)


def stop_with_parent():
    """When the parent closes our standard input, or is gone, train.py saves and ends."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def train_way(way, results, sizes, tokenizer):
    """A run of `fastgpt train`, from where it was stopped, if it was. -> its figures"""
    folder, config = results.folder(way), results.config
    resumed = os.path.exists(os.path.join(folder, train.FILES[0]))
    how = dict(dtype=config.dtype) if resumed else options(way, config, results.steps[way], sizes, tokenizer)
    argv = [f"--{gpt.dashed(name)}={x}" for name, x in dict(how, out=folder).items() if x is not None]
    try:
        peak = in_own_process([*argv, *(["--resume"] if resumed else [])])
    except ValueError as error:
        rest = f"what is done is kept, `fastgpt compare --out {config.out}` goes on"
        raise ValueError(f"{config.title(way)}: {error}; {rest}") from error
    rows = metrics.read(folder)
    step, last = rows[0], rows[-1]
    best = min((row for row in rows if row["validation"] is not None), key=lambda row: row["validation"])
    return dict(
        seconds=last["seconds"],
        steps=last["step"],
        tokens_per_second=last["tokens"] / last["seconds"],
        step_seconds=step["tokens"] / statistics.median(row["tokens_per_second"] for row in rows),
        trained=count_trained(folder),
        peak_mib=peak,
        resumed=resumed,
        keep_bytes=sum(
            Path(folder, name).stat().st_size for name in (lora.FILES if way == "lora" else train.FILES[1:])
        ),
        validation=last["validation"],
        best=dict(step=best["step"], validation=best["validation"]),
    )


def count_trained(folder):
    """Parameters that a run trained, by its checkpoint."""
    with safetensors.safe_open(os.path.join(folder, train.FILES[0]), "pt") as file:
        names = (name for name in file.keys() if not name.startswith(gpt.MOMENTS))
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def measure(model, val, bytes_of_val, tokenizer, config):
    """What a model makes of the held-out text, and how it continues the prompt."""
    loss = experiment.val_loss(model, val)
    start = tokenizer.encode(config.prompt, allowed_special="all") or [tokenizer.eot_token]
    tokens = model.generate(torch.tensor([start]), config.sample, 0.8, top_k=200, seed=config.seed)[0].tolist()
    bits = loss * (len(val) - 1) / math.log(2) / bytes_of_val
    sample = experiment.printable(tokenizer.decode_bytes(tokens))
    return dict(loss=loss, bits_per_byte=bits, perplexity=math.exp(min(loss, 700)), sample=sample)


def run(results):
    """The ways that are not done yet, each kept when it is."""
    config = results.config
    model = gpt.GPT.from_pretrained(config.init, config.ops()).eval()
    sizes = model.config
    lora.expect_fits(sizes, config.lora, config.alpha())
    tokenizer, name = tokenizer_of(model, config)
    tokens, val = data.load_tokens(config.data, tokenizer, sizes.block_size)
    results.settle(base=gpt.checksum(model.state_dict(), {}), text=data.describe(tokens, val), val=len(val))
    n = evaluate.count_bytes(val, tokenizer)
    if AS_IT_IS not in results.ways:
        print(config.title(AS_IT_IS), flush=True)
        validation = gpt.evaluate(model, val, config.batch_size, MAX_WINDOWS)
        results.add(AS_IT_IS, measure(model, val, n, tokenizer, config) | dict(validation=validation))
    del model
    plan(results, tokens)
    for way in TRAINED:
        if way not in results.ways:
            print(f"{config.title(way)}, {results.steps[way]:,} steps", flush=True)
            figures = train_way(way, results, sizes, name)
            model = gpt.GPT.from_pretrained(results.folder(way), config.ops()).eval()
            results.add(way, measure(model, val, n, tokenizer, config) | figures)
            del model


# -------------------------------------------------------------------------------------------------- the report

COLUMNS = {
    "": -16, "val loss": 9, "bits/byte": 11, "perplexity": 12, "seconds": 9, "steps": 8, "tokens/s": 10,
    "trained": 13, "peak MiB": 10, "to keep, MB": 13,
}  # fmt: skip


def cells(title, figures):
    """A row of the table as texts, one for each of COLUMNS."""
    known = dict(
        loss=".4f", bits_per_byte=".4f", perplexity=",.3f", seconds=",.1f", steps=",d", tokens_per_second=",.0f"
    )
    known |= dict(trained=",d", peak_mib=",.0f")
    texts = [format(figures[key], style) if key in figures else "-" for key, style in known.items()]
    return [title, *texts, f"{figures['keep_bytes'] / 1e6:,.3f}" if "keep_bytes" in figures else "-"]


def first_below(rows, loss):
    """Seconds of training after which a run's validation loss is no higher than this; None if it never is."""
    return next((r["seconds"] for r in rows if r["validation"] is not None and r["validation"] <= loss), None)


def findings(results):
    """What the table means, in lines."""
    ways, config = results.ways, results.config
    scratch = metrics.read(results.folder("scratch"))
    others = [AS_IT_IS, "lora", "finetuned"]
    times = {way: first_below(scratch, ways[way]["validation"]) for way in others}
    words = [f"{config.title(way)}: {'never' if t is None else f'after {t:.1f} s'}" for way, t in times.items()]
    yield f"Training from scratch reaches the validation loss of the others: {'; '.join(words)}."
    full, adapters = ways["finetuned"], ways["lora"]
    timed = results.saved.get("step_seconds")  # in turns; the runs may have had other neighbours each
    ms = [1e3 * (timed[way] if timed else ways[way]["step_seconds"]) for way in ("lora", "finetuned")]
    how = "timed in turns" if timed else "medians of the runs"
    yield (
        f"A step of LoRA takes {ms[0] / ms[1]:.2f} of fine-tuning's time ({ms[0]:,.1f} and {ms[1]:,.1f} ms, {how}),"
        f" its process {adapters['peak_mib'] / full['peak_mib']:.2f} of the memory,"
        f" its files {adapters['keep_bytes'] / full['keep_bytes']:.4f} of the bytes."
    )
    for way in TRAINED:
        best, last = ways[way]["best"], ways[way]["validation"]
        if best["validation"] < last:
            lower = f"{best['validation']:.4f} instead of {last:.4f}"
            yield f"{config.title(way)} was better after step {best['step']:,} ({lower}): {way}/best has those weights."
        if ways[way]["resumed"]:
            yield f"{config.title(way)} was stopped and resumed: its peak memory is that of the last process alone."


def legend(results):
    val = f"{results.saved['val']:,} tokens held out"
    yield f"val loss: nats a token, on {val}. seconds: of training steps; without evaluations, and without"
    yield "the training of the model as it is. to keep: files that a user needs, LoRA's beside the model as it is."


def show(results):
    ways, config = results.ways, results.config
    print()
    bench.show_texts(COLUMNS, list(COLUMNS))
    for way, figures in ways.items():
        bench.show_texts(COLUMNS, cells(config.title(way), figures))
    print()
    print("\n".join(legend(results)), end="\n\n")
    print("\n".join(findings(results)), end="\n\n")
    for way, figures in ways.items():
        print(f"{config.title(way):<14}| {figures['sample']}")


def markdown(results):
    """The same in Markdown."""
    about, config = results.saved["about"], results.config
    budget = f"{config.steps:,} steps" if config.steps else f"{config.budget:g} s"
    text = config.data or "Python's own help texts"
    return "\n".join(
        [
            f"# {config.init} for {text}, in four ways on {budget} each",
            "",
            f"`fastgpt compare`; {about['cpu']}, {about['isa']}, {about['threads']} threads, torch {about['torch']}.",
            "",
            *bench.table(COLUMNS, [cells(config.title(way), figures) for way, figures in results.ways.items()]),
            *legend(results),
            "",
            *(f"- {line}" for line in findings(results)),
            "",
            *bench.table({"": -1, "continues the prompt": -1}, samples(results)),
        ]
    )


def samples(results):
    """Rows of a Markdown table."""
    return [(results.config.title(way), figures["sample"].replace("|", "\\|")) for way, figures in results.ways.items()]


def draw(results, path):
    """Losses over seconds of training, and that of the model as it is."""
    title, before = results.config.title, results.ways[AS_IT_IS]["validation"]
    runs = {title(way): metrics.read(results.folder(way)) for way in TRAINED}
    figure, axes = plot.picture(runs, "seconds", first={title(way): before for way in ("finetuned", "lora")})
    axes.axhline(before, color="black", linewidth=1, linestyle="--", label=AS_IT_IS)
    axes.legend()
    experiment.save_figure(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="fastgpt compare", description=CompareConfig.__doc__)
    gpt.add_options(parser, CompareConfig)
    parser.add_argument("--again", action="append", choices=TRAINED, default=[], help="train this way once more")
    parser.add_argument("--plot", default=None, metavar="FILE", help="draw the losses over seconds here: PNG or SVG")
    parser.add_argument("--markdown", default=None, metavar="FILE", help="write the table here")
    typed = vars(parser.parse_args(argv))
    again, picture, report = (typed.pop(name) for name in ("again", "plot", "markdown"))
    interrupts = train.Interrupts()
    interrupts.take_over()
    try:
        with train.claimed(typed.get("out", "compare")):
            results = Results(typed, again)
            bench.try_report_files(SimpleNamespace(json=None, markdown=report, plot=picture))
            for way in again:
                results.forget(way)
            run(results)
            show(results)
            if picture:
                draw(results, picture)
            if report:
                experiment.write_whole(report, lambda name: Path(name).write_text(markdown(results), encoding="utf-8"))
    except KeyboardInterrupt:
        gpt.progress("")
        print(f"what is done is kept; `fastgpt compare --out {typed.get('out', 'compare')}` goes on", flush=True)
        sys.exit(128 + (interrupts.number or signal.SIGINT))
    finally:
        interrupts.give_back()
