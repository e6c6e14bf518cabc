// Layer normalization (Ba, Kiros and Hinton 2016) of each row of C channels: gpt.py's layer_norm.
//
//   xhat = (x - mean) rstd        mean = sum(x) / C        rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)
//   y    = xhat weight + bias
//
// Backward, with g = dy weight. xhat depends on x directly, through mean and through rstd:
//
//   dx = rstd (g - a - xhat b)        a = sum(g) / C        b = sum(g xhat) / C
//
//   dweight = sum over rows of dy xhat        dbias = sum over rows of dy
//
// The sum of xhat is 0 but for the rounding of the mean. Beside a large mean that is many digits, so it is taken off
// again: xhat - sum(xhat) / C stands for xhat in dx.
//
// Saved for the backward: mean and rstd, two numbers a row. xhat is computed again from x, which autograd holds anyway,
// so nothing of x's size is stored.
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
//
// Compiled once per instruction set (all_kernels.h).

// Rows in a task: some 256 KiB, so that small inputs stay on one core.
FASTGPT_INLINE int64_t layer_norm_block(int64_t C) { return max<int64_t>(65536 / C, 1); }

// Where squares overflow: 1 / sqrt(sum(((x - mean) / shrink)^2) / C) / shrink. eps is nothing beside such a variance.
template <class T> FASTGPT_NOINLINE T rstd_of_large(const T* x, T mean, int64_t C) {
    constexpr T shrink = sizeof(T) == 4 ? T(0x1p80) : T(0x1p600);
    T variance = 0;
    for (int64_t c = 0; c < C; c++) {
        const T d = (x[c] - mean) / shrink;
        variance += d * d / T(C);
    }
    return T(1) / T(__builtin_sqrt(variance)) / shrink;
}

// Rows r .. r + R - 1.
template <class T, int R> FASTGPT_INLINE void layer_norm_forward_rows(const Rows<const T>& x, const T* weight,
                                                                      const T* bias, T eps, int64_t C, int64_t r, T* y,
                                                                      T* mean, T* rstd) {
    const T* row[R];
    vec<T> row_mean[R], row_rstd[R], sums[R] = {}, squares[R] = {};
    for (int i = 0; i < R; i++) row[i] = x[r + i];
    for_channels<T>(C, [&](int64_t c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) sums[i] += load_first(row[i] + c, n);
    });
    for (int i = 0; i < R; i++) {
        row_mean[i] = broadcast(sum<T>(sums[i]) / T(C));
        sums[i] = vec<T>{};
    }
    for_channels<T>(C, [&](int64_t c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            vec<T> d = load_first(row[i] + c, n) - row_mean[i];
            for (int lane = n; lane < VL<T>; lane++) d[lane] = 0; // past the row
            sums[i] += d;
            squares[i] += d * d;
        }
    });
    for (int i = 0; i < R; i++) { // what is left of the mean, and what it did to the variance
        const T rest = sum<T>(sums[i]) / T(C);
        const T variance = sum<T>(squares[i]) / T(C) - rest * rest;
        mean[r + i] = row_mean[i][0] + rest;
        row_mean[i] = broadcast(mean[r + i]);
        rstd[r + i] = variance <= max_finite<T> ? T(1) / T(__builtin_sqrt((variance > 0 ? variance : 0) + eps))
                                                : rstd_of_large(row[i], mean[r + i], C);
        row_rstd[i] = broadcast(rstd[r + i]);
    }
    for (int i = 0; i < R; i++) // one after the other: a single stream of writes
        for_channels<T>(C, [&](int64_t c, int n) FASTGPT_LAMBDA {
            const vec<T> w = load_first(weight + c, n);
            const vec<T> b = load_first(bias + c, n);
            store_first(y + (r + i) * C + c, (load_first(row[i] + c, n) - row_mean[i]) * row_rstd[i] * w + b, n);
        });
}

template <class T> void layer_norm_forward(const Rows<const T>& x, const T* weight, const T* bias, T eps, int64_t C,
                                           T* y, T* mean, T* rstd) {
    const int64_t block = layer_norm_block(C);
    parallel_tasks(ceil_div(x.count, block), [&](int64_t task) {
        const int64_t end = min((task + 1) * block, x.count);
        int64_t r = task * block;
        for (; r + 2 <= end; r += 2) layer_norm_forward_rows<T, 2>(x, weight, bias, eps, C, r, y, mean, rstd);
        for (; r < end; r++) layer_norm_forward_rows<T, 1>(x, weight, bias, eps, C, r, y, mean, rstd);
    });
}

