// Copies of matrices: rows that become columns, and A in micro-panels, the order in which the microkernel reads it.
//
//               k ->                          K values of MR rows, k by k: one micro-panel
//           +-------------+
//   MR rows | 0 2 4 6 ... |    packed_a:   0 1 2 3 4 5 6 7 ...     (here MR is 2)
//           | 1 3 5 7 ... |
//           +-------------+
//
// What the copy holds is X: values of T, or pairs of bfloat16 (bfloat16.h), of k and k + 1, made of them.
//
// Compiled once per instruction set (all_kernels.h).

// A register of X from values that lie side by side in a row; n are left of it.
template <class X, class T> FASTGPT_INLINE vec<X> load_along(const T* row, int n) {
    if constexpr (per<X> == 1) return load_first(row, n);
    else return in_order(load_first(row, n), load_first(row + VL<T>, n - VL<T>));
}

// The rows whose values one X takes: row k of K, or rows 2k and 2k + 1.
template <class X, class T> struct Across {
    const T *row, *next; // next: null past the last row

    template <class Row> FASTGPT_INLINE Across(const Row& of, int64_t k, int64_t K)
        : row(of(k * per<X>)), next(per<X> == 2 && 2 * k + 1 < K ? of(2 * k + 1) : nullptr) {}
    FASTGPT_INLINE vec<X> load(int64_t i, int n) const { // columns i .. i + n - 1
        if constexpr (per<X> == 1) return load_first(row + i, n);
        else return interleaved(load_first(row + i, n), next ? load_first(next + i, n) : vec<T>{});
    }
};

// A matrix from rows to columns, VL x VL of X at a time: put(c, r, v) gets column c in rows r .. r + VL - 1 as one
// register, zero past the last row. row(r) is where row r begins, K values long.
template <class X, class Row, class Put>
FASTGPT_INLINE void for_columns(int64_t rows, int64_t K, const Row& row, const Put& put) {
    for (int64_t r = 0; r < rows; r += VL<X>) {
        decltype(row(r)) from[VL<X>];
        for (int64_t i = 0; i < VL<X>; i++) from[i] = r + i < rows ? row(r + i) : nullptr;
        vec<X> v[VL<X>];
        int64_t c = 0;
        if (r + VL<X> <= rows)
            for (; (c + VL<X>)*per<X> <= K; c += VL<X>) {
#pragma GCC unroll 16
                for (int i = 0; i < VL<X>; i++) v[i] = load_along<X>(from[i] + c * per<X>, VL<X> * per<X>);
                transpose_registers<X>(v);
#pragma GCC unroll 16
                for (int i = 0; i < VL<X>; i++) put(c + i, r, v[i]);
            }
        for (; c < depth<X>(K); c += VL<X>) {
            const int width = int(min<int64_t>(K - c * per<X>, VL<X> * per<X>));
            for (int i = 0; i < VL<X>; i++) v[i] = from[i] ? load_along<X>(from[i] + c * per<X>, width) : vec<X>{};
            transpose_registers<X>(v);
            for (int i = 0; i < depth<X>(width); i++) put(c + i, r, v[i]);
        }
    }
}

// to[c][r] = from[r][c] * scale for all r < rows, c < cols. With `pad`, r runs on to the next multiple of VL and is
// zero there.
template <class T> FASTGPT_NOINLINE void transpose(int rows, int cols, const T* from, int64_t ld_from, T* to,
                                                   int64_t ld_to, T scale, bool pad) {
    for_columns<T>(
        rows, cols, [&](int64_t r) FASTGPT_LAMBDA { return from + r * ld_from; },
        [&](int64_t c, int64_t r, vec<T> v)
            FASTGPT_LAMBDA { store_first(to + c * ld_to + r, v * broadcast(scale), pad ? VL<T> : int(rows - r)); });
}

// Writes micro-panels, `stride` values apart; values past the last row are zero, up to a whole micro-panel.
template <class X> struct MicroPanelWriter {
    X* packed_a;
    int64_t stride;
    // v holds column k of rows m, m + 1, ...; m is a multiple of VL.
    FASTGPT_INLINE void operator()(int64_t k, int64_t m, vec<X> v) const {
        constexpr int piece = min(MR, VL<X>);
        X values[VL<X>];
        store(values, v);
#pragma GCC unroll 4
        for (int i = 0; i < VL<X>; i += piece)
            __builtin_memcpy(packed_a + (m + i) / MR * stride + k * MR + (m + i) % MR, values + i, piece * sizeof(X));
    }
    // The rest of the last micro-panel, where a register is less than that.
    FASTGPT_INLINE void finish(int64_t rows, int64_t K) const {
        for (int64_t m = round_up(rows, VL<X>); m < round_up(rows, MR); m += VL<X>)
            for (int64_t k = 0; k < depth<X>(K); k++) (*this)(k, m, vec<X>{});
    }
};

// row(m) is row m of A, K long.
template <class X, class Row>
FASTGPT_INLINE void pack_a_from_rows(int64_t rows, int64_t K, const Row& row, X* packed_a, int64_t stride) {
    const MicroPanelWriter<X> put{packed_a, stride};
    for_columns<X>(rows, K, row, put);
    put.finish(rows, K);
}

// column(k) is column k of A, `rows` long.
template <class T, class X, class Column>
FASTGPT_INLINE void pack_a_from_columns(int64_t rows, int64_t K, const Column& column, X* packed_a, int64_t stride) {
    constexpr int64_t chunk = 64; // rows at a time
    const MicroPanelWriter<X> put{packed_a, stride};
    for (int64_t m = 0; m < rows; m += chunk)
        for (int64_t k = 0; k < depth<X>(K); k++) {
            const Across<X, T> from(column, k, K);
            for_channels<X>(min(rows - m, chunk),
                            [&](int64_t i, int n) FASTGPT_LAMBDA { put(k, m + i, from.load(m + i, n)); });
        }
    put.finish(rows, K);
}
