"""GPT-2's five formulas as fused C++ kernels: a drop-in for gpt.py's own.

    import fastgpt, gpt
    model = gpt.GPT(gpt.GPTConfig(), ops=fastgpt)

layer_norm, gelu, linear, attention and lm_loss have the signatures of gpt.py's functions and the same values and
gradients; linear_gelu is gelu(linear(...)) in one pass. fastgpt.bfloat16 holds the same in bfloat16 products. The
environment variable FASTGPT_ISA forces an instruction set (see `fastgpt info`).

Decoder(model) generates: all layers of a token in one call, weights in float32, bfloat16, int8 or int4.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

if Path(*sys.argv[:1]).stem in ("fastgpt", "-m") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the command: until its main(), Ctrl-C just ends the process

import torch

try:
    from . import _kernels
except ImportError as error:
    raise ImportError(
        f"fastgpt: the compiled kernels are missing in {Path(__file__).parent} ({error}). In the project's folder, "
        "`pip install -e .` builds them in place; after a plain `pip install .`, start Python in another folder"
    ) from error

from . import bfloat16
from .ops import attention, gelu, layer_norm, linear, linear_gelu, lm_loss

__all__ = ["Decoder", "attention", "bfloat16", "gelu", "layer_norm", "linear", "linear_gelu", "lm_loss"]


def _use_torchs_threads():
    """Hand torch's thread pool to the kernels: two addresses, found in the library that is loaded already."""
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"))))
    functions = (library.torch_parallel_for, library.torch_get_num_threads)
    _kernels.use_thread_pool(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))


_use_torchs_threads()
if "FASTGPT_ISA" in os.environ:
    _kernels.set_isa(os.environ["FASTGPT_ISA"])


def __getattr__(name):  # Decoder needs gpt.py, which those who only want the formulas may not have
    if name == "Decoder":
        from .decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
