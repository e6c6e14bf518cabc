#!/usr/bin/env bash
# The kernels for AMX on a processor that has AVX-512 alone: its instructions are emulated, all else is what runs on AMX.
. "$(dirname "$0")/build.sh"
. "$root/tests/native/op_tests.sh"
need g++ pytest
if ! grep -qw avx512dq /proc/cpuinfo 2>/dev/null; then
    echo "skipped: $(basename "$0") needs a processor with AVX-512"
    exit 0
fi
cp -r "$root/csrc" "$root/tests" "$root/fastgpt" "$root/gpt.py" "$root/setup.py" "$root/pyproject.toml" \
    "$root/README.md" "$root/LICENSE" "$work"
rm -f "$work"/fastgpt/*.so
cd "$work"
CXXFLAGS=-DFASTGPT_EMULATE_AMX FASTGPT_BUILD_ISA=amx python setup.py -q build_ext --inplace
python -c "import fastgpt._kernels as k; assert k.isa() == 'amx' and k.__file__.startswith('$work'), k.__file__"
python -m pytest -q -p no:cacheprovider -m "not slow" -k "not memory and not never_holds and not piece and not every_isa" \
    tests/test_bfloat16.py tests/test_{matmul,attention,lm_loss}.py
