#!/usr/bin/env bash
# A processor without AVX runs this build: no instruction that it lacks stands outside the namespaces that are chosen at
# run time, and an emulated one comes to the end of the tests.
. "$(dirname "$0")/build.sh"
need objdump g++
if [ "$(uname -m)" != x86_64 ]; then
    echo "skipped: $(basename "$0") is about x86-64"
    exit 0
fi

# Every function with an instruction in VEX or EVEX encoding (their names begin with v), a mask or a tile.
beyond_baseline() {
    objdump -d --no-show-raw-insn "$1" | awk '
        /^[0-9a-f]+ <.*>:$/ { name = $2; functions++ }
        $2 ~ /^(v[a-z]|k(mov|or|test|and|not|xor|unpck)|tile|ldtilecfg|tdp)/ && $2 !~ /^ver[rw]$/ { found[name] = 1 }
        END { if (!functions) exit 1; for (name in found) print name }'
}

build g++
extension=${1:-$(cd / && python3 -c "import fastgpt._kernels as k; print(k.__file__)" 2>/dev/null || true)}
for binary in "$work/kernels_test" $extension; do
    beyond_baseline "$binary" >"$work/functions"
    outside=$(grep -vE '4avx2|6avx512|3amx' "$work/functions" || true)
    inside=$(grep -cE '4avx2|6avx512|3amx' "$work/functions" || true)
    echo "$(basename "$binary"): $inside functions use AVX or more, all of them in their namespaces"
    if [ -n "$outside" ] || [ "$inside" = 0 ]; then
        echo "FAILED: AVX stands outside avx2, avx512 and amx: $outside"
        exit 1
    fi
done

need qemu-x86_64
build g++ -static
qemu-x86_64 -cpu Nehalem "$work/kernels_test" | tee "$work/output"
grep -q "avx2: not on this processor" "$work/output"
grep -q "sse2: done" "$work/output"
