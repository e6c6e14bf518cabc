// Weights for decoding. A token meets each weight once, so its speed is that at which memory is read: the weights lie
// in the order in which they are used, as small as their dtype allows, and are read from front to back.
//
//             k ->                                   A matrix (N, K) is cut into strips of 16 rows. Along k, a strip is
//           +------+------+------+------+            made of cells of 64 bytes: 16 lanes of 32 bits, a lane a row.
//    row 0  | lane | lane | lane |      |            A lane holds, from its lowest bits on,
//    row 1  | lane | lane |      |      |
//     ...   |      |      |      |      |              1 float32      k
//    row 15 | lane | lane | lane |      |              2 bfloat16     k, k + 1
//           +------+------+------+------+              4 int8         k .. k + 3
//            cell 0 cell 1 ...                         8 int4         k, k + 4, k + 1, k + 5, ... k + 7
//
// Lanes are rows, so a sum never runs across lanes: x[k] is broadcast, and a cell is one, two or four registers. The
// same bytes serve every instruction set. A strip's sums run in one order, however many rows of x meet it.
//
//   float32    as it is
//   bfloat16   rounded to nearest
//   int8       w = q s, |q| <= 127, with a scale s for each row, of 17 bits, so that q s is a float: 16 of them end a
//   strip int4       w = (u - 8) s, 0 <= u <= 15, with a bfloat16 scale for each row and group of 32 k, such that the
//   group's
//              largest magnitude is -8 s. 64 k are a cell of scales (the first group's in the low halves) and 8 cells.
//              x is rounded, too: to int8, with a scale for each 32 k. A product of the two is a whole number.
//
// K is padded with zeros to whole cells or groups, N to whole strips.
//
// Compiled once for each instruction set.

constexpr int64_t LANES = 16, CELL = 64, GROUP = 32; // rows of a strip; bytes; k that share a scale
constexpr float smallest = 1e-30f;                   // magnitude that int4's scales, and those of x, tell from 0
constexpr int REGISTERS = CELL / vector_bytes;       // of a cell

using words = simd<float>::bits;

template <class V> FASTGPT_INLINE V read(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
FASTGPT_INLINE vec<float> as_float(words v) { return read<vec<float>>(&v); }
FASTGPT_INLINE vec<float> to_float(mask<float> v) { return __builtin_convertvector(v, vec<float>); }
FASTGPT_INLINE mask<float> signed_words(words v) { return read<mask<float>>(&v); }

FASTGPT_INLINE uint16_t to_bfloat16(float x) { // to nearest, ties to even
    const uint32_t u = read<uint32_t>(&x);
    return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
FASTGPT_INLINE float from_bfloat16(uint16_t half) {
    const uint32_t u = uint32_t(half) << 16;
    return read<float>(&u);
}

// Rows of x that meet the same weights.
struct Activations {
    const float* x; // a row's K values, then zeros to a multiple of 64
    int64_t stride;
    const int8_t* q = nullptr; // for int4: x = q scale, a scale and the sum of q for each group
    const float* scale = nullptr;
    const float* sum = nullptr;
    int64_t ahead = 4096; // bytes to prefetch: several rows of x slow the reads, and then memory's time shows
    FASTGPT_INLINE Activations from(int64_t row) const {
        const int64_t group = row * stride / GROUP;
        return {x + row * stride, stride, q + row * stride, scale + group, sum + group, ahead};
    }
};

// Every format: bytes of a strip; pack up to 16 rows, zeros past them; one value; the VL lanes from `lane` on for
// k0 <= k < k1, k0 a multiple of 64; the products of a strip with B rows of x: y[b * 16 + lane].

struct Float32 {
    static constexpr int max_rows = vector_bytes == 64 ? 8 : vector_bytes == 32 ? 2 : 1; // that the registers hold
    static FASTGPT_INLINE int64_t bytes(int64_t K) { return round_up(K, 2) * CELL; }
    static void pack(const float* w, int64_t rows, int64_t K, char* strip) {
        float* to = reinterpret_cast<float*>(strip);
        for (int64_t k = 0; k < round_up(K, 2); k++)
            for (int64_t r = 0; r < LANES; r++) *to++ = r < rows && k < K ? w[r * K + k] : 0;
    }
    static FASTGPT_INLINE float value(const char* strip, int64_t, int64_t lane, int64_t k) {
        return read<float>(strip + k * CELL + lane * 4);
    }
    static FASTGPT_INLINE void put(char* strip, int64_t lane, int64_t k, float x) {
        __builtin_memcpy(strip + k * CELL + lane * 4, &x, 4);
    }
    static FASTGPT_INLINE void panel(const char* strip, int64_t, int64_t lane, int64_t k0, int64_t k1, float* to,
                                     int64_t stride) {
        for (int64_t k = k0; k < k1; k++, to += stride) store(to, read<vec<float>>(strip + k * CELL + lane * 4));
    }
    template <int B> static FASTGPT_INLINE void multiply(const char* w, int64_t K, const Activations& a, float* y) {
        vec<float> even[B][REGISTERS] = {}, odd[B][REGISTERS] = {};
        for (int64_t k = 0; k < K; k += 2, w += 2 * CELL)
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) {
                __builtin_prefetch(w + a.ahead + r * vector_bytes);
                __builtin_prefetch(w + a.ahead + CELL + r * vector_bytes);
                const vec<float> w0 = read<vec<float>>(w + r * vector_bytes);
                const vec<float> w1 = read<vec<float>>(w + r * vector_bytes + CELL);
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    even[b][r] += w0 * broadcast(a.x[b * a.stride + k]);
                    odd[b][r] += w1 * broadcast(a.x[b * a.stride + k + 1]);
                }
            }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) store(y + b * LANES + r * VL<float>, even[b][r] + odd[b][r]);
    }
};

