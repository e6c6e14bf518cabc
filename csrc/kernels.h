// What the bindings know of the kernels: a table of function pointers, one for each instruction set (dispatch.cpp).
#pragma once
#include <cstdint>

// always: an intrinsic in all but name. never: a loop that is worth its own registers.
#define FASTGPT_INLINE inline __attribute__((always_inline))
#define FASTGPT_LAMBDA __attribute__((always_inline))
#define FASTGPT_NOINLINE __attribute__((noinline))

namespace fastgpt {

// Rows of adjacent values in a tensor of any rank and strides: row i of the last dimension, counted as if contiguous.
template <class T> struct Rows {
    static constexpr int max_rank = 8;
    T* data = nullptr;
    int64_t count = 1;
    int64_t first = 0; // row 0 is the tensor's row `first`
    int rank = 0;      // of the leading dimensions
    int64_t size[max_rank], stride[max_rank];

    static Rows contiguous(T* data, int64_t count, int64_t ld) {
        Rows rows;
        rows.data = data;
        rows.count = count;
        rows.rank = 1;
        rows.size[0] = count;
        rows.stride[0] = ld;
        return rows;
    }
    Rows from(int64_t row) const {
        Rows rows = *this;
        rows.first += row;
        rows.count -= row;
        return rows;
    }
    FASTGPT_INLINE T* operator[](int64_t i) const {
        i += first;
        if (rank == 1) return data + i * stride[0];
        T* row = data;
        for (int d = rank - 1; d >= 0; d--) {
            row += i % size[d] * stride[d];
            i /= size[d];
        }
        return row;
    }
};

// (B, T, channels) with adjacent channels.
template <class T> struct Sequence {
    T* data;
    int64_t b_stride, t_stride;
    FASTGPT_INLINE T* at(int64_t b, int64_t t) const { return data + b * b_stride + t * t_stride; }
};

// C = A B, or C += A B; then + bias, then activated = gelu(C).
template <class T> struct MatmulArgs {
    int64_t M, N, K;
    Rows<const T> A; // (M, K): element (m, k) is A[m][k], or A[k][m] where transposed
    bool A_transposed;
    Rows<const T> B; // (K, N), likewise
    bool B_transposed;
    T* C;                    // (M, N), contiguous
    bool accumulate = false; // C += A B
    const T* bias = nullptr; // (N), or null
    T* activated = nullptr;  // like C, or C itself: then only gelu(C) is kept; or null
};

// How decoding stores weights: strips.h.
enum class Packing { float32, bfloat16, int8, int4 };

struct PackedMatrix { // (N, K) in strips of 16 rows
    Packing packing;
    int64_t N, K;
    const char* data;
    const float* bias; // (N) and zeros to whole strips; or null
};

// GPT-2's weights for decoding: decoder.h.
struct DecoderLayer {
    const float *ln_1_weight, *ln_1_bias;
    PackedMatrix c_attn; // for each head its rows of q, k and v, padded to whole strips
    PackedMatrix c_proj;
    const float *ln_2_weight, *ln_2_bias;
    PackedMatrix c_fc, mlp_c_proj;
};
struct DecoderModel {
    int64_t n_layer, C, H, V;
    PackedMatrix wte;
    const float* wpe; // (block_size, C) and zeros to a multiple of 16
    const DecoderLayer* layers;
    const float *ln_f_weight, *ln_f_bias;
    bool fast_prompts; // round their activations, too, where rounds_prompts
};

// Keys and values of `slots` sequences, each up to `capacity` positions, a multiple of 16.
struct DecoderCache {
    Packing packing; // float32 or bfloat16
    int64_t slots, capacity;
    char* data;
};

struct DecoderToken {
    int64_t id, slot, position;
};
struct DecoderPrompt {
    const int64_t* ids;
    int64_t T, slot;
};

struct AttentionShape {
    int64_t B, T, H, D;
    double dropout;
    uint64_t seed;
};

// What is made of matrix products, for one kind of them.
template <class T> struct ProductsFor {
    void (*matmul)(const MatmulArgs<T>& args);
    double (*lm_loss)(const Rows<const T>& hidden, const Rows<const T>& weight, const int64_t* targets, int64_t M,
                      int64_t C, int64_t V, T* dhidden, T* dweight);
    void (*attention_forward)(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* stats);
    void (*attention_backward)(const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                               Sequence<const T> out, const T* stats, T* dqkv);
    double (*work)(int64_t n); // n rounds of multiply-adds in registers, on every thread -> floating-point operations
};

template <class T> struct KernelsFor : ProductsFor<T> {
    void (*layer_norm_forward)(const Rows<const T>& x, const T* weight, const T* bias, T eps, int64_t C, T* y, T* mean,
                               T* rstd);
    void (*layer_norm_backward)(const Rows<const T>& dy, const Rows<const T>& x, const T* weight, const T* mean,
                                const T* rstd, int64_t C, T* dx, T* dweight, T* dbias);
    void (*gelu_forward)(const Rows<const T>& x, int64_t C, T* y);
    void (*gelu_backward)(const Rows<const T>& dy, const Rows<const T>& x, int64_t C, T* dx);
};

struct DecoderKernels {
    int64_t (*packed_bytes)(Packing packing, int64_t N, int64_t K);
    void (*pack)(const float* w, Packing packing, int64_t N, int64_t K, char* to);
    void (*unpack)(const PackedMatrix& w, float* to);
    bool (*rounds_prompts)(Packing packing); // are there products for prompts whose activations are rounded, too?
    int64_t (*cache_bytes)(const DecoderModel& model, const DecoderCache& cache); // of a slot
    void (*decode)(const DecoderModel& model, const DecoderCache& cache, const DecoderToken* tokens, int64_t n,
                   float* logits);
    void (*prefill)(const DecoderModel& model, const DecoderCache& cache, const DecoderPrompt* prompts, int64_t n,
                    bool all_logits, float* logits);
};

struct Kernels {
    const char* name; // as FASTGPT_ISA spells it
    bool (*runs_here)();
    KernelsFor<float> f32;
    KernelsFor<double> f64;
    bool (*has_bfloat16)();      // does the processor have the instruction that `bfloat16` needs?
    ProductsFor<float> bfloat16; // of operands rounded to bfloat16; all else is float32. Empty where there are none
    DecoderKernels decoder;
    double (*read_work)(const float* data, int64_t n, double* out); // sums n floats into *out; -> bytes read
};

extern bool has_dot_products; // an instruction for int4's products; false does without

extern const Kernels *const kernels_begin, *const kernels_end; // from the oldest instruction set to the newest

} // namespace fastgpt
