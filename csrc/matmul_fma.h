// Matrix products on the microkernel, the engine that takes every type and every value: its blocks, how it packs A and
// B (matmul.h says why), and its one step. Packed, A and B are X: values of T, or of float in pairs of bfloat16
// (bfloat16.h), two k in one, of the same size. A workspace counts in values of T. Pairs halve the time of a product,
// but not of packing B and of adding to C: so their C blocks have twice the rows. The smaller KC keeps a block of A at
// 768 KiB; measured on Zen 5, whose second-level cache has 1 MiB a core.
//
// Compiled once per instruction set (all_kernels.h).

template <class T, class X = T> struct Fma {
    static_assert(sizeof(X) == sizeof(T));
    static constexpr bool handles_nonfinite = true;
    static constexpr int64_t MR = FASTGPT_MR, NR = NV * VL<T>, KC = per<X> == 2 ? 384 : 256;
    static constexpr int64_t max_rows = 512 * per<X>, max_columns = 1536, row_unit = max<int64_t>(MR, VL<T>);

    // In values of T: a micro-panel of A, a panel of B.
    static FASTGPT_INLINE int64_t packed_a_size(int64_t kc) { return MR * depth<X>(kc); }
    static FASTGPT_INLINE int64_t packed_b_size(int64_t kc) { return NR * depth<X>(kc); }
    static FASTGPT_INLINE bool stores_directly(int64_t width, int64_t, bool) { return width % VL<T> == 0; }
    static FASTGPT_INLINE void begin() {}
    static FASTGPT_INLINE void end() {}

    static FASTGPT_NOINLINE void pack_a(const MatmulArgs<T>& args, int64_t m0, int64_t mc, int64_t k0, int64_t kc,
                                        T* packed_a, bool*) {
        X* to = reinterpret_cast<X*>(packed_a);
        if (args.A_transposed)
            pack_a_from_columns<T>(
                mc, kc, [&](int64_t k) FASTGPT_LAMBDA { return args.A[k0 + k] + m0; }, to, packed_a_size(kc));
        else
            pack_a_from_rows<X>(
                mc, kc, [&](int64_t m) FASTGPT_LAMBDA { return args.A[m0 + m] + k0; }, to, packed_a_size(kc));
    }

    // packed_b[k * NR + j] = element (k0 + k, n0 + j), k < kc, j < width; zero up to a whole register.
    static FASTGPT_NOINLINE bool pack_b(const MatmulArgs<T>& args, int64_t k0, int64_t kc, int64_t n0, int64_t width,
                                        T* packed_b) {
        X* to = reinterpret_cast<X*>(packed_b);
        if (args.B_transposed) { // its rows are columns of the panel
            for_columns<X>(
                width, kc, [&](int64_t j) FASTGPT_LAMBDA { return args.B[n0 + j] + k0; },
                [&](int64_t k, int64_t j, vec<X> v) FASTGPT_LAMBDA { store(to + k * NR + j, v); });
            return true;
        }
        for (int64_t k = 0; k < depth<X>(kc); k++, to += NR) {
            const Across<X, T> from([&](int64_t of) FASTGPT_LAMBDA { return args.B[k0 + of] + n0; }, k, kc);
            for_channels<X>(width, [&](int64_t j, int n) FASTGPT_LAMBDA { store(to + j, from.load(j, n)); });
        }
        return true;
    }

    static FASTGPT_INLINE void multiply(int64_t kc, const T* packed_a, const T* packed_b, int64_t width, T* C,
                                        int64_t ldc, bool accumulate) {
        const int vectors = int(ceil_div(width, VL<T>));
        const PackedA<X> a{reinterpret_cast<const X*>(packed_a), packed_a_size(kc)};
        const X* b = reinterpret_cast<const X*>(packed_b);
        if (accumulate) panel_product<T, true>(int(MR), vectors, depth<X>(kc), a, b, NR, C, ldc);
        else panel_product<T, false>(int(MR), vectors, depth<X>(kc), a, b, NR, C, ldc);
    }
};
