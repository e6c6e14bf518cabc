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
// Memory is read once: a row is fetched, stays in the first-level cache, and is passed over again there. The second pass
// for the variance is what makes a large mean harmless; E[x^2] - E[x]^2 would cancel.
//
// The columns of dweight and dbias are summed within fixed blocks of rows and then block by block, so the order depends
// on the shape alone and the bits do not depend on the number of threads.

//
// R rows are taken at once: their sums hide each other's latency, and weight and bias are loaded once for all of them.

// step(c, n) for all channels, n = VL at a time and what is left over at the end.
template <class T, class Step> FASTGPT_INLINE void for_channels(long C, const Step& step) {
    long c = 0;
    for (; c + VL<T> <= C; c += VL<T>) step(c, VL<T>);
    if (c < C) step(c, int(C - c));
}

template <class T, int R>
FASTGPT_INLINE void layer_norm_forward_rows(const Rows<const T>& x, const T* weight, const T* bias, T eps, long C,
                                            long r, T* y, T* mean, T* rstd) {
    constexpr int L = VL<T>;
    const T* row[R];
    vec<T> m[R], s[R], total[R] = {}, squares[R] = {};
    for (int i = 0; i < R; i++) row[i] = x[r + i];
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) total[i] += load_first(row[i] + c, n);
    });
    for (int i = 0; i < R; i++) m[i] = broadcast(mean[r + i] = sum<T>(total[i]) / T(C));
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            vec<T> d = load_first(row[i] + c, n) - m[i];
            for (int lane = n; lane < L; lane++) d[lane] = 0; // behind the row: not -mean
            squares[i] += d * d;
        }
    });
    for (int i = 0; i < R; i++)
        s[i] = broadcast(rstd[r + i] = T(1) / T(__builtin_sqrt(sum<T>(squares[i]) / T(C) + eps)));
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
        const vec<T> w = load_first(weight + c, n), b = load_first(bias + c, n);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
            store_first(y + (r + i) * C + c, (load_first(row[i] + c, n) - m[i]) * s[i] * w + b, n);
    });
}

template <class T>
void layer_norm_forward(const Rows<const T>& x, const T* weight, const T* bias, T eps, long C, T* y, T* mean, T* rstd) {
    const long block = layer_norm_block(C);
    parallel_tasks((x.count + block - 1) / block, [&](int64_t task) {
        const long end = (task + 1) * block < x.count ? (task + 1) * block : x.count;
        long r = task * block;
        for (; r + 4 <= end; r += 4) layer_norm_forward_rows<T, 4>(x, weight, bias, eps, C, r, y, mean, rstd);
        for (; r < end; r++) layer_norm_forward_rows<T, 1>(x, weight, bias, eps, C, r, y, mean, rstd);
    });
}

// dx for R rows, and their share of dweight and dbias.
template <class T, int R>
FASTGPT_INLINE void layer_norm_backward_rows(const Rows<const T>& dy, const Rows<const T>& x, const T* weight,
                                             const T* mean, const T* rstd, long C, long r, T* dx, T* dweight, T* dbias) {
    const T *g[R], *v[R];
    vec<T> m[R], s[R], a[R] = {}, b[R] = {};
    for (int i = 0; i < R; i++)
        g[i] = dy[r + i], v[i] = x[r + i], m[i] = broadcast(mean[r + i]), s[i] = broadcast(rstd[r + i]);
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
        const vec<T> w = load_first(weight + c, n);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            const vec<T> gw = load_first(g[i] + c, n) * w;
            a[i] += gw;
            b[i] += gw * (load_first(v[i] + c, n) - m[i]);
        }
    });
    for (int i = 0; i < R; i++) { // dx = s gw - a - (x - m) b
        b[i] = broadcast(sum<T>(b[i]) / T(C)) * s[i] * s[i] * s[i];
        a[i] = broadcast(sum<T>(a[i]) / T(C)) * s[i];
    }
    for_channels<T>(C, [&](long c, int n) FASTGPT_LAMBDA {
        const vec<T> w = load_first(weight + c, n);
        vec<T> dw = load_first(dweight + c, n), db = load_first(dbias + c, n);
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            const vec<T> grad = load_first(g[i] + c, n), centered = load_first(v[i] + c, n) - m[i];
            store_first(dx + (r + i) * C + c, grad * (w * s[i]) - a[i] - centered * b[i], n);
            dw += grad * (centered * s[i]);
            db += grad;
        }
        store_first(dweight + c, dw, n);
        store_first(dbias + c, db, n);
    });
}

template <class T>
void layer_norm_backward(const Rows<const T>& dy, const Rows<const T>& x, const T* weight, const T* mean, const T* rstd,
                         long C, T* dx, T* dweight, T* dbias) {
    const long rows = x.count, smallest = layer_norm_block(C);
    const long block = (rows + 31) / 32 < smallest ? smallest : (rows + 31) / 32, blocks = (rows + block - 1) / block;
    Scratch<T> partial(blocks, 2 * C);
    parallel_tasks(blocks, [&](int64_t task) {
        T *dw = partial.part(task), *db = dw + C;
        for (long c = 0; c < 2 * C; c++) dw[c] = 0;
        const long end = (task + 1) * block < rows ? (task + 1) * block : rows;
        long r = task * block;
        for (; r + 4 <= end; r += 4) layer_norm_backward_rows<T, 4>(dy, x, weight, mean, rstd, C, r, dx, dw, db);
        for (; r < end; r++) layer_norm_backward_rows<T, 1>(dy, x, weight, mean, rstd, C, r, dx, dw, db);
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
