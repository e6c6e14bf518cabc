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
// with no step across lanes. Q and dO are transposed once per block of queries, O and dQ once on the way out. K and V
// are copied out of qkv into strips (microkernel.h) once per head: in qkv, rows are 3C values apart, and that stride
// falls into few sets of the first-level cache.
//
// Forward: a task is a block of NQ queries of one head, and a worker takes the blocks of a head one after the other, to
// use its copies again. Backward: a task is a range of keys of one head and owns its dk and dv; its part of dq is summed
// over the ranges afterwards, in order. The order of each sum depends on the shape alone, so the bits do not depend on
// the number of threads.

constexpr int NQ = 96, NK = 64; // NQ is a multiple of NV * VL for every instruction set, NK of MR and VL
static_assert(NQ % (NV * VL<float>) == 0 && NK % MR == 0 && NK % VL<float> == 0);

template <class T> FASTGPT_INLINE long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// Head size, as rows for the microkernel's MR and as lanes: both are powers of 2.
template <class T> FASTGPT_INLINE int padded(long D) { return int(round_up<T>(D, MR > VL<T> ? MR : VL<T>)); }

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
    // step(row, rows, c): rows of keys from `row` on, which the registers from column c on see. One step for a whole
    // tile; on the diagonal, one for each register, down the stairs. Columns c .. end - 1.
    template <class Step> FASTGPT_INLINE void stairs(int c, int end, const Step& step) const {
        for (int row = 0; c < end; c += VL<T>) {
            const int below = visible(c + VL<T>);
            if (below > row) step(row, below - row, c);
            row = below;
        }
    }
    // Do the queries of the register at column c see no key outside this tile?
    FASTGPT_INLINE bool has_all_keys_of(int c) const { return k0 == 0 && q0 + c + VL<T> <= NK; }
    FASTGPT_INLINE bool on_diagonal() const { return k0 + rows > q0 + 1; }
    // S = -inf where the key comes after the query.
    FASTGPT_NOINLINE void mask(T* S, long line) const {
        for (long j = q0 + 1 > k0 ? q0 + 1 - k0 : 0; j < rows; j++) {
            const long end = k0 + j - q0 < lanes ? k0 + j - q0 : lanes;
            for (long i = 0; i < end; i++) S[j * line + i] = -__builtin_inf();
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

// Rows of one head are D values each, far apart, so the processor can't guess the next. Ask for rows
// n * part / parts to n * (part + 1) / parts of n.
template <class T> FASTGPT_INLINE void prefetch_rows(const T* p, long stride, long n, long part, long parts, long D) {
    for (long i = n * part / parts; i < n * (part + 1) / parts; i++)
        for (long d = 0; d < D; d += 64 / long(sizeof(T))) __builtin_prefetch(p + i * stride + d, 0, 2);
}

template <class T> FASTGPT_INLINE T base2_scale(long D) { return T(1.4426950408889634 / __builtin_sqrt(double(D))); }

// K and V of one head in strips, for a worker that takes several tasks of that head in a row.
template <class T> struct HeadCopy {
    T *K, *V; // strips of keys, term by term along D; strips of channels, term by term along the keys
    long Tp, Dp;
    long head = -1, keys = 0; // what is there

    static long size(long T_, long Dp) { return 2 * round_up<T>(T_, NK) * Dp; }
    HeadCopy(T* memory, long T_, long Dp) : K(memory), V(memory + round_up<T>(T_, NK) * Dp), Tp(round_up<T>(T_, NK)), Dp(Dp) {}

    StripsOf<T> K_from(long key) const { return {K + key * Dp, MR * Dp}; }
    StripsOf<T> V_from(long key) const { return {V + key * MR, MR * Tp}; }

    // k and v: where row 0 is; rows are `time` values apart.
    FASTGPT_NOINLINE void fill(long new_head, long n, const T* k, const T* v, long time, long D) {
        if (head == new_head && keys >= n) return;
        head = new_head, keys = n;
        strips_from_rows<T>(n, D, [&](long j) FASTGPT_LAMBDA { return k + j * time; }, K, MR * Dp);
        strips_from_terms<T>(D, n, [&](long j) FASTGPT_LAMBDA { return v + j * time; }, V, MR * Tp);
        for (long d = 0; d < Dp; d += MR) // behind the last key: P is 0 there, and 0 times garbage may be NaN
            for (long i = n * MR; i < round_up<T>(n, MR) * MR; i++) V[d * Tp + i] = 0;
    }
};

// S -> P for one panel of a tile, column by column: new maximum, P = 2^(S - maximum), sum; O where the maximum moved.
template <class T, bool DROPOUT>
FASTGPT_NOINLINE void softmax_panel(const Tile<T>& tile, int Dp, T* S, const T* keep, T* OT, T* top, T* total) {
    constexpr int NR = NV * VL<T>;
    for (int c = 0; c < tile.lanes; c += VL<T>) {
        const int rows = tile.visible(c + VL<T>);
        const vec<T> old = load(top + c);
        vec<T> m[2] = {old, old};
        for (int j = 0; j < rows; j += 2)
            for (int i = 0; i < 2; i++) m[i] = max<T>(m[i], load(S + (j + i) * NR + c));
        const vec<T> now = max<T>(m[0], m[1]), shrink = exp2(old - now);
        vec<T> s[2] = {load(total + c) * shrink, {}};
        for (int j = 0; j < rows; j += 2)
            for (int i = 0; i < 2; i++) {
                const vec<T> e = exp2(load(S + (j + i) * NR + c) - now);
                s[i] += e;
                store(S + (j + i) * NR + c, DROPOUT ? e * load(keep + (j + i) * NR + c) : e);
            }
        store(top + c, now);
        store(total + c, s[0] + s[1]);
        if (any<T>(now != old))
            for (int d = 0; d < Dp; d++) store(OT + d * NR + c, load(OT + d * NR + c) * shrink);
    }
}

template <class T, bool DROPOUT>
void attention_forward_with(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* lse) {
    constexpr int NR = NV * VL<T>; // queries in a panel; blocks of queries lie panel by panel
    const long D = shape.D, C = shape.H * D, blocks = (shape.T + NQ - 1) / NQ;
    const int Dp = padded<T>(D), workers = num_threads();
    const long copy_size = HeadCopy<T>::size(shape.T, Dp);
    Scratch<T> scratch(workers, (DROPOUT ? 2 : 1) * NK * NR + 2 * Dp * NQ + 2 * NQ + copy_size);
    Scratch<HeadCopy<T>> copies(workers, 1);
    for (int w = 0; w < workers; w++) new (copies.part(w)) HeadCopy<T>(scratch.part(w), shape.T, Dp);
    parallel_tasks(shape.B * shape.H * blocks, workers, [&](int64_t task, int worker) {
        // the last blocks of queries see the most keys: begin with them, so that no long task is left for the end
        const long head = task / blocks, b = head / shape.H, h = head % shape.H;
        const long q0 = (blocks - 1 - task % blocks) * NQ;
        const int n = int(shape.T - q0 < NQ ? shape.T - q0 : NQ);
        HeadCopy<T>& kv = *copies.part(worker);
        kv.fill(head, q0 + n, qkv.at(b, 0) + C + h * D, qkv.at(b, 0) + 2 * C + h * D, qkv.time, D);
        T* QT = scratch.part(worker) + copy_size;
        T *OT = QT + Dp * NQ, *S = OT + Dp * NQ, *top = S + NK * NR, *total = top + NQ, *keep = total + NQ;
        for (int p = 0; p < n; p += NR)
            transpose<T>(n - p < NR ? n - p : NR, int(D), qkv.at(b, q0 + p) + h * D, qkv.time, QT + p * Dp, NR,
                         base2_scale<T>(D), true);
        for (int i = 0; i < NQ; i++) top[i] = -__builtin_inf(), total[i] = 0;
        for (long i = 0; i < long(Dp) * NQ; i++) OT[i] = 0;

        const bool more = head + 1 < shape.B * shape.H;
        const T* next = more ? qkv.at((head + 1) / shape.H, q0) + (head + 1) % shape.H * D : nullptr;
        const long tiles = (q0 + n + NK - 1) / NK;
        for (long k0 = 0; k0 < q0 + n; k0 += NK) {
            for (int i = 0; more && i < 3; i++) prefetch_rows(next + i * C, qkv.time, n, k0 / NK, tiles, D);
            for (int p = 0; p < n; p += NR) {
                const int queries = n - p < NR ? n - p : NR;
                if (k0 >= q0 + p + queries) continue;
                const Tile<T> tile(q0 + p, queries, k0, q0 + p + queries);
                T* O = OT + p * Dp;
                tile.stairs(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA { // S^T = K Q^T
                    panel_product<T, false>(rows, (tile.lanes - c) / VL<T>, D, kv.K_from(k0 + row), QT + p * Dp + c, NR,
                                            S + row * NR + c, NR);
                });
                if (tile.on_diagonal()) tile.mask(S, NR);
                if (DROPOUT) dropout_tile<T, NR>(shape.dropout, shape.seed, head, q0 + p, k0, tile.rows, keep);
                softmax_panel<T, DROPOUT>(tile, Dp, S, keep, O, top + p, total + p);
                tile.stairs(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA { // O^T += V^T P^T
                    panel_product<T, true>(Dp, (tile.lanes - c) / VL<T>, rows, kv.V_from(k0 + row), S + row * NR + c,
                                           NR, O + c, NR);
                });
            }
        }

        T* log_sums = lse + head * shape.T + q0;
        for (int i = 0; i < n; i++) log_sums[i] = top[i] + T(__builtin_log2(double(total[i])));
        for (int p = 0; p < n; p += NR) {
            T* O = OT + p * Dp;
            for (int c = 0; c < NR; c += VL<T>) {
                const vec<T> inverse = broadcast(T(1)) / load(total + p + c);
                for (int d = 0; d < D; d++) store(O + d * NR + c, load(O + d * NR + c) * inverse);
            }
            transpose<T>(int(D), n - p < NR ? n - p : NR, O, NR, out + (b * shape.T + q0 + p) * C + h * D, C, T(1),
                         false);
        }
    });
}

// P and dS of one tile, from S and dP: P^T meets do with dropout applied, dS meets q and k.
template <class T, bool DROPOUT> FASTGPT_NOINLINE void
softmax_backward_tile(const Tile<T>& tile, T* S, T* dP, const T* keep, const T* lse, const T* delta) {
    for (int c = 0; c < tile.lanes; c += VL<T>) {
        const int rows = tile.visible(c + VL<T>);
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

// into (NK, D) += W^T (keys, queries) X (queries, D), for each row of keys from its first query on.
template <class T>
FASTGPT_INLINE void add_over_queries(const Tile<T>& tile, int n, const T* W, const T* X, int Dp, T* into) {
    for (int j = 0; j < tile.rows; j += MR) {
        const long first = tile.k0 + j > tile.q0 ? tile.k0 + j - tile.q0 : 0;
        if (first >= n) break;
        product<T, true>(MR, Dp / VL<T>, n - first, RowsOf<T>{W + j * NQ + first, NQ}, X + first * Dp, Dp,
                         into + j * Dp, Dp);
    }
}

// K and V in strips of keys, then K in strips of channels: `range` * Dp values each.
template <class T>
FASTGPT_NOINLINE void copy_keys(long keys, long range, const T* k, long time, long C, long D, long Dp, T* to) {
    const auto k_row = [&](long j) FASTGPT_LAMBDA { return k + j * time; };
    strips_from_rows<T>(keys, D, k_row, to, MR * Dp);
    strips_from_rows<T>(keys, D, [&](long j) FASTGPT_LAMBDA { return k + C + j * time; }, to + range * Dp, MR * Dp);
    T* channels = to + 2 * range * Dp;
    strips_from_terms<T>(D, keys, k_row, channels, MR * range);
    for (long d = 0; d < Dp; d += MR) // behind the last key
        for (long i = keys * MR; i < round_up<T>(keys, MR) * MR; i++) channels[d * range + i] = 0;
}

// Ranges of keys per head: enough tasks for many cores, but each range at least 4 tiles, and at most 4 ranges, since
// each one past the first costs a copy of dq.
inline long key_ranges(const AttentionShape& s) {
    const long wanted = (23 + s.B * s.H) / (s.B * s.H), most = s.T / (4 * NK) < 4 ? s.T / (4 * NK) : 4;
    return wanted < most ? wanted : most < 1 ? 1 : most;
}

template <class T, bool DROPOUT> void attention_backward_with(const AttentionShape& shape, Sequence<const T> dout,
                                                              Sequence<const T> qkv, Sequence<const T> out,
                                                              const T* lse, T* dqkv) {
    const long D = shape.D, C = shape.H * D, heads = shape.B * shape.H, ranges = key_ranges(shape);
    const long range = ((shape.T + ranges - 1) / ranges + NK - 1) / NK * NK; // keys, whole tiles
    const int Dp = padded<T>(D), workers = num_threads();
    const long tile_size = NQ * NK;
    Scratch<T> scratch(workers, (DROPOUT ? 3 : 2) * tile_size + 3 * Dp * NQ + 2 * NQ * Dp + 2 * NQ + 5 * range * Dp);
    Scratch<T> partial(heads * (ranges - 1), shape.T * D); // dq of all ranges but the first
    const T scale = T(1 / __builtin_sqrt(double(D)));

    parallel_tasks(heads * ranges, workers, [&](int64_t task, int worker) {
        const long head = task % heads, b = head / shape.H, h = head % shape.H, r = task / heads;
        const long k_begin = r * range, k_end = (r + 1) * range < shape.T ? (r + 1) * range : shape.T;
        if (k_begin >= k_end) return;
        T* S = scratch.part(worker);
        T *dP = S + tile_size, *QT = dP + tile_size, *GT = QT + Dp * NQ, *dQT = GT + Dp * NQ; // G is dO
        T *Q = dQT + Dp * NQ, *G = Q + NQ * Dp, *lses = G + NQ * Dp, *delta = lses + NQ;
        T *dK = delta + NQ, *dV = dK + range * Dp, *copies = dV + range * Dp, *keep = copies + 3 * range * Dp;
        for (long i = 0; i < 2 * range * Dp; i++) dK[i] = 0;
        copy_keys(k_end - k_begin, range, qkv.at(b, k_begin) + C + h * D, qkv.time, C, D, Dp, copies);

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
                const long j0 = k0 - k_begin;
                for (Panels p(tile.lanes / VL<T>); p.next();) { // S^T = K Q^T, dP^T = V dO^T
                    const int end = (p.begin + p.vectors) * VL<T>;
                    tile.stairs(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                        const int vectors = (end - c) / VL<T>, at = row * NQ + c;
                        const StripsOf<T> K{copies + (j0 + row) * Dp, MR * Dp};
                        const StripsOf<T> V{copies + (range + j0 + row) * Dp, MR * Dp};
                        panel_product<T, false>(rows, vectors, D, K, QT + c, NQ, S + at, NQ);
                        panel_product<T, false>(rows, vectors, D, V, GT + c, NQ, dP + at, NQ);
                    });
                }
                if (tile.on_diagonal()) tile.mask(S, NQ);
                if (DROPOUT) dropout_tile<T, NQ>(shape.dropout, shape.seed, head, q0, k0, tile.rows, keep);
                softmax_backward_tile<T, DROPOUT>(tile, S, dP, keep, lses, delta);
                add_over_queries(tile, n, S, G, Dp, dV + j0 * Dp);
                add_over_queries(tile, n, dP, Q, Dp, dK + j0 * Dp);
                for (Panels p(tile.lanes / VL<T>); p.next();) { // dQ^T += K^T dS^T
                    const int end = (p.begin + p.vectors) * VL<T>;
                    tile.stairs(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                        const StripsOf<T> KT{copies + 2 * range * Dp + (j0 + row) * MR, MR * range};
                        panel_product<T, true>(Dp, (end - c) / VL<T>, rows, KT, dP + row * NQ + c, NQ, dQT + c, NQ);
                    });
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
