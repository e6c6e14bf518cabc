// Causal attention on packed (B, T, 3C) queries, keys and values: gpt.py's attention, in tiles, in the manner of
// FlashAttention-2 (Dao 2023). No T x T matrix exists anywhere.
//
//   S_ij = q_i . k_j / sqrt(D),  j <= i        P_ij = exp(S_ij - lse_i)        lse_i = log sum_j exp(S_ij)
//   o_i  = sum_j P_ij v_j
//
// Backward. With dP_ij = do_i . v_j the softmax gives dS_ij = P_ij (dP_ij - delta_i), where
// delta_i = sum_j P_ij dP_ij = do_i . o_i needs no sum over keys:
//
//   dv_j = sum_i P_ij do_i        dq_i = sum_j dS_ij k_j / sqrt(D)        dk_j = sum_i dS_ij q_i / sqrt(D)
//
// Dropout multiplies P by z_ij = 0 or 1 / (1 - dropout) where it meets v: o and dv take z P, dP becomes z dP, and
// delta_i = do_i . o_i still holds.
//
// Saved for the backward: out, which the next layer holds anyway, and lse, one number a query and head (in base 2,
// since exp2 is what the kernel computes: log2(e) / sqrt(D) is folded into Q). P is made anew from both.
//
//            NQ queries, side by side in the lanes           keys    queries ->
//          +-----------------------------------+               |   [#\ . . . ]     # whole tiles
//   NK     |                                   |               v   [# #\ . . ]     \ tiles cut by the diagonal: each
//   keys   |   S^T = K Q^T   then P^T, dS^T    |                   [# # #\ . ]       panel of columns ends where its
//          |                                   |                   [# # # #\ ]       last query does
//          +-----------------------------------+                                   . never touched
//
// Queries lie across SIMD lanes (as in gemma.cpp), so the running maximum and sum of a softmax go down the columns,
// with no step across lanes. Q and dO are transposed once per block of queries, O and dQ once on the way out; the other
// products take their operands as they lie. Each tile of K and V is first copied out of qkv: there, rows are 3C values
// apart, and that stride falls into few sets of the first-level cache.
//
// Forward: a task is a block of NQ queries of one head. Backward: a task is a range of keys of one head and owns its dk
// and dv; its part of dq is summed over the ranges afterwards, in order. Both cuts depend on the shape alone, so the
// bits do not depend on the number of threads.

constexpr int NQ = 96, NK = 64; // NQ is a multiple of NV * VL for every instruction set, NK of MR
static_assert(NQ % (NV * VL<float>) == 0 && NK % MR == 0);

// Head size, as rows for the microkernel's MR and as lanes: both are powers of 2.
template <class T> FASTGPT_INLINE int padded(long D) {
    constexpr int unit = MR > VL<T> ? MR : VL<T>;
    return int(D + unit - 1) / unit * unit;
}

// What queries q0 .. q0 + n - 1 see of keys k0 .. k0 + keys - 1. Columns are queries, in panels of registers.
template <class T> struct Tile {
    long q0, k0;
    int lanes, rows, keys; // lanes: queries up to a whole register; rows: keys up to a whole MR

    FASTGPT_INLINE Tile(long q0, int n, long k0, long k_end)
        : q0(q0), k0(k0), lanes((n + VL<T> - 1) / VL<T> * VL<T>), keys(int(k_end - k0 < NK ? k_end - k0 : NK)) {
        rows = (keys + MR - 1) / MR * MR;
    }
    // Rows that any query before column `end` sees.
    FASTGPT_INLINE int visible(int end) const {
        long n = q0 + end - k0;
        n = n < 0 ? 0 : (n + MR - 1) / MR * MR;
        return n < rows ? int(n) : rows;
    }
    // Do the queries of the register at column c see no key outside this tile?
    FASTGPT_INLINE bool has_all_keys_of(int c) const { return k0 == 0 && q0 + c + VL<T> <= NK; }
    FASTGPT_INLINE bool on_diagonal() const { return k0 + rows > q0 + 1; }
    // S = -inf where the key comes after the query.
    FASTGPT_NOINLINE void mask(T* S) const {
        for (long j = q0 + 1 > k0 ? q0 + 1 - k0 : 0; j < rows; j++) {
            const long end = k0 + j - q0 < lanes ? k0 + j - q0 : lanes;
            for (long i = 0; i < end; i++) S[j * NQ + i] = -__builtin_inf();
        }
    }
};

