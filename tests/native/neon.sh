#!/usr/bin/env bash
# The kernels as ARM's NEON: cross-compiled, and run in an emulator.
. "$(dirname "$0")/build.sh"
need aarch64-linux-gnu-g++ qemu-aarch64
build aarch64-linux-gnu-g++ -static
qemu-aarch64 "$work/kernels_test"
