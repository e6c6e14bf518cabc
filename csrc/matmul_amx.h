// Matrix products of float32 on AMX, whose tiles multiply bfloat16 (8 bits of mantissa) and add in float32, at 15 times
// the rate of float32 multiply-adds.
//
// A float has 24 bits of mantissa, so it is the sum of three bfloat16, exactly:
//
//   x = x0 + x1 + x2        x0 = x rounded to bfloat16        x1 = x - x0 rounded        x2 = x - x0 - x1
//
// and a product is the sum of nine. With |x1| <= 2^-8 |x0| and |x2| <= 2^-16 |x0|, three of them are below 2^-24 of the
// whole, the rounding of a float; the other six are computed:
//
//   a b = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0)
//
// So a multiply-add costs six, and yet less than half of what one costs in float32. Each product of two bfloat16 is
// exact, and 32 of them are added before the sum meets the accumulator: the result is no less exact than a float32 sum,
// by the same test as everything here. (The split is known from Henry, Tang and Heinecke 2019, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations".)
//
//                 16 columns   16 columns
//               +------------+------------+
//    depth 32   | b0  b1  b2 | b0  b1  b2 |      An AMX tile is 16 rows of 64 bytes. Four of the eight hold 32 x 32
//               +------------+------------+      sums, the other four pass the parts of A and B through.
//  16 a0 a1 a2  |   sums 0   |   sums 1   |
//  16 a0 a1 a2  |   sums 2   |   sums 3   |
//               +------------+------------+
//
// Infinities and NaN have no such sum (inf - inf is NaN): a micro-panel or panel that has one is left to Fma.
//
// Where bfloat16 products are wanted, x0 alone stands for x, and one product does instead of six: PARTS is 1.
//
// Compiled once per instruction set (all_kernels.h).

#ifdef FASTGPT_EMULATE_AMX // by the tests, on processors without it
#include "../tests/native/emulated_amx.h"
#else
// The instructions, by name: compilers differ in what their own functions for them accept.
struct AmxInstructions {
    template <int TILE> static FASTGPT_INLINE void tilezero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
    template <int TILE> static FASTGPT_INLINE void tileloadd(const void* rows, int64_t stride) { // in bytes
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(TILE));
    }
    template <int TILE> static FASTGPT_INLINE void tilestored(void* rows, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(TILE) : "memory");
    }
    template <int SUMS, int A, int B> static FASTGPT_INLINE void tdpbf16ps() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
    }

    static FASTGPT_INLINE void begin() { // on this thread: all eight AMX tiles whole
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; i++) {
            config.bytes[i] = 64;
            config.rows[i] = 16;
        }
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    static FASTGPT_INLINE void end() { __asm__ volatile("tilerelease"); }
};
#endif

