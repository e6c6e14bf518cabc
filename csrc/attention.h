// Causal attention on packed (B, T, 3C) queries, keys and values: gpt.py's attention, in tiles, in the manner of
// FlashAttention-2 (Dao 2023). No T x T matrix exists anywhere.
//
//   S_ij = q_i . k_j / sqrt(D),  j <= i        m_i = max_j S_ij        l_i = sum_j exp(S_ij - m_i)
//   P_ij = exp(S_ij - m_i) / l_i               o_i = sum_j P_ij v_j
//
// Backward. With dP_ij = do_i . v_j the softmax gives dS_ij = P_ij (dP_ij - delta_i), where
// delta_i = sum_j P_ij dP_ij = do_i . o_i needs no sum over keys:
//
//   dv_j = sum_i P_ij do_i        dq_i = sum_j dS_ij k_j / sqrt(D)        dk_j = sum_i dS_ij q_i / sqrt(D)
//
// Dropout multiplies P by z_ij = 0 or 1 / (1 - dropout) where it meets v: o and dv take z P, dP becomes z dP, and
// delta_i = do_i . o_i still holds.
//
// Saved for the backward: out, which the next layer holds anyway, and m and 1 / l, two numbers a query and head (in
// base 2, since exp2 is what the kernel computes: log2(e) / sqrt(D) is folded into Q). P is computed again from them.
// Their logarithm, m + log2(l), would be one number, but its rounding is that of a score: where scores are in the
// hundreds, it alone costs P three digits.
//
//            NQ queries, side by side in the lanes           keys    queries ->
//          +-----------------------------------+               |   [#\ . . . ]     # whole tiles
//   NK     |                                   |               v   [# #\ . . ]     \ tiles cut by the diagonal: each
//   keys   |   S^T = K Q^T   then P^T, dS^T    |                   [# # #\ . ]       register of queries ends where
//          |                                   |                   [# # # #\ ]       the last of them does
//          +-----------------------------------+                                   . never touched
//
// Queries lie across SIMD lanes (as in gemma.cpp), so the running maximum and sum of a softmax go down the columns,
// with no step across lanes. Q and dO are transposed once per block of queries, O and dQ once on the way out. K and V
// are copied out of qkv into strips (microkernel.h) once per head: in qkv, rows are 3C values apart, and that stride
// falls into few sets of the first-level cache.
//
// Forward: a task is a block of NQ queries of one head, and a worker takes the blocks of a head one after the other, to
// use its copies again. Backward: a task is a range of keys of one head and owns its dk and dv; its part of dq is
// summed over the ranges afterwards, in order. The order of each sum depends on the shape alone, so the bits do not
// depend on the number of threads.

constexpr int NQ = 96, NK = 64; // NQ is a multiple of NV * VL for every instruction set, NK of MR and VL
static_assert(NQ % (NV * VL<float>) == 0 && NK % MR == 0 && NK % VL<float> == 0);

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

template <class T> FASTGPT_INLINE T base2_scale(long D) { return T(1.4426950408889634 / __builtin_sqrt(double(D))); }

// Rows of one head, `stride` values apart.
template <class T> struct HeadRows {
    const T* data;
    long stride;
    FASTGPT_INLINE const T* operator()(long i) const { return data + i * stride; }
};

