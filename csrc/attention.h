// Causal attention on packed (B, T, 3C) queries, keys and values: gpt.py's attention, in tiles, in the manner of
// FlashAttention-2 (Dao 2023). No T x T matrix exists anywhere.
//
//   S_ij = q_i . k_j / sqrt(D),  j <= i        m_i = max_j S_ij        l_i = sum_j exp(S_ij - m_i)
//   P_ij = exp(S_ij - m_i) / l_i               o_i = sum_j P_ij v_j
//
// Backward. With dP_ij = dout_i . v_j the softmax gives dS_ij = P_ij (dP_ij - delta_i), where
// delta_i = sum_j P_ij dP_ij = dout_i . o_i needs no sum over keys:
//
//   dv_j = sum_i P_ij dout_i        dq_i = sum_j dS_ij k_j / sqrt(D)        dk_j = sum_i dS_ij q_i / sqrt(D)
//
// Dropout multiplies P by z_ij = 0 or 1 / (1 - dropout) where it meets v: o and dv take z P, dP becomes z dP, and
// delta_i = dout_i . o_i still holds.
//
// Saved for the backward: out, which the next layer holds anyway, and m and 1 / l, two numbers a query and head (in
// base 2, since exp2 is what the kernel computes: log2(e) / sqrt(D) is folded into Q). P is computed again from them.
// Their logarithm, m + log2(l), would be one number, but its rounding is that of a score: where scores are in the
// hundreds, it alone costs P three digits.
//
//            NQ queries, side by side in the lanes           keys    queries ->
//          +-----------------------------------+               |   [#\ . . . ]     # full tiles
//   NK     |                                   |               v   [# #\ . . ]     \ tiles cut by the diagonal: each
//   keys   |   S^T = K Q^T   then P^T, dS^T    |                   [# # #\ . ]       register of queries ends where
//          |                                   |                   [# # # #\ ]       the last of them does
//          +-----------------------------------+                                   . never touched
//
// Queries lie across SIMD lanes (as in gemma.cpp), so the running maximum and sum of a softmax go down the columns,
// with no step across lanes. Q and dO are transposed once per block of queries, O and dQ once on the way out. K and V
// are copied out of qkv into micro-panels (packing.h) once per head: in qkv, rows are 3C values apart, and that stride
// falls into few sets of the first-level cache.
//
// Forward: a task is a block of NQ queries of one head, and a worker takes the blocks of a head one after the other, to
// use its copies again. Backward: a task is a range of keys of one head and owns its dk and dv; its part of dq is
// summed over the ranges afterwards, in order. The order of each sum depends on the shape alone, so the bits do not
// depend on the number of threads.
//
// attention_plain.h has the same formulas without tiles; attention_fma.h and attention_amx.h, the matrix products.
//
// Compiled once per instruction set (all_kernels.h).

// ------------------------------------------------------------------------------------------------------------ forward

// What a block of queries works in; a panel has Engine::NR queries.
template <class Engine, class T> struct ForwardWorkspace {
    T* OT;      // (D, NQ), panel by panel
    T* S;       // (NK, NR): S, then P
    T* row_max; // (NQ)
    T* row_sum; // (NQ)
    T* keep;    // (NK, NR): z

    static int64_t size(int64_t D) { return Engine::padded(D) * NQ + 2 * NK * Engine::NR + 2 * NQ; }
    ForwardWorkspace(T* memory, int64_t D)
        : OT(memory), S(OT + Engine::padded(D) * NQ), row_max(S + NK * Engine::NR), row_sum(row_max + NQ),
          keep(row_sum + NQ) {}
};

