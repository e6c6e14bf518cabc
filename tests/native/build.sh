# Sourced by the scripts beside it: where things are, and how the test program is built.
#   build COMPILER FLAGS...   -> $work/kernels_test
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

need() { # need TOOL...: without them, there is nothing to show
    for tool in "$@"; do
        if ! command -v "$tool" >/dev/null; then
            echo "skipped: $(basename "$0") needs $tool"
            exit 0
        fi
    done
}

build() {
    local compiler=$1
    shift
    "$compiler" -std=c++17 -O2 -Wall -Wextra -Werror -Wno-psabi -ffp-contract=fast -fno-math-errno -pthread \
        -DFASTGPT_POISON "$@" \
        -o "$work/kernels_test" "$root/tests/native/kernels_test.cpp" "$root/csrc/dispatch.cpp"
}
