#!/usr/bin/env bash
# Each instruction set alone, as FASTGPT_BUILD_ISA builds it: no warning, and its kernels are right where it runs.
. "$(dirname "$0")/build.sh"
need g++
if [ "$(uname -m)" != x86_64 ]; then
    echo "skipped: $(basename "$0") is about x86-64"
    exit 0
fi
for isa in sse2 avx2 avx512 amx; do
    build g++ -DFASTGPT_BUILD_ONE "-DFASTGPT_BUILD_${isa^^}"
    "$work/kernels_test" | tee "$work/output"
    grep -q "^$isa: " "$work/output"
    [ "$(grep -c ": " "$work/output")" = 1 ]
done