struct BFloat16 {
    static constexpr int max_rows = Float32::max_rows;
    static FASTGPT_INLINE int64_t bytes(int64_t K) { return (K + 1) / 2 * CELL; }
    static void pack(const float* w, int64_t rows, int64_t K, char* strip) {
        for (int64_t k = 0; k < K; k += 2)
            for (int64_t r = 0; r < LANES; r++, strip += 4) {
                const float low = r < rows ? w[r * K + k] : 0, high = r < rows && k + 1 < K ? w[r * K + k + 1] : 0;
                const uint32_t word = to_bfloat16(low) | uint32_t(to_bfloat16(high)) << 16;
                __builtin_memcpy(strip, &word, 4);
            }
    }
    static FASTGPT_INLINE float value(const char* strip, int64_t, int64_t lane, int64_t k) {
        return from_bfloat16(read<uint16_t>(strip + k / 2 * CELL + lane * 4 + k % 2 * 2));
    }
    static FASTGPT_INLINE void put(char* strip, int64_t lane, int64_t k, float x) {
        const uint16_t half = to_bfloat16(x);
        __builtin_memcpy(strip + k / 2 * CELL + lane * 4 + k % 2 * 2, &half, 2);
    }
    static FASTGPT_INLINE void panel(const char* strip, int64_t, int64_t lane, int64_t k0, int64_t k1, float* to,
                                     int64_t stride) {
        for (int64_t k = k0; k < k1; k += 2, to += 2 * stride) {
            const words w = read<words>(strip + k / 2 * CELL + lane * 4);
            store(to, as_float(w << 16));
            if (k + 1 < k1) store(to + stride, as_float(w & 0xFFFF0000u));
        }
    }
    template <int B> static FASTGPT_INLINE void multiply(const char* w, int64_t K, const Activations& a, float* y) {
        vec<float> even[B][REGISTERS] = {}, odd[B][REGISTERS] = {};
        for (int64_t k = 0; k < K; k += 2, w += CELL)
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) {
                __builtin_prefetch(w + a.ahead + r * vector_bytes);
                const words pair = read<words>(w + r * vector_bytes);
                const vec<float> w0 = as_float(pair << 16), w1 = as_float(pair & 0xFFFF0000u);
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    even[b][r] += w0 * broadcast(a.x[b * a.stride + k]);
                    odd[b][r] += w1 * broadcast(a.x[b * a.stride + k + 1]);
                }
            }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) store(y + b * LANES + r * VL<float>, even[b][r] + odd[b][r]);
    }
};