// S -> P for one panel of a tile, column by column: new maximum m, P = 2^(S - m), sum; O where the maximum moved.
// P becomes zero in rows that only later columns see, up to `zero_to`.
template <class T, int NR, bool DROPOUT> FASTGPT_NOINLINE void
softmax_panel(const Tile<T>& tile, int64_t Dp, int64_t zero_to, T* S, const T* keep, T* OT, T* row_max, T* row_sum) {
    for (int c = 0; c < tile.lanes; c += VL<T>) {
        const int rows = tile.visible(c + VL<T>);
        const vec<T> m_old = load(row_max + c);
        vec<T> m[2] = {m_old, m_old};
        for (int j = 0; j < rows; j += 2)
            for (int i = 0; i < 2; i++) m[i] = max(m[i], load(S + (j + i) * NR + c));
        const vec<T> m_new = max(m[0], m[1]);
        const vec<T> rescale = exp2(m_old - m_new);
        vec<T> sums[2] = {load(row_sum + c) * rescale, {}};
        for (int j = 0; j < rows; j += 2)
            for (int i = 0; i < 2; i++) {
                const vec<T> e = exp2(load(S + (j + i) * NR + c) - m_new);
                sums[i] += e;
                store(S + (j + i) * NR + c, DROPOUT ? e * load(keep + (j + i) * NR + c) : e);
            }
        for (int64_t j = rows; j < zero_to; j++) store(S + j * NR + c, vec<T>{});
        store(row_max + c, m_new);
        store(row_sum + c, sums[0] + sums[1]);
        if (any<T>(m_new != m_old))
            for (int d = 0; d < Dp; d++) store(OT + d * NR + c, load(OT + d * NR + c) * rescale);
    }
    for (int c = tile.lanes; zero_to && c < NR; c += VL<T>)
        for (int64_t j = 0; j < zero_to; j++) store(S + j * NR + c, vec<T>{});
}

// One block of NQ queries of one head. -> false if the engine can't take the values.
template <bool DROPOUT, class Engine, class T> bool attend(Engine& engine, const AttentionShape& shape,
                                                           Sequence<const T> qkv, int64_t head, int64_t q0, T* memory,
                                                           T* out, T* stats) {
    constexpr int NR = Engine::NR;
    const int64_t D = shape.D, C = shape.H * D, Dp = Engine::padded(D);
    const int64_t b = head / shape.H, h = head % shape.H;
    const int n = int(min<int64_t>(shape.T - q0, NQ));
    const auto rows = [&](int64_t t, int64_t part) FASTGPT_LAMBDA {
        return HeadRows<T>{qkv.at(b, t) + part * C + h * D, qkv.t_stride};
    };
    const ForwardWorkspace<Engine, T> work(memory, D);
    if (!engine.pack_keys_and_values(head, q0 + n, rows(0, 1), rows(0, 2)) || !engine.pack_queries(rows(q0, 0), n))
        return false;
    for (int i = 0; i < NQ; i++) {
        work.row_max[i] = -__builtin_inf();
        work.row_sum[i] = 0;
    }
    for (int64_t i = 0; i < Dp * NQ; i++) work.OT[i] = 0;

    for (int64_t k0 = 0; k0 < q0 + n; k0 += NK) {
        for (int p = 0; p < n; p += NR) {
            const int queries = min(n - p, NR);
            if (k0 >= q0 + p + queries) continue;
            const Tile<T> tile(q0 + p, queries, k0, q0 + p + queries);
            const int64_t zero_to = Engine::row_unit > 1 ? round_up(tile.rows, Engine::row_unit) : 0;
            engine.scores(tile, p, work.S);
            if (tile.on_diagonal()) tile.mask(work.S, NR);
            if (DROPOUT) dropout_tile<T, NR>(shape.dropout, shape.seed, head, q0 + p, k0, tile.rows, work.keep);
            softmax_panel<T, NR, DROPOUT>(tile, Dp, zero_to, work.S, work.keep, work.OT + p * Dp, work.row_max + p,
                                          work.row_sum + p);
            if (!engine.add_values(tile, work.S, work.OT + p * Dp)) return false;
        }
    }

    T* m = stats + head * shape.T + q0;
    T* inverse_sum = m + shape.B * shape.H * shape.T;
    for (int i = 0; i < n; i++) {
        m[i] = work.row_max[i];
        inverse_sum[i] = T(1) / work.row_sum[i];
    }
    for (int p = 0; p < n; p += NR) {
        T* OT = work.OT + p * Dp;
        for (int c = 0; c < NR; c += VL<T>) {
            const vec<T> inverse = broadcast(T(1)) / load(work.row_sum + p + c);
            for (int d = 0; d < D; d++) store(OT + d * NR + c, load(OT + d * NR + c) * inverse);
        }
        transpose<T>(int(D), min(n - p, NR), OT, NR, out + (b * shape.T + q0 + p) * C + h * D, C, T(1), false);
    }
    return true;
}

// Which heads have only finite values: the others are left to PlainAttention.
template <class T> void find_finite_heads(const AttentionShape& shape, Sequence<const T> qkv,
                                          const Sequence<const T>* dout, bool* finite) {
    const int64_t D = shape.D, C = shape.H * D;
    parallel_tasks(shape.B * shape.H, [&](int64_t head) {
        const int64_t b = head / shape.H, h = head % shape.H;
        bool all = !dout || all_finite<T>(shape.T, D, [&](int64_t t) FASTGPT_LAMBDA { return dout->at(b, t) + h * D; });
        for (int64_t part = 0; part < 3 && all; part++)
            all = all_finite<T>(shape.T, D, [&](int64_t t) FASTGPT_LAMBDA { return qkv.at(b, t) + part * C + h * D; });
        finite[head] = all;
    });
}

