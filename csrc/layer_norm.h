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
// Saved for the backward: mean and rstd, two numbers a row. xhat is made anew from x, which autograd holds anyway, so
// nothing of x's size is stored.
//
// Memory is read once: a row is fetched, stays in the first-level cache, and is passed over again there. The second
// pass for the variance, and sums of differences from the row's first value, are what makes a large mean harmless.
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

template <class T, int R> FASTGPT_INLINE void layer_norm_forward_rows(const Rows<const T>& x, const T* weight,
                                                                      const T* bias, T eps, long C, long r, T* y,
                                                                      T* mean, T* rstd) {
    constexpr int L = VL<T>;
    const T* row[R];
    vec<T> m[R], s[R], total[R] = {}, squares[R] = {};
    for (int i = 0; i < R; i++) row[i] = x[r + i];
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            vec<T> d = load_first(row[i] + c, n) - broadcast(row[i][0]);
            for (int lane = n; lane < L; lane++) d[lane] = 0; // behind the row
            total[i] += d;
        }
    });
    for (int i = 0; i < R; i++) m[i] = broadcast(mean[r + i] = row[i][0] + sum<T>(total[i]) / T(C));
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            vec<T> d = load_first(row[i] + c, n) - m[i];
            for (int lane = n; lane < L; lane++) d[lane] = 0;
            squares[i] += d * d;
        }
    });
    for (int i = 0; i < R; i++)
        s[i] = broadcast(rstd[r + i] = T(1) / T(__builtin_sqrt(sum<T>(squares[i]) / T(C) + eps)));
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
    vec<T> sum_gw[2] = {}, sum_gwx[2] = {};
    auto add = [&](int i, long c, int n) FASTGPT_LAMBDA {
        const vec<T> gw = load_first(g + c, n) * load_first(weight + c, n);
        sum_gw[i] += gw;
        sum_gwx[i] += gw * (load_first(v + c, n) - m);
    };
    long c = 0;
    for (; c + 2 * VL<T> <= C; c += 2 * VL<T>) add(0, c, VL<T>), add(1, c + VL<T>, VL<T>);
    for_channels<T>(C - c, [&](long more, int n) FASTGPT_LAMBDA { add(0, c + more, n); });
    const vec<T> a = broadcast(sum<T>(sum_gw[0] + sum_gw[1]) / T(C));
    const vec<T> b = broadcast(sum<T>(sum_gwx[0] + sum_gwx[1]) / T(C)) * s * s;
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
        const vec<T> grad = load_first(g + c, n), centered = load_first(v + c, n) - m;
        store_first(dx + c, s * (grad * load_first(weight + c, n) - a - centered * b), n);
        store_first(dweight + c, load_first(dweight + c, n) + grad * (centered * s), n);
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