struct Int8 {
    static constexpr int max_rows = vector_bytes == 64 ? 8 : 1;
    static FASTGPT_INLINE int64_t cells(int64_t K) { return (K + 3) / 4 * CELL; } // bytes; the scales follow
    static FASTGPT_INLINE int64_t bytes(int64_t K) { return cells(K) + CELL; }
    static float scale_of(const float* w, int64_t K) {
        float largest = 0;
        for (int64_t k = 0; k < K; k++) largest = __builtin_fabsf(w[k]) > largest ? __builtin_fabsf(w[k]) : largest;
        const float s = largest / 127;
        const uint32_t up = (read<uint32_t>(&s) + 127) & ~127u; // 17 bits, never smaller
        return read<float>(&up);
    }
    static void pack(const float* w, int64_t rows, int64_t K, char* strip) {
        __builtin_memset(strip, 0, size_t(bytes(K)));
        for (int64_t r = 0; r < rows; r++, w += K) {
            const float s = scale_of(w, K);
            __builtin_memcpy(strip + cells(K) + r * 4, &s, 4);
            for (int64_t k = 0; k < K; k++)
                strip[k / 4 * CELL + r * 4 + k % 4] = char(s > 0 ? __builtin_lrintf(w[k] / s) : 0);
        }
    }
    static FASTGPT_INLINE float value(const char* strip, int64_t K, int64_t lane, int64_t k) {
        const int8_t q = read<int8_t>(strip + k / 4 * CELL + lane * 4 + k % 4);
        return q * read<float>(strip + cells(K) + lane * 4);
    }
    static FASTGPT_INLINE void panel(const char* strip, int64_t K, int64_t lane, int64_t k0, int64_t k1, float* to,
                                     int64_t stride) {
        const vec<float> s = read<vec<float>>(strip + cells(K) + lane * 4);
        for (int64_t k = k0; k < k1; k += 4) {
            const words w = read<words>(strip + k / 4 * CELL + lane * 4);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, to += stride)
                if (k + j < k1) store(to, to_float(signed_words(w << (24 - 8 * j)) >> 24) * s);
        }
    }
    template <int B> static FASTGPT_INLINE void multiply(const char* w, int64_t K, const Activations& a, float* y) {
        constexpr int chains = 3; // of additions that need not wait for each other: k modulo 3
        vec<float> sums[chains][B][REGISTERS] = {};
        const auto add_cell = [&](int64_t k, int phase) FASTGPT_LAMBDA {
            const char* cell = w + k / 4 * CELL;
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) {
                __builtin_prefetch(cell + a.ahead + r * vector_bytes);
                const words four = read<words>(cell + r * vector_bytes);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const vec<float> q = to_float(signed_words(four << (24 - 8 * j)) >> 24);
#pragma GCC unroll 8
                    for (int b = 0; b < B; b++)
                        sums[(phase + j) % chains][b][r] += q * broadcast(a.x[b * a.stride + k + j]);
                }
            }
        };
        int64_t k = 0;
        for (; k + 8 < K; k += 12) {
            add_cell(k, 0);
            add_cell(k + 4, 1);
            add_cell(k + 8, 2);
        }
        if (k < K) add_cell(k, 0);
        if (k + 4 < K) add_cell(k + 4, 1);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) {
                const vec<float> sum = sums[0][b][r] + sums[1][b][r] + sums[2][b][r];
                store(y + b * LANES + r * VL<float>, sum * read<vec<float>>(w + cells(K) + r * vector_bytes));
            }
    }
};

// Products of int4's lanes with four of x's bytes each, low nibbles with q[0 .. 3], high ones with q[4 .. 7], summed
// over a group. The instructions stand here by name: compilers differ in which of them a function may use.
struct PlainDot { // in floats, which hold these whole numbers exactly
    using Sum = vec<float>;
    static FASTGPT_INLINE Sum begin() { return Sum{}; }
    static FASTGPT_INLINE Sum add(Sum sum, words low, words high, const int8_t* q) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sum += to_float(signed_words(low >> (8 * j) & 0xFu)) * broadcast(float(q[j]));
            sum += to_float(signed_words(high >> (8 * j) & 0xFu)) * broadcast(float(q[j + 4]));
        }
        return sum;
    }
    static FASTGPT_INLINE vec<float> end(Sum sum) { return sum; }
};