// Attention's seven matrix products, and the copies of Q, K, V and dO in the order in which the microkernel reads them.
// attention_amx.h has the same for AMX. Methods that return bool tell whether this way can take the values at all; S,
// P, dP and dS are lines of queries, one line a key.
template <class T> class FmaAttention {
  public:
    static constexpr int NR = NV * VL<T>; // queries in a panel
    static constexpr int row_unit = 1;    // P and dS are read up to a multiple of so many keys, and columns of NR

    static int padded(long D) { // as rows for the microkernel's MR and as lanes: both are powers of 2
        return int(round_up(D, MR > VL<T> ? MR : VL<T>));
    }
    static long forward_size(long keys, long D) { return 2 * round_up(keys, NK) * padded(D) + padded(D) * NQ; }
    static long backward_size(long keys, long D) { return 3 * round_up(keys, NK) * padded(D) + 4 * padded(D) * NQ; }
    static FASTGPT_INLINE void begin() {}
    static FASTGPT_INLINE void end() {}

    FmaAttention(T* memory, long keys, long D) : D(D), Dp(padded(D)), all(round_up(keys, NK)) {
        K = memory, V = K + all * Dp, KT = V + all * Dp, QT = KT; // the forward has no KT
    }

    // ---- forward

    // K and V of a head; they stay for the next blocks of its queries.
    FASTGPT_NOINLINE bool keys_and_values(long new_head, long n, HeadRows<T> k, HeadRows<T> v) {
        if (head == new_head && filled >= n) return true;
        head = new_head, filled = n;
        strips_from_rows<T>(n, D, k, K, MR * Dp);
        strips_of_channels(n, v, V);
        return true;
    }
    bool queries(HeadRows<T> q, int n) {
        for (int p = 0; p < n; p += NR)
            columns(q(p), q.stride, n - p < NR ? n - p : NR, QT + p * Dp, NR, base2_scale<T>(D));
        return true;
    }
    // S^T = K Q^T for the panel of queries from p on.
    FASTGPT_INLINE void scores(const Tile<T>& tile, int p, T* S) const {
        tile.stairs(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA {
            over_channels(rows, (tile.lanes - c) / VL<T>, K + (tile.k0 + row) * Dp, QT + p * Dp + c, NR,
                          S + row * NR + c);
        });
    }
    // O^T += V^T P^T
    FASTGPT_INLINE bool add_values(const Tile<T>& tile, const T* P, T* O) {
        tile.stairs(0, tile.lanes, [&](int row, int rows, int c) FASTGPT_LAMBDA {
            const StripsOf<T> v{V + (tile.k0 + row) * MR, MR * all};
            panel_product<T, true>(Dp, (tile.lanes - c) / VL<T>, rows, v, P + row * NR + c, NR, O + c, NR);
        });
        return true;
    }

    // ---- backward: K and V of a range of keys; `j` counts from its first

    FASTGPT_NOINLINE bool range(long n, HeadRows<T> k, HeadRows<T> v) {
        strips_from_rows<T>(n, D, k, K, MR * Dp);
        strips_from_rows<T>(n, D, v, V, MR * Dp);
        strips_of_channels(n, k, KT);
        QT = KT + all * Dp, GT = QT + Dp * NQ, Q = GT + Dp * NQ, G = Q + Dp * NQ;
        return true;
    }
    bool queries_and_gradients(HeadRows<T> q, HeadRows<T> g, int n) {
        columns(q.data, q.stride, n, QT, NQ, base2_scale<T>(D)), columns(g.data, g.stride, n, GT, NQ, T(1));
        copy_rows(q, n, Q), copy_rows(g, n, G);
        return true;
    }
    // S^T = K Q^T, dP^T = V dO^T
    FASTGPT_INLINE void scores_and_gradients(const Tile<T>& tile, long j, T* S, T* dP) const {
        for (Panels p(tile.lanes / VL<T>); p.next();) {
            const int end = (p.begin + p.vectors) * VL<T>;
            tile.stairs(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                const int vectors = (end - c) / VL<T>, at = row * NQ + c;
                over_channels(rows, vectors, K + (j + row) * Dp, QT + c, NQ, S + at);
                over_channels(rows, vectors, V + (j + row) * Dp, GT + c, NQ, dP + at);
            });
        }
    }
    // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T
    FASTGPT_INLINE bool add_gradients(const Tile<T>& tile, long j, int n, const T* P, const T* dS, T* dV, T* dK,
                                      T* dQT) {
        add_over_queries(tile, n, P, G, dV + j * Dp), add_over_queries(tile, n, dS, Q, dK + j * Dp);
        for (Panels p(tile.lanes / VL<T>); p.next();) {
            const int end = (p.begin + p.vectors) * VL<T>;
            tile.stairs(p.begin * VL<T>, end, [&](int row, int rows, int c) FASTGPT_LAMBDA {
                const StripsOf<T> k{KT + (j + row) * MR, MR * all};
                panel_product<T, true>(Dp, (end - c) / VL<T>, rows, k, dS + row * NQ + c, NQ, dQT + c, NQ);
            });
        }
        return true;
    }

  private:
    const long D, Dp, all; // all: keys there is room for
    long head = -1, filled = 0;
    T *K, *V, *KT, *QT, *GT = nullptr, *Q = nullptr, *G = nullptr;

    // C = A B over all channels: A strips of keys, B columns of queries, lines of B and C `line` values apart. At most
    // 256 terms in a row, as in matmul: short sums of sums round less than a long sum.
    FASTGPT_INLINE void over_channels(int rows, int vectors, const T* A, const T* B, long line, T* C) const {
        constexpr long some = 256;
        for (long d = 0; d < D; d += some) {
            const StripsOf<T> a{A + d * MR, MR * Dp};
            const long n = D - d < some ? D - d : some;
            if (d == 0) panel_product<T, false>(rows, vectors, n, a, B, line, C, line);
            else panel_product<T, true>(rows, vectors, n, a, B + d * line, line, C, line);
        }
    }
    void columns(const T* x, long stride, int n, T* to, int line, T scale) const {
        transpose<T>(n, int(D), x, stride, to, line, scale, true);
    }
    // Strips of MR channels, key by key. P is 0 behind the last key, and 0 times garbage may be NaN: so zeros there.
    FASTGPT_NOINLINE void strips_of_channels(long n, HeadRows<T> x, T* to) const {
        strips_from_terms<T>(D, n, x, to, MR * all);
        for (long d = 0; d < Dp; d += MR)
            for (long i = n * MR; i < round_up(n, MR) * MR; i++) to[d * all + i] = 0;
    }
    FASTGPT_NOINLINE void copy_rows(HeadRows<T> x, int n, T* to) const { // lines of Dp values, zero behind D
        for (int i = 0; i < n; i++, to += Dp) {
            long d = 0;
            for (; d < D; d++) to[d] = x(i)[d];
            for (; d < Dp; d++) to[d] = 0;
        }
    }
    // into (NK, Dp) += W^T (keys, queries) X (queries, Dp), for each row of keys from its first query on.
    FASTGPT_INLINE void add_over_queries(const Tile<T>& tile, int n, const T* W, const T* X, T* into) const {
        for (int j = 0; j < tile.rows; j += MR) {
            const long first = tile.k0 + j > tile.q0 ? tile.k0 + j - tile.q0 : 0;
            if (first >= n) break;
            product<T, true>(MR, int(Dp / VL<T>), n - first, RowsOf<T>{W + j * NQ + first, NQ}, X + first * Dp, Dp,
                             into + j * Dp, Dp);
        }
    }
};

