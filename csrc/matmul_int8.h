// Products of int8: the engine for prompts that meet packed int8 weights, where their activations may be rounded, too.
//
//   y[m, n] = sum over k blocks of  s[m] t[n] (sum of q[m, k] p[n, k] over the block's k)      x = s q, w = t p, in
//   int8
//
// vpdpbusd multiplies four unsigned bytes by four signed ones and adds the products to a lane of 32 bits: four times
// the products of a float multiply-add. Its unsigned side takes u = q + 128, so 128 times the sum of p is taken off
// again. A cell of an int8 strip (strips.h), 16 rows by 4 k, is its other side as it lies in memory.
//
// A row of x has a scale of its own for each k block, so its bits depend on neither its neighbours nor the C blocks. A
// block's sums are whole numbers below 2^24, which floats hold exactly: 256 k of at most 255 * 127.
//
// Compiled once for each instruction set that has 64 bytes to a register; runs where has_dot_products.

struct Int8Dot {
    static constexpr bool handles_nonfinite = true; // they make the scale NaN
    static constexpr int64_t MR = FASTGPT_MR, NR = NV * LANES, KC = 256;
    static constexpr int64_t max_rows = 512, max_columns = 1536, row_unit = MR;

    // In floats: a micro-panel of A, fours of bytes and a scale for each row; a panel of B, fours of bytes, 128 times
    // their sum and a scale for each column.
    static FASTGPT_INLINE int64_t fours(int64_t kc) { return ceil_div(kc, 4); }
    static FASTGPT_INLINE int64_t packed_a_size(int64_t kc) { return MR * (fours(kc) + 1); }
    static FASTGPT_INLINE int64_t packed_b_size(int64_t kc) { return NR * (fours(kc) + 2); }
    static FASTGPT_INLINE bool stores_directly(int64_t width, int64_t, bool) { return width % LANES == 0; }
    static FASTGPT_INLINE void begin() {}
    static FASTGPT_INLINE void end() {}

    // A row's kc values as bytes u, zero past kc, four of them every `stride` floats. -> the scale
    static FASTGPT_INLINE float round_row(const float* x, int64_t kc, float* to, int64_t stride) {
        typedef uint8_t bytes __attribute__((vector_size(LANES)));
        vec<float> magnitudes{}, sums{};
        for_channels<float>(kc, [&](int64_t k, int n) FASTGPT_LAMBDA {
            const vec<float> v = load_first(x + k, n);
            magnitudes = max(magnitudes, v < 0 ? -v : v);
            sums += v - v; // NaN, if some value is not finite
        });
        float largest = magnitudes[0];
        for (int i = 1; i < VL<float>; i++) largest = max(largest, magnitudes[i]);
        const vec<float> steps = broadcast(largest > smallest ? 127 / largest : 0);
        for_channels<float>(kc, [&](int64_t k, int n) FASTGPT_LAMBDA {
            const vec<float> magic = broadcast(12582912.0f); // adding 1.5 * 2^23 rounds to a whole number
            const vec<float> whole = rounded<float>(load_first(x + k, n) * steps) + magic - magic + broadcast(128.0f);
            const bytes u = __builtin_convertvector(__builtin_convertvector(whole, mask<float>), bytes);
            for (int i = 0; i < ceil_div(n, 4); i++)
                __builtin_memcpy(to + (k / 4 + i) * stride, reinterpret_cast<const char*>(&u) + 4 * i, 4);
        });
        return largest / 127 + sum<float>(sums);
    }

    static FASTGPT_NOINLINE void pack_a(const MatmulArgs<float>& args, int64_t m0, int64_t mc, int64_t k0, int64_t kc,
                                        float* packed_a, bool*) {
        for (int64_t m = 0; m < round_up(mc, MR); m++) {
            float* panel = packed_a + m / MR * packed_a_size(kc);
            float* scale = panel + MR * fours(kc) + m % MR;
            if (m < mc) *scale = round_row(args.A[m0 + m] + k0, kc, panel + m % MR, MR);
            else
                for (int64_t k = 0; k <= fours(kc); k++) panel[k * MR + m % MR] = 0;
        }
    }

    // From strips, to which B.data points.
    static FASTGPT_NOINLINE bool pack_b(const MatmulArgs<float>& args, int64_t k0, int64_t kc, int64_t n0,
                                        int64_t width, float* packed_b) {
        const char* strips = reinterpret_cast<const char*>(args.B.data);
        const words ones = 0x01010101u - words{};
        for (int64_t j = 0; j < width; j += LANES) {
            const char* strip = strips + (n0 + j) / LANES * Int8::bytes(args.K);
            mask<float> sums{};
            float* to = packed_b + j;
            for (int64_t k = 0; k < fours(kc); k++, to += NR) {
                const words cell = read<words>(strip + (k0 / 4 + k) * CELL);
                __builtin_memcpy(to, &cell, CELL);
                add_products(sums, ones, cell);
            }
            store(to, to_float(sums) * broadcast(128.0f));
            store(to + NR, read<vec<float>>(strip + Int8::cells(args.K)));
        }
        return true;
    }

    static FASTGPT_INLINE void add_products(mask<float>& sums, words u, words p) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u), "v"(p));
    }

    template <int VECTORS, bool ACCUMULATE>
    static FASTGPT_NOINLINE void microkernel(int64_t depth, const float* A, const float* B, float* C, int64_t ldc) {
        mask<float> c[MR][VECTORS] = {};
        for (int64_t k = 0; k < depth; k++, A += MR, B += NR) {
            words p[VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) p[j] = read<words>(B + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < MR; i++) {
                const words u = read<uint32_t>(A + i) - words{};
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; j++) add_products(c[i][j], u, p[j]);
            }
        }
        for (int j = 0; j < VECTORS; j++) {
            const vec<float> too_much = load(B + j * LANES), t = load(B + NR + j * LANES);
            for (int i = 0; i < MR; i++) {
                float* to = C + i * ldc + j * LANES;
                // Rounded before it is added, as it is where add_k_block adds it.
                const vec<float> y = rounded<float>((to_float(c[i][j]) - too_much) * (t * broadcast(A[i])));
                store(to, ACCUMULATE ? load(to) + y : y);
            }
        }
    }

    static FASTGPT_INLINE void multiply(int64_t kc, const float* packed_a, const float* packed_b, int64_t width,
                                        float* C, int64_t ldc, bool accumulate) {
        const auto run = [&](auto vectors) {
            constexpr int V = decltype(vectors)::value;
            accumulate ? microkernel<V, true>(fours(kc), packed_a, packed_b, C, ldc)
                       : microkernel<V, false>(fours(kc), packed_a, packed_b, C, ldc);
        };
        static_assert(NV == 3, "one case for each possible number of registers");
        if (width > 2 * LANES) run(std::integral_constant<int, 3>{});
        else if (width > LANES) run(std::integral_constant<int, 2>{});
        else run(std::integral_constant<int, 1>{});
    }
};