FASTGPT_INLINE words four_bytes(const int8_t* q) { return read<uint32_t>(q) - words{}; }

#if defined(__x86_64__) && FASTGPT_VECTOR_BYTES >= 32
struct PairDot { // pairs of products u8 x s8 in 16 bits, which hold a group's: 2 * 15 * 127 * 8 < 2^15
    using Sum = words;
    static FASTGPT_INLINE Sum begin() { return Sum{}; }
    static FASTGPT_INLINE words add16(words a, words b) {
        typedef int16_t halves __attribute__((vector_size(vector_bytes)));
        const halves sum = read<halves>(&a) + read<halves>(&b);
        return read<words>(&sum);
    }
    static FASTGPT_INLINE Sum add(Sum sum, words low, words high, const int8_t* q) {
        words a, b;
        __asm__("vpmaddubsw %2, %1, %0" : "=v"(a) : "v"(low), "v"(four_bytes(q)));
        __asm__("vpmaddubsw %2, %1, %0" : "=v"(b) : "v"(high), "v"(four_bytes(q + 4)));
        return add16(sum, add16(a, b));
    }
    static FASTGPT_INLINE vec<float> end(Sum sum) {
        mask<float> pairs;
        __asm__("vpmaddwd %2, %1, %0" : "=v"(pairs) : "v"(sum), "v"(0x00010001u - words{}));
        return to_float(pairs);
    }
};
using SlowDot = PairDot;
#endif
#if defined(__x86_64__) && FASTGPT_VECTOR_BYTES == 64
struct FastDot { // VNNI: four products u8 x s8 are added to each lane
    using Sum = mask<float>;
    static FASTGPT_INLINE Sum begin() { return Sum{}; }
    static FASTGPT_INLINE Sum add(Sum sum, words low, words high, const int8_t* q) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(low), "v"(four_bytes(q)));
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(high), "v"(four_bytes(q + 4)));
        return sum;
    }
    static FASTGPT_INLINE vec<float> end(Sum sum) { return to_float(sum); }
};
#elif defined(__x86_64__) && FASTGPT_VECTOR_BYTES == 32
using FastDot = PairDot;
#elif defined(__aarch64__)
struct FastDot { // ARM's dot product: four products s8 x s8
    using Sum = mask<float>;
    static FASTGPT_INLINE Sum begin() { return Sum{}; }
    static FASTGPT_INLINE Sum add(Sum sum, words low, words high, const int8_t* q) {
        __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(low), "w"(four_bytes(q)));
        __asm__(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b"
                : "+w"(sum)
                : "w"(high), "w"(four_bytes(q + 4)));
        return sum;
    }
    static FASTGPT_INLINE vec<float> end(Sum sum) { return to_float(sum); }
};
using SlowDot = PlainDot;
#else
using FastDot = PlainDot;
using SlowDot = PlainDot;
#endif

