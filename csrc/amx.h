// float32 products on AMX, whose tiles multiply bfloat16 (8 bits of mantissa) and add in float32, at 15 times the rate
// of float32 multiply-adds.
//
// A float has 24 bits of mantissa, so it is the sum of three bfloat16, exactly:
//
//   x = x0 + x1 + x2        x0 = x rounded to bfloat16        x1 = x - x0 rounded        x2 = x - x0 - x1
//
// and a product is the sum of nine. With |x1| <= 2^-8 |x0| and |x2| <= 2^-16 |x0|, three of them are below 2^-24 of the
// whole, the rounding of a float; the other six are made:
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
//   32 terms    | b0  b1  b2 | b0  b1  b2 |      A tile is 16 lines of 64 bytes. Four of the eight hold 32 x 32 sums,
//               +------------+------------+      the other four pass the parts of A and B through.
//  16 a0 a1 a2  |   sums 0   |   sums 1   |
//  16 a0 a1 a2  |   sums 2   |   sums 3   |
//               +------------+------------+
//
// Infinities and NaN have no such sum (inf - inf is NaN): a tile that meets one is left to the float32 microkernel.

struct Amx {
    static constexpr int MR = 32, NR = 32, depth = 32; // depth: terms in a tile
    static constexpr bool takes_all = false;           // neither infinities nor NaN
    static constexpr long KC = 384, most_rows = 512, most_columns = 1536, row_unit = MR;
    static constexpr long bytes = 3 * 2; // that a float takes in its three parts

    // In floats.
    static FASTGPT_INLINE long strip_size(long kc) { return MR * ((kc + depth - 1) / depth * depth) * bytes / 4; }
    static FASTGPT_INLINE long panel_size(long kc) { return strip_size(kc) / MR * NR; }

    // In C without a buffer: tiles are slow to write across cache lines, and a sum that goes on in a tile, where the
    // next terms join it pair by pair, rounds more often than one to which their sum is added.
    static FASTGPT_INLINE bool fits(long width, long line, bool first) {
        return first && width == NR && line % 16 == 0;
    }

    // 16 lines of 32 values (`along` the terms), or 32 lines of 16, become the tiles of their three parts, 2048 bytes
    // apart. Pair i of a line is made of terms i and 16 + i: the order of the terms is free, so long as A and B agree.
    // TURN: lines become columns. -> was every value finite?
    template <bool TURN, class Line>
    static FASTGPT_INLINE bool split(const Line& line, bool along, int lines, int width, char* to) {
        using bits = simd<float>::bits;
        vec<float> x[2][16], residue{};
        for (int half = 0; half < 2; half++) {
            const int from = along ? 16 * half : 0;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int at = along ? i : i + 16 * half;
                x[half][i] = at < lines && from < width ? load_first(line(at) + from, width - from) : vec<float>{};
            }
            if (TURN) transpose_block<float>(x[half]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            bits pair[3];
            for (int half = 0; half < 2; half++) {
                vec<float> rest = x[half][i];
                for (int p = 0; p < 3; p++) {
                    bits part;
                    __builtin_memcpy(&part, &rest, sizeof part);
                    if (p < 2) part += 0x8000u; // rounds to 8 bits of mantissa; the last part has no more
                    part &= 0xFFFF0000u;        // but for numbers so small that their last bits have no exponent
                    vec<float> value;
                    __builtin_memcpy(&value, &part, sizeof value);
                    if (p < 2) rest -= value;
                    else residue += value;
                    pair[p] = half ? pair[p] | part : part >> 16;
                }
            }
#pragma GCC unroll 3
            for (int p = 0; p < 3; p++) __builtin_memcpy(to + 2048 * p + 64 * i, &pair[p], 64);
        }
        const float sum_of_residues = sum<float>(residue); // NaN for inf - inf, or where rounding up made an infinity
        return sum_of_residues == sum_of_residues;
    }

