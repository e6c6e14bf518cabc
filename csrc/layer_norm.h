// Layer normalization (Ba, Kiros and Hinton 2016) of each row of C channels: gpt.py's layer_norm.
//
//   xhat = (x - mean) rstd        mean = sum(x) / C        rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)
//   y    = xhat weight + bias
//
// Backward, with g = dy weight. xhat depends on x directly, through mean and through rstd:
//
//   dx = rstd (g - sum(g) / C - xhat sum(g xhat) / C)          dweight = sum over rows of dy xhat
//                                                              dbias   = sum over rows of dy
//
// The sum of xhat is 0 but for the rounding of the mean. Beside a large mean that is many digits, so it is taken off
// again: xhat - sum(xhat) / C stands for xhat in dx.
//
// Saved for the backward: mean and rstd, two numbers a row. xhat is made anew from x, which autograd holds anyway, so
// nothing of x's size is stored.
//
// Memory is read once: a row is fetched, stays in the first-level cache, and is passed over again there. The second
// pass, for the variance, also sums x - mean, which is what rounding left out of the mean: so a large mean is harmless.
//
//                C channels
//            +----------------+
//   block 0  | row            |  forward: mean, rstd, y          A block of rows is a task. The backward adds each row
//            | row            |  backward: dx, and down the      to the block's own dweight and dbias, and then all
//            +----------------+  columns  v v v v v v v          blocks' to the result.
//            |  dweight dbias | ---------------.
//            +----------------+                 + -> dweight, dbias
//   block 1  | row            |                /
//            |  ...           | --------------'
//            +----------------+
//
// The columns of dweight and dbias are summed within fixed blocks of rows and then block by block, so the order depends
// on the shape alone and the bits do not depend on the number of threads.
//
// The forward takes the sums of R rows at once: they hide each other's latency.

// Where squares overflow: 1 / sqrt(sum(((x - mean) / shrink)^2) / C) / shrink. eps is nothing beside such a variance.
template <class T> FASTGPT_NOINLINE T rstd_of_large(const T* x, T mean, long C) {
    constexpr T shrink = sizeof(T) == 4 ? T(0x1p80) : T(0x1p600);
    T variance = 0;
    for (long c = 0; c < C; c++) {
        const T d = (x[c] - mean) / shrink;
        variance += d * d / T(C);
    }
    return T(1) / T(__builtin_sqrt(variance)) / shrink;
}

template <class T, int R> FASTGPT_INLINE void layer_norm_forward_rows(const Rows<const T>& x, const T* weight,
                                                                      const T* bias, T eps, long C, long r, T* y,
                                                                      T* mean, T* rstd) {
    constexpr int L = VL<T>;
    const T* row[R];
    vec<T> m[R], s[R], total[R] = {}, squares[R] = {};
    for (int i = 0; i < R; i++) row[i] = x[r + i];
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) total[i] += load_first(row[i] + c, n);
    });
    for (int i = 0; i < R; i++) m[i] = broadcast(sum<T>(total[i]) / T(C)), total[i] = vec<T>{};
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            vec<T> d = load_first(row[i] + c, n) - m[i];
            for (int lane = n; lane < L; lane++) d[lane] = 0; // past the row
            total[i] += d;
            squares[i] += d * d;
        }
    });
    for (int i = 0; i < R; i++) { // what is left of the mean, and what it did to the variance
        const T rest = sum<T>(total[i]) / T(C), variance = sum<T>(squares[i]) / T(C) - rest * rest;
        mean[r + i] = m[i][0] + rest;
        m[i] = broadcast(mean[r + i]);
        rstd[r + i] = variance <= max_finite<T> ? T(1) / T(__builtin_sqrt((variance > 0 ? variance : 0) + eps))
                                                : rstd_of_large(row[i], mean[r + i], C);
        s[i] = broadcast(rstd[r + i]);
    }
    for (int i = 0; i < R; i++) // one after the other: a single stream of writes
        for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
            const vec<T> w = load_first(weight + c, n), b = load_first(bias + c, n);
            store_first(y + (r + i) * C + c, (load_first(row[i] + c, n) - m[i]) * s[i] * w + b, n);
        });
}

