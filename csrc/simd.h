// One SIMD register as a GNU vector type: load, store, broadcast, exp2, reduce, transpose. And the helpers of all
// kernels: min, max, ceil_div, round_up, log2e.
//
// GCC and clang lower the same operators to SSE2, AVX2, AVX-512 or NEON. Everything is written once for T = float and
// T = double; a register holds VL values of T.
//
// Compiled once per instruction set (all_kernels.h).

constexpr int vector_bytes = FASTGPT_VECTOR_BYTES;

template <class T> struct simd;
template <> struct simd<float> {
    typedef float vec __attribute__((vector_size(vector_bytes)));
    typedef int32_t mask __attribute__((vector_size(vector_bytes)));
    typedef uint32_t bits __attribute__((vector_size(vector_bytes)));
};
template <> struct simd<uint16_t> {
    typedef uint16_t vec __attribute__((vector_size(vector_bytes)));
    typedef int16_t mask __attribute__((vector_size(vector_bytes)));
};
template <> struct simd<uint32_t> {
    typedef uint32_t vec __attribute__((vector_size(vector_bytes)));
    typedef int32_t mask __attribute__((vector_size(vector_bytes)));
};
template <> struct simd<double> {
    typedef double vec __attribute__((vector_size(vector_bytes)));
    typedef int64_t mask __attribute__((vector_size(vector_bytes)));
};

template <class T> using vec = typename simd<T>::vec;
template <class T> using mask = typename simd<T>::mask;
template <class T> constexpr int VL = vector_bytes / sizeof(T);

template <class T> constexpr T max_finite = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);
// How many values along a product's depth k one X holds, and how many X hold K of them: bfloat16.h has two in one.
template <class X> constexpr int per = 1;

constexpr double log2e = 1.4426950408889634;

// Of numbers, or lane by lane. A NaN in b stays: every comparison with it is false.
template <class V> FASTGPT_INLINE constexpr V min(V a, V b) { return a < b ? a : b; }
template <class V> FASTGPT_INLINE constexpr V max(V a, V b) { return a > b ? a : b; }

FASTGPT_INLINE constexpr int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
FASTGPT_INLINE constexpr int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
template <class X> FASTGPT_INLINE constexpr int64_t depth(int64_t K) { return ceil_div(K, per<X>); }

