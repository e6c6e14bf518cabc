#!/usr/bin/env bash
# The kernels built by clang, on every instruction set that is here.
. "$(dirname "$0")/build.sh"
need clang++
build clang++
"$work/kernels_test"
