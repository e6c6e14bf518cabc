// GELU in its tanh form (Hendrycks and Gimpel 2016), value by value: gpt.py's gelu.
//
//   y = x/2 (1 + tanh u)        u = sqrt(2/pi) (x + 0.044715 x^3)
//
// Since (1 + tanh u) / 2 = 1 / (1 + exp(-2u)) = s, the sigmoid of 2u, one exponential and one division do:
//
//   y = x s        s = 1 / (1 + e)        e = exp(-2u) = 2^(-2 log2(e) u)
//
// which also keeps its digits where tanh u is near -1. Backward, from s' = s (1 - s) 2u' and 1 - s = e s:
//
//   dx = dy (s + x s')        2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
//
// Saved for the backward: x alone, which the layer before holds anyway.
//
//            C columns
//          +-----------+-----------+
//   rows   |  task 0   |  task 1   |     A task is 8192 values: whole rows where they are short, a piece of one where
//          +-----------+-----------+     they are long. It runs from front to back, a register at a time:
//          |  task 2   |  task 3   |
//          +-----------+-----------+     [ done | done | now | prefetched | prefetched | not yet ]
//
// Compiled once per instruction set (all_kernels.h).

constexpr double gelu_root = 0.7978845608028654; // sqrt(2 / pi)
constexpr double gelu_cubic = 0.044715;

// e, at most 2^limit.
template <class T> FASTGPT_INLINE vec<T> gelu_exponential(vec<T> x, T limit) {
    constexpr T linear = T(-2 * log2e * gelu_root);
    constexpr T cubic = linear * T(gelu_cubic);
    return exp2(min(broadcast(limit), x * (broadcast(linear) + broadcast(cubic) * x * x)));
}

// s. Far to the left e is infinite, and s 0.
template <class T> FASTGPT_INLINE vec<T> gelu_sigmoid(vec<T> x) {
    const vec<T> one = broadcast(T(1));
    return one / (one + gelu_exponential<T>(x, sizeof(T) == 4 ? T(128) : T(1024)));
}

// dx / dy
template <class T> FASTGPT_INLINE vec<T> gelu_derivative(vec<T> x) {
    constexpr T linear = T(2 * gelu_root);
    constexpr T square = linear * T(3 * gelu_cubic);
    const vec<T> one = broadcast(T(1));
    const vec<T> limit = broadcast(T(64));
    const vec<T> near = max(-limit, min(limit, x)); // x: further out 1 - s is 0, and x^2 must not overflow
    const vec<T> e = gelu_exponential<T>(x, T(126));
    const vec<T> s = one / (one + e);
    const vec<T> one_minus_s = e * s;
    const vec<T> ds = s * one_minus_s * (broadcast(linear) + broadcast(square) * near * near);
    return s + near * ds + (x - x); // x - x: 0, but NaN for an infinity, like the formula
}

// piece(r, c, n) for n values from column c of row r on, all of them, in parallel.
template <class T, class Piece> FASTGPT_INLINE void for_pieces(int64_t rows, int64_t C, const Piece& piece) {
    constexpr int64_t max_values = 8192; // in a task
    const int64_t height = max<int64_t>(max_values / max<int64_t>(C, 1), 1);
    const int64_t col_blocks = ceil_div(C, max_values);
    parallel_tasks(ceil_div(rows, height) * col_blocks, [&](int64_t task) {
        const int64_t begin = task / col_blocks * height;
        const int64_t c = task % col_blocks * max_values;
        for (int64_t r = begin; r < begin + height && r < rows; r++) piece(r, c, min(C - c, max_values));
    });
}

constexpr int64_t prefetch_distance = 256; // values: hides memory latency

template <class T> void gelu_forward(const Rows<const T>& x, int64_t C, T* y) {
    for_pieces<T>(x.count, C, [&](int64_t r, int64_t c, int64_t n) FASTGPT_LAMBDA {
        const T* from = x[r] + c;
        T* to = y + r * C + c;
        for_channels<T>(n, [=](int64_t i, int lanes) FASTGPT_LAMBDA {
            __builtin_prefetch(from + i + prefetch_distance);
            const vec<T> v = load_first(from + i, lanes);
            store_first(to + i, v * gelu_sigmoid<T>(v), lanes);
        });
    });
}

template <class T> void gelu_backward(const Rows<const T>& dy, const Rows<const T>& x, int64_t C, T* dx) {
    for_pieces<T>(x.count, C, [&](int64_t r, int64_t c, int64_t n) FASTGPT_LAMBDA {
        const T* from_dy = dy[r] + c;
        const T* from_x = x[r] + c;
        T* to = dx + r * C + c;
        for_channels<T>(n, [=](int64_t i, int lanes) FASTGPT_LAMBDA {
            __builtin_prefetch(from_x + i + prefetch_distance);
            __builtin_prefetch(from_dy + i + prefetch_distance);
            const vec<T> derivative = gelu_derivative<T>(load_first(from_x + i, lanes));
            store_first(to + i, load_first(from_dy + i, lanes) * derivative, lanes);
        });
    });
}