#ifdef FASTGPT_AMX
#include "attention_amx.h"
#endif

// The first choice for values of type T; FmaAttention takes what it can't.
template <class T> struct AttentionFor { using type = FmaAttention<T>; };
#ifdef FASTGPT_AMX
template <> struct AttentionFor<float> { using type = AmxAttention; };
#endif

// S -> P for one panel of a tile, column by column: new maximum, P = 2^(S - maximum), sum; O where the maximum moved.
// P becomes zero in rows that only later columns see, up to `zero_to`.
template <class T, int NR, bool DROPOUT> FASTGPT_NOINLINE void
softmax_panel(const Tile<T>& tile, long Dp, long zero_to, T* S, const T* keep, T* OT, T* top, T* total) {
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
        for (long j = rows; j < zero_to; j++) store(S + j * NR + c, vec<T>{});
        store(top + c, now);
        store(total + c, s[0] + s[1]);
        if (any<T>(now != old))
            for (int d = 0; d < Dp; d++) store(OT + d * NR + c, load(OT + d * NR + c) * shrink);
    }
    for (int c = tile.lanes; zero_to && c < NR; c += VL<T>)
        for (long j = 0; j < zero_to; j++) store(S + j * NR + c, vec<T>{});
}

// One block of NQ queries of one head. -> false if these products can't take the values.
template <class Products, bool DROPOUT, class T> bool attend(Products& products, const AttentionShape& shape,
                                                             Sequence<const T> qkv, long head, long q0, T* memory,
                                                             T* out, T* stats) {
    constexpr int NR = Products::NR; // blocks of queries lie panel by panel
    const long D = shape.D, C = shape.H * D, b = head / shape.H, h = head % shape.H, Dp = Products::padded(D);
    const int n = int(shape.T - q0 < NQ ? shape.T - q0 : NQ);
    const auto rows = [&](long t, long part) FASTGPT_LAMBDA {
        return HeadRows<T>{qkv.at(b, t) + part * C + h * D, qkv.time};
    };
    T *OT = memory, *S = OT + Dp * NQ, *top = S + NK * NR, *total = top + NQ, *keep = total + NQ;
    if (!products.keys_and_values(head, q0 + n, rows(0, 1), rows(0, 2)) || !products.queries(rows(q0, 0), n))
        return false;
    for (int i = 0; i < NQ; i++) top[i] = -__builtin_inf(), total[i] = 0;
    for (long i = 0; i < Dp * NQ; i++) OT[i] = 0;

    for (long k0 = 0; k0 < q0 + n; k0 += NK) {
        for (int p = 0; p < n; p += NR) {
            const int queries = n - p < NR ? n - p : NR;
            if (k0 >= q0 + p + queries) continue;
            const Tile<T> tile(q0 + p, queries, k0, q0 + p + queries);
            const long zero_to = Products::row_unit > 1 ? round_up(tile.rows, Products::row_unit) : 0;
            products.scores(tile, p, S);
            if (tile.on_diagonal()) tile.mask(S, NR);
            if (DROPOUT) dropout_tile<T, NR>(shape.dropout, shape.seed, head, q0 + p, k0, tile.rows, keep);
            softmax_panel<T, NR, DROPOUT>(tile, Dp, zero_to, S, keep, OT + p * Dp, top + p, total + p);
            if (!products.add_values(tile, S, OT + p * Dp)) return false;
        }
    }

    T *row_max = stats + head * shape.T + q0, *inverse_sum = row_max + shape.B * shape.H * shape.T;
    for (int i = 0; i < n; i++) row_max[i] = top[i], inverse_sum[i] = T(1) / total[i];
    for (int p = 0; p < n; p += NR) {
        T* O = OT + p * Dp;
        for (int c = 0; c < NR; c += VL<T>) {
            const vec<T> inverse = broadcast(T(1)) / load(total + p + c);
            for (int d = 0; d < D; d++) store(O + d * NR + c, load(O + d * NR + c) * inverse);
        }
        transpose<T>(int(D), n - p < NR ? n - p : NR, O, NR, out + (b * shape.T + q0 + p) * C + h * D, C, T(1), false);
    }
    return true;
}