    // rows lines (of A, or columns of B) and kc terms. -> finite?
    template <bool B_SIDE> static FASTGPT_NOINLINE bool pack(const Rows<const float>& source, bool lines_are_terms,
                                                             long first, long count, long k0, long kc, float* to) {
        char* strip = reinterpret_cast<char*>(to);
        bool finite = true;
        for (long i = 0; i < count; i += 32) // a strip or panel
            for (long k = 0; k < kc; k += depth, strip += 32 * depth * bytes)
                for (long j = i; j < i + 32; j += 16) {
                    char* tile = strip + (j - i) * 64;
                    const int terms = int(kc - k < depth ? kc - k : depth),
                              lines = int(count - j < 16 ? count - j : 16);
                    if (lines_are_terms) {
                        const auto term = [&](long t) FASTGPT_LAMBDA { return source[k0 + k + t] + first + j; };
                        if (kc - k >= 2 * depth) // far apart in memory: ask for the next tile's now
                            for (int t = 0; t < depth; t++) __builtin_prefetch(term(depth + t));
                        finite &= split<!B_SIDE>(term, false, terms, lines, tile);
                    } else
                        finite &= split<B_SIDE>([&](int l) FASTGPT_LAMBDA { return source[first + j + l] + k0 + k; },
                                                true, lines, terms, tile);
                }
        return finite;
    }

    static void pack_strips(const Product<float>& p, long m0, long mc, long k0, long kc, float* to, bool* taken) {
        for (long m = 0; m < mc; m += MR, to += strip_size(kc))
            *taken++ = pack<false>(p.A, p.A_transposed, m0 + m, mc - m < MR ? mc - m : MR, k0, kc, to);
    }
    static bool pack_panel(const Product<float>& p, long k0, long kc, long n0, long width, float* to) {
        return pack<true>(p.B, !p.B_transposed, n0, width, k0, kc, to);
    }

    // The instructions, by name: compilers differ in what their own functions for them accept.
    template <int TILE> static FASTGPT_INLINE void zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE)); }
    template <int TILE> static FASTGPT_INLINE void load_tile(const void* lines, long stride) { // in bytes
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(lines), "r"(stride), "i"(TILE));
    }
    template <int TILE> static FASTGPT_INLINE void store_tile(void* lines, long stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(lines), "r"(stride), "i"(TILE) : "memory");
    }
    template <int SUMS, int A, int B> static FASTGPT_INLINE void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
    }

    static FASTGPT_INLINE void begin() { // on this thread: all eight tiles whole
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t lines[16] = {};
        } config;
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.lines[i] = 16;
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    static FASTGPT_INLINE void end() { __asm__ volatile("tilerelease"); }

    // to (32, 32), lines `line` values apart, = or += the sums of a strip and a panel.
    static FASTGPT_NOINLINE void tile(long kc, const float* strip, const float* panel, long, float* to, long line,
                                      bool add) {
        const char *a = reinterpret_cast<const char*>(strip), *b = reinterpret_cast<const char*>(panel);
        const auto load_a = [&](int part) FASTGPT_LAMBDA {
            load_tile<4>(a + 2048 * part, 64), load_tile<5>(a + 2048 * part + 1024, 64);
        };
        const auto load_b = [&](int part) FASTGPT_LAMBDA {
            load_tile<6>(b + 2048 * part, 64), load_tile<7>(b + 2048 * part + 1024, 64);
        };
        const auto multiply_all = []() FASTGPT_LAMBDA {
            multiply<0, 4, 6>(), multiply<1, 4, 7>(), multiply<2, 5, 6>(), multiply<3, 5, 7>();
        };
        const long stride = line * 4;
        __asm__ volatile("" ::: "memory"); // what was packed is in memory now
        if (add) {
            load_tile<0>(to, stride), load_tile<1>(to + 16, stride);
            load_tile<2>(to + 16 * line, stride), load_tile<3>(to + 16 * line + 16, stride);
        } else zero<0>(), zero<1>(), zero<2>(), zero<3>();
        for (long k = 0; k < kc; k += depth, a += MR * depth * bytes, b += NR * depth * bytes) {
            load_b(0), load_a(2), multiply_all(); // a2 b0
            load_a(1), multiply_all();            // a1 b0
            load_a(0), multiply_all();            // a0 b0
            load_b(2), multiply_all();            // a0 b2
            load_b(1), multiply_all();            // a0 b1
            load_a(1), multiply_all();            // a1 b1
        }
        store_tile<0>(to, stride), store_tile<1>(to + 16, stride);
        store_tile<2>(to + 16 * line, stride), store_tile<3>(to + 16 * line + 16, stride);
    }
};