template <bool DROPOUT, class MatmulEngine, class T>
void attention_forward_with(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* stats) {
    using Engine = AttentionEngine<MatmulEngine>;
    using Fallback = AttentionEngine<Fma<T>>;
    const int64_t D = shape.D, heads = shape.B * shape.H, blocks = ceil_div(shape.T, NQ);
    const int workers = num_threads();
    Scratch<T> scratch(workers, max(ForwardWorkspace<Engine, T>::size(D), ForwardWorkspace<Fallback, T>::size(D)));
    Scratch<T> copies(workers, Engine::forward_size(shape.T, D));
    Scratch<T> fallback_copies(workers, Fallback::forward_size(shape.T, D));
    Scratch<T> plain(workers, 2 * shape.T);
    Scratch<Engine> engines(workers, 1);
    for (int w = 0; w < workers; w++) new (engines.part(w)) Engine(copies.part(w), shape.T, D);
    const Scratch<bool> finite(1, heads);
    find_finite_heads<T>(shape, qkv, nullptr, finite.part(0));
    // the last blocks of queries see the most keys: begin with them, so that no long task is left for the end
    parallel_tasks(heads * blocks, workers, [&](int64_t task, int worker) {
        const int64_t head = task / blocks;
        const int64_t q0 = (blocks - 1 - task % blocks) * NQ;
        if (!finite[head]) {
            if (q0 == 0) PlainAttention<T>{shape, qkv, head}.forward(plain.part(worker), out);
            return;
        }
        Engine::begin();
        const bool done =
            attend<DROPOUT>(*engines.part(worker), shape, qkv, head, q0, scratch.part(worker), out, stats);
        Engine::end();
        if (done) return;
        Fallback fallback(fallback_copies.part(worker), shape.T, D);
        attend<DROPOUT>(fallback, shape, qkv, head, q0, scratch.part(worker), out, stats);
    });
}

// ----------------------------------------------------------------------------------------------------------- backward

// What a range of at most `keys` keys, whole tiles, works in.
template <class Engine, class T> struct BackwardWorkspace {
    T* S;                             // (NK, NQ): S, then z P
    T* dP;                            // (NK, NQ): dP, then dS
    T* keep;                          // (NK, NQ): z
    T* dQT;                           // (D, NQ)
    T* dOT;                           // (D, NQ)
    T *row_max, *inverse_sum, *delta; // (NQ)
    T *dK, *dV;                       // (keys, D)

    static int64_t size(int64_t keys, int64_t D) {
        return 3 * NK * NQ + 2 * Engine::padded(D) * NQ + 3 * NQ + 2 * keys * Engine::padded(D);
    }
    BackwardWorkspace(T* memory, int64_t keys, int64_t D)
        : S(memory), dP(S + NK * NQ), keep(dP + NK * NQ), dQT(keep + NK * NQ), dOT(dQT + Engine::padded(D) * NQ),
          row_max(dOT + Engine::padded(D) * NQ), inverse_sum(row_max + NQ), delta(inverse_sum + NQ), dK(delta + NQ),
          dV(dK + keys * Engine::padded(D)) {}
};