template <class Dot> struct Int4 {
    static constexpr int max_rows = vector_bytes == 64 ? 8 : vector_bytes == 32 ? 2 : 1;
    static constexpr int64_t block = 2 * GROUP, block_bytes = 9 * CELL; // k of a cell of scales, and their bytes
    static FASTGPT_INLINE int64_t bytes(int64_t K) { return round_up(K, block) / block * block_bytes; }
    static void pack_group(const float* x, int64_t n, int64_t half, char* scale, char* cells) {
        float far = 0;
        for (int64_t i = 0; i < n; i++) far = __builtin_fabsf(x[i]) > __builtin_fabsf(far) ? x[i] : far;
        const uint16_t s = __builtin_fabsf(far) > smallest ? to_bfloat16(far / -8) : 0;
        const float inverse = s ? 1 / from_bfloat16(s) : 0;
        __builtin_memcpy(scale + 2 * half, &s, 2);
        for (int64_t i = 0; i < GROUP; i++) {
            const int64_t u = (i < n ? __builtin_lrintf(x[i] * inverse) : 0) + 8;
            cells[i / 8 * CELL + i % 4] |= char((u < 0 ? 0 : u > 15 ? 15 : u) << (i & 4));
        }
    }
    static void pack(const float* w, int64_t rows, int64_t K, char* strip) {
        __builtin_memset(strip, 0, size_t(bytes(K)));
        for (int64_t r = 0; r < rows; r++, w += K)
            for (int64_t k = 0; k < K; k += GROUP) {
                char* at = strip + k / block * block_bytes + r * 4;
                const int64_t half = k / GROUP % 2;
                pack_group(w + k, K - k < GROUP ? K - k : GROUP, half, at, at + CELL + half * 4 * CELL);
            }
    }
    static FASTGPT_INLINE float value(const char* strip, int64_t, int64_t lane, int64_t k) {
        const char* at = strip + k / block * block_bytes + lane * 4;
        const float s = from_bfloat16(read<uint16_t>(at + k / GROUP % 2 * 2));
        const uint8_t pair = read<uint8_t>(at + CELL + k % block / 8 * CELL + k % 4);
        return float(int(pair >> (k & 4) & 15) - 8) * s;
    }
    static FASTGPT_INLINE vec<float> scales(words both, int half) {
        return as_float(half ? both & 0xFFFF0000u : both << 16);
    }
    static FASTGPT_INLINE void panel(const char* strip, int64_t, int64_t lane, int64_t k0, int64_t k1, float* to,
                                     int64_t stride) {
        for (int64_t k = k0; k < k1; k += 8) {
            const char* at = strip + k / block * block_bytes + lane * 4;
            const vec<float> s = scales(read<words>(at), int(k / GROUP % 2));
            const words w = read<words>(at + CELL + k % block / 8 * CELL);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++, to += stride)
                if (k + j < k1) store(to, to_float(signed_words(w >> (j % 4 * 8 + (j & 4)) & 15u) - 8) * s);
        }
    }
    template <int B> static FASTGPT_INLINE void multiply(const char* w, int64_t K, const Activations& a, float* y) {
        vec<float> sums[B][REGISTERS] = {};
        for (int64_t k = 0; k < K; w += block_bytes)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++, k += GROUP) {
                typename Dot::Sum dots[B][REGISTERS];
#pragma GCC unroll 8
                for (int b = 0; b < B; b++)
#pragma GCC unroll 4
                    for (int r = 0; r < REGISTERS; r++) dots[b][r] = Dot::begin();
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++)
#pragma GCC unroll 4
                    for (int r = 0; r < REGISTERS; r++) {
                        const char* at = w + (1 + 4 * half + c) * CELL + r * vector_bytes;
                        __builtin_prefetch(at + a.ahead);
                        const words v = read<words>(at);
                        const words low = v & 0x0F0F0F0Fu, high = v >> 4 & 0x0F0F0F0Fu;
#pragma GCC unroll 8
                        for (int b = 0; b < B; b++)
                            dots[b][r] = Dot::add(dots[b][r], low, high, a.q + b * a.stride + k + 8 * c);
                    }
#pragma GCC unroll 4
                for (int r = 0; r < REGISTERS; r++) {
                    const vec<float> s = scales(read<words>(w + r * vector_bytes), half);
#pragma GCC unroll 8
                    for (int b = 0; b < B; b++) { // u stands for u - 8: 8 times the sum of q is too much
                        const int64_t group = (b * a.stride + k) / GROUP;
                        const vec<float> dot = Dot::end(dots[b][r]) - broadcast(8 * a.sum[group]);
                        sums[b][r] += dot * (s * broadcast(a.scale[group]));
                    }
                }
            }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
#pragma GCC unroll 4
            for (int r = 0; r < REGISTERS; r++) store(y + b * LANES + r * VL<float>, sums[b][r]);
    }
};