// Copy `rows` rows of D values into lines of `line`, zero behind them and in rows up to `all`.
template <class T> FASTGPT_NOINLINE void pack(const T* from, long stride, int rows, int all, long D, T* to, int line) {
    for (int i = 0; i < all; i++, to += line) {
        long d = 0;
        if (i < rows)
            for (; d < D; d++) to[d] = from[i * stride + d];
        for (; d < line; d++) to[d] = 0;
    }
}

template <class T> FASTGPT_INLINE T base2_scale(long D) { return T(1.4426950408889634 / __builtin_sqrt(double(D))); }

// S -> P for one tile, column by column: new maximum, P = 2^(S - maximum), sum; O where the maximum has moved.
template <class T, bool DROPOUT>
FASTGPT_NOINLINE void softmax_tile(const Tile<T>& tile, int Dp, T* S, const T* keep, T* OT, T* top, T* total) {
    for (Panels p(tile.lanes / VL<T>); p.next();) {
        const int rows = tile.visible((p.begin + p.vectors) * VL<T>);
        for (int c = p.begin * VL<T>; c < (p.begin + p.vectors) * VL<T>; c += VL<T>) {
            const vec<T> old = load(top + c);
            vec<T> m[2] = {old, old};
            for (int j = 0; j < rows; j += 2)
                for (int i = 0; i < 2; i++) m[i] = max<T>(m[i], load(S + (j + i) * NQ + c));
            const vec<T> now = max<T>(m[0], m[1]), shrink = exp2(old - now);
            vec<T> s[2] = {load(total + c) * shrink, {}};
            for (int j = 0; j < rows; j += 2)
                for (int i = 0; i < 2; i++) {
                    const vec<T> e = exp2(load(S + (j + i) * NQ + c) - now);
                    s[i] += e;
                    store(S + (j + i) * NQ + c, DROPOUT ? e * load(keep + (j + i) * NQ + c) : e);
                }
            store(top + c, now);
            store(total + c, s[0] + s[1]);
            if (any<T>(now != old))
                for (int d = 0; d < Dp; d++) store(OT + d * NQ + c, load(OT + d * NQ + c) * shrink);
        }
    }
}

