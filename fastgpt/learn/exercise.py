"""`fastgpt exercise`: write GPT-2's functions yourself, and be told what is wrong.

    start NAME [--cpp]    write a file to fill: signature, shapes, the formula in words
    check FILE            is it right; if not, where and why; if so, how fast
    hint FILE             one more hint each time
    solution NAME         gpt.py's own lines

What a file defines says which exercises it answers, so one file may hold several. It runs in a process of its own.
The hints that were given stand in a text file beside it, to be read again; without that file, they begin again.
"""

import argparse
import ast
import inspect
import re
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

import gpt

from .. import _kernels, bench, check, ops
from . import judge, judge_generation, native, tasks
from .sandbox import SECONDS, Broken, Sandbox, import_file, with_backward
from .tasks import EXERCISES

WIDTH, WHOLE_WORDS = 96, dict(break_long_words=False, break_on_hyphens=False)

# ---------------------------------------------------------------------------------------------- start, hint, solution


def start(name, cpp=False, out=None):
    """Write the file to begin with. -> its path"""
    e = find_exercise(name)
    path = Path(out or f"my_{name.replace('-', '_')}{'.cpp' if cpp else '.py'}")
    if is_cpp(path) != cpp:
        raise ValueError(f"--out is {str(path)!r}, expected a name that ends in {'.cpp' if cpp else '.py'}")
    text = (tasks.cpp_file if cpp else tasks.python_file)(e, path.name)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} is there already and stays as it is; --out takes another name") from None
    return path


def find_exercise(name):
    if name not in EXERCISES:
        raise ValueError(f"NAME is {name!r}, expected one of {', '.join(EXERCISES)}")
    return EXERCISES[name]


def hint(path, name=None):
    """The next hint for a file, as lines. It is kept in a text file beside it, where the ones before stand."""
    names = defined(path)[0]
    if name is not None and name not in names:
        raise ValueError(f"{path} has no {name}, but {', '.join(names)}")
    e = EXERCISES[name or names[0]]
    notes = Path(f"{path}.hints.txt")
    given = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    number = sum(line.startswith(f"{e.name} ") for line in given)
    if number == len(e.hints):
        return [
            f"That was the last hint; all stand in {notes}. `fastgpt exercise solution {e.name}` shows gpt.py's lines."
        ]
    title = f"{e.name} {number + 1} of {len(e.hints)}"
    text = textwrap.wrap(e.hints[number], WIDTH, **WHOLE_WORDS)
    with open(notes, "a", encoding="utf-8") as file:
        file.write("\n".join([title, *(f"  {line}" for line in text), ""]) + "\n")
    return [f"Hint {title}:", *text, "" if number + 1 < len(e.hints) else "(the last one)", f"(kept in {notes})"]


def solution(name):
    """gpt.py's own lines."""
    e = find_exercise(name)
    parts = []
    for function in e.solution:
        lines, first = inspect.getsourcelines(getattr(gpt, function))
        parts.append(f"# gpt.py, line {first}\n{''.join(lines).rstrip()}")
    text = "\n\n\n".join(parts)
    if e.derivation:
        text += f"\n\n# The gradients are derived at the top of csrc/{e.derivation}."
    return text


# ------------------------------------------------------------------------------------------------------ check


def defined(path):
    """The exercises that a file answers, and the names of all functions that it defines."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; `fastgpt exercise start NAME` writes one")
    text = path.read_bytes().decode("utf-8", errors="replace")
    names = cpp_names(text) if is_cpp(path) else python_names(text, path)
    found = [e.name for e in EXERCISES.values() if (e.cpp_function if is_cpp(path) else e.function) in names]
    if not found:
        functions = ", ".join(e.cpp_function if is_cpp(path) else e.function for e in EXERCISES.values())
        raise ValueError(f"{path} defines none of {functions}")
    return found, names


def is_cpp(path):
    suffix = Path(path).suffix
    if suffix not in (".py", ".cpp", ".cc", ".cxx"):
        raise ValueError(f"{path} ends in {suffix or 'nothing'!r}, expected .py or .cpp")
    return suffix != ".py"


def cpp_names(text):
    """The functions that a file defines for others: not what it calls, nor a helper of its own beside them."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    own = r"\b(?:static|inline)\s+"
    found = re.findall(rf"({own})?\b(?:std::)?(?:void|int64_t)\s+(\w+)\s*\([^(){{}}]*\)\s*(?:noexcept\s*)?\{{", text)
    return {name for helper, name in found if not helper}


