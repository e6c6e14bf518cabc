// What this machine can do at best, for `fastgpt bench` to compare with: multiply-adds in registers, reads in a row.
//
// Compiled once per instruction set (all_kernels.h).

// n rounds of one fused multiply-add in each accumulator of a microkernel, on every thread. -> floating-point
// operations
inline double fma_work(int64_t n) {
    const int threads = num_threads();
    parallel_tasks(threads, [&](int64_t) {
        vec<float> c[MR * NV];
        const vec<float> a = broadcast(0.999f);
        const vec<float> b = broadcast(0.001f);
        for (auto& x : c) x = b;
        for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 32
            for (int j = 0; j < MR * NV; j++) c[j] = c[j] * a + b;
        vec<float> all{};
        for (auto& x : c) all += x;
        volatile float sink = sum<float>(all); // so that the work is not optimized away
        (void)sink;
    });
    return 2.0 * VL<float> * MR * NV * double(n) * threads;
}

// Adds up n floats, in pieces shared among the threads. -> bytes read
inline double read_work(const float* data, int64_t n, double* out) {
    constexpr int64_t piece = 1 << 16;
    const int64_t pieces = ceil_div(n, piece);
    Scratch<double> sums(pieces, 1);
    parallel_tasks(pieces, [&](int64_t task) {
        const int64_t end = min((task + 1) * piece, n);
        vec<float> s[8] = {};
        int64_t i = task * piece;
        for (; i + 8 * VL<float> <= end; i += 8 * VL<float>)
            for (int j = 0; j < 8; j++) s[j] += load(data + i + j * VL<float>);
        for (; i < end; i += VL<float>) s[0] += load_first(data + i, int(end - i));
        for (int j = 1; j < 8; j++) s[0] += s[j];
        *sums.part(task) = sum<float>(s[0]);
    });
    *out = 0;
    for (int64_t i = 0; i < pieces; i++) *out += *sums.part(i);
    return double(n) * sizeof(float);
}