// Which heads have only finite values: the others are left to PlainAttention.
template <class T> void find_finite_heads(const AttentionShape& shape, Sequence<const T> qkv,
                                          const Sequence<const T>* dout, bool* finite) {
    const long D = shape.D, C = shape.H * D;
    parallel_tasks(shape.B * shape.H, [&](int64_t head) {
        const long b = head / shape.H, h = head % shape.H;
        bool all = !dout || all_finite<T>(shape.T, D, [&](long t) FASTGPT_LAMBDA { return dout->at(b, t) + h * D; });
        for (long part = 0; part < 3 && all; part++)
            all = all_finite<T>(shape.T, D, [&](long t) FASTGPT_LAMBDA { return qkv.at(b, t) + part * C + h * D; });
        finite[head] = all;
    });
}

template <class T, bool DROPOUT>
void attention_forward_with(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* stats) {
    using Products = typename AttentionFor<T>::type;
    using Fma = FmaAttention<T>;
    constexpr int NR = Products::NR > Fma::NR ? Products::NR : Fma::NR;
    const long D = shape.D, blocks = (shape.T + NQ - 1) / NQ;
    const int Dp = Products::padded(D) > Fma::padded(D) ? Products::padded(D) : Fma::padded(D), workers = num_threads();
    Scratch<T> scratch(workers, Dp * NQ + 2 * NK * NR + 2 * NQ);
    Scratch<T> copies(workers, Products::forward_size(shape.T, D)),
        other_copies(workers, Fma::forward_size(shape.T, D));
    Scratch<Products> products(workers, 1);
    for (int w = 0; w < workers; w++) new (products.part(w)) Products(copies.part(w), shape.T, D);
    const Scratch<bool> finite(1, shape.B * shape.H);
    find_finite_heads<T>(shape, qkv, nullptr, finite.part(0));
    Scratch<T> plain(workers, 2 * shape.T);
    // the last blocks of queries see the most keys: begin with them, so that no long task is left for the end
    parallel_tasks(shape.B * shape.H * blocks, workers, [&](int64_t task, int worker) {
        const long head = task / blocks, q0 = (blocks - 1 - task % blocks) * NQ;
        if (!finite[head]) {
            if (q0 == 0) PlainAttention<T>{shape, qkv, head}.forward(plain.part(worker), out);
            return;
        }
        Products::begin();
        const bool done =
            attend<Products, DROPOUT>(*products.part(worker), shape, qkv, head, q0, scratch.part(worker), out, stats);
        Products::end();
        if (done) return;
        Fma fma(other_copies.part(worker), shape.T, D);
        attend<Fma, DROPOUT>(fma, shape, qkv, head, q0, scratch.part(worker), out, stats);
    });
}

