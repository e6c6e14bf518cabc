// One source, several instruction sets: every kernel header is included once for each, in a namespace of its own and
// compiled for that instruction set. Which table of kernels is used is decided when the package is imported.
//
// Nothing that the whole program shares may be compiled inside such a region, or the linker might keep the copy that
// uses AVX for everybody. So the headers of the standard library and of this project that have include guards come
// first, and each template of the kernels stands inside its namespace.

#include "kernels.h"
#include "parallel.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

// Vectors wider than the baseline's change how they would be passed between functions; here, they never are.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__)

#ifndef FASTGPT_BUILD_ONE // set by setup.py, with one of these, where the environment has FASTGPT_BUILD_ISA
#define FASTGPT_BUILD_SSE2
#define FASTGPT_BUILD_AVX2
#define FASTGPT_BUILD_AVX512
#define FASTGPT_BUILD_AMX
#endif

#ifdef FASTGPT_BUILD_SSE2
namespace fastgpt::sse2 {
static bool runs_here() { return true; } // every x86-64 has it
} // namespace fastgpt::sse2
#define FASTGPT_ISA sse2
#define FASTGPT_VECTOR_BYTES 16
#define FASTGPT_MR 4
#define FASTGPT_NV 2
#include "all_kernels.h"
#endif

#ifdef FASTGPT_BUILD_AVX2
namespace fastgpt::avx2 {
static bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
} // namespace fastgpt::avx2
#define FASTGPT_ISA avx2
#define FASTGPT_TARGET "avx2,fma"
#define FASTGPT_VECTOR_BYTES 32
#define FASTGPT_MR 4
#define FASTGPT_NV 3
#include "all_kernels.h"
#endif

#if defined(FASTGPT_BUILD_AVX512) || defined(FASTGPT_BUILD_AMX)
namespace fastgpt::avx512 {
static bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] static bool has_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
} // namespace fastgpt::avx512
#endif

#ifdef FASTGPT_BUILD_AVX512
#define FASTGPT_ISA avx512
#define FASTGPT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define FASTGPT_VECTOR_BYTES 64
#define FASTGPT_MR 8
#define FASTGPT_NV 3
#define FASTGPT_BFLOAT16
#include "all_kernels.h"
#endif

#ifdef FASTGPT_BUILD_AMX // AVX-512, and matrix products on AMX
namespace fastgpt::amx {
static bool runs_here() {
#ifdef FASTGPT_EMULATE_AMX
    return avx512::runs_here();
#elif defined(__linux__) // gives a process AMX's 8 KiB of registers only if it asks
    unsigned a, b, c, d;
    const bool has_bfloat16_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    constexpr int request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return avx512::runs_here() && has_bfloat16_tiles && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
static bool has_bfloat16() { return true; }
} // namespace fastgpt::amx
#define FASTGPT_ISA amx
#define FASTGPT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define FASTGPT_VECTOR_BYTES 64
#define FASTGPT_MR 8
#define FASTGPT_NV 3
#define FASTGPT_AMX
#include "all_kernels.h"
#endif

#else // any other processor: vectors of 16 bytes, lowered to NEON or whatever the compiler has

#ifdef __aarch64__
#define FASTGPT_BUILD_NEON
namespace fastgpt::neon {
static bool runs_here() { return true; }
static bool has_bfloat16() {
#ifdef __linux__
    return getauxval(AT_HWCAP2) >> 14 & 1; // HWCAP2_BF16
#else
    return false;
#endif
}
} // namespace fastgpt::neon
#define FASTGPT_ISA neon
#define FASTGPT_BFLOAT16
#else
#define FASTGPT_BUILD_GENERIC
namespace fastgpt::generic {
static bool runs_here() { return true; }
} // namespace fastgpt::generic
#define FASTGPT_ISA generic
#endif
#define FASTGPT_VECTOR_BYTES 16
#define FASTGPT_MR 4
#define FASTGPT_NV 3
#include "all_kernels.h"

#endif

namespace fastgpt {

static constexpr Kernels tables[] = {
#ifdef FASTGPT_BUILD_SSE2
    sse2::table,
#endif
#ifdef FASTGPT_BUILD_AVX2
    avx2::table,
#endif
#ifdef FASTGPT_BUILD_AVX512
    avx512::table,
#endif
#ifdef FASTGPT_BUILD_AMX
    amx::table,
#endif
#ifdef FASTGPT_BUILD_NEON
    neon::table,
#endif
#ifdef FASTGPT_BUILD_GENERIC
    generic::table,
#endif
};
static bool dot_products_are_here() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1; // HWCAP_ASIMDDP
#else
    return true; // every ARM processor that macOS runs on
#endif
}
bool has_dot_products = dot_products_are_here();

const Kernels* const kernels_begin = tables;
const Kernels* const kernels_end = tables + sizeof tables / sizeof tables[0];

} // namespace fastgpt
