// Matrix products of any size, from the same microkernel as attention: gpt.py's linear and its backward.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x        (dbias = sum of dy's rows)
//
// All three are C = A B with A or B read across its lines, so one function serves them. Nothing is saved for the
// backward but x and W, and, where gelu follows at once, y: its own backward (gelu.h) turns dgelu into dy first.
//
//            NC columns, in panels of NR = NV * VL          C is cut into blocks of MC x NC; a block is a task, with one
//          +------+------+------+------+                    owner. For every KC terms of the sum
//     KC   | B    | NR   |      |      |                      the owner copies its rows of A into strips of MR rows,
//          +------+------+------+------+                        which stay in the second-level cache, and
//   A      +------+------+------+------+                      for each panel of NR columns
//  MR [--> | C    | tile |      |      |  MC                    copies the panel of B, and
//     [    |      |      |      |      |  rows                  runs down the strips: one tile of C each.
//   KC     +------+------+------+------+
//
// In both copies the values lie in the order in which the microkernel meets them, so it reads memory in one piece, from
// front to back. Bias and gelu are applied to a tile when its last terms arrive, while it is in the first-level cache.
//
// Names and order of the loops are those of BLIS. Each sum runs in one order, KC terms at a time, whatever the blocks
// are, so the bits do not depend on the number of threads.

constexpr long KC = 256, largest_MC = 512, largest_NC = 1536;

// Blocks: as large as caches allow, since a block's edges are what its copies cost, but two for each thread.
template <class T> struct Blocks {
    static constexpr long NR = NV * VL<T>, unit = MR > VL<T> ? MR : VL<T>;
    long MC, NC, down, across;

    Blocks(long M, long N, int workers) {
        const auto cut = [](long size, long most, long unit) {
            const long parts = (size + most - 1) / most;
            return parts ? ((size + parts - 1) / parts + unit - 1) / unit * unit : unit;
        };
        MC = cut(M, largest_MC, unit), NC = cut(N, largest_NC, NR);
        for (;; MC >= NC ? MC = cut(M, MC / 2, unit) : NC = cut(N, NC / 2, NR)) {
            down = (M + MC - 1) / MC, across = (N + NC - 1) / NC;
            if (down * across >= 2 * workers || (MC < 2 * 64 && NC < 2 * 64)) break;
        }
    }
};

// One panel of B: to[k * NR + j] = element (k0 + k, n0 + j), k < kc, j < width; zero up to a whole register.
template <class T>
FASTGPT_NOINLINE void pack_panel(const Product<T>& p, long k0, long kc, long n0, long width, T* to) {
    constexpr int NR = NV * VL<T>;
    if (p.B_transposed) // lines of B are columns of the panel
        return for_columns<T>(
            width, kc, [&](long j) FASTGPT_LAMBDA { return p.B[n0 + j] + k0; },
            [&](long k, long j, vec<T> v) FASTGPT_LAMBDA { store(to + k * NR + j, v); });
    for (long k = 0; k < kc; k++, to += NR) {
        const T* from = p.B[k0 + k] + n0;
        for_channels<T>(width, [&](long j, int n) FASTGPT_LAMBDA { store(to + j, load_first(from + j, n)); });
    }
}

// All strips of A for KC terms, MR * KC values apart.
template <class T> FASTGPT_NOINLINE void pack_strips(const Product<T>& p, long m0, long mc, long k0, long kc, T* to) {
    if (p.A_transposed)
        strips_from_terms<T>(mc, kc, [&](long k) FASTGPT_LAMBDA { return p.A[k0 + k] + m0; }, to, MR * KC);
    else strips_from_rows<T>(mc, kc, [&](long m) FASTGPT_LAMBDA { return p.A[m0 + m] + k0; }, to, MR * KC);
}

// The last step of a tile at C[at]: bias, and gelu where it follows.
template <class T> FASTGPT_INLINE void finish_tile(const Product<T>& p, long at, long n0, long rows, long width) {
    for (long i = 0; i < rows; i++, at += p.N)
        for_channels<T>(width, [&](long j, int n) FASTGPT_LAMBDA {
            vec<T> y = load_first(p.C + at + j, n);
            if (p.bias) y += load_first(p.bias + n0 + j, n);
            if (p.activated != p.C) store_first(p.C + at + j, y, n);
            if (p.activated) store_first(p.activated + at + j, y * Gate<T>(y).open, n);
        });
}

template <class T> void matmul(const Product<T>& p) {
    constexpr int NR = NV * VL<T>;
    const int workers = num_threads();
    const Blocks<T> blocks(p.M, p.N, workers);
    Scratch<T> scratch(workers, blocks.MC * KC + KC * NR + MR * NR);
    parallel_tasks(blocks.down * blocks.across, workers, [&](int64_t task, int worker) {
        const long m0 = task / blocks.across * blocks.MC, n0 = task % blocks.across * blocks.NC;
        const long m_end = p.M - m0 < blocks.MC ? p.M : m0 + blocks.MC;
        const long n_end = p.N - n0 < blocks.NC ? p.N : n0 + blocks.NC;
        T *strips = scratch.part(worker), *panel = strips + blocks.MC * KC, *edge = panel + KC * NR;
        for (long k0 = 0; k0 == 0 || k0 < p.K; k0 += KC) {
            const long kc = p.K - k0 < KC ? p.K - k0 : KC;
            const bool first = k0 == 0 && !p.add, last = k0 + KC >= p.K;
            pack_strips(p, m0, m_end - m0, k0, kc, strips);
            for (long n = n0; n < n_end; n += NR) {
                const long width = n_end - n < NR ? n_end - n : NR;
                const int vectors = int((width + VL<T> - 1) / VL<T>);
                pack_panel(p, k0, kc, n, width, panel);
                for (long m = m0; m < m_end; m += MR) {
                    const auto strip = Left<T>::strips(strips + (m - m0) * KC, MR * KC);
                    const long rows = m_end - m < MR ? m_end - m : MR;
                    T* c = p.C + m * p.N + n;
                    if (rows < MR || width % VL<T>) { // a tile that sticks out: by way of a buffer
                        panel_product<T, false>(MR, vectors, kc, strip, panel, NR, edge, NR);
                        for (long i = 0; i < rows; i++)
                            for (long j = 0; j < width; j++)
                                c[i * p.N + j] = edge[i * NR + j] + (first ? T(0) : c[i * p.N + j]);
                    } else if (first) panel_product<T, false>(MR, vectors, kc, strip, panel, NR, c, p.N);
                    else panel_product<T, true>(MR, vectors, kc, strip, panel, NR, c, p.N);
                    if (last && (p.bias || p.activated)) finish_tile(p, m * p.N + n, n, rows, width);
                }
            }
        }
    });
}