def python_names(text, path):
    """The names that a module binds at its top level, but for what it takes from torch."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        raise ValueError(f"{path}: {line}{type(error).__name__}: {gpt.one_line(error)}") from None
    names, nodes = set(), list(tree.body)
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            if not f"{node.module}.".startswith("torch."):
                names |= {alias.asname or alias.name for alias in node.names}
        else:  # if, try, with
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names


@contextmanager
def opened(path, seconds=SECONDS):
    """A Sandbox with the file in it, compiled first if that is C++; and the compiler's warnings."""
    with tempfile.TemporaryDirectory() as folder:
        library, warnings = native.compile_file(path, folder) if is_cpp(path) else (None, [])
        with Sandbox(path, library, seconds) as sandbox:
            yield sandbox, warnings


def judge_exercise(sandbox, name, names):
    """The verdict on one of the exercises in a sandbox's file, which defines these names."""
    if name == "sampling":
        return judge_generation.judge_sampling(sandbox)
    if name == "kv-cache":
        return judge_generation.judge_cache(sandbox)
    return judge.judge_formula(sandbox, name, f"{EXERCISES[name].function}_backward" in names)


def check_file(path, speed=True, seconds=SECONDS, file=None):
    """Judge everything in a file and print it. -> whether all of it is right. Broken if it can't be judged."""
    found, names = defined(path)
    right, fast = True, []
    with opened(path, seconds) as (sandbox, warnings):
        for name in found:
            try:
                verdict = judge_exercise(sandbox, name, names)
            except Broken as error:
                told = "\n".join(f"  {line[: WIDTH - 2]}" for line in sandbox.printed_lines()[:10])
                print(f"It printed:\n{told}\n" if told else "", end="", file=file)
                raise Broken(f"{error}" if len(found) == 1 else f"{name}: {error}") from None
            show(verdict, path, sandbox.printed_lines(), warnings, file)
            sandbox.printed = b""
            right &= verdict.ok
            fast += [verdict] if verdict.ok and EXERCISES[name].inputs else []
    for verdict in fast if speed else ():
        show_speed(path, verdict, file)
    if right:
        show_next(path, found, file)
    return right


WHOSE = {"autograd": "gradients by autograd", "own": "gradients by its own backward", "": ""}


def show(verdict, path, printed=(), warnings=(), file=None):
    """Print a verdict."""
    e = EXERCISES[verdict.name]

    def say(text="", indent=""):
        print(textwrap.fill(text, WIDTH, subsequent_indent=indent, **WHOLE_WORDS), file=file)

    language = "C++" if is_cpp(path) else "Python"
    say(f"{Path(path).name}: {', '.join(filter(None, (verdict.name, language, WHOSE[verdict.gradients])))}")
    if verdict.todo:
        function = e.cpp_function if is_cpp(path) else e.function
        say(f"{function} is not written yet. `fastgpt exercise hint {path}` helps.")
        return
    say()
    good, bad = ([r for r in verdict.results if r.ok is ok] for ok in (True, False))
    for r in bad[:8]:
        say(f"  WRONG  {r.case.title:<40}" + ("error" if r.error else ", ".join(r.wrong)))
    if len(bad) > 8:
        say(f"  WRONG  in {len(bad) - 8} more cases")
    for r in good[:12]:
        say(f"  ok     {r.case.title}")
    if len(good) > 12:
        say(f"  ok     {len(good) - 12} more cases")
    say()
    for line in warnings[:3] if bad else []:
        say(f"The compiler warns: {line}")
    if printed:
        shown = [f"  {line[: WIDTH - 2]}" for line in printed[:10]] + ["  ..."] * (len(printed) > 10)
        print("It printed:", *shown, "", sep="\n", file=file)
    if not bad:
        what = "outputs and all gradients" if verdict.gradients else "all outputs"
        if verdict.name == "sampling":
            say("Right: the same tokens as gpt.py's, draw by draw.")
        elif verdict.name == "kv-cache":
            say("Right: every way of cutting a sequence gives the results of one pass.")
        else:
            say(f"Right: {what} are as exact as rounding to float32 lets the formula be.")
    for line in (verdict.first, *verdict.mistake) if bad else verdict.notes:
        say(line, "  ")
    if bad:
        say(f"`fastgpt exercise hint {path}` helps.")