template <class T> FASTGPT_INLINE vec<T> load(const T* p) { // unaligned
    vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class T> FASTGPT_INLINE void store(T* p, vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T> FASTGPT_INLINE vec<T> load_first(const T* p, int n) { // the first n lanes; zero past them
    vec<T> v{};
    if (n >= VL<T>) return load(p);
    for (int i = 0; i < VL<T>; i++) v[i] = i < n ? p[i] : T(0);
    return v;
}

template <class T> FASTGPT_INLINE void store_first(T* p, vec<T> v, int n) {
    if (n >= VL<T>) return store(p, v);
    for (int i = 0; i < VL<T>; i++)
        if (i < n) p[i] = v[i];
}

// step(c, n) for all of C values, n = VL at a time and what is left over at the end.
template <class T, class Step> FASTGPT_INLINE void for_channels(int64_t C, const Step& step) {
    int64_t c = 0;
    for (; c + VL<T> <= C; c += VL<T>) step(c, VL<T>);
    if (c < C) step(c, int(C - c));
}

// x - {} and not {} + x: 0 + x must turn -0 into 0, so GCC would emit a real addition for every broadcast.
template <class T> FASTGPT_INLINE vec<T> broadcast(T x) { return x - vec<T>{}; }

// v, rounded to T here and now: the compiler may not fuse what computed it with what uses it.
template <class T> FASTGPT_INLINE vec<T> rounded(vec<T> v) {
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
    return v;
}

template <class T> FASTGPT_INLINE bool any(mask<T> m) {
    int64_t words[vector_bytes / 8];
    int64_t all = 0;
    __builtin_memcpy(words, &m, sizeof m);
    for (int64_t word : words) all |= word;
    return all != 0;
}

// 2^x to 7.9e-8 relative (0.66 of a float's half unit), 0 below x = -127. NaN stays NaN.
//
// x = z + f with z whole and |f| <= 1/2. Adding 1.5 * 2^23 rounds x to z, leaves z in the low bits of the float, and
// 2^z is then an addition to the exponent bits of 2^f. 2^f = 1 + f g(f), g minimax for the relative error
// (2.0e-9 before rounding). With the constant exactly 1 the lower clamp gives exactly 0, so that masked keys weigh
// nothing.
FASTGPT_INLINE vec<float> exp2(vec<float> x) {
    const vec<float> magic = broadcast(12582912.0f);
    x = max(broadcast(-127.0f), x);
    vec<float> z = x + magic;
    const vec<float> f = x - (z - magic);
    vec<float> p = broadcast(1.53533620e-4f) * f + broadcast(1.33988739e-3f);
    p = p * f + broadcast(9.61843692e-3f);
    p = p * f + broadcast(5.55033237e-2f);
    p = p * f + broadcast(2.40226477e-1f);
    p = p * f + broadcast(6.93147182e-1f);
    p = p * f + broadcast(1.0f);
    simd<float>::bits bits, shift;
    __builtin_memcpy(&bits, &p, sizeof p);
    __builtin_memcpy(&shift, &z, sizeof z);
    bits += shift << 23; // magic's own exponent leaves at the top
    __builtin_memcpy(&p, &bits, sizeof p);
    return p;
}

FASTGPT_INLINE vec<double> exp2(vec<double> x) {
    for (int i = 0; i < VL<double>; i++) x[i] = __builtin_exp2(x[i]);
    return x;
}

// Lane i of the result is lane Pick::from(i) of a, or lane Pick::from(i) - VL of b. The choice is part of the type:
// only from constants does GCC make one instruction of it.
template <class Pick, class T, int... I>
FASTGPT_INLINE vec<T> shuffle(vec<T> a, vec<T> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Pick::from(I)...);
#else
    return __builtin_shuffle(a, b, mask<T>{Pick::from(I)...});
#endif
}

template <class Pick, class T> FASTGPT_INLINE vec<T> shuffle(vec<T> a, vec<T> b) {
    return shuffle<Pick, T>(a, b, std::make_integer_sequence<int, VL<T>>{});
}

// Sum of all lanes, always in the same order: halves onto each other.
template <int HALF> struct OtherHalf {
    static constexpr int from(int i) { return i ^ HALF; }
};
template <class T, int HALF = VL<T> / 2> FASTGPT_INLINE T sum(vec<T> v) {
    v += shuffle<OtherHalf<HALF>, T>(v, v);
    if constexpr (HALF > 1) return sum<T, HALF / 2>(v);
    else return v[0];
}

// VL registers, the rows of a matrix, become its columns: in step s, the lanes with bit s swap places with the rows
// with bit s. log2(VL) steps of VL two-register shuffles.
template <int N, int S> struct FirstRow {
    static constexpr int from(int i) { return i & S ? N + i - S : i; }
};
template <int N, int S> struct SecondRow {
    static constexpr int from(int i) { return i & S ? N + i : i + S; }
};
template <class T, int S = 1> FASTGPT_INLINE void transpose_registers(vec<T> (&v)[VL<T>]) {
#pragma GCC unroll 16
    for (int row = 0; row < VL<T>; row++)
        if (!(row & S)) {
            const vec<T> a = v[row];
            const vec<T> b = v[row + S];
            v[row] = shuffle<FirstRow<VL<T>, S>, T>(a, b);
            v[row + S] = shuffle<SecondRow<VL<T>, S>, T>(a, b);
        }
    if constexpr (2 * S < VL<T>) transpose_registers<T, 2 * S>(v);
}
