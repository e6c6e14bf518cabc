// What this machine can do at best, for `fastgpt bench` to compare with: multiply-adds in registers, reads in a row.
//
// Compiled once per instruction set (all_kernels.h).

// n rounds of what an engine's inner loop does, on registers alone, on every thread. -> floating-point operations
template <class Engine> struct Work;
template <class T, class X> struct Work<Fma<T, X>> { // one multiply-add in each accumulator of a microkernel
    static double run(int64_t n) {
        const int threads = num_threads();
        parallel_tasks(threads, [&](int64_t) {
            vec<T> c[MR * NV]; // in registers only if every loop over them is unrolled
#pragma GCC unroll 32
            for (int j = 0; j < MR * NV; j++) c[j] = broadcast(T(j)); // all different, or one would do for all
            if constexpr (per<X> == 1) {
                const vec<T> a = broadcast(T(0.999)), b = broadcast(T(0.001));
                for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 32
                    for (int j = 0; j < MR * NV; j++) c[j] = c[j] * a + b;
            } else {
                const vec<X> one = interleaved(broadcast(T(1)), broadcast(T(1)));
                for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 32
                    for (int j = 0; j < MR * NV; j++) multiply_add(c[j], one, one);
            }
            vec<T> all{};
#pragma GCC unroll 32
            for (int j = 0; j < MR * NV; j++) all += c[j];
            volatile T sink = sum<T>(all); // so that the work is not optimized away
            (void)sink;
        });
        return 2.0 * per<X> * VL<T> * MR * NV * double(n) * threads;
    }
};
#ifdef FASTGPT_AMX
template <> struct Work<Amx> : Work<Fma<float>> {}; // the limit that float32 has without the three parts
template <> struct Work<AmxBFloat16> {              // one product of tiles in each of the four sums
    static double run(int64_t n) {
        const int threads = num_threads();
        parallel_tasks(threads, [&](int64_t) {
            AmxBFloat16::begin();
            AmxBFloat16::repeat(n);
            AmxBFloat16::end();
        });
        return 4 * 2.0 * 16 * 16 * AmxBFloat16::depth * double(n) * threads;
    }
};
#endif

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
