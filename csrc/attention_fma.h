// Attention's seven matrix products on the microkernel, and the copies of Q, K, V and dO in the order in which it reads
// them.
//
// Compiled once per instruction set (all_kernels.h).

template <class T> class AttentionEngine<Fma<T>> {
  public:
    static constexpr int NR = NV * VL<T>; // queries in a panel
    static constexpr int row_unit = 1;    // P and dS are read up to a multiple of so many keys, and columns of NR

    // D up to whole micro-panels and registers.
    static int padded(int64_t D) { return int(round_up(D, max(MR, VL<T>))); } // both are powers of 2

    // Values of T, for at most `keys` keys; the forward needs no more than K, V and QT.
    static int64_t forward_size(int64_t keys, int64_t D) { return padded(D) * (2 * round_up(keys, NK) + NQ); }
    static int64_t backward_size(int64_t keys, int64_t D) { return padded(D) * (3 * round_up(keys, NK) + 4 * NQ); }
    AttentionEngine(T* memory, int64_t keys, int64_t D)
        : D(D), Dp(padded(D)), max_keys(round_up(keys, NK)), K(memory), V(K + max_keys * Dp), QT(V + max_keys * Dp),
          dOT(QT + Dp * NQ), Q(dOT + Dp * NQ), dO(Q + Dp * NQ), KT(dO + Dp * NQ) {}

    static FASTGPT_INLINE void begin() {}
    static FASTGPT_INLINE void end() {}

    // ---- forward

    // Keys 0 .. n - 1 of a head; they stay for the next blocks of its queries.
    FASTGPT_NOINLINE bool pack_keys_and_values(int64_t new_head, int64_t n, HeadRows<T> k, HeadRows<T> v) {
        if (head == new_head && packed_keys >= n) return true;
        head = new_head;
        packed_keys = n;
        pack_a_from_rows<T>(n, D, k, K, MR * Dp);
        pack_channels(n, v, V);
        return true;
    }
    bool pack_queries(HeadRows<T> q, int n) {
        for (int p = 0; p < n; p += NR)
            transpose<T>(min(n - p, NR), int(D), q(p), q.ld, QT + p * Dp, NR, base2_scale<T>(D), true);
        return true;
    }
    // S^T = K Q^T for the panel of queries from p on.
    FASTGPT_INLINE void scores(const Tile<T>& tile, int p, T* S) const {
        tile.for_each_causal_block(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA {
            multiply_over_channels(rows, (tile.lanes - c) / VL<T>, K + (tile.k0 + row) * Dp, QT + p * Dp + c, NR,
                                   S + row * NR + c);
        });
    }
    // O^T += V^T P^T
    FASTGPT_INLINE bool add_values(const Tile<T>& tile, const T* P, T* OT) {
        tile.for_each_causal_block(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA {
            const PackedA<T> v{V + (tile.k0 + row) * MR, MR * max_keys};
            panel_product<T, true>(Dp, (tile.lanes - c) / VL<T>, rows, v, P + row * NR + c, NR, OT + c, NR);
        });
        return true;
    }

    // ---- backward: K and V of a range of keys; `j` counts from its first

    FASTGPT_NOINLINE bool pack_range(int64_t n, HeadRows<T> k, HeadRows<T> v) {
        pack_a_from_rows<T>(n, D, k, K, MR * Dp);
        pack_a_from_rows<T>(n, D, v, V, MR * Dp);
        pack_channels(n, k, KT);
        return true;
    }
    bool pack_queries_and_gradients(HeadRows<T> q, HeadRows<T> dout, int n) {
        transpose<T>(n, int(D), q.data, q.ld, QT, NQ, base2_scale<T>(D), true);
        transpose<T>(n, int(D), dout.data, dout.ld, dOT, NQ, T(1), true);
        copy_rows(q, n, Q);
        copy_rows(dout, n, dO);
        return true;
    }
    // S^T = K Q^T, dP^T = V dO^T
    FASTGPT_INLINE void scores_and_gradients(const Tile<T>& tile, int64_t j, T* S, T* dP) const {
        for (Panels p(tile.lanes / VL<T>); p.next();) {
            const int end = (p.begin + p.vectors) * VL<T>;
            tile.for_each_causal_block(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                const int vectors = (end - c) / VL<T>;
                const int at = row * NQ + c;
                multiply_over_channels(rows, vectors, K + (j + row) * Dp, QT + c, NQ, S + at);
                multiply_over_channels(rows, vectors, V + (j + row) * Dp, dOT + c, NQ, dP + at);
            });
        }
    }
    // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
    FASTGPT_INLINE bool add_gradients(const Tile<T>& tile, int64_t j, int n, const T* P, const T* dS, T* dV, T* dK,
                                      T* dQT) {
        add_over_queries(tile, n, P, dO, dV + j * Dp);
        add_over_queries(tile, n, dS, Q, dK + j * Dp);
        for (Panels p(tile.lanes / VL<T>); p.next();) {
            const int end = (p.begin + p.vectors) * VL<T>;
            tile.for_each_causal_block(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                const PackedA<T> k{KT + (j + row) * MR, MR * max_keys};
                panel_product<T, true>(Dp, (end - c) / VL<T>, rows, k, dS + row * NQ + c, NQ, dQT + c, NQ);
            });
        }
        return true;
    }

  private:
    const int64_t D, Dp, max_keys;
    int64_t head = -1, packed_keys = 0;
    T *const K, *const V, *const QT, *const dOT, *const Q, *const dO, *const KT;

    // C = A B over all channels: A micro-panels of keys, B columns of queries. At most 256 channels at once, as in
    // matmul: short sums of sums round less than a long sum.
    FASTGPT_INLINE void multiply_over_channels(int rows, int vectors, const T* A, const T* B, int64_t ld, T* C) const {
        constexpr int64_t chunk = 256;
        for (int64_t d = 0; d < D; d += chunk) {
            const PackedA<T> a{A + d * MR, MR * Dp};
            const int64_t n = min(D - d, chunk);
            if (d == 0) panel_product<T, false>(rows, vectors, n, a, B, ld, C, ld);
            else panel_product<T, true>(rows, vectors, n, a, B + d * ld, ld, C, ld);
        }
    }
    // Micro-panels of MR channels, key by key. P is 0 past the last key, and 0 times garbage may be NaN: so zeros
    // there.
    FASTGPT_NOINLINE void pack_channels(int64_t n, HeadRows<T> x, T* to) const {
        pack_a_from_columns<T>(D, n, x, to, MR * max_keys);
        for (int64_t d = 0; d < Dp; d += MR)
            for (int64_t i = n * MR; i < round_up(n, MR) * MR; i++) to[d * max_keys + i] = 0;
    }
    FASTGPT_NOINLINE void copy_rows(HeadRows<T> x, int n, T* to) const { // Dp values each, zero past D
        for (int i = 0; i < n; i++, to += Dp) {
            int64_t d = 0;
            for (; d < D; d++) to[d] = x(i)[d];
            for (; d < Dp; d++) to[d] = 0;
        }
    }
    // to (NK, Dp) += W^T (keys, queries) X (queries, Dp), for each MR keys from their first query on.
    FASTGPT_INLINE void add_over_queries(const Tile<T>& tile, int n, const T* W, const T* X, T* to) const {
        for (int j = 0; j < tile.rows; j += MR) {
            const int64_t first = max<int64_t>(tile.k0 + j - tile.q0, 0);
            if (first >= n) break;
            block_product<T, true>(MR, int(Dp / VL<T>), n - first, UnpackedA<T>{W + j * NQ + first, NQ}, X + first * Dp,
                                   Dp, to + j * Dp, Dp);
        }
    }
};
