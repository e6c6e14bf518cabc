// GELU in its tanh form (Hendrycks and Gimpel 2016), value by value: gpt.py's gelu.
//
//   y = x/2 (1 + tanh u)        u = sqrt(2/pi) (x + 0.044715 x^3)
//
// Since (1 + tanh u) / 2 = 1 / (1 + exp(-2u)) = s, the sigmoid of 2u, one exponential and one division do:
//
//   y = x s        s = 1 / (1 + e)        e = 2^(-v)        v = 2 log2(e) u
//
// which also keeps its digits where tanh u is near -1. Backward, from s' = s (1 - s) 2u' and 1 - s = e s:
//
//   dx = dy (s + x s (1 - s) 2u')        2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
//
// Saved for the backward: x alone, which the layer before holds anyway.
//
//            C columns
//          +-----------+-----------+
//   rows   |  task 0   |  task 1   |     A task is 8192 values: some whole rows where they are short, a piece of one
//          +-----------+-----------+     where they are long. It goes from front to back, a register at a time, and
//          |  task 2   |  task 3   |     prefetches memory well ahead of the register at hand:
//          +-----------+-----------+
//                                          [done done done | now | ... | prefetched | not yet ]

// e, at most 2^limit.
template <class T> FASTGPT_INLINE vec<T> gelu_exponential(vec<T> x, T limit) {
    constexpr T slope = T(-2 * 1.4426950408889634 * 0.7978845608028654), cubic = slope * T(0.044715);
    const vec<T> most = broadcast(limit), minus_v = x * (broadcast(slope) + broadcast(cubic) * x * x);
    return exp2(minus_v > most ? most : minus_v);
}

// s. Far to the left e is infinite, and s 0.
template <class T> FASTGPT_INLINE vec<T> gelu_sigmoid(vec<T> x) {
    const vec<T> one = broadcast(T(1));
    return one / (one + gelu_exponential<T>(x, sizeof(T) == 4 ? T(128) : T(1024)));
}

// piece(r, c, n) for n values from column c of row r on, all of them, in parallel.
template <class T, class Piece> FASTGPT_INLINE void for_pieces(long rows, long C, const Piece& piece) {
    constexpr long most = 8192; // values a task takes
    const long height = C < most ? most / (C > 0 ? C : 1) : 1, across = (C + most - 1) / most;
    parallel_tasks((rows + height - 1) / height * across, [&](int64_t task) {
        const long begin = task / across * height, c = task % across * most;
        for (long r = begin; r < begin + height && r < rows; r++) piece(r, c, C - c < most ? C - c : most);
    });
}

constexpr long ahead = 256; // values: asked for this early, memory's time hides behind the arithmetic

template <class T> void gelu_forward(const Rows<const T>& x, long C, T* y) {
    for_pieces<T>(x.count, C, [&](long r, long c, long n) FASTGPT_LAMBDA {
        const T* from = x[r] + c;
        T* to = y + r * C + c;
        for_channels<T>(n, [=](long i, int lanes) FASTGPT_LAMBDA {
            __builtin_prefetch(from + i + ahead);
            const vec<T> v = load_first(from + i, lanes);
            store_first(to + i, v * gelu_sigmoid<T>(v), lanes);
        });
    });
}

template <class T> void gelu_backward(const Rows<const T>& dy, const Rows<const T>& x, long C, T* dx) {
    for_pieces<T>(x.count, C, [&](long r, long c, long n) FASTGPT_LAMBDA {
        const T *grad = dy[r] + c, *from = x[r] + c;
        T* to = dx + r * C + c;
        for_channels<T>(n, [=](long i, int lanes) FASTGPT_LAMBDA {
            __builtin_prefetch(from + i + ahead), __builtin_prefetch(grad + i + ahead);
            constexpr T slope = T(2 * 0.7978845608028654), square = slope * T(3 * 0.044715);
            const vec<T> v = load_first(from + i, lanes), most = broadcast(T(64));
            const vec<T> w = v > most ? most : v < -most ? -most : v; // out there 1 - s is 0, and x^2 must not overflow
            const vec<T> one = broadcast(T(1)), e = gelu_exponential<T>(v, T(126)), s = one / (one + e); // e s is 1 - s
            const vec<T> change = s * (e * s) * (broadcast(slope) + broadcast(square) * w * w);
            const vec<T> slip = v - v; // 0, but NaN for an infinity, like the formula
            store_first(to + i, load_first(grad + i, lanes) * (s + w * change + slip), lanes);
        });
    });
}
