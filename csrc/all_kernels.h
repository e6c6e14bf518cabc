// All kernels for one instruction set, in a namespace of their own, and the table of them. dispatch.cpp includes this
// file once for each, with
//
//   FASTGPT_ISA             its name, also the namespace's, where runs_here() stands already
//   FASTGPT_TARGET          what the compiler may use beyond the baseline, or not defined
//   FASTGPT_VECTOR_BYTES    the width of a register
//   FASTGPT_MR, FASTGPT_NV  rows and registers per row of the microkernel's register block
//   FASTGPT_AMX             defined where matrix products run on AMX
//   FASTGPT_BFLOAT16        defined where there is an instruction for bfloat16 products; has_bfloat16() tells whether
//                           the processor has it

#define FASTGPT_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define FASTGPT_EXPANDED_PRAGMA(...) FASTGPT_PRAGMA(__VA_ARGS__)
#define FASTGPT_STRING(name) #name
#define FASTGPT_EXPANDED_STRING(name) FASTGPT_STRING(name)

#ifdef FASTGPT_TARGET
#ifdef __clang__
FASTGPT_EXPANDED_PRAGMA(clang attribute push(__attribute__((target(FASTGPT_TARGET))), apply_to = function))
#else
FASTGPT_PRAGMA(GCC push_options)
FASTGPT_EXPANDED_PRAGMA(GCC target(FASTGPT_TARGET))
#if FASTGPT_VECTOR_BYTES == 64
FASTGPT_PRAGMA(GCC target("prefer-vector-width=512"))
#endif
#endif
#endif

namespace fastgpt::FASTGPT_ISA {

#include "simd.h"

#ifdef FASTGPT_BFLOAT16
#include "bfloat16.h"
#endif

#include "microkernel.h"

#include "packing.h"

#include "layer_norm.h"

#include "gelu.h"

#include "matmul_fma.h"

#ifdef FASTGPT_AMX
#include "matmul_amx.h"
#endif

#include "matmul.h"

#include "loss.h"

#include "philox.h"

#include "attention_plain.h"

#include "attention_tile.h"

#include "attention_fma.h"

#ifdef FASTGPT_AMX
#include "attention_amx.h"
#endif

#include "attention.h"

#include "strips.h"

#include "decoder.h"

#include "machine.h"

template <class T, class Engine> constexpr ProductsFor<T> products_for() {
    return {matmul<T, Engine>, lm_loss<T, Engine>, attention_forward<T, Engine>, attention_backward<T, Engine>,
            Work<Engine>::run};
}

template <class T> constexpr KernelsFor<T> kernels_for() {
    KernelsFor<T> k{};
    static_cast<ProductsFor<T>&>(k) = products_for<T, EngineFor<T>>();
    k.layer_norm_forward = layer_norm_forward<T>;
    k.layer_norm_backward = layer_norm_backward<T>;
    k.gelu_forward = gelu_forward<T>;
    k.gelu_backward = gelu_backward<T>;
    return k;
}

constexpr DecoderKernels decoder_kernels = {packed_bytes, pack, unpack, rounds_prompts, cache_bytes, decode, prefill};

constexpr Kernels all_kernels() {
    Kernels k{};
    k.name = FASTGPT_EXPANDED_STRING(FASTGPT_ISA);
    k.runs_here = runs_here;
    k.f32 = kernels_for<float>();
    k.f64 = kernels_for<double>();
#if defined(FASTGPT_AMX) || defined(FASTGPT_BFLOAT16)
    k.has_bfloat16 = has_bfloat16;
    k.bfloat16 = products_for<float, BFloat16Engine>();
#else
    k.has_bfloat16 = [] { return false; };
#endif
    k.decoder = decoder_kernels;
    k.read_work = read_work;
    return k;
}

constexpr Kernels table = all_kernels(); // by the compiler: nothing of this instruction set runs at start-up

} // namespace fastgpt::FASTGPT_ISA

#ifdef FASTGPT_TARGET
#ifdef __clang__
FASTGPT_PRAGMA(clang attribute pop)
#else
FASTGPT_PRAGMA(GCC pop_options)
#endif
#endif

#undef FASTGPT_PRAGMA
#undef FASTGPT_EXPANDED_PRAGMA
#undef FASTGPT_STRING
#undef FASTGPT_EXPANDED_STRING
#undef FASTGPT_ISA
#undef FASTGPT_TARGET
#undef FASTGPT_VECTOR_BYTES
#undef FASTGPT_MR
#undef FASTGPT_NV
#undef FASTGPT_AMX
#undef FASTGPT_BFLOAT16
