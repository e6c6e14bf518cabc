// GELU in its tanh form (Hendrycks and Gimpel 2016), value by value: gpt.py's gelu.
//
//   y = x/2 (1 + tanh u)        u = sqrt(2/pi) (x + 0.044715 x^3)
//
// Since (1 + tanh u) / 2 = 1 / (1 + exp(-2u)), one exponential and one division do:
//
//   y = x s        s = e / (1 + e)        e = 2^v        v = 2 log2(e) u
//
// which also keeps its digits where tanh u is near -1. Backward, from s' = s (1 - s) 2u' and 1 - s = 1 / (1 + e):
//
//   dx = dy (s + x s (1 - s) 2u')        2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
//
// Saved for the backward: x alone, which the layer before holds anyway.

// s and 1 - s.
template <class T> struct Gate {
    vec<T> open, shut;

    FASTGPT_INLINE explicit Gate(vec<T> x) {
        constexpr T slope = T(2 * 1.4426950408889634 * 0.7978845608028654), cubic = slope * T(0.044715);
        const vec<T> one = broadcast(T(1)), highest = broadcast(T(126)); // 2^v must not overflow; s is 1 long before
        const vec<T> v = x * (broadcast(slope) + broadcast(cubic) * x * x), e = exp2(v > highest ? highest : v);
        shut = one / (one + e);
        open = e * shut;
    }
};

// each(r, c, n) for n <= VL values from column c of row r on, all of them, in parallel.
template <class T, class Each> FASTGPT_INLINE void for_values(long rows, long C, const Each& each) {
    constexpr long piece = 8192; // values a task takes
    const long height = C < piece ? piece / (C > 0 ? C : 1) : 1, across = (C + piece - 1) / piece;
    parallel_tasks((rows + height - 1) / height * across, [&](int64_t task) {
        const long begin = task / across * height, from = task % across * piece;
        const long width = C - from < piece ? C - from : piece;
        for (long r = begin; r < begin + height && r < rows; r++)
            for_channels<T>(width, [&](long c, int n) FASTGPT_LAMBDA { each(r, from + c, n); });
    });
}

template <class T> void gelu_forward(const Rows<const T>& x, long C, T* y) {
    for_values<T>(x.count, C, [&](long r, long c, int n) FASTGPT_LAMBDA {
        const vec<T> v = load_first(x[r] + c, n);
        store_first(y + r * C + c, v * Gate<T>(v).open, n);
    });
}

template <class T> void gelu_backward(const Rows<const T>& dy, const Rows<const T>& x, long C, T* dx) {
    for_values<T>(x.count, C, [&](long r, long c, int n) FASTGPT_LAMBDA {
        constexpr T slope = T(2 * 0.7978845608028654), square = slope * T(3 * 0.044715);
        const vec<T> v = load_first(x[r] + c, n);
        const Gate<T> s(v);
        const vec<T> change = s.open * s.shut * (broadcast(slope) + broadcast(square) * v * v);
        store_first(dx + r * C + c, load_first(dy[r] + c, n) * (s.open + v * change), n);
    });
}