template <class T>
void layer_norm_forward(const Rows<const T>& x, const T* weight, const T* bias, T eps, long C, T* y, T* mean, T* rstd) {
    const long block = layer_norm_block(C);
    parallel_tasks((x.count + block - 1) / block, [&](int64_t task) {
        const long end = (task + 1) * block < x.count ? (task + 1) * block : x.count;
        long r = task * block;
        for (; r + 2 <= end; r += 2) layer_norm_forward_rows<T, 2>(x, weight, bias, eps, C, r, y, mean, rstd);
        for (; r < end; r++) layer_norm_forward_rows<T, 1>(x, weight, bias, eps, C, r, y, mean, rstd);
    });
}

// dx for one row, and its share of dweight and dbias.
template <class T> FASTGPT_INLINE void layer_norm_backward_row(const T* g, const T* v, const T* weight, T mean, T rstd,
                                                               long C, T* dx, T* dweight, T* dbias) {
    const vec<T> m = broadcast(mean), s = broadcast(rstd);
    vec<T> sum_gw[2] = {}, sum_gwx[2] = {}, sum_x[2] = {};
    auto add = [&](int i, long c, int n) FASTGPT_LAMBDA {
        const vec<T> gw = rounded<T>(load_first(g + c, n) * load_first(weight + c, n));
        sum_gw[i] += gw;
        vec<T> xhat = (load_first(v + c, n) - m) * s;
        for (int lane = n; lane < VL<T>; lane++) xhat[lane] = 0; // past the row
        sum_gwx[i] += gw * xhat;
        sum_x[i] += xhat;
    };
    long c = 0;
    for (; c + 2 * VL<T> <= C; c += 2 * VL<T>) add(0, c, VL<T>), add(1, c + VL<T>, VL<T>);
    for_channels<T>(C - c, [&](long more, int n) FASTGPT_LAMBDA { add(0, c + more, n); });
    vec<T> a = broadcast(sum<T>(sum_gw[0] + sum_gw[1]) / T(C));
    vec<T> b = broadcast(sum<T>(sum_gwx[0] + sum_gwx[1]) / T(C));
    b += (a - a) + (b - b); // NaN where one of them is infinite, like the formula
    a -= broadcast(sum<T>(sum_x[0] + sum_x[1]) / T(C)) * b;
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
        const vec<T> grad = load_first(g + c, n), xhat = (load_first(v + c, n) - m) * s;
        const vec<T> gw = rounded<T>(grad * load_first(weight + c, n)); // as in the sums, or gw - a does not cancel
        store_first(dx + c, s * (gw - a - xhat * b), n);
        store_first(dweight + c, load_first(dweight + c, n) + grad * xhat, n);
        store_first(dbias + c, load_first(dbias + c, n) + grad, n);
    });
}

template <class T> void layer_norm_backward(const Rows<const T>& dy, const Rows<const T>& x, const T* weight,
                                            const T* mean, const T* rstd, long C, T* dx, T* dweight, T* dbias) {
    const long rows = x.count, smallest = layer_norm_block(C);
    const long block = (rows + 31) / 32 < smallest ? smallest : (rows + 31) / 32, blocks = (rows + block - 1) / block;
    Scratch<T> partial(blocks, 4 * C);
    parallel_tasks(blocks, [&](int64_t task) {
        T *total = partial.part(task), *some = total + 2 * C; // dweight and dbias side by side
        for (long c = 0; c < 2 * C; c++) total[c] = 0;
        const long end = (task + 1) * block < rows ? (task + 1) * block : rows;
        for (long begin = task * block; begin < end; begin += 32) { // short sums of sums round less than a long sum
            for (long c = 0; c < 2 * C; c++) some[c] = 0;
            for (long r = begin; r < begin + 32 && r < end; r++)
                layer_norm_backward_row(dy[r], x[r], weight, mean[r], rstd[r], C, dx + r * C, some, some + C);
            for (long c = 0; c < 2 * C; c++) total[c] += some[c];
        }
    });
    constexpr long columns = 256;
    parallel_tasks((C + columns - 1) / columns, [&](int64_t task) {
        const long begin = task * columns, end = begin + columns < C ? begin + columns : C;
        for (long c = begin; c < end; c++) dweight[c] = dbias[c] = 0;
        for (long i = 0; i < blocks; i++) {
            const T *dw = partial.part(i), *db = dw + C;
            for (long c = begin; c < end; c++) dweight[c] += dw[c], dbias[c] += db[c];
        }
    });
}