// A row of x in int8: for each group q, the scale that brings its largest magnitude to 127, and the sum of q.
inline FASTGPT_NOINLINE void round_to_int8(const float* x, int64_t K, int8_t* q, float* scales, float* sums) {
    typedef int8_t bytes __attribute__((vector_size(VL<float>)));
    for (int64_t k = 0; k < K; k += GROUP, x += GROUP, q += GROUP) {
        vec<float> magnitudes{};
        for (int64_t i = 0; i < GROUP; i += VL<float>) {
            const vec<float> v = load(x + i);
            magnitudes = max(magnitudes, v < 0 ? -v : v);
        }
        float largest = 0;
        for (int i = 0; i < VL<float>; i++)
            if (!(magnitudes[i] <= largest)) largest = magnitudes[i]; // NaN stays
        const vec<float> steps = broadcast(largest > smallest ? 127 / largest : 0), magic = broadcast(12582912.0f);
        vec<float> sum_of_q{};
        for (int64_t i = 0; i < GROUP; i += VL<float>) { // adding 1.5 * 2^23 rounds to a whole number
            const vec<float> whole = rounded<float>(load(x + i) * steps) + magic - magic;
            const bytes b = __builtin_convertvector(__builtin_convertvector(whole, mask<float>), bytes);
            __builtin_memcpy(q + i, &b, sizeof b);
            sum_of_q += whole;
        }
        *scales++ = largest > smallest ? largest / 127 : largest - largest; // 0, or NaN
        *sums++ = sum<float>(sum_of_q);
    }
}

// body(Format()) for a matrix's packing.
template <class Body> FASTGPT_INLINE auto with_format(Packing packing, const Body& body) {
    switch (packing) {
    case Packing::float32:
        return body(Float32{});
    case Packing::bfloat16:
        return body(BFloat16{});
    case Packing::int8:
        return body(Int8{});
    default:
        return has_dot_products ? body(Int4<FastDot>{}) : body(Int4<SlowDot>{});
    }
}

inline int64_t strip_bytes(Packing packing, int64_t K) {
    return with_format(packing, [&](auto format) { return format.bytes(K); });
}

inline int64_t packed_bytes(Packing packing, int64_t N, int64_t K) {
    return ceil_div(N, LANES) * strip_bytes(packing, K);
}

// w (N, K) becomes strips.
inline void pack(const float* w, Packing packing, int64_t N, int64_t K, char* to) {
    const int64_t bytes = strip_bytes(packing, K);
    parallel_tasks(ceil_div(N, LANES), [&](int64_t strip) {
        const int64_t n = strip * LANES, rows = N - n < LANES ? N - n : LANES;
        with_format(packing, [&](auto format) { format.pack(w + n * K, rows, K, to + strip * bytes); });
    });
}

// And back: to (N, K).
inline void unpack(const PackedMatrix& w, float* to) {
    const int64_t bytes = strip_bytes(w.packing, w.K);
    parallel_tasks(w.N, [&](int64_t n) {
        const char* strip = w.data + n / LANES * bytes;
        with_format(w.packing, [&](auto format) {
            for (int64_t k = 0; k < w.K; k++) to[n * w.K + k] = format.value(strip, w.K, n % LANES, k);
        });
    });
}

// The products of a strip with n rows of x: y[b * 16 + lane]. As many rows at once as the registers hold; the first
// brings the strip to the cache, the others the next strip.
template <class Format, int B>
FASTGPT_NOINLINE void multiply_rows(const char* strip, int64_t K, const Activations& a, float* y) {
    Format::template multiply<B>(strip, K, a, y);
}
template <class Format, int B = Format::max_rows>
FASTGPT_INLINE void multiply_strip(const char* strip, int64_t K, Activations a, int64_t n, float* y) {
    int64_t b = 0;
    for (; b + B <= n; b += B) {
        multiply_rows<Format, B>(strip, K, a.from(b), y + b * LANES);
        a.ahead = Format::bytes(K);
    }
    if constexpr (B > 1)
        if (b < n) multiply_strip<Format, B / 2>(strip, K, a.from(b), n - b, y + b * LANES);
}
inline void multiply_strip(Packing packing, const char* strip, int64_t K, const Activations& a, int64_t n, float* y) {
    with_format(packing, [&](auto format) { multiply_strip<decltype(format)>(strip, K, a, n, y); });
}

// Fma that takes B^T from strips: p.B.data points to them.
template <class Format> struct FromStrips : Fma<float> {
    static FASTGPT_NOINLINE bool pack_b(const MatmulArgs<float>& p, int64_t k0, int64_t kc, int64_t n0, int64_t width,
                                        float* to) {
        const char* strips = reinterpret_cast<const char*>(p.B.data);
        for (int64_t j = 0; j < width; j += VL<float>) {
            const int64_t n = n0 + j;
            Format::panel(strips + n / LANES * Format::bytes(p.K), p.K, n % LANES, k0, k0 + kc, to + j, NR);
        }
        return true;
    }
};

