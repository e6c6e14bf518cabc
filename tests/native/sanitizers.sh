#!/usr/bin/env bash
# The address and undefined-behaviour sanitizers over the kernels alone and over the extension under the op tests.
. "$(dirname "$0")/build.sh"
. "$root/tests/native/op_tests.sh"
need g++ pytest
sanitize="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
# shellcheck disable=SC2086
build g++ $sanitize
"$work/kernels_test"

cp -r "$root/csrc" "$root/fastgpt" "$root/gpt.py" "$root/setup.py" "$root/pyproject.toml" \
    "$root/README.md" "$root/LICENSE" "$work"
rm -f "$work"/fastgpt/*.so
CXXFLAGS="$sanitize -DFASTGPT_POISON" pip install --quiet --no-deps --target "$work/site" "$work"
cd "$root/tests"
# Python itself is not built with the sanitizer, so its library comes first; and it frees little when it ends.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$work/site" PYTHONMALLOC=malloc
python -c "import fastgpt._kernels as k; assert k.__file__.startswith('$work'), k.__file__"
# The many shapes of the parity tests run in kernels_test; here, what reaches the kernels through Python.
skip="not memory and not never_holds and not opcheck and not awkward and not as_exact and not transformers and not leak and not commands"
pytest -q -p no:cacheprovider -k "$skip" "${op_tests[@]/#tests\//}" test_decoder.py