# ------------------------------------------------------------------------------------------------------ speed


def speed_case(name):
    """Inputs, options, work (forward, and with the backward) and unit: bench.py's, in sizes for a first version."""

    def normal(*size, scale=1.0):
        return torch.randn(size) * scale

    if name == "layer_norm":
        n, C = 1024, 768
        inputs = dict(x=normal(n, C), weight=normal(C), bias=normal(C))
        return f"{n}x{C}", inputs, {}, (8 * n * C, 20 * n * C), "GB/s"
    if name == "gelu":
        n = 1024 * 768
        return "1024x768", dict(x=normal(1024, 768)), {}, (8 * n, 20 * n), "GB/s"
    if name in ("linear", "linear_gelu"):
        M, K, N = 256, 384, 384
        inputs = dict(x=normal(M, K), weight=normal(N, K, scale=0.02), bias=normal(N))
        return f"{M}x{K} -> {N}", inputs, {}, (2 * M * K * N, 6 * M * K * N), "GFLOP/s"
    if name == "attention":
        B, T, H, D = 1, 256, 6, 64
        work = B * H * T * (T + 1) // 2 * 4 * D
        return (
            f"B{B} T{T} H{H} D{D}",
            dict(qkv=normal(B, T, 3 * H * D)),
            dict(n_head=H),
            (work, 7 * work // 2),
            "GFLOP/s",
        )
    n, C, V = 256, 128, 2048
    inputs = dict(hidden=normal(1, n, C), weight=normal(V, C, scale=0.02))
    options = dict(targets=torch.randint(V, (1, n)))
    return f"{n}x{C} V{V}", inputs, options, (2 * n * C * V, 6 * n * C * V), "GFLOP/s"


SPEED_SECONDS = 0.4  # for each line


def measure(path, verdict, seconds=SPEED_SECONDS):
    """bench.py's rows for the file's function: {part: {who: row}}, and the machine's limits."""
    torch.manual_seed(0)
    title, inputs, options, work, unit = speed_case(verdict.name)
    limit = bench.limits()
    request = dict(ask="speed", name=verdict.name, inputs=inputs, options=options, seconds=seconds)
    with opened(path) as (sandbox, _):
        times = sandbox.ask(
            request | dict(own_backward=verdict.gradients == "own"), "the measurement of its speed", 120.0
        )
    if "error" in times:
        raise Broken(f"{Path(path).name}: in the measurement of its speed: {times['error']}")
    rows = {}
    for (part, taken), amount in zip(times.items(), work, strict=False):
        yours = taken.pop("yours")
        rows[part] = {
            who: bench.row(verdict.name, title, part, taken | dict(kernel=one), amount / 1e9, unit, limit)
            for who, one in dict(kernel=taken["kernel"], yours=yours, formula=taken["formula"]).items()
        }
    return title, rows, limit


def show_speed(path, verdict, file=None):
    """Print how fast the file's function is, beside the formula, torch and our kernel."""
    title, rows, limit = measure(path, verdict)
    print(
        f"\nThe speed of {verdict.name}, {title}; medians in ms, in turns, and the share of what this machine can do",
        file=file,
    )
    print(
        f"({limit['gflops']:.0f} GFLOP/s of multiply-adds, {limit['gbs']:.1f} GB/s of reads from memory):\n", file=file
    )
    print(f"  {'':<18}{'formula':>16}{'best of torch':>18}{'our kernel':>18}{'yours':>18}", file=file)
    for part, by in rows.items():
        kernel, best = by["kernel"], by["kernel"]["best"]
        share = kernel["share"] * kernel["kernel"]["ms"]  # times ms: what a time of 1 ms would be

        def cell(ms, share=share):
            return (
                f"{bench_digits(ms)} {share / ms:>6.1%}"
                if share / ms < 0.1
                else f"{bench_digits(ms)} {share / ms:>6.0%}"
            )

        cells = [cell(kernel[who]["ms"]) for who in ("formula", best, "kernel")] + [cell(by["yours"]["kernel"]["ms"])]
        print(f"  {part:<18}{cells[0]:>16}" + "".join(f"{c:>18}" for c in cells[1:]), file=file)
    ratio = rows["forward"]["yours"]["ratio"]
    told = bench.notes([row for by in rows.values() for row in by.values()], _kernels.isa())
    print("", *(line for line in told if line.startswith("Above")), sep="\n", end="", file=file)
    print(f"\nForward, it is {ratio:.2g} times as fast as the best of torch.", file=file)


def bench_digits(ms):
    return f"{ms:.{3 if ms < 1 else 2 if ms < 10 else 1 if ms < 100 else 0}f}"


def show_next(path, found, file=None):
    """What to do with what is right."""
    formulas = [name for name in found if EXERCISES[name].inputs]
    print(file=file)
    if formulas:
        print("Now let it live, a small GPT trained on it:\n", file=file)
        print(f"  fastgpt train --ops {path} --steps 200 --out out-mine", file=file)
    left = [name for name in EXERCISES if name not in found]
    print(f"\nOther exercises: {', '.join(left)}" if left else "\nThat is all of GPT-2.", file=file)


# ------------------------------------------------------------------------------------------------------- live


def load_ops(path, others=ops):
    """fastgpt's ops, or others, with a file's own functions in the places of those of the same names: for gpt.GPT.

    Python functions run as they are, with their own backward where there is one; C++ ones are compiled and called
    through ctypes, with their own backward or gpt.py's formula for it. Each is first tried on a small input in a
    process of its own: what crashes, hangs or gives another shape is refused here with a ValueError of one line, before
    anything is trained. Whether it is right, `check` says.
    """
    found, names = defined(path)
    found = [name for name in found if EXERCISES[name].inputs]
    if not found:
        raise ValueError(f"{path} defines none of {', '.join(n for n, e in EXERCISES.items() if e.inputs)}")
    with tempfile.TemporaryDirectory() as folder:
        library = native.compile_file(path, folder)[0] if is_cpp(path) else None
        with Sandbox(path, library) as sandbox:
            written = {name: probe(sandbox, name, names) for name in found}
        module = native.Library(library) if library else import_file(path)
    given = {name: getattr(others, name) for name in check.CASES}
    for name in found:
        given[name] = op_of(module, EXERCISES[name], written[name])
    if "linear_gelu" in found:
        given["linear_gelu"].stands_for = (given["linear"], given["gelu"])  # gpt.GPT uses it only in their place
    return SimpleNamespace(**given)


def probe(sandbox, name, names):
    """Try a function on a small input. -> whether it has a backward of its own"""
    e, case = EXERCISES[name], judge.cases(name)[1]
    arguments = [(case.inputs | case.options).get(n) for n in e.arguments if n != "eps"]
    out = getattr(check.FORMULAS, name)(*arguments)
    own = f"{e.function}_backward" in names
    for own_backward in (True, False) if own else (False,):
        grad = torch.ones_like(out) if own_backward or not sandbox.native else None
        request = dict(ask="case", name=name, arguments=arguments, grad=grad, own_backward=own_backward)
        answer = sandbox.ask(request, case.title)
        todo = answer.get("todo") or sandbox.native and judge.nothing_written(answer, e, own_backward)
        if not todo:
            break
    file = sandbox.path.name
    if todo:
        raise ValueError(f"{file}: {e.function} is not written yet")
    if "error" in answer:
        raise ValueError(f"{file}: {e.function}: {answer['error']}")
    if answer["out"].shape != out.shape or answer["out"].dtype != out.dtype:
        raise ValueError(
            f"{file}: {e.function} gives {judge.spell(answer['out'].dtype, answer['out'].shape)}, "
            f"expected {judge.spell(out.dtype, out.shape)}"
        )
    if lost := e.inputs if answer.get("detached") else answer.get("unused"):
        raise ValueError(f"{file}: {e.function} lets no gradient through to {', '.join(lost)}, which could not learn")
    return own_backward


def op_of(module, e, own_backward):
    """A file's function as one of the ops: (arguments as gpt.py's function)."""
    function = getattr(module, e.function)
    if own_backward:
        function = with_backward(e, function, getattr(module, f"{e.function}_backward"))
    elif isinstance(module, native.Library):
        function = with_backward(e, function, formula_backward(e))

    def op(*arguments, **named):
        if e.name == "attention" and (len(arguments) > 2 or named.get("dropout")):
            raise ValueError("attention: the file's own has no dropout: train with --dropout 0")
        return function(*arguments, **named)

    op.__module__ = getattr(function, "__module__", None) or getattr(module, "__name__", "torch")
    op.__qualname__ = getattr(function, "__qualname__", e.function)
    return op


def formula_backward(e):
    """The gradients of gpt.py's formula."""

    def backward(dout, *arguments):
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
            ]
            named = dict(zip(e.arguments, leaves, strict=False))
            wanted = [named[n] for n in e.inputs if named.get(n) is not None]
            return torch.autograd.grad(getattr(gpt, e.function)(*leaves), wanted, dout)

    return backward


