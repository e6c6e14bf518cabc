// Attention's seven matrix products on the microkernel, and the copies of Q, K, V and dO in the order in which it reads
// them. They hold X: values of T, or pairs of bfloat16 (bfloat16.h), of two channels, keys or queries, whichever the
// product adds over. P and dS are read where they are, or copied into pairs, tile by tile.
//
// Compiled once per instruction set (all_kernels.h).

template <class T, class X> class AttentionEngine<Fma<T, X>> {
  public:
    static constexpr int NR = NV * VL<T>; // queries in a panel
    static constexpr int row_unit = 1;    // P and dS are read up to a multiple of so many keys, and columns of NR

    // D up to whole micro-panels and registers.
    static int padded(int64_t D) { return int(round_up(D, max(MR, VL<T>))); } // both are powers of 2

    // Values of T, for at most `keys` keys; the forward needs no more than K, V, QT, P and scaled queries.
    static int64_t forward_size(int64_t keys, int64_t D) {
        return padded(D) * depth<X>(2 * round_up(keys, NK) + NQ) + of_tile + of_scaled(D);
    }
    static int64_t backward_size(int64_t keys, int64_t D) {
        return padded(D) * depth<X>(3 * round_up(keys, NK) + 4 * NQ) + 3 * of_tile + of_scaled(D);
    }
    AttentionEngine(T* memory, int64_t keys, int64_t D) : D(D), Dp(padded(D)), max_keys(round_up(keys, NK)) {
        const auto take = [&](int64_t values) {
            memory += values;
            return reinterpret_cast<X*>(memory - values);
        };
        scaled = memory;
        memory += of_scaled(D);
        PX = take(of_tile);
        K = take(Dp * depth<X>(max_keys));
        V = take(Dp * depth<X>(max_keys));
        QT = take(Dp * depth<X>(NQ));
        dOT = take(Dp * depth<X>(NQ));
        Q = take(Dp * depth<X>(NQ));
        dO = take(Dp * depth<X>(NQ));
        KT = take(Dp * depth<X>(max_keys));
        dSX = take(of_tile);
        dSTX = take(of_tile);
    }

    static FASTGPT_INLINE void begin() {}
    static FASTGPT_INLINE void end() {}

    // v as the products see it.
    static FASTGPT_INLINE vec<T> operand(vec<T> v) {
        if constexpr (per<X> == 1) return v;
        else return rounded_to_bfloat16(v);
    }

    // ---- forward

    // Keys 0 .. n - 1 of a head; they stay for the next blocks of its queries.
    FASTGPT_NOINLINE bool pack_keys_and_values(int64_t new_head, int64_t n, HeadRows<T> k, HeadRows<T> v) {
        if (head == new_head && packed_keys >= n) return true;
        head = new_head;
        packed_keys = n;
        pack_a_from_rows(n, D, k, K, MR * depth<X>(Dp));
        pack_channels(n, v, V);
        return true;
    }
    bool pack_queries(HeadRows<T> q, int n) {
        for (int p = 0; p < n; p += NR)
            pack_columns(min(n - p, NR), {q(p), q.ld}, base2_scale<T>(D), QT + p * depth<X>(Dp), NR);
        return true;
    }
    // S^T = K Q^T for the panel of queries from p on.
    FASTGPT_INLINE void scores(const Tile<T>& tile, int p, T* S) const {
        tile.for_each_causal_block(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA {
            multiply_over_channels(rows, (tile.lanes - c) / VL<T>, K + (tile.k0 + row) * depth<X>(Dp),
                                   QT + p * depth<X>(Dp) + c, NR, S + row * NR + c);
        });
    }
    // O^T += V^T P^T
    FASTGPT_INLINE bool add_values(const Tile<T>& tile, const T* weights, T* OT) {
        const X* P = pair_keys(tile, weights, NR, PX);
        tile.for_each_causal_block(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA {
            const PackedA<X> v{V + depth<X>(tile.k0 + row) * MR, MR * depth<X>(max_keys)};
            panel_product<T, true>(Dp, (tile.lanes - c) / VL<T>, depth<X>(rows), v, P + depth<X>(row) * NR + c, NR,
                                   OT + c, NR);
        });
        return true;
    }

    // ---- backward: K and V of a range of keys; `j` counts from its first

    FASTGPT_NOINLINE bool pack_range(int64_t n, HeadRows<T> k, HeadRows<T> v) {
        pack_a_from_rows(n, D, k, K, MR * depth<X>(Dp));
        pack_a_from_rows(n, D, v, V, MR * depth<X>(Dp));
        pack_channels(n, k, KT);
        return true;
    }
    bool pack_queries_and_gradients(HeadRows<T> q, HeadRows<T> dout, int n) {
        pack_columns(n, q, base2_scale<T>(D), QT, NQ);
        pack_columns(n, dout, T(1), dOT, NQ);
        pack_rows(q, n, Q);
        pack_rows(dout, n, dO);
        return true;
    }
    // S^T = K Q^T, dP^T = V dO^T
    FASTGPT_INLINE void scores_and_gradients(const Tile<T>& tile, int64_t j, T* S, T* dP) const {
        for (Panels p(tile.lanes / VL<T>); p.next();) {
            const int end = (p.begin + p.vectors) * VL<T>;
            tile.for_each_causal_block(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                const int vectors = (end - c) / VL<T>;
                const int at = row * NQ + c;
                const int64_t of_keys = (j + row) * depth<X>(Dp);
                multiply_over_channels(rows, vectors, K + of_keys, QT + c, NQ, S + at);
                multiply_over_channels(rows, vectors, V + of_keys, dOT + c, NQ, dP + at);
            });
        }
    }
    // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
    FASTGPT_INLINE bool add_gradients(const Tile<T>& tile, int64_t j, int n, const T* P, const T* dscores, T* dV, T* dK,
                                      T* dQT) {
        add_over_queries(tile, n, pair_queries(tile, P, PX), dO, dV + j * Dp);
        add_over_queries(tile, n, pair_queries(tile, dscores, dSX), Q, dK + j * Dp);
        const X* dS = pair_keys(tile, dscores, NQ, dSTX);
        for (Panels p(tile.lanes / VL<T>); p.next();) {
            const int end = (p.begin + p.vectors) * VL<T>;
            tile.for_each_causal_block(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                const PackedA<X> k{KT + depth<X>(j + row) * MR, MR * depth<X>(max_keys)};
                panel_product<T, true>(Dp, (end - c) / VL<T>, depth<X>(rows), k, dS + depth<X>(row) * NQ + c, NQ,
                                       dQT + c, NQ);
            });
        }
        return true;
    }

  private:
    static constexpr int64_t of_tile = per<X> == 1 ? 0 : NK * NQ / per<X>;
    static int64_t of_scaled(int64_t D) { return per<X> == 1 ? 0 : NQ * D; }

    const int64_t D, Dp, max_keys;
    int64_t head = -1, packed_keys = 0;
    T* scaled; // queries
    X *PX, *K, *V, *QT, *dOT, *Q, *dO, *KT, *dSX, *dSTX;

    // C = A B over all channels: A micro-panels of keys, B columns of queries. At most KC channels at once, as in
    // matmul: short sums of sums round less than a long sum.
    FASTGPT_INLINE void multiply_over_channels(int rows, int vectors, const X* A, const X* B, int64_t ld, T* C) const {
        constexpr int64_t chunk = Fma<T, X>::KC;
        for (int64_t d = 0; d < D; d += chunk) {
            const PackedA<X> a{A + depth<X>(d) * MR, MR * depth<X>(Dp)};
            const int64_t n = depth<X>(min(D - d, chunk));
            if (d == 0) panel_product<T, false>(rows, vectors, n, a, B, ld, C, ld);
            else panel_product<T, true>(rows, vectors, n, a, B + depth<X>(d) * ld, ld, C, ld);
        }
    }
    // Micro-panels of MR channels, key by key. P is 0 past the last key, and 0 times garbage may be NaN: so zeros
    // there.
    FASTGPT_NOINLINE void pack_channels(int64_t n, HeadRows<T> x, X* to) const {
        const int64_t keys = depth<X>(max_keys);
        pack_a_from_columns<T>(D, n, x, to, MR * keys);
        for (int64_t d = 0; d < Dp; d += MR)
            for (int64_t i = depth<X>(n) * MR; i < depth<X>(round_up(n, MR)) * MR; i++) to[d * keys + i] = 0;
    }
    // Channel by channel, n queries side by side.
    FASTGPT_NOINLINE void pack_columns(int n, HeadRows<T> x, T scale, X* to, int64_t ld) const {
        if constexpr (per<X> == 1) transpose<T>(n, int(D), x.data, x.ld, to, ld, scale, true);
        else {
            for (int64_t i = 0; i < n; i++)
                for (int64_t d = 0; d < D; d++) scaled[i * D + d] = x(i)[d] * scale;
            for_columns<X>(
                n, D, [&](int64_t i) FASTGPT_LAMBDA { return scaled + i * D; },
                [&](int64_t d, int64_t i, vec<X> v) FASTGPT_LAMBDA { store(to + d * ld + i, v); });
        }
    }
    // Query by query, Dp channels side by side, zero past D.
    FASTGPT_NOINLINE void pack_rows(HeadRows<T> x, int64_t n, X* to) const {
        for (int64_t i = 0; i < depth<X>(n); i++, to += Dp) {
            const Across<X, T> from(x, i, n);
            for (int64_t d = 0; d < Dp; d += VL<X>) store(to + d, from.load(d, int(min<int64_t>(D - d, VL<X>))));
        }
    }
    // P or dS as B of a product over keys, and as A of one over queries.
    static FASTGPT_NOINLINE const X* pair_keys(const Tile<T>& tile, const T* x, int64_t ld, X* to) {
        if constexpr (per<X> == 1) return x;
        else {
            for (int c = 0; c < tile.lanes; c += VL<T>)
                for (int64_t j = 0; j < tile.visible(c + VL<T>); j += per<X>)
                    store(to + depth<X>(j) * ld + c, interleaved(load(x + j * ld + c), load(x + (j + 1) * ld + c)));
            return to;
        }
    }
    static FASTGPT_NOINLINE const X* pair_queries(const Tile<T>& tile, const T* x, X* to) {
        if constexpr (per<X> == 1) return x;
        else {
            constexpr int wide = per<X> * VL<T>;
            for (int c = 0; c < tile.lanes; c += wide)
                for (int64_t j = 0; j < tile.visible(c + wide); j++)
                    store(to + j * depth<X>(NQ) + depth<X>(c),
                          load_along<X>(x + j * NQ + c, min(wide, tile.lanes - c)));
            return to;
        }
    }
    // to (NK, Dp) += W^T (keys, queries) x (queries, Dp), for each MR keys from their first query on.
    FASTGPT_INLINE void add_over_queries(const Tile<T>& tile, int n, const X* W, const X* x, T* to) const {
        for (int j = 0; j < tile.rows; j += MR) {
            const int64_t first = max<int64_t>(tile.k0 + j - tile.q0, 0);
            if (first >= n) break;
            const UnpackedA<X> w{W + j * depth<X>(NQ) + depth<X>(first), depth<X>(NQ)};
            block_product<T, true>(MR, int(Dp / VL<T>), depth<X>(n - first), w, x + depth<X>(first) * Dp, Dp,
                                   to + j * Dp, Dp);
        }
    }
};