template <int PARTS> struct AmxTiles : AmxInstructions {
    static_assert(PARTS == 1 || PARTS == 3);
    static constexpr int MR = 32, NR = 32;
    static constexpr int depth = 32; // of an AMX tile
    static constexpr bool handles_nonfinite = false;
    using Fallback = Fma<float>; // for what it doesn't handle
    static constexpr int64_t KC = 384 * 3 / PARTS, max_rows = 512, max_columns = 1536, row_unit = MR;
    static constexpr int64_t bytes = PARTS * 2;        // of a float's parts
    static constexpr int64_t part_bytes = 32 * 32 * 2; // of one part of 32 x 32 values: two AMX tiles

    // In floats: a micro-panel of A, a panel of B.
    static FASTGPT_INLINE int64_t packed_a_size(int64_t kc) { return MR * round_up(kc, depth) * bytes / 4; }
    static FASTGPT_INLINE int64_t packed_b_size(int64_t kc) { return packed_a_size(kc) / MR * NR; }

    // Store to C directly only for the first k block and aligned rows. Later blocks are added once, after the AMX tile:
    // resuming the sum inside it would round at every pair.
    static FASTGPT_INLINE bool stores_directly(int64_t width, int64_t ldc, bool first) {
        return first && width == NR && ldc % 16 == 0;
    }

    // x rounded to the nearest bfloat16. The first of three parts may be any neighbour: ties go up, which is quicker.
    static FASTGPT_INLINE vec<float> to_bfloat16(vec<float> x) {
        simd<float>::bits part;
        __builtin_memcpy(&part, &x, sizeof part);
        if (PARTS == 1) part += 0x7FFFu + (part >> 16 & 1u);
        else part += 0x8000u;
        part &= 0xFFFF0000u;
        __builtin_memcpy(&x, &part, sizeof part);
        return x;
    }

    // 16 rows of 32 values (`along` the depth), or 32 rows of 16, become the AMX tiles of their parts, part_bytes
    // apart. Pair i of a tile's row is of k = i and 16 + i: the order in the depth is free, so long as A and B agree.
    // TURN: rows become columns. -> was every value finite?
    template <bool TURN, class Row>
    static FASTGPT_INLINE bool split(const Row& row, bool along, int rows, int width, char* to) {
        using bits = simd<float>::bits;
        vec<float> x[2][16], residue{};
        for (int half = 0; half < 2; half++) {
            const int from = along ? 16 * half : 0;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int r = along ? i : i + 16 * half;
                x[half][i] = r < rows && from < width ? load_first(row(r) + from, width - from) : vec<float>{};
            }
            if (TURN) transpose_registers<float>(x[half]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            bits pair[PARTS];
            for (int half = 0; half < 2; half++) {
                vec<float> rest = x[half][i];
                for (int p = 0; p < PARTS; p++) {
                    const vec<float> value = p < 2 ? to_bfloat16(rest) : rest; // the third is exact but for subnormals
                    bits part;
                    __builtin_memcpy(&part, &value, sizeof part);
                    part &= 0xFFFF0000u;
                    rest -= value;
                    pair[p] = half ? pair[p] | part : part >> 16;
                }
                residue += rest - rest;
            }
#pragma GCC unroll 3
            for (int p = 0; p < PARTS; p++) __builtin_memcpy(to + part_bytes * p + 64 * i, &pair[p], 64);
        }
        const float sum_of_residues = sum<float>(residue); // NaN for inf - inf, also where rounding gave an infinity
        return sum_of_residues == sum_of_residues;
    }

    // `count` rows of A (or columns of B) from `first` on, kc deep from k0 on, in groups of 32 (a micro-panel or
    // panel). x[i] is row (or column) i; with k_is_row, x[k] is element k of all of them. -> finite?
    template <bool OF_B> static FASTGPT_NOINLINE bool pack(const Rows<const float>& x, bool k_is_row, int64_t first,
                                                           int64_t count, int64_t k0, int64_t kc, float* packed) {
        char* to = reinterpret_cast<char*>(packed);
        bool finite = true;
        for (int64_t i = 0; i < count; i += 32)
            for (int64_t k = 0; k < kc; k += depth, to += 32 * depth * bytes)
                for (int64_t j = i; j < i + 32; j += 16) {
                    char* tile = to + (j - i) * 64;
                    const int deep = int(min<int64_t>(kc - k, depth));
                    const int wide = int(min<int64_t>(count - j, 16));
                    if (k_is_row) {
                        const auto row = [&](int64_t r) FASTGPT_LAMBDA { return x[k0 + k + r] + first + j; };
                        if (kc - k >= 2 * depth) // rows are far apart in memory: prefetch the next tile's
                            for (int r = 0; r < depth; r++) __builtin_prefetch(row(depth + r));
                        finite &= split<!OF_B>(row, false, deep, wide, tile);
                    } else
                        finite &= split<OF_B>([&](int r) FASTGPT_LAMBDA { return x[first + j + r] + k0 + k; }, true,
                                              wide, deep, tile);
                }
        return finite;
    }

    static void pack_a(const MatmulArgs<float>& args, int64_t m0, int64_t mc, int64_t k0, int64_t kc, float* packed_a,
                       bool* packed_ok) {
        for (int64_t m = 0; m < mc; m += MR) {
            packed_ok[m / MR] =
                pack<false>(args.A, args.A_transposed, m0 + m, min<int64_t>(mc - m, MR), k0, kc, packed_a);
            packed_a += packed_a_size(kc);
        }
    }
    static bool pack_b(const MatmulArgs<float>& args, int64_t k0, int64_t kc, int64_t n0, int64_t width,
                       float* packed_b) {
        return pack<true>(args.B, !args.B_transposed, n0, width, k0, kc, packed_b);
    }

    // n times the four products of what the AMX tiles hold: for Work (machine.h).
    static void repeat(int64_t n) {
        tilezero<4>();
        tilezero<5>();
        tilezero<6>();
        tilezero<7>();
        for (int64_t i = 0; i < n; i++) {
            tdpbf16ps<0, 4, 6>();
            tdpbf16ps<1, 4, 7>();
            tdpbf16ps<2, 5, 6>();
            tdpbf16ps<3, 5, 7>();
        }
    }

    // C (32, 32) = or += a micro-panel of A times a panel of B.
    static FASTGPT_NOINLINE void multiply(int64_t kc, const float* packed_a, const float* packed_b, int64_t, float* C,
                                          int64_t ldc, bool accumulate) {
        const char* a = reinterpret_cast<const char*>(packed_a);
        const char* b = reinterpret_cast<const char*>(packed_b);
        const auto load_a = [&](int part) FASTGPT_LAMBDA {
            tileloadd<4>(a + part_bytes * part, 64);
            tileloadd<5>(a + part_bytes * part + 1024, 64);
        };
        const auto load_b = [&](int part) FASTGPT_LAMBDA {
            tileloadd<6>(b + part_bytes * part, 64);
            tileloadd<7>(b + part_bytes * part + 1024, 64);
        };
        const auto add_products = []() FASTGPT_LAMBDA {
            tdpbf16ps<0, 4, 6>();
            tdpbf16ps<1, 4, 7>();
            tdpbf16ps<2, 5, 6>();
            tdpbf16ps<3, 5, 7>();
        };
        const int64_t stride = ldc * 4;
        __asm__ volatile("" ::: "memory"); // what was packed is in memory now
        if (accumulate) {
            tileloadd<0>(C, stride);
            tileloadd<1>(C + 16, stride);
            tileloadd<2>(C + 16 * ldc, stride);
            tileloadd<3>(C + 16 * ldc + 16, stride);
        } else {
            tilezero<0>();
            tilezero<1>();
            tilezero<2>();
            tilezero<3>();
        }
        for (int64_t k = 0; k < kc; k += depth) {
            load_b(0);
            if constexpr (PARTS == 3) {
                load_a(2);
                add_products(); // a2 b0
                load_a(1);
                add_products(); // a1 b0
            }
            load_a(0);
            add_products(); // a0 b0
            if constexpr (PARTS == 3) {
                load_b(2);
                add_products(); // a0 b2
                load_b(1);
                add_products(); // a0 b1
                load_a(1);
                add_products(); // a1 b1
            }
            a += MR * depth * bytes;
            b += NR * depth * bytes;
        }
        tilestored<0>(C, stride);
        tilestored<1>(C + 16, stride);
        tilestored<2>(C + 16 * ldc, stride);
        tilestored<3>(C + 16 * ldc + 16, stride);
    }
};

using Amx = AmxTiles<3>; // as exact as float32
using AmxBFloat16 = AmxTiles<1>;