// P and dS of one tile, from S and dP: P^T meets do with dropout applied, dS meets q and k. Both become zero where no
// query sees the key, up to row `zero_to`.
template <class T, bool DROPOUT> FASTGPT_NOINLINE void softmax_backward_tile(const Tile<T>& tile, long zero_to, T* S,
                                                                             T* dP, const T* keep, const T* row_max,
                                                                             const T* inverse_sum, const T* delta) {
    for (int c = 0; c < tile.lanes; c += VL<T>) {
        const int rows = tile.visible(c + VL<T>);
        const vec<T> m = load(row_max + c), inverse = load(inverse_sum + c);
        vec<T> mean = load(delta + c);
        if (tile.has_all_keys_of(c)) { // few keys, some P near 1: sum P dP itself, whose rounding cancels with dP's
            mean = vec<T>{};
            for (long at = c; at < rows * NQ; at += NQ) {
                const vec<T> z = DROPOUT ? load(keep + at) : broadcast(T(1));
                mean += exp2(load(S + at) - m) * inverse * rounded<T>(load(dP + at) * z);
            }
        }
        for (int j = 0; j < rows; j++) {
            const long at = j * NQ + c;
            const vec<T> P = exp2(load(S + at) - m) * inverse;
            if (DROPOUT) {
                const vec<T> z = load(keep + at);
                store(S + at, P * z);
                store(dP + at, P * (rounded<T>(load(dP + at) * z) - mean));
            } else {
                store(S + at, P);
                store(dP + at, P * (load(dP + at) - mean));
            }
        }
        for (long at = rows * NQ + c; at < zero_to * NQ; at += NQ) store(S + at, vec<T>{}), store(dP + at, vec<T>{});
    }
    for (long j = 0; j < zero_to; j++)
        for (int c = tile.lanes; c < NQ; c += VL<T>) store(S + j * NQ + c, vec<T>{}), store(dP + j * NQ + c, vec<T>{});
}

