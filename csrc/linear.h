// Matrix products of any size, from the same microkernel as attention: gpt.py's linear and its backward.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x        (dbias = sum of dy's rows)
//
// All three are C = A B + bias with A or B read across its lines, so one function serves them. Nothing is saved for the
// backward but x and W.
//
//            NC columns, in panels of NR = NV * VL
//          +------+------+------+------+        C is cut into blocks of MC x NC; a block is a task, with one owner.
//     KC   | B    |      |      |      |        For every KC terms of the sum, the owner copies its part of A and B
//          +------+------+------+------+        into buffers that fit the second-level cache, B in panels of NR
//   A      +------+------+------+------+        columns, each small enough for the first level. Then the
//  [MC x   | C    |      |      |      |  MC    microkernel runs down each panel, MR rows at a time, and its sum
//   KC]    |      |      |      |      |  rows  of KC terms is added to C.
//          +------+------+------+------+
//
// Names and order of the loops are those of BLIS. The blocks depend on the shape alone, and each sum runs in one order,
// so the bits do not depend on the number of threads.

// element (i, j) is lines[i][j], or lines[j][i] where transposed.
template <class T> using Lines = Rows<const T>;

constexpr long KC = 192, NC = 384;

// MC rows a block: about 384, but less where there would be too few blocks for many cores.
inline long block_rows(long M, long N) {
    const long across = (N + NC - 1) / NC;
    long down = (M + 383) / 384;
    while (down * across < 16 && M / down > 96) down++;
    return ((M + down - 1) / down + MR - 1) / MR * MR;
}

// Lines from `line` on, n of them, each from value `from` on and `width` long, one under the other; zero up to `all`.
template <class T> FASTGPT_INLINE void copy_lines(const Lines<T>& lines, long line, long n, long all, long from,
                                                  long width, T* to, long stride) {
    for (long i = 0; i < all; i++, to += stride) {
        if (i < n) {
            const T* source = lines[line + i] + from;
            for (long j = 0; j < width; j++) to[j] = source[j];
        } else
            for (long j = 0; j < width; j++) to[j] = 0;
    }
}

// One panel of B: to[k * NR + j] = element (k0 + k, n0 + j), k < kc, j < width. What lies behind `width` stays unset.
template <class T>
FASTGPT_NOINLINE void pack_panel(const Lines<T>& B, bool transposed, long k0, long kc, long n0, long width, T* to) {
    constexpr int NR = NV * VL<T>;
    if (!transposed) return copy_lines(B, k0, kc, kc, n0, width, to, NR);
    for (long j = 0; j < width; j += VL<T>) { // lines of B are columns of the panel
        const int n = width - j < VL<T> ? int(width - j) : VL<T>;
        if (B.rank <= 1) {
            transpose<T>(n, int(kc), B[n0 + j] + k0, B.rank ? B.stride[0] : 0, to + j, NR, T(1), true);
        } else
            for (int i = 0; i < n; i++)
                for (long k = 0; k < kc; k++) to[k * NR + j + i] = B[n0 + j + i][k0 + k];
    }
}

// C (M, N), contiguous, = A (M, K) B (K, N) + bias (N, or null).
template <class T> void matmul(long M, long N, long K, const Lines<T>& A, bool A_transposed, const Lines<T>& B,
                               bool B_transposed, const T* bias, T* C) {
    constexpr int NR = NV * VL<T>;
    static_assert(NC % NR == 0);
    const long MC = block_rows(M, N), down = (M + MC - 1) / MC, across = (N + NC - 1) / NC;
    const int workers = num_threads();
    Scratch<T> scratch(workers, MC * KC + KC * NC + MR * NR);
    parallel_tasks(down * across, workers, [&](int64_t task, int worker) {
        const long m0 = task / across * MC, n0 = task % across * NC;
        const long mc = M - m0 < MC ? M - m0 : MC, nc = N - n0 < NC ? N - n0 : NC, strips = (mc + MR - 1) / MR * MR;
        T *a = scratch.part(worker), *b = a + MC * KC, *edge = b + KC * NC;
        for (long i = 0; i < mc; i++)
            for (long j = 0; j < nc; j++) C[(m0 + i) * N + n0 + j] = bias ? bias[n0 + j] : T(0);
        for (long k0 = 0; k0 < K; k0 += KC) {
            const long kc = K - k0 < KC ? K - k0 : KC;
            const long a_row = A_transposed ? 1 : KC, a_col = A_transposed ? MC : 1;
            if (A_transposed) {
                copy_lines(A, k0, kc, kc, m0, mc, a, MC);
                for (long k = 0; k < kc; k++)
                    for (long i = mc; i < strips; i++) a[k * MC + i] = 0;
            } else copy_lines(A, m0, mc, strips, k0, kc, a, KC);
            for (long p = 0; p < nc; p += NR)
                pack_panel(B, B_transposed, k0, kc, n0 + p, nc - p < NR ? nc - p : NR, b + p * KC);
            for (long p = 0; p < nc; p += NR) {
                const T* panel = b + p * KC;
                T* c = C + m0 * N + n0 + p;
                const long whole = nc - p < NR ? 0 : mc / MR * MR; // rows of whole tiles
                panel_product<T, true>(int(whole), NV, kc, a, a_row, a_col, panel, NR, c, N);
                for (long m = whole; m < mc; m += MR) { // tiles that stick out: by way of a buffer
                    panel_product<T, false>(MR, NV, kc, a + m * a_row, a_row, a_col, panel, NR, edge, NR);
                    for (long i = 0; i < MR && m + i < mc; i++)
                        for (long j = 0; j < NR && p + j < nc; j++) c[(m + i) * N + j] += edge[i * NR + j];
                }
            }
        }
    });
}
