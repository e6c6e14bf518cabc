"""Builds the extension fastgpt._kernels from csrc/. Everything else is in pyproject.toml.

No torch is needed to build: tensors cross as NumPy arrays. CXXFLAGS and CFLAGS are obeyed.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "fastgpt._kernels",
            sources=["csrc/bindings.cpp", "csrc/dispatch.cpp"],
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
