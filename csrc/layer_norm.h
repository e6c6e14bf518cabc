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

// Four partial sums: enough additions in flight to hide their latency.
template <class T, class F> FASTGPT_INLINE T row_sum(long C, const F& term) {
    constexpr int L = VL<T>;
    vec<T> s[4] = {};
    long c = 0;
    for (; c + 4 * L <= C; c += 4 * L)
        for (int i = 0; i < 4; i++) s[i] += term(c + i * L, L);
    for (; c + L <= C; c += L) s[0] += term(c, L);
    if (c < C) s[1] += term(c, int(C - c));
    return sum<T>((s[0] + s[1]) + (s[2] + s[3]));
}

template <class T>
void layer_norm_forward(const Rows<const T>& x, const T* weight, const T* bias, T eps, long C, T* y, T* mean, T* rstd) {
    constexpr int L = VL<T>;
    const long block = layer_norm_block(C);
    parallel_tasks((x.count + block - 1) / block, [&](int64_t task) {
        for (long r = task * block; r < (task + 1) * block && r < x.count; r++) {
            const T* row = x[r];
            const T mu = row_sum<T>(C, [&](long c, int n) { return load_first(row + c, n); }) / T(C);
            const vec<T> m = broadcast(mu);
            const T var = row_sum<T>(C, [&](long c, int n) {
                vec<T> d = load_first(row + c, n) - m;
                for (int i = n; i < L; i++) d[i] = 0; // behind the row: not -mean
                return d * d;
            }) / T(C);
            const T rs = T(1) / __builtin_sqrt(var + eps);
            const vec<T> s = broadcast(rs);
            T* out = y + r * C;
            long c = 0;
            for (; c + L <= C; c += L)
                store(out + c, (load(row + c) - m) * s * load(weight + c) + load(bias + c));
            for (; c < C; c++) out[c] = (row[c] - mu) * rs * weight[c] + bias[c];
            mean[r] = mu;
            rstd[r] = rs;
        }
    });
}

// dx for R rows and their share of dweight and dbias: R rows at a time load and store the two sums once for all of them.
template <class T, int R>
FASTGPT_INLINE void layer_norm_backward_rows(const Rows<const T>& dy, const Rows<const T>& x, const T* weight,
                                             const T* mean, const T* rstd, long C, long r, T* dx, T* dweight, T* dbias) {
    constexpr int L = VL<T>;
    const T *g[R], *v[R];
    T *out[R], a[R], b[R];
    for (int i = 0; i < R; i++) {
        g[i] = dy[r + i], v[i] = x[r + i], out[i] = dx + (r + i) * C;
        vec<T> sg[2] = {}, sgx[2] = {};
        const vec<T> m = broadcast(mean[r + i]);
        long c = 0;
        auto add = [&](int s, vec<T> grad, vec<T> value, vec<T> w) {
            sg[s] += grad * w;
            sgx[s] += grad * w * (value - m);
        };
        for (; c + 2 * L <= C; c += 2 * L) {
            add(0, load(g[i] + c), load(v[i] + c), load(weight + c));
            add(1, load(g[i] + c + L), load(v[i] + c + L), load(weight + c + L));
        }
        for (; c < C; c += L) {
            const int n = C - c < L ? int(C - c) : L;
            add(0, load_first(g[i] + c, n), load_first(v[i] + c, n), load_first(weight + c, n));
        }
        a[i] = sum<T>(sg[0] + sg[1]) / T(C);
        b[i] = sum<T>(sgx[0] + sgx[1]) * rstd[r + i] / T(C);
    }
    long c = 0;
    for (; c + L <= C; c += L) {
        const vec<T> w = load(weight + c);
        vec<T> dw = load(dweight + c), db = load(dbias + c);
        for (int i = 0; i < R; i++) {
            const vec<T> grad = load(g[i] + c), xhat = (load(v[i] + c) - broadcast(mean[r + i])) * broadcast(rstd[r + i]);
            store(out[i] + c, broadcast(rstd[r + i]) * (grad * w - broadcast(a[i]) - xhat * broadcast(b[i])));
            dw += grad * xhat;
            db += grad;
        }
        store(dweight + c, dw);
        store(dbias + c, db);
    }
    for (; c < C; c++)
        for (int i = 0; i < R; i++) {
            const T grad = g[i][c], xhat = (v[i][c] - mean[r + i]) * rstd[r + i];
            out[i][c] = rstd[r + i] * (grad * weight[c] - a[i] - xhat * b[i]);
            dweight[c] += grad * xhat;
            dbias[c] += grad;
        }
}

template <class T>
void layer_norm_backward(const Rows<const T>& dy, const Rows<const T>& x, const T* weight, const T* mean, const T* rstd,
                         long C, T* dx, T* dweight, T* dbias) {
    const long rows = x.count, smallest = layer_norm_block(C);
    const long block = (rows + 63) / 64 < smallest ? smallest : (rows + 63) / 64, blocks = (rows + block - 1) / block;
    Scratch<T> partial(blocks, 2 * C);
    parallel_tasks(blocks, [&](int64_t task) {
        T *dw = partial.part(task), *db = dw + C;
        for (long c = 0; c < 2 * C; c++) dw[c] = 0;
        const long end = (task + 1) * block < rows ? (task + 1) * block : rows;
        long r = task * block;
        for (; r + 4 <= end; r += 4) layer_norm_backward_rows<T, 4>(dy, x, weight, mean, rstd, C, r, dx, dw, db);
        for (; r < end; r++) layer_norm_backward_rows<T, 1>(dy, x, weight, mean, rstd, C, r, dx, dw, db);
    });
    for (long c = 0; c < C; c++) dweight[c] = dbias[c] = 0;
    for (long i = 0; i < blocks; i++) {
        const T *dw = partial.part(i), *db = dw + C;
        for (long c = 0; c < C; c++) dweight[c] += dw[c], dbias[c] += db[c];
    }
}