// The engines for prompts whose rows may be rounded as their weights are: of bfloat16, whose cells are B as it lies in
// registers, and of int8.
#ifdef FASTGPT_AMX
struct BFloat16FromStrips : AmxBFloat16 {
    using Fallback = FromStrips<BFloat16>;
    static FASTGPT_NOINLINE bool pack_b(const MatmulArgs<float>& p, int64_t k0, int64_t kc, int64_t n0, int64_t width,
                                        float* packed_b) {
        const char* strips = reinterpret_cast<const char*>(p.B.data);
        char* to = reinterpret_cast<char*>(packed_b);
        for (int64_t k = k0; k < k0 + kc; k += depth)
            for (int64_t j = 0; j < NR; j += LANES)
                for (int64_t i = 0; i < 8; i++, to += 2 * CELL) { // pairs of neighbours become pairs 16 k apart
                    const char* strip = strips + (n0 + j) / LANES * BFloat16::bytes(p.K);
                    const auto cell = [&](int64_t at) FASTGPT_LAMBDA {
                        return j < width && at < p.K ? read<words>(strip + at / 2 * CELL) : words{};
                    };
                    const words low = cell(k + 2 * i), high = cell(k + 16 + 2 * i);
                    const words pairs[] = {(low & 0xFFFFu) | high << 16, low >> 16 | (high & 0xFFFF0000u)};
                    __builtin_memcpy(to, pairs, sizeof pairs);
                }
        return true;
    }
};
#elif defined(FASTGPT_BFLOAT16)
struct BFloat16FromStrips : Fma<float, Pair> {
    static FASTGPT_NOINLINE bool pack_b(const MatmulArgs<float>& p, int64_t k0, int64_t kc, int64_t n0, int64_t width,
                                        float* packed_b) {
        const char* strips = reinterpret_cast<const char*>(p.B.data);
        for (int64_t j = 0; j < width; j += VL<float>) {
            const char* cell = strips + (n0 + j) / LANES * BFloat16::bytes(p.K) + k0 / 2 * CELL + (n0 + j) % LANES * 4;
            float* to = packed_b + j;
            for (int64_t k = 0; k < kc; k += 2, cell += CELL, to += NR) __builtin_memcpy(to, cell, vector_bytes);
        }
        return true;
    }
};
#endif
#if defined(__x86_64__) && FASTGPT_VECTOR_BYTES == 64
#define FASTGPT_INT8_PRODUCTS
#include "matmul_int8.h"
#endif

// Is there such an engine here?
inline bool rounds_prompts([[maybe_unused]] Packing packing) {
#ifdef FASTGPT_INT8_PRODUCTS
    if (packing == Packing::int8) return has_dot_products;
#endif
#if defined(FASTGPT_AMX) || defined(FASTGPT_BFLOAT16)
    if (packing == Packing::bfloat16) return has_bfloat16();
#endif
    return false;
}

// y = x w^T + bias for M rows of x (M, K); `add` to what y (M, N) holds; with gelu, y = gelu(x w^T + bias). With
// `rounded`, by those engines.
inline void matmul_packed(const PackedMatrix& w, const float* x, int64_t M, float* y, bool add, bool gelu,
                          [[maybe_unused]] bool rounded) {
    MatmulArgs<float> p{
        M, w.N, w.K, Rows<const float>::contiguous(x, M, w.K), false, {}, true, y, add, w.bias, gelu ? y : nullptr};
    p.B.data = reinterpret_cast<const float*>(w.data);
#ifdef FASTGPT_INT8_PRODUCTS
    if (rounded && w.packing == Packing::int8) return matmul<float, Int8Dot>(p);
#undef FASTGPT_INT8_PRODUCTS
#endif
#if defined(FASTGPT_AMX) || defined(FASTGPT_BFLOAT16)
    if (rounded && w.packing == Packing::bfloat16) return matmul<float, BFloat16FromStrips>(p);
#endif
    with_format(w.packing, [&](auto format) { matmul<float, FromStrips<decltype(format)>>(p); });
}
