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

namespace fastgpt {

#ifdef FASTGPT_BUILD_SSE2
namespace sse2 { // what every x86-64 has
#define FASTGPT_VECTOR_BYTES 16
#define FASTGPT_MR 4
#define FASTGPT_NV 2
#include "all_kernels.h"
#undef FASTGPT_VECTOR_BYTES
#undef FASTGPT_MR
#undef FASTGPT_NV
} // namespace sse2
#endif

#ifdef FASTGPT_BUILD_AVX2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define FASTGPT_VECTOR_BYTES 32
#define FASTGPT_MR 4
#define FASTGPT_NV 3
#include "all_kernels.h"
#undef FASTGPT_VECTOR_BYTES
#undef FASTGPT_MR
#undef FASTGPT_NV
} // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(FASTGPT_BUILD_AVX512) || defined(FASTGPT_BUILD_AMX)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))),                   \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define FASTGPT_VECTOR_BYTES 64
#define FASTGPT_MR 8
#define FASTGPT_NV 3
#ifdef FASTGPT_BUILD_AVX512
namespace avx512 {
#include "all_kernels.h"
} // namespace avx512
#endif
#ifdef FASTGPT_BUILD_AMX
namespace amx { // AVX-512, and matrix products on AMX
#define FASTGPT_AMX
#include "all_kernels.h"
#undef FASTGPT_AMX
} // namespace amx
#endif
#undef FASTGPT_VECTOR_BYTES
#undef FASTGPT_MR
#undef FASTGPT_NV
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// AMX's tiles are 8 KiB of registers, which Linux gives to a process only if it asks.
[[maybe_unused]] static bool amx_is_here() {
#ifdef __linux__
    unsigned a, b, c, d;
    const bool has_bfloat16_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    constexpr int request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return has_bfloat16_tiles && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
[[maybe_unused]] static bool avx512_is_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// clang-format off
#define FASTGPT_TABLE(isa, runs_here) \
    {#isa, [] { return bool(runs_here); }, isa::kernels_for<float>, isa::kernels_for<double>, isa::decoder_kernels, isa::fma_work, isa::read_work}
// clang-format on

static const Kernels tables[] = {
#ifdef FASTGPT_BUILD_SSE2
    FASTGPT_TABLE(sse2, true),
#endif
#ifdef FASTGPT_BUILD_AVX2
    FASTGPT_TABLE(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
#ifdef FASTGPT_BUILD_AVX512
    FASTGPT_TABLE(avx512, avx512_is_here()),
#endif
#ifdef FASTGPT_BUILD_AMX
    FASTGPT_TABLE(amx, avx512_is_here() && amx_is_here()),
#endif
};

} // namespace fastgpt

#else // any other processor: vectors of 16 bytes, lowered to NEON or whatever the compiler has

namespace fastgpt {
#if defined(__aarch64__)
#define FASTGPT_ISA_NAME neon
#else
#define FASTGPT_ISA_NAME generic
#endif
namespace FASTGPT_ISA_NAME {
#define FASTGPT_VECTOR_BYTES 16
#define FASTGPT_MR 4
#define FASTGPT_NV 3
#include "all_kernels.h"
} // namespace FASTGPT_ISA_NAME
static const Kernels tables[] = {
#if defined(__aarch64__)
    {"neon", [] { return true; }, neon::kernels_for<float>, neon::kernels_for<double>, neon::decoder_kernels,
     neon::fma_work, neon::read_work},
#else
    {"generic", [] { return true; }, generic::kernels_for<float>, generic::kernels_for<double>,
     generic::decoder_kernels, generic::fma_work, generic::read_work},
#endif
};
} // namespace fastgpt

#endif

namespace fastgpt {
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
