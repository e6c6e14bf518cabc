"""The command `fastgpt`: info, check, bench, train, generate, eval, demo."""

import platform
import sys
import tempfile
import time

import numpy
import tiktoken
import torch

import gpt

from . import _kernels, bench, check, ops

USAGE = """usage: fastgpt COMMAND ...

  info       versions, instruction set, threads
  check      parity of kernels and formulas, as a table; status 1 if any fails
  bench      speed of formulas, torch and kernels
  train      } gpt.py's command line
  generate   } with the kernels under it
  eval       }
  demo       all of it once, in a minute or two

fastgpt COMMAND --help tells more."""


def info():
    """What a report of a problem or of a speed should say."""
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, tiktoken ", end=""
    )
    print(f"{tiktoken.__version__} on {platform.system()} {platform.machine()}")
    print(f"instruction sets: {', '.join(_kernels.isas())}; in use: {_kernels.isa()} (FASTGPT_ISA forces another)")
    if _kernels.isa() == "amx":
        print("matrix products: on AMX's tiles, a float32 as three bfloat16, whose six products take less than half")
        print("  the time of a float32 multiply-add; FASTGPT_ISA=avx512 does without")
    else:
        print("matrix products: float32 multiply-adds")
    print(f"threads: {_kernels.num_threads()}, in torch's own pool (torch.set_num_threads sets their number)")


def demo():
    """The main job: parity, speed, a small GPT trained on the text that every Python carries, and a sample."""
    started = time.perf_counter()
    title("This machine")
    info()
    title("Do the kernels compute what gpt.py's formulas say? Errors against float64")
    failed = check.run(quick=True)
    title("How fast are they?")
    bench.run(quick=True, seconds=1.0)
    title("A small GPT, trained on Python's own help texts, byte by byte")
    with tempfile.TemporaryDirectory() as out:
        gpt.main(["train", "--out", out, "--steps", "1000", "--eval-every", "250", "--sample", "400"], ops)
    print(f"\n{time.perf_counter() - started:.0f} s in all. Next: read gpt.py; `fastgpt train --data FILE`")
    return 1 if failed else 0


def title(text):
    print(f"\n== {text}\n", flush=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if command in ("train", "generate", "eval"):
        gpt.main(argv, ops, prog="fastgpt")
    elif command in ("check", "bench"):
        try:
            {"check": check, "bench": bench}[command].main(argv[1:])
        except ValueError as error:
            sys.exit(f"fastgpt {command}: error: {error}")
    elif command in ("info", "demo") and len(argv) == 1:
        sys.exit({"info": info, "demo": demo}[command]())
    elif command in ("-h", "--help"):
        print(USAGE)
    else:
        sys.exit(f"fastgpt: unknown command {' '.join(argv)!r}\n\n{USAGE}")


if __name__ == "__main__":
    main()
