// All kernels for one instruction set, and the table of them. dispatch.cpp includes this file in one namespace for
// each.

#include "simd.h"

#include "microkernel.h"

#include "layer_norm.h"

#include "gelu.h"

#ifdef FASTGPT_AMX
#include "amx.h"
#endif

#include "linear.h"

#include "loss.h"

#include "philox.h"

#include "attention_plain.h"

#include "attention.h"

#include "strips.h"

#include "decoder.h"

#include "machine.h"

template <class T> constexpr KernelsFor<T> kernels_for = {
    layer_norm_forward<T>, layer_norm_backward<T>, gelu_forward<T>, gelu_backward<T>, matmul<T>, lm_loss<T>,
    attention_forward<T>,  attention_backward<T>};

constexpr DecoderKernels decoder_kernels = {packed_bytes, pack, unpack, cache_bytes, decode, prefill};
