// The loss of a language model: gpt.py's lm_loss, mean cross-entropy of softmax(hidden W^T), and both gradients at
// once.
//
//   l = h W^T        p = softmax(l)        loss = mean over the targets t that count of nll
//                                          nll = -log p_t = log sum_j exp(l_j) - l_t
//
// Backward. Of n targets that count, each gives
//
//   dl_j = (p_j - [j = t]) / n        dh = dl W        dW = sum over positions of dl^T h
//
// With a vocabulary of 50,257 the logits l of 1,024 positions take 206 MB, more than all else that a training step
// holds. They need never exist as a whole: the loss is a sum, so its gradient is known up to one factor, dloss, as soon
// as the logits of a position are. Here the forward takes a chunk of positions at a time and computes all that follows
// from them:
//
//                 V                    V                            C
//          +--------------+    +--------------+               +-----------+
//   chunk  | l = h W^T    | -> | dl, in place | -> dh = dl W  |           | positions
//          +--------------+    +--------------+               +-----------+
//                                            \ -> dW += dl^T h, V x C
//
// and the backward only multiplies by dloss. Three matrix products, as with whole logits; computing the logits again in
// the backward would cost a fourth. (The idea is Liger-Kernel's.) Nothing is saved but the gradients themselves.
// Without gradients, the first product alone is done.
//
// Compiled once per instruction set (all_kernels.h).

// Positions in a chunk: at most 56 MiB of logits, in chunks of equal size. Each chunk reads W twice, and reads and
// writes dW once. bfloat16 products take half the time, so that weighs twice as much: they get 112 MiB.
template <class T, class Engine> FASTGPT_INLINE int64_t loss_chunk(int64_t M, int64_t V) {
    const int64_t max_bytes = int64_t(std::is_same_v<Engine, EngineFor<T>> ? 56 : 112) << 20;
    const int64_t max_rows = max<int64_t>(max_bytes / (V * int64_t(sizeof(T))), 1);
    const int64_t rows = ceil_div(M, max<int64_t>(ceil_div(M, max_rows), 1));
    const int64_t whole = round_up(rows, 16);
    return whole <= max_rows ? whole : rows;
}

template <class T> FASTGPT_INLINE T largest(const T* l, int64_t n) {
    T result = l[0];
    vec<T> m[2] = {broadcast(result), broadcast(result)};
    int64_t c = 0;
    for (; c + 2 * VL<T> <= n; c += 2 * VL<T>) {
        m[0] = max(m[0], load(l + c));
        m[1] = max(m[1], load(l + c + VL<T>));
    }
    for (; c < n; c++) result = max(l[c], result);
    m[0] = max(m[0], m[1]);
    for (int i = 0; i < VL<T>; i++) result = max<T>(m[0][i], result);
    return result;
}

// nll where a logit is infinite: as torch's logsumexp, whose value is then infinite and whose softmax is NaN there and
// 0 elsewhere.
template <class T, bool GRADIENT> FASTGPT_NOINLINE double infinite_nll(T* l, int64_t V, int64_t target, T scale) {
    const T inf = T(__builtin_inf()), nan = T(__builtin_nan(""));
    const double target_logit = l[target];
    bool any_nan = false;
    for (int64_t j = 0; j < V; j++) any_nan |= l[j] != l[j];
    for (int64_t j = 0; GRADIENT && j < V; j++) l[j] = any_nan || l[j] == inf ? nan : T(0);
    if (GRADIENT) l[target] -= scale;
    return any_nan ? double(nan) : double(inf) - target_logit;
}

// l (V) -> nll; with GRADIENT, l becomes scale * (softmax(l) - [j = target]).
template <class T, bool GRADIENT> FASTGPT_NOINLINE double nll(T* l, int64_t V, int64_t target, T scale) {
    const double target_logit = l[target];
    const vec<T> row_max = broadcast(largest(l, V));
    if (row_max[0] > max_finite<T>) return infinite_nll<T, GRADIENT>(l, V, target, scale);
    vec<T> sums[2] = {};
    const auto exp_shifted = [&](int64_t c, int n) FASTGPT_LAMBDA {
        vec<T> e = exp2((load_first(l + c, n) - row_max) * broadcast(T(log2e)));
        for (int lane = n; lane < VL<T>; lane++) e[lane] = 0;
        if (GRADIENT) store_first(l + c, e, n);
        return e;
    };
    int64_t c = 0;
    for (; c + 2 * VL<T> <= V; c += 2 * VL<T>) {
        sums[0] += exp_shifted(c, VL<T>);
        sums[1] += exp_shifted(c + VL<T>, VL<T>);
    }
    for_channels<T>(V - c, [&](int64_t more, int n) FASTGPT_LAMBDA { sums[0] += exp_shifted(c + more, n); });
    const T row_sum = sum<T>(sums[0] + sums[1]);
    if (GRADIENT) {
        const vec<T> factor = broadcast(scale / row_sum);
        for_channels<T>(V,
                        [&](int64_t c, int n) FASTGPT_LAMBDA { store_first(l + c, load_first(l + c, n) * factor, n); });
        l[target] -= scale;
    }
    return double(row_max[0]) + __builtin_log(double(row_sum)) - target_logit;
}

// -> the loss; dhidden (M, C) and dweight (V, C) unless they are null, for dloss = 1.
template <class T, class Engine = EngineFor<T>> double lm_loss(const Rows<const T>& hidden, const Rows<const T>& weight,
                                                               const int64_t* targets, int64_t M, int64_t C, int64_t V,
                                                               T* dhidden, T* dweight) {
    int64_t count = 0;
    for (int64_t i = 0; i < M; i++) count += targets[i] >= 0;
    const T scale = T(1) / T(count);
    const int64_t chunk = loss_chunk<T, Engine>(M, V);
    Scratch<T> logits(1, chunk * V);
    Scratch<double> losses(1, M);
    T* l = logits.part(0);
    if (dweight) ask_for_huge_pages(dweight, V * C * int64_t(sizeof(T)));
    if (dweight && M == 0)
        for (int64_t i = 0; i < V * C; i++) dweight[i] = 0;
    for (int64_t m0 = 0; m0 < M; m0 += chunk) {
        const int64_t rows = min(M - m0, chunk);
        const Rows<const T> h = hidden.from(m0);
        const Rows<const T> dl = Rows<const T>::contiguous(l, rows, V);
        matmul<T, Engine>({rows, V, C, h, false, weight, true, l});
        parallel_tasks(rows, [&](int64_t i) {
            const int64_t target = targets[m0 + i];
            const bool counts = target >= 0; // what doesn't has gradient 0 * softmax
            T* row = l + i * V;
            double loss = 0;
            if (dhidden || dweight) loss = nll<T, true>(row, V, counts ? target : 0, counts ? scale : T(0));
            else if (counts) loss = nll<T, false>(row, V, target, scale);
            losses.part(0)[m0 + i] = counts ? loss : 0;
        });
        if (dhidden) matmul<T, Engine>({rows, C, V, dl, false, weight, false, dhidden + m0 * C});
        if (dweight) matmul<T, Engine>({V, C, rows, dl, true, h, false, dweight, m0 > 0});
    }
    double total = 0;
    for (int64_t i = 0; i < M; i++) total += losses.part(0)[i];
    return total / double(count);
}