// dx of one row, and its share of dweight and dbias.
template <class T> FASTGPT_INLINE void layer_norm_backward_row(const T* dy, const T* x, const T* weight, T row_mean,
                                                               T row_rstd, int64_t C, T* dx, T* dweight, T* dbias) {
    const vec<T> mean = broadcast(row_mean);
    const vec<T> rstd = broadcast(row_rstd);
    vec<T> sum_g[2] = {}, sum_gx[2] = {}, sum_x[2] = {};
    auto add = [&](int i, int64_t c, int n) FASTGPT_LAMBDA {
        const vec<T> g = rounded<T>(load_first(dy + c, n) * load_first(weight + c, n));
        sum_g[i] += g;
        vec<T> xhat = (load_first(x + c, n) - mean) * rstd;
        for (int lane = n; lane < VL<T>; lane++) xhat[lane] = 0; // past the row
        sum_gx[i] += g * xhat;
        sum_x[i] += xhat;
    };
    int64_t c = 0;
    for (; c + 2 * VL<T> <= C; c += 2 * VL<T>) {
        add(0, c, VL<T>);
        add(1, c + VL<T>, VL<T>);
    }
    for_channels<T>(C - c, [&](int64_t more, int n) FASTGPT_LAMBDA { add(0, c + more, n); });
    vec<T> a = broadcast(sum<T>(sum_g[0] + sum_g[1]) / T(C));
    vec<T> b = broadcast(sum<T>(sum_gx[0] + sum_gx[1]) / T(C));
    b += (a - a) + (b - b); // NaN where one of them is infinite, like the formula
    a -= broadcast(sum<T>(sum_x[0] + sum_x[1]) / T(C)) * b;
    for_channels<T>(C, [&](int64_t c, int n) FASTGPT_LAMBDA {
        const vec<T> d = load_first(dy + c, n);
        const vec<T> xhat = (load_first(x + c, n) - mean) * rstd;
        const vec<T> g = rounded<T>(d * load_first(weight + c, n)); // as in the sums, or g - a does not cancel
        store_first(dx + c, rstd * (g - a - xhat * b), n);
        store_first(dweight + c, load_first(dweight + c, n) + d * xhat, n);
        store_first(dbias + c, load_first(dbias + c, n) + d, n);
    });
}

template <class T> void layer_norm_backward(const Rows<const T>& dy, const Rows<const T>& x, const T* weight,
                                            const T* mean, const T* rstd, int64_t C, T* dx, T* dweight, T* dbias) {
    constexpr int64_t chunk = 32; // rows: short sums of sums round less than a long sum
    const int64_t rows = x.count;
    const int64_t block = max(ceil_div(rows, 32), layer_norm_block(C));
    const int64_t blocks = ceil_div(rows, block);
    Scratch<T> partial(blocks, 4 * C); // dweight and dbias side by side, of the block and of a chunk
    parallel_tasks(blocks, [&](int64_t task) {
        T* block_sums = partial.part(task);
        T* chunk_sums = block_sums + 2 * C;
        for (int64_t c = 0; c < 2 * C; c++) block_sums[c] = 0;
        const int64_t end = min((task + 1) * block, rows);
        for (int64_t begin = task * block; begin < end; begin += chunk) {
            for (int64_t c = 0; c < 2 * C; c++) chunk_sums[c] = 0;
            for (int64_t r = begin; r < begin + chunk && r < end; r++)
                layer_norm_backward_row(dy[r], x[r], weight, mean[r], rstd[r], C, dx + r * C, chunk_sums,
                                        chunk_sums + C);
            for (int64_t c = 0; c < 2 * C; c++) block_sums[c] += chunk_sums[c];
        }
    });
    constexpr int64_t columns = 256;
    parallel_tasks(ceil_div(C, columns), [&](int64_t task) {
        const int64_t begin = task * columns;
        const int64_t end = min(begin + columns, C);
        for (int64_t c = begin; c < end; c++) {
            dweight[c] = 0;
            dbias[c] = 0;
        }
        for (int64_t i = 0; i < blocks; i++) {
            const T* block_sums = partial.part(i);
            for (int64_t c = begin; c < end; c++) {
                dweight[c] += block_sums[c];
                dbias[c] += block_sums[C + c];
            }
        }
    });
}
