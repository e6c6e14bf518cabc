// What the bindings know of the kernels: a table of function pointers, which dispatch.cpp fills once per instruction
// set.
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
    long count = 1, first = 0; // row 0 is the tensor's row `first`
    int rank = 0;              // of the leading dimensions
    long size[max_rank], stride[max_rank];

    static Rows contiguous(T* data, long count, long width) {
        Rows rows;
        rows.data = data, rows.count = rows.size[0] = count, rows.rank = 1, rows.stride[0] = width;
        return rows;
    }
    Rows from(long row) const {
        Rows rows = *this;
        rows.first += row, rows.count -= row;
        return rows;
    }
    FASTGPT_INLINE T* operator[](long i) const {
        i += first;
        if (rank == 1) return data + i * stride[0];
        T* p = data;
        for (int d = rank - 1; d >= 0; d--) p += i % size[d] * stride[d], i /= size[d];
        return p;
    }
};

// (B, T, channels) with adjacent channels.
template <class T> struct Sequence {
    T* data;
    long batch, time; // strides
    FASTGPT_INLINE T* at(long b, long t) const { return data + b * batch + t * time; }
};

// C = A B, or C += A B; then + bias, then activated = gelu(C).
template <class T> struct Product {
    long M, N, K;
    Rows<const T> A; // (M, K): element (m, k) is A[m][k], or A[k][m] where transposed
    bool A_transposed;
    Rows<const T> B; // (K, N), likewise
    bool B_transposed;
    T* C;                    // (M, N), contiguous
    bool add = false;        // to what C holds
    const T* bias = nullptr; // (N), or null
    T* activated = nullptr;  // like C, or C itself: then only gelu(C) is kept; or null
};

// How decoding stores weights: strips.h.
enum class Packing { float32, bfloat16, int8, int4 };

struct PackedMatrix { // (N, K) in strips of 16 rows
    Packing packing;
    long N, K;
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
    long n_layer, C, H, V;
    PackedMatrix wte;
    const float* wpe; // (block_size, C) and zeros to a multiple of 16
    const DecoderLayer* layers;
    const float *ln_f_weight, *ln_f_bias;
};

// Keys and values of `slots` sequences, each up to `capacity` positions, a multiple of 16.
struct DecoderCache {
    Packing packing; // float32 or bfloat16
    long slots, capacity;
    char* data;
};

struct DecoderToken {
    int64_t id, slot, position;
};
struct DecoderPrompt {
    const int64_t* ids;
    long T, slot;
};

struct AttentionShape {
    long B, T, H, D;
    double dropout;
    uint64_t seed;
};

// Rows that one task of layer_norm takes: some 256 KiB, so that small inputs stay on one core.
FASTGPT_INLINE long layer_norm_block(long C) { return 65536 / C < 1 ? 1 : 65536 / C; }

template <class T> struct KernelsFor {
    void (*layer_norm_forward)(const Rows<const T>& x, const T* weight, const T* bias, T eps, long C, T* y, T* mean,
                               T* rstd);
    void (*layer_norm_backward)(const Rows<const T>& dy, const Rows<const T>& x, const T* weight, const T* mean,
                                const T* rstd, long C, T* dx, T* dweight, T* dbias);
    void (*gelu_forward)(const Rows<const T>& x, long C, T* y);
    void (*gelu_backward)(const Rows<const T>& dy, const Rows<const T>& x, long C, T* dx);
    void (*matmul)(const Product<T>& product);
    double (*lm_loss)(const Rows<const T>& hidden, const Rows<const T>& weight, const int64_t* targets, long M, long C,
                      long V, T* dhidden, T* dweight);
    void (*attention_forward)(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* stats);
    void (*attention_backward)(const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                               Sequence<const T> out, const T* stats, T* dqkv);
};

struct DecoderKernels {
    long (*packed_bytes)(Packing packing, long N, long K);
    void (*pack)(const float* w, Packing packing, long N, long K, char* to);
    void (*unpack)(const PackedMatrix& w, float* to);
    long (*cache_bytes)(const DecoderModel& model, const DecoderCache& cache); // of a slot
    void (*decode)(const DecoderModel& model, const DecoderCache& cache, const DecoderToken* tokens, long n,
                   float* logits);
    void (*prefill)(const DecoderModel& model, const DecoderCache& cache, const DecoderPrompt* prompts, long n,
                    bool all_logits, float* logits);
};

struct Kernels {
    const char* name; // as FASTGPT_ISA spells it
    bool (*runs_here)();
    KernelsFor<float> f32;
    KernelsFor<double> f64;
    DecoderKernels decoder;
    double (*fma_work)(long n); // does n fused multiply-adds a lane; -> their number in all
    double (*read_work)(const float* data, long n, double* out); // sums n floats into *out; -> bytes read
};

extern bool has_dot_products; // an instruction for int4's products; false does without

extern const Kernels *const kernels_begin, *const kernels_end; // from the oldest instruction set to the newest

} // namespace fastgpt
