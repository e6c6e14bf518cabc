// Copies of matrices: rows that become columns, and A in micro-panels, the order in which the microkernel reads it.
//
//               k ->                          K values of MR rows, k by k: one micro-panel
//           +-------------+
//   MR rows | 0 2 4 6 ... |    packed_a:   0 1 2 3 4 5 6 7 ...     (here MR is 2)
//           | 1 3 5 7 ... |
//           +-------------+
//
// Compiled once per instruction set (all_kernels.h).

// A matrix from rows to columns, VL x VL values at a time: put(c, r, v) gets the values of column c in rows
// r .. r + VL - 1 as one register, zero past the last row. row(r) is where row r begins.
template <class T, class Row, class Put>
FASTGPT_INLINE void for_columns(int64_t rows, int64_t cols, const Row& row, const Put& put) {
    for (int64_t r = 0; r < rows; r += VL<T>) {
        const T* from[VL<T>];
        for (int64_t i = 0; i < VL<T>; i++) from[i] = r + i < rows ? row(r + i) : nullptr;
        vec<T> v[VL<T>];
        int64_t c = 0;
        if (r + VL<T> <= rows)
            for (; c + VL<T> <= cols; c += VL<T>) {
#pragma GCC unroll 16
                for (int i = 0; i < VL<T>; i++) v[i] = load(from[i] + c);
                transpose_registers<T>(v);
#pragma GCC unroll 16
                for (int i = 0; i < VL<T>; i++) put(c + i, r, v[i]);
            }
        for (; c < cols; c += VL<T>) {
            const int width = int(min<int64_t>(cols - c, VL<T>));
            for (int i = 0; i < VL<T>; i++) v[i] = from[i] ? load_first(from[i] + c, width) : vec<T>{};
            transpose_registers<T>(v);
            for (int i = 0; i < width; i++) put(c + i, r, v[i]);
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
template <class T> struct MicroPanelWriter {
    T* packed_a;
    int64_t stride;
    // v holds column k of rows m, m + 1, ...; m is a multiple of VL.
    FASTGPT_INLINE void operator()(int64_t k, int64_t m, vec<T> v) const {
        constexpr int piece = min(MR, VL<T>);
        T values[VL<T>];
        store(values, v);
#pragma GCC unroll 4
        for (int i = 0; i < VL<T>; i += piece)
            __builtin_memcpy(packed_a + (m + i) / MR * stride + k * MR + (m + i) % MR, values + i, piece * sizeof(T));
    }
    // The rest of the last micro-panel, where a register is less than that.
    FASTGPT_INLINE void finish(int64_t rows, int64_t K) const {
        for (int64_t m = round_up(rows, VL<T>); m < round_up(rows, MR); m += VL<T>)
            for (int64_t k = 0; k < K; k++) (*this)(k, m, vec<T>{});
    }
};

// row(m) is row m of A, K long.
template <class T, class Row>
FASTGPT_INLINE void pack_a_from_rows(int64_t rows, int64_t K, const Row& row, T* packed_a, int64_t stride) {
    const MicroPanelWriter<T> put{packed_a, stride};
    for_columns<T>(rows, K, row, put);
    put.finish(rows, K);
}

// column(k) is column k of A, `rows` long.
template <class T, class Column>
FASTGPT_INLINE void pack_a_from_columns(int64_t rows, int64_t K, const Column& column, T* packed_a, int64_t stride) {
    constexpr int64_t chunk = 64; // rows at a time
    const MicroPanelWriter<T> put{packed_a, stride};
    for (int64_t m = 0; m < rows; m += chunk)
        for (int64_t k = 0; k < K; k++) {
            const T* from = column(k) + m;
            for_channels<T>(min(rows - m, chunk),
                            [&](int64_t i, int n) FASTGPT_LAMBDA { put(k, m + i, load_first(from + i, n)); });
        }
    put.finish(rows, K);
}