template <class T, bool DROPOUT>
void attention_forward_with(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* lse) {
    const long D = shape.D, C = shape.H * D, blocks = (shape.T + NQ - 1) / NQ;
    const int Dp = padded<T>(D), workers = num_threads();
    const long tile_size = NQ * NK;
    Scratch<T> scratch(workers, (DROPOUT ? 2 : 1) * tile_size + 2 * Dp * NQ + 2 * NK * Dp + 2 * NQ);
    parallel_tasks(shape.B * shape.H * blocks, workers, [&](int64_t task, int worker) {
        // the last blocks of queries see the most keys: begin with them, so that no long task is left for the end
        const long b = task % (shape.B * shape.H) / shape.H, h = task % shape.H;
        const long q0 = (blocks - 1 - task / (shape.B * shape.H)) * NQ;
        const int n = int(shape.T - q0 < NQ ? shape.T - q0 : NQ);
        T* S = scratch.part(worker);
        T *QT = S + tile_size, *OT = QT + Dp * NQ, *K = OT + Dp * NQ, *V = K + NK * Dp;
        T *top = V + NK * Dp, *total = top + NQ, *keep = total + NQ;
        transpose<T>(n, int(D), qkv.at(b, q0) + h * D, qkv.time, QT, NQ, base2_scale<T>(D), true);
        for (int i = 0; i < NQ; i++) top[i] = -__builtin_inf(), total[i] = 0;
        for (long i = 0; i < long(Dp) * NQ; i++) OT[i] = 0;

        for (long k0 = 0; k0 < q0 + n; k0 += NK) {
            const Tile<T> tile(q0, n, k0, q0 + n);
            pack(qkv.at(b, k0) + C + h * D, qkv.time, tile.keys, tile.rows, D, K, Dp);
            pack(qkv.at(b, k0) + 2 * C + h * D, qkv.time, tile.keys, tile.rows, D, V, Dp);
            for (Panels p(tile.lanes / VL<T>); p.next();) { // S^T = K Q^T
                const int c = p.begin * VL<T>, rows = tile.visible(c + p.vectors * VL<T>);
                panel_product<T, false>(rows, p.vectors, D, K, Dp, 1, QT + c, NQ, S + c, NQ);
            }
            if (tile.on_diagonal()) tile.mask(S);
            if (DROPOUT) dropout_tile<T, NQ>(shape.dropout, shape.seed, b * shape.H + h, q0, k0, tile.rows, keep);
            softmax_tile<T, DROPOUT>(tile, Dp, S, keep, OT, top, total);
            for (Panels p(tile.lanes / VL<T>); p.next();) { // O^T += V^T P^T
                const int c = p.begin * VL<T>, rows = tile.visible(c + p.vectors * VL<T>);
                panel_product<T, true>(Dp, p.vectors, rows, V, 1, Dp, S + c, NQ, OT + c, NQ);
            }
        }

        T* log_sums = lse + (b * shape.H + h) * shape.T + q0;
        for (int i = 0; i < n; i++) log_sums[i] = top[i] + T(__builtin_log2(double(total[i])));
        for (int c = 0; c < NQ; c += VL<T>) {
            const vec<T> inverse = broadcast(T(1)) / load(total + c);
            for (int d = 0; d < D; d++) store(OT + d * NQ + c, load(OT + d * NQ + c) * inverse);
        }
        transpose<T>(int(D), n, OT, NQ, out + (b * shape.T + q0) * C + h * D, C, T(1), false);
    });
}

// P and dS of one tile, from S and dP: P^T meets do with dropout applied, dS meets q and k.
template <class T, bool DROPOUT> FASTGPT_NOINLINE void
softmax_backward_tile(const Tile<T>& tile, T* S, T* dP, const T* keep, const T* lse, const T* delta) {
    for (Panels p(tile.lanes / VL<T>); p.next();) {
        const int rows = tile.visible((p.begin + p.vectors) * VL<T>);
        for (int c = p.begin * VL<T>; c < (p.begin + p.vectors) * VL<T>; c += VL<T>) {
            const vec<T> l = load(lse + c);
            vec<T> mean = load(delta + c);
            if (tile.has_all_keys_of(c)) { // few keys, some P near 1: sum P dP itself, whose rounding cancels with dP's
                mean = vec<T>{};
                for (long at = c; at < rows * NQ; at += NQ) {
                    const vec<T> PdP = exp2(load(S + at) - l) * load(dP + at);
                    mean += DROPOUT ? PdP * load(keep + at) : PdP;
                }
            }
            for (int j = 0; j < rows; j++) {
                const long at = j * NQ + c;
                const vec<T> P = exp2(load(S + at) - l);
                if (DROPOUT) {
                    const vec<T> z = load(keep + at);
                    store(S + at, P * z);
                    store(dP + at, P * (load(dP + at) * z - mean));
                } else {
                    store(S + at, P);
                    store(dP + at, P * (load(dP + at) - mean));
                }
            }
        }
    }
}