// S -> z P and dP -> dS of one tile. Both become zero where no query sees the key, up to row `zero_to`.
template <class T, bool DROPOUT> FASTGPT_NOINLINE void softmax_backward_tile(const Tile<T>& tile, int64_t zero_to, T* S,
                                                                             T* dP, const T* keep, const T* row_max,
                                                                             const T* inverse_sum, const T* delta) {
    for (int c = 0; c < tile.lanes; c += VL<T>) {
        const int rows = tile.visible(c + VL<T>);
        const vec<T> m = load(row_max + c);
        const vec<T> inverse = load(inverse_sum + c);
        vec<T> mean = load(delta + c);
        if (tile.has_all_keys_of(c)) { // few keys, some P near 1: sum P dP itself, whose rounding cancels with dP's
            mean = vec<T>{};
            for (int64_t at = c; at < rows * NQ; at += NQ) {
                const vec<T> z = DROPOUT ? load(keep + at) : broadcast(T(1));
                mean += exp2(load(S + at) - m) * inverse * rounded<T>(load(dP + at) * z);
            }
        }
        for (int j = 0; j < rows; j++) {
            const int64_t at = j * NQ + c;
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
        for (int64_t at = rows * NQ + c; at < zero_to * NQ; at += NQ) {
            store(S + at, vec<T>{});
            store(dP + at, vec<T>{});
        }
    }
    for (int64_t j = 0; j < zero_to; j++)
        for (int c = tile.lanes; c < NQ; c += VL<T>) {
            store(S + j * NQ + c, vec<T>{});
            store(dP + j * NQ + c, vec<T>{});
        }
}

// Ranges of keys per head: enough tasks for many cores, but each range at least 4 tiles, and at most 4 ranges, since
// each one past the first costs a copy of dq.
inline int64_t key_ranges(const AttentionShape& shape) {
    const int64_t wanted = ceil_div(24, shape.B * shape.H);
    const int64_t max_ranges = min<int64_t>(shape.T / (4 * NK), 4);
    return max<int64_t>(min(wanted, max_ranges), 1);
}

// dk and dv of keys k_begin .. k_end - 1 of one head, and their part of dq. -> false if the engine can't take the
// values.
template <bool DROPOUT, class Engine, class T>
bool attend_backward(Engine& engine, const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                     Sequence<const T> out, const T* stats, int64_t head, int64_t k_begin, int64_t k_end, T* memory,
                     T* dq, int64_t ld_dq, T* dqkv) {
    const int64_t D = shape.D, C = shape.H * D, Dp = Engine::padded(D);
    const int64_t b = head / shape.H, h = head % shape.H;
    const int64_t range = round_up(k_end - k_begin, NK);
    const T scale = T(1 / __builtin_sqrt(double(D)));
    const auto rows = [&](int64_t t, int64_t part) FASTGPT_LAMBDA {
        return HeadRows<T>{qkv.at(b, t) + part * C + h * D, qkv.t_stride};
    };
    const BackwardWorkspace<Engine, T> work(memory, range, D);
    if (!engine.pack_range(k_end - k_begin, rows(k_begin, 1), rows(k_begin, 2))) return false;
    for (int64_t i = 0; i < range * Dp; i++) {
        work.dK[i] = 0;
        work.dV[i] = 0;
    }

    for (int64_t q0 = k_begin / NQ * NQ; q0 < shape.T; q0 += NQ) {
        const int n = int(min<int64_t>(shape.T - q0, NQ));
        const HeadRows<T> dout_rows{dout.at(b, q0) + h * D, dout.t_stride};
        if (!engine.pack_queries_and_gradients(rows(q0, 0), dout_rows, n)) return false;
        for (int i = 0; i < NQ; i++) { // past the last query, P = 2^-inf * 0 = 0
            const T* saved = stats + head * shape.T + q0 + i;
            work.row_max[i] = i < n ? saved[0] : T(__builtin_inf());
            work.inverse_sum[i] = i < n ? saved[shape.B * shape.H * shape.T] : T(0);
        }
        T* OT =
            work.dQT; // for a moment; delta adds in the order in which the product adds dP, so that they cancel well
        transpose<T>(n, int(D), dout_rows.data, dout_rows.ld, work.dOT, NQ, T(1), true);
        transpose<T>(n, int(D), out.at(b, q0) + h * D, out.t_stride, OT, NQ, T(1), true);
        for (int c = 0; c < NQ; c += VL<T>) {
            vec<T> delta{};
            if (c < n)
                for (int64_t d = 0; d < D; d++)
                    delta += Engine::operand(load(work.dOT + d * NQ + c)) * load(OT + d * NQ + c);
            store(work.delta + c, delta);
        }
        for (int64_t i = 0; i < Dp * NQ; i++) work.dQT[i] = 0;

        for (int64_t k0 = k_begin; k0 < k_end && k0 < q0 + n; k0 += NK) {
            const Tile<T> tile(q0, n, k0, min(q0 + n, k_end));
            const int64_t j = k0 - k_begin;
            const int64_t zero_to = Engine::row_unit > 1 ? round_up(tile.rows, Engine::row_unit) : 0;
            engine.scores_and_gradients(tile, j, work.S, work.dP);
            if (tile.on_diagonal()) tile.mask(work.S, NQ);
            if (DROPOUT) dropout_tile<T, NQ>(shape.dropout, shape.seed, head, q0, k0, tile.rows, work.keep);
            softmax_backward_tile<T, DROPOUT>(tile, zero_to, work.S, work.dP, work.keep, work.row_max, work.inverse_sum,
                                              work.delta);
            if (!engine.add_gradients(tile, j, n, work.S, work.dP, work.dV, work.dK, work.dQT)) return false;
        }
        transpose<T>(int(D), n, work.dQT, NQ, dq + q0 * ld_dq, ld_dq, scale, false);
    }
    for (int64_t j = 0; j < k_end - k_begin; j++) {
        T* dk = dqkv + (b * shape.T + k_begin + j) * 3 * C + C + h * D;
        T* dv = dk + C;
        for (int64_t d = 0; d < D; d++) {
            dk[d] = work.dK[j * Dp + d] * scale;
            dv[d] = work.dV[j * Dp + d];
        }
    }
    return true;
}

template <bool DROPOUT, class MatmulEngine, class T>
void attention_backward_with(const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                             Sequence<const T> out, const T* stats, T* dqkv) {
    using Engine = AttentionEngine<MatmulEngine>;
    using Fallback = AttentionEngine<Fma<T>>;
    const int64_t D = shape.D, C = shape.H * D, heads = shape.B * shape.H;
    const int64_t ranges = key_ranges(shape);
    const int64_t range = round_up(ceil_div(shape.T, ranges), NK); // keys, whole tiles
    const int workers = num_threads();
    Scratch<T> scratch(
        workers, max(BackwardWorkspace<Engine, T>::size(range, D), BackwardWorkspace<Fallback, T>::size(range, D)));
    Scratch<T> copies(workers, Engine::backward_size(range, D));
    Scratch<T> fallback_copies(workers, Fallback::backward_size(range, D));
    Scratch<T> plain(workers, 3 * shape.T);
    Scratch<T> partial(heads * (ranges - 1), shape.T * D); // dq of all ranges but the first
    const auto partial_dq = [&](int64_t head, int64_t r) { return partial.part(head * (ranges - 1) + r - 1); };
    const auto dq_of = [&](int64_t head, int64_t t) {
        return dqkv + (head / shape.H * shape.T + t) * 3 * C + head % shape.H * D;
    };
    const Scratch<bool> finite(1, heads);
    find_finite_heads(shape, qkv, &dout, finite.part(0));
    parallel_tasks(heads * ranges, workers, [&](int64_t task, int worker) {
        const int64_t head = task % heads, r = task / heads;
        const int64_t k_begin = r * range, k_end = min(k_begin + range, shape.T);
        if (k_begin >= k_end) return;
        if (!finite[head]) {
            if (r == 0) PlainAttention<T>{shape, qkv, head}.backward(plain.part(worker), dout, dqkv);
            return;
        }
        const auto run = [&](auto engine) {
            T* dq = r ? partial_dq(head, r) : dq_of(head, 0);
            engine.begin();
            const bool done = attend_backward<DROPOUT>(engine, shape, dout, qkv, out, stats, head, k_begin, k_end,
                                                       scratch.part(worker), dq, r ? D : 3 * C, dqkv);
            engine.end();
            return done;
        };
        if (!run(Engine(copies.part(worker), range, D))) run(Fallback(fallback_copies.part(worker), range, D));
    });

    if (ranges > 1)
        parallel_tasks(heads * ceil_div(shape.T, NQ), workers, [&](int64_t task, int) {
            const int64_t head = task % heads, q0 = task / heads * NQ;
            if (!finite[head]) return;
            for (int64_t q = q0; q < q0 + NQ && q < shape.T; q++) {
                T* dq = dq_of(head, q);
                for (int64_t r = 1; r < ranges && r * range < shape.T && r * range / NQ * NQ <= q0;
                     r++) { // began by q0
                    const T* part = partial_dq(head, r) + q * D;
                    for (int64_t d = 0; d < D; d++) dq[d] += part[d];
                }
            }
        });
}

// -------------------------------------------------------------------------------------------------- with and without z

template <class T, class Engine = EngineFor<T>>
void attention_forward(const AttentionShape& shape, Sequence<const T> qkv, T* out, T* stats) {
    if (shape.dropout > 0) attention_forward_with<true, Engine>(shape, qkv, out, stats);
    else attention_forward_with<false, Engine>(shape, qkv, out, stats);
}

template <class T, class Engine = EngineFor<T>>
void attention_backward(const AttentionShape& shape, Sequence<const T> dout, Sequence<const T> qkv,
                        Sequence<const T> out, const T* stats, T* dqkv) {
    if (shape.dropout > 0) attention_backward_with<true, Engine>(shape, dout, qkv, out, stats, dqkv);
    else attention_backward_with<false, Engine>(shape, dout, qkv, out, stats, dqkv);
}
