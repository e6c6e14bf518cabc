// The loss of a language model: gpt.py's lm_loss, mean cross-entropy of softmax(hidden W^T), and both gradients at
// once.
//
//   l = h W^T        p = softmax(l)        loss = mean over the targets t that count of (log sum_j exp(l_j) - l_t)
//
// Backward. Of n targets that count, each gives
//
//   dl_j = (p_j - [j = t]) / n        dh = dl W        dW = sum over positions of dl^T h
//
// With a vocabulary of 50,257 the logits l of 1,024 positions take 206 MB, more than all else that a training step
// holds. They need never exist as a whole: the loss is a sum, so its gradient is known up to one factor, dloss, as soon
// as the logits of a position are. Here the forward takes some positions at a time and makes all that follows from
// them:
//
//                 V                    V                            C
//          +--------------+    +--------------+               +-----------+
//   some   | l = h W^T    | -> | dl, in place | -> dh = dl W  |           | positions
//   rows   +--------------+    +--------------+               +-----------+
//                                            \ -> dW += dl^T h, V x C
//
// and the backward only multiplies by dloss. Three matrix products, as with whole logits; holding the logits back and
// making them anew in the backward would cost a fourth. (The idea is Liger-Kernel's.) Nothing is saved but the
// gradients themselves. Without gradients, the first product alone is done.

// Positions at a time: at most 56 MiB of logits, in parts of equal size.
template <class T> FASTGPT_INLINE long loss_rows(long M, long V) {
    const long fit = (56l << 20) / (V * long(sizeof(T))), most = fit > 0 ? fit : 1;
    const long parts = M > 0 ? (M + most - 1) / most : 1, rows = (M + parts - 1) / parts, whole = (rows + 15) / 16 * 16;
    return whole <= most ? whole : rows;
}

template <class T> FASTGPT_INLINE T largest(const T* l, long n) {
    T top = l[0];
    vec<T> m[2] = {broadcast(top), broadcast(top)};
    long c = 0;
    for (; c + 2 * VL<T> <= n; c += 2 * VL<T>)
        m[0] = max<T>(m[0], load(l + c)), m[1] = max<T>(m[1], load(l + c + VL<T>));
    for (; c < n; c++) top = l[c] > top ? l[c] : top;
    m[0] = max<T>(m[0], m[1]);
    for (int i = 0; i < VL<T>; i++) top = m[0][i] > top ? m[0][i] : top;
    return top;
}

// The same where a logit is infinite: as torch's logsumexp, whose value is then infinite and whose softmax is NaN there
// and 0 elsewhere.
template <class T, bool GRADIENT> FASTGPT_NOINLINE double infinite_loss_row(T* l, long V, long target, T scale) {
    const T inf = T(__builtin_inf()), nan = T(__builtin_nan(""));
    const double target_logit = l[target];
    bool any_nan = false;
    for (long j = 0; j < V; j++) any_nan |= l[j] != l[j];
    for (long j = 0; GRADIENT && j < V; j++) l[j] = any_nan || l[j] == inf ? nan : T(0);
    if (GRADIENT) l[target] -= scale;
    return any_nan ? double(nan) : double(inf) - target_logit;
}

// l (V) -> its log-sum-exp minus l[target]; with GRADIENT, l becomes scale * (softmax(l) - [j = target]).
template <class T, bool GRADIENT> FASTGPT_NOINLINE double loss_row(T* l, long V, long target, T scale) {
    const T log2e = T(1.4426950408889634);
    const double chosen = l[target];
    const vec<T> highest = broadcast(largest(l, V));
    if (highest[0] > max_finite<T>) return infinite_loss_row<T, GRADIENT>(l, V, target, scale);
    vec<T> s[2] = {};
    const auto power = [&](long c, int n) FASTGPT_LAMBDA {
        vec<T> e = exp2((load_first(l + c, n) - highest) * broadcast(log2e));
        for (int lane = n; lane < VL<T>; lane++) e[lane] = 0;
        if (GRADIENT) store_first(l + c, e, n);
        return e;
    };
    long c = 0;
    for (; c + 2 * VL<T> <= V; c += 2 * VL<T>) s[0] += power(c, VL<T>), s[1] += power(c + VL<T>, VL<T>);
    for_channels<T>(V - c, [&](long more, int n) FASTGPT_LAMBDA { s[0] += power(c + more, n); });
    const T total = sum<T>(s[0] + s[1]);
    if (GRADIENT) {
        const vec<T> factor = broadcast(scale / total);
        for_channels<T>(V, [&](long c, int n) FASTGPT_LAMBDA { store_first(l + c, load_first(l + c, n) * factor, n); });
        l[target] -= scale;
    }
    return double(highest[0]) + __builtin_log(double(total)) - chosen;
}

// -> the loss; dhidden (M, C) and dweight (V, C) unless they are null, for dloss = 1.
template <class T> double lm_loss(const Rows<const T>& hidden, const Rows<const T>& weight, const int64_t* targets,
                                  long M, long C, long V, T* dhidden, T* dweight) {
    long count = 0;
    for (long i = 0; i < M; i++) count += targets[i] >= 0;
    const T scale = T(1) / T(count);
    const long some = loss_rows<T>(M, V);
    Scratch<T> logits(1, some * V);
    Scratch<double> losses(1, M);
    T* l = logits.part(0);
    if (dweight) ask_for_huge_pages(dweight, V * C * long(sizeof(T)));
    if (dweight && M == 0)
        for (long i = 0; i < V * C; i++) dweight[i] = 0;
    for (long m0 = 0; m0 < M; m0 += some) {
        const long rows = M - m0 < some ? M - m0 : some;
        const Rows<const T> h = hidden.from(m0), dl = Rows<const T>::contiguous(l, rows, V);
        matmul<T>({rows, V, C, h, false, weight, true, l});
        parallel_tasks(rows, [&](int64_t i) {
            const long target = targets[m0 + i];
            T* row = l + i * V;
            double& loss = losses.part(0)[m0 + i];
            const bool counts = target >= 0,
                       gradient = dhidden || dweight; // what doesn't count has gradient 0 * softmax
            loss = 0;
            if (gradient) loss = loss_row<T, true>(row, V, counts ? target : 0, counts ? scale : T(0));
            else if (counts) loss = loss_row<T, false>(row, V, target, scale);
            if (!counts) loss = 0;
        });
        if (dhidden) matmul<T>({rows, C, V, dl, false, weight, false, dhidden + m0 * C});
        if (dweight) matmul<T>({V, C, rows, dl, true, h, false, dweight, m0 > 0});
    }
    double total = 0;
    for (long i = 0; i < M; i++) total += losses.part(0)[i];
    return total / double(count);
}
