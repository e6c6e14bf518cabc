"""Builds the extension fastgpt._kernels from csrc/. Everything else is in pyproject.toml.

No torch is needed to build: tensors cross as NumPy arrays. CXXFLAGS and CFLAGS are obeyed. FASTGPT_BUILD_ISA=avx2 in
the environment builds that instruction set alone, for quick rounds on one machine; without it, all are built and the
best is chosen at import.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

ISAS = ("sse2", "avx2", "avx512", "amx")  # of x86-64; other processors have one, which is always built

one = os.environ.get("FASTGPT_BUILD_ISA")
if one and one not in ISAS:
    raise SystemExit(f"FASTGPT_BUILD_ISA is {one!r}, expected one of: {', '.join(ISAS)}")

setup(
    ext_modules=[
        Pybind11Extension(
            "fastgpt._kernels",
            sources=["csrc/bindings.cpp", "csrc/dispatch.cpp"],
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            define_macros=[("FASTGPT_BUILD_ONE", None), (f"FASTGPT_BUILD_{one.upper()}", None)] if one else [],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