// Ranges of keys per head: enough tasks for many cores, but each range at least 4 tiles, and at most 4 ranges, since
// each one past the first costs a copy of dq.
inline long key_ranges(const AttentionShape& s) {
    const long wanted = (23 + s.B * s.H) / (s.B * s.H), most = s.T / (4 * NK) < 4 ? s.T / (4 * NK) : 4;
    return wanted < most ? wanted : most < 1 ? 1 : most;
}

// dk and dv of keys k_begin .. k_end - 1 of one head, and their part of dq. -> false if these products can't take the
// values.
template <class Products, bool DROPOUT, class T>
bool attend_backward(Products& products, const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                     Sequence<const T> out, const T* stats, long head, long k_begin, long k_end, T* memory, T* dq,
                     long dq_stride, T* dqkv) {
    const long D = shape.D, C = shape.H * D, b = head / shape.H, h = head % shape.H, Dp = Products::padded(D);
    const long range = round_up(k_end - k_begin, NK);
    const T scale = T(1 / __builtin_sqrt(double(D)));
    const auto rows = [&](long t, long part) FASTGPT_LAMBDA {
        return HeadRows<T>{qkv.at(b, t) + part * C + h * D, qkv.time};
    };
    T *S = memory, *dP = S + NQ * NK, *keep = dP + NQ * NK, *dQT = keep + NQ * NK, *GT = dQT + Dp * NQ; // G is dO
    T *row_max = GT + Dp * NQ, *inverse_sum = row_max + NQ, *delta = inverse_sum + NQ, *dK = delta + NQ,
      *dV = dK + range * Dp;
    if (!products.range(k_end - k_begin, rows(k_begin, 1), rows(k_begin, 2))) return false;
    for (long i = 0; i < 2 * range * Dp; i++) dK[i] = 0;

    for (long q0 = k_begin / NQ * NQ; q0 < shape.T; q0 += NQ) {
        const int n = int(shape.T - q0 < NQ ? shape.T - q0 : NQ);
        const HeadRows<T> g{dout.at(b, q0) + h * D, dout.time};
        if (!products.queries_and_gradients(rows(q0, 0), g, n)) return false;
        for (int i = 0; i < NQ; i++) { // past the last query, P = 2^-inf * 0 = 0
            const T* saved = stats + head * shape.T + q0 + i;
            row_max[i] = i < n ? saved[0] : T(__builtin_inf());
            inverse_sum[i] = i < n ? saved[shape.B * shape.H * shape.T] : T(0);
        }
        T* OT = dQT; // for a moment; delta adds in the order in which the product adds dP, so that they cancel well
        transpose<T>(n, int(D), g.data, g.stride, GT, NQ, T(1), true);
        transpose<T>(n, int(D), out.at(b, q0) + h * D, out.time, OT, NQ, T(1), true);
        for (int c = 0; c < NQ; c += VL<T>) {
            vec<T> d{};
            if (c < n)
                for (long k = 0; k < D; k++) d += load(GT + k * NQ + c) * load(OT + k * NQ + c);
            store(delta + c, d);
        }
        for (long i = 0; i < Dp * NQ; i++) dQT[i] = 0;

        for (long k0 = k_begin; k0 < k_end && k0 < q0 + n; k0 += NK) {
            const Tile<T> tile(q0, n, k0, q0 + n < k_end ? q0 + n : k_end);
            const long j = k0 - k_begin;
            const long zero_to = Products::row_unit > 1 ? round_up(tile.rows, Products::row_unit) : 0;
            products.scores_and_gradients(tile, j, S, dP);
            if (tile.on_diagonal()) tile.mask(S, NQ);
            if (DROPOUT) dropout_tile<T, NQ>(shape.dropout, shape.seed, head, q0, k0, tile.rows, keep);
            softmax_backward_tile<T, DROPOUT>(tile, zero_to, S, dP, keep, row_max, inverse_sum, delta);
            if (!products.add_gradients(tile, j, n, S, dP, dV, dK, dQT)) return false;
        }
        transpose<T>(int(D), n, dQT, NQ, dq + q0 * dq_stride, dq_stride, scale, false);
    }
    for (long k = k_begin; k < k_end; k++) {
        T* to = dqkv + (b * shape.T + k) * 3 * C + C + h * D;
        for (long d = 0; d < D; d++) {
            to[d] = dK[(k - k_begin) * Dp + d] * scale;
            to[C + d] = dV[(k - k_begin) * Dp + d];
        }
    }
    return true;
}