// into (NK, D) += W^T (keys, queries) X (queries, D), for each row of keys from its first query on.
template <class T>
FASTGPT_INLINE void add_over_queries(const Tile<T>& tile, int n, const T* W, const T* X, int Dp, T* into) {
    for (int j = 0; j < tile.rows; j += MR) {
        const long first = tile.k0 + j > tile.q0 ? tile.k0 + j - tile.q0 : 0;
        if (first >= n) break;
        product<T, true>(MR, Dp / VL<T>, n - first, W + j * NQ + first, NQ, 1, X + first * Dp, Dp, into + j * Dp, Dp);
    }
}

// Ranges of keys per head: enough tasks for many cores, but each range at least 4 tiles, and at most 4 ranges, since
// each one past the first costs a copy of dq.
inline long key_ranges(const AttentionShape& s) {
    const long wanted = 64 / (s.B * s.H) + 1, most = s.T / (4 * NK) < 4 ? s.T / (4 * NK) : 4;
    return wanted < most ? wanted : most < 1 ? 1 : most;
}

template <class T, bool DROPOUT> void attention_backward_with(const AttentionShape& shape, Sequence<const T> dout,
                                                              Sequence<const T> qkv, Sequence<const T> out,
                                                              const T* lse, T* dqkv) {
    const long D = shape.D, C = shape.H * D, heads = shape.B * shape.H, ranges = key_ranges(shape);
    const long range = ((shape.T + ranges - 1) / ranges + NK - 1) / NK * NK; // keys, whole tiles
    const int Dp = padded<T>(D), workers = num_threads();
    const long tile_size = NQ * NK;
    Scratch<T> scratch(workers, (DROPOUT ? 3 : 2) * tile_size + 3 * Dp * NQ + 2 * NQ * Dp + 2 * NK * Dp + 2 * NQ +
                                    2 * range * Dp);
    Scratch<T> partial(heads * (ranges - 1), shape.T * D); // dq of all ranges but the first
    const T scale = T(1 / __builtin_sqrt(double(D)));

    parallel_tasks(heads * ranges, workers, [&](int64_t task, int worker) {
        const long head = task % heads, b = head / shape.H, h = head % shape.H, r = task / heads;
        const long k_begin = r * range, k_end = (r + 1) * range < shape.T ? (r + 1) * range : shape.T;
        if (k_begin >= k_end) return;
        T* S = scratch.part(worker);
        T *dP = S + tile_size, *QT = dP + tile_size, *GT = QT + Dp * NQ, *dQT = GT + Dp * NQ; // G is dO
        T *Q = dQT + Dp * NQ, *G = Q + NQ * Dp, *K = G + NQ * Dp, *V = K + NK * Dp;
        T *lses = V + NK * Dp, *delta = lses + NQ, *dK = delta + NQ, *dV = dK + range * Dp, *keep = dV + range * Dp;
        for (long i = 0; i < 2 * range * Dp; i++) dK[i] = 0;

        for (long q0 = k_begin / NQ * NQ; q0 < shape.T; q0 += NQ) {
            const int n = int(shape.T - q0 < NQ ? shape.T - q0 : NQ);
            const T *q = qkv.at(b, q0) + h * D, *g = dout.at(b, q0) + h * D, *o = out.at(b, q0) + h * D;
            transpose<T>(n, int(D), q, qkv.time, QT, NQ, base2_scale<T>(D), true);
            transpose<T>(n, int(D), g, dout.time, GT, NQ, T(1), true);
            pack(q, qkv.time, n, n, D, Q, Dp);
            pack(g, dout.time, n, n, D, G, Dp);
            for (int i = 0; i < NQ; i++) // lanes behind the last query: P = 2^-inf = 0
                lses[i] = i < n ? lse[head * shape.T + q0 + i] : T(__builtin_inf());
            T* OT = dQT; // for a moment; delta adds in the order in which the product adds dP, so that they cancel well
            transpose<T>(n, int(D), o, out.time, OT, NQ, T(1), true);
            for (int c = 0; c < NQ; c += VL<T>) {
                vec<T> d{};
                if (c < n)
                    for (long k = 0; k < D; k++) d += load(GT + k * NQ + c) * load(OT + k * NQ + c);
                store(delta + c, d);
            }
            for (long i = 0; i < long(Dp) * NQ; i++) dQT[i] = 0;

            for (long k0 = k_begin; k0 < k_end && k0 < q0 + n; k0 += NK) {
                const Tile<T> tile(q0, n, k0, q0 + n < k_end ? q0 + n : k_end);
                pack(qkv.at(b, k0) + C + h * D, qkv.time, tile.keys, tile.rows, D, K, Dp);
                pack(qkv.at(b, k0) + 2 * C + h * D, qkv.time, tile.keys, tile.rows, D, V, Dp);
                for (Panels p(tile.lanes / VL<T>); p.next();) { // S^T = K Q^T, dP^T = V dO^T
                    const int c = p.begin * VL<T>, rows = tile.visible(c + p.vectors * VL<T>);
                    panel_product<T, false>(rows, p.vectors, D, K, Dp, 1, QT + c, NQ, S + c, NQ);
                    panel_product<T, false>(rows, p.vectors, D, V, Dp, 1, GT + c, NQ, dP + c, NQ);
                }
                if (tile.on_diagonal()) tile.mask(S);
                if (DROPOUT) dropout_tile<T, NQ>(shape.dropout, shape.seed, head, q0, k0, tile.rows, keep);
                softmax_backward_tile<T, DROPOUT>(tile, S, dP, keep, lses, delta);
                add_over_queries(tile, n, S, G, Dp, dV + (k0 - k_begin) * Dp);
                add_over_queries(tile, n, dP, Q, Dp, dK + (k0 - k_begin) * Dp);
                for (Panels p(tile.lanes / VL<T>); p.next();) { // dQ^T += K^T dS^T
                    const int c = p.begin * VL<T>, rows = tile.visible(c + p.vectors * VL<T>);
                    panel_product<T, true>(Dp, p.vectors, rows, K, 1, Dp, dP + c, NQ, dQT + c, NQ);
                }
            }
            T* dq =
                r == 0 ? dqkv + (b * shape.T + q0) * 3 * C + h * D : partial.part(head * (ranges - 1) + r - 1) + q0 * D;
            transpose<T>(int(D), n, dQT, NQ, dq, r == 0 ? 3 * C : D, scale, false);
        }
        for (long k = k_begin; k < k_end; k++) {
            T* to = dqkv + (b * shape.T + k) * 3 * C + C + h * D;
            for (long d = 0; d < D; d++) {
                to[d] = dK[(k - k_begin) * Dp + d] * scale;
                to[C + d] = dV[(k - k_begin) * Dp + d];
            }
        }
    });

    if (ranges > 1)
        parallel_tasks(heads * ((shape.T + NQ - 1) / NQ), workers, [&](int64_t task, int) {
            const long head = task % heads, b = head / shape.H, h = head % shape.H, q0 = task / heads * NQ;
            for (long q = q0; q < q0 + NQ && q < shape.T; q++) {
                T* dq = dqkv + (b * shape.T + q) * 3 * C + h * D;
                for (long r = 1; r < ranges && r * range < shape.T && r * range / NQ * NQ <= q0; r++) { // began by q0
                    const T* part = partial.part(head * (ranges - 1) + r - 1) + q * D;
                    for (long d = 0; d < D; d++) dq[d] += part[d];
                }
            }
        });
}

template <class T> void attention_forward(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* lse) {
    return shape.dropout > 0 ? attention_forward_with<T, true>(shape, qkv, out, lse)
                             : attention_forward_with<T, false>(shape, qkv, out, lse);
}

template <class T> void attention_backward(const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                                           Sequence<const T> out, const T* lse, T* dqkv) {
    return shape.dropout > 0 ? attention_backward_with<T, true>(shape, dout, qkv, out, lse, dqkv)
                             : attention_backward_with<T, false>(shape, dout, qkv, out, lse, dqkv);
}