# ----------------------------------------------------------------------------------------------- command line


def positive(text):
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


positive.__name__ = "positive number"


def make_parser():
    listed = "\n".join(f"  {e.name:<13}{e.about}" for e in EXERCISES.values())
    parser = argparse.ArgumentParser(
        prog="fastgpt exercise",
        description="Write GPT-2's functions yourself, in Python or in C++, and be told what is wrong.",
        epilog=f"exercises, in a good order:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="start | check | hint | solution")
    command = commands.add_parser("start", help="write a file to fill")
    command.add_argument("name", metavar="NAME", help=", ".join(EXERCISES))
    command.add_argument("--cpp", action="store_true", help="in C++ instead of Python")
    command.add_argument("--out", metavar="FILE", help="name of the file (default: my_NAME.py or my_NAME.cpp)")
    command = commands.add_parser("check", help="judge a file: right or not, what is wrong, how fast")
    command.add_argument("file", metavar="FILE")
    command.add_argument("--no-speed", action="store_true", help="leave out the speed")
    command.add_argument(
        "--seconds",
        type=positive,
        default=SECONDS,
        metavar="S",
        help="for one answer of the file (default: %(default)g)",
    )
    command = commands.add_parser("hint", help="one more hint each time")
    command.add_argument("file", metavar="FILE")
    command.add_argument("name", metavar="NAME", nargs="?", help="which exercise, if the file has several")
    command = commands.add_parser("solution", help="gpt.py's own lines")
    command.add_argument("name", metavar="NAME", help=", ".join(EXERCISES))
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "start":
        path = start(args.name, args.cpp, args.out)
        print(f"{path} is yours to fill. Then: fastgpt exercise check {path}")
    elif args.command == "hint":
        print("\n".join(filter(None, hint(args.file, args.name))))
    elif args.command == "solution":
        print(solution(args.name))
    else:
        return 0 if check_file(args.file, not args.no_speed, args.seconds) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