template <class T, bool DROPOUT> void attention_backward_with(const AttentionShape& shape, Sequence<const T> dout,
                                                              Sequence<const T> qkv, Sequence<const T> out,
                                                              const T* stats, T* dqkv) {
    using Products = typename AttentionFor<T>::type;
    using Fma = FmaAttention<T>;
    const long D = shape.D, C = shape.H * D, heads = shape.B * shape.H, ranges = key_ranges(shape);
    const long range = round_up((shape.T + ranges - 1) / ranges, NK); // keys, whole tiles
    const long Dp = Products::padded(D) > Fma::padded(D) ? Products::padded(D) : Fma::padded(D);
    const int workers = num_threads();
    Scratch<T> scratch(workers, 3 * NQ * NK + 2 * Dp * NQ + 3 * NQ + 2 * range * Dp);
    Scratch<T> copies(workers, Products::backward_size(range, D)), other_copies(workers, Fma::backward_size(range, D));
    Scratch<T> partial(heads * (ranges - 1), shape.T * D); // dq of all ranges but the first

    const Scratch<bool> finite(1, heads);
    find_finite_heads(shape, qkv, &dout, finite.part(0));
    Scratch<T> plain(workers, 3 * shape.T);
    parallel_tasks(heads * ranges, workers, [&](int64_t task, int worker) {
        const long head = task % heads, r = task / heads;
        const long k_begin = r * range, k_end = (r + 1) * range < shape.T ? (r + 1) * range : shape.T;
        if (k_begin >= k_end) return;
        if (!finite[head]) {
            if (r == 0) PlainAttention<T>{shape, qkv, head}.backward(plain.part(worker), dout, dqkv);
            return;
        }
        const auto run = [&](auto products) {
            using P = decltype(products);
            T* dq = r ? partial.part(head * (ranges - 1) + r - 1)
                      : dqkv + head / shape.H * shape.T * 3 * C + head % shape.H * D;
            P::begin();
            const bool done = attend_backward<P, DROPOUT>(products, shape, dout, qkv, out, stats, head, k_begin, k_end,
                                                          scratch.part(worker), dq, r ? D : 3 * C, dqkv);
            P::end();
            return done;
        };
        if (!run(Products(copies.part(worker), range, D))) run(Fma(other_copies.part(worker), range, D));
    });

    if (ranges > 1)
        parallel_tasks(heads * ((shape.T + NQ - 1) / NQ), workers, [&](int64_t task, int) {
            const long head = task % heads, b = head / shape.H, h = head % shape.H, q0 = task / heads * NQ;
            if (!finite[head]) return;
            for (long q = q0; q < q0 + NQ && q < shape.T; q++) {
                T* dq = dqkv + (b * shape.T + q) * 3 * C + h * D;
                for (long r = 1; r < ranges && r * range < shape.T && r * range / NQ * NQ <= q0; r++) { // began by q0
                    const T* part = partial.part(head * (ranges - 1) + r - 1) + q * D;
                    for (long d = 0; d < D; d++) dq[d] += part[d];
                }
            }
        });
}

template <class T> void attention_forward(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* stats) {
    return shape.dropout > 0 ? attention_forward_with<T, true>(shape, qkv, out, stats)
                             : attention_forward_with<T, false>(shape, qkv, out, stats);
}

template <class T> void attention_backward(const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                                           Sequence<const T> out, const T* stats, T* dqkv) {
    return shape.dropout > 0 ? attention_backward_with<T, true>(shape, dout, qkv, out, stats, dqkv)
                             : attention_backward_with<T, false>(shape, dout, qkv, out, stats, dqkv);
}
