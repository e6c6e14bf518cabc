// One SIMD register as a GNU vector type: load, store, broadcast, exp2, reduce, transpose.
//
// No include guard: dispatch.cpp includes this file once per instruction set, each time inside another namespace, with
// FASTGPT_VECTOR_BYTES = the width of a register
// FASTGPT_MR, FASTGPT_NV = rows and registers per row of the microkernel's block of accumulators
// GCC and clang lower the same operators to SSE2, AVX2, AVX-512 or NEON. Everything is written once for T = float and
// T = double; a register holds VL values of T.

constexpr int vector_bytes = FASTGPT_VECTOR_BYTES;

template <class T> struct simd;
template <> struct simd<float> {
    typedef float vec __attribute__((vector_size(vector_bytes)));
    typedef int32_t mask __attribute__((vector_size(vector_bytes)));
    typedef uint32_t bits __attribute__((vector_size(vector_bytes)));
};
template <> struct simd<double> {
    typedef double vec __attribute__((vector_size(vector_bytes)));
    typedef int64_t mask __attribute__((vector_size(vector_bytes)));
};

template <class T> using vec = typename simd<T>::vec;
template <class T> using mask = typename simd<T>::mask;
template <class T> constexpr int VL = vector_bytes / sizeof(T);

template <class T> FASTGPT_INLINE vec<T> load(const T* p) { // unaligned
    vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class T> FASTGPT_INLINE void store(T* p, vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T> FASTGPT_INLINE vec<T> load_first(const T* p, int n) { // the first n lanes; zero behind them
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
template <class T, class Step> FASTGPT_INLINE void for_channels(long C, const Step& step) {
    long c = 0;
    for (; c + VL<T> <= C; c += VL<T>) step(c, VL<T>);
    if (c < C) step(c, int(C - c));
}

// x - {} and not {} + x: 0 + x must turn -0 into 0, so GCC would emit a real addition for every broadcast.
template <class T> FASTGPT_INLINE vec<T> broadcast(T x) { return x - vec<T>{}; }

// Written so that a NaN in b stays: a > NaN is false.
template <class T> FASTGPT_INLINE vec<T> max(vec<T> a, vec<T> b) { return a > b ? a : b; }

template <class T> FASTGPT_INLINE bool any(mask<T> m) {
    int64_t words[vector_bytes / 8], all = 0;
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
    const vec<float> lowest = broadcast(-127.0f), magic = broadcast(12582912.0f);
    x = x < lowest ? lowest : x;
    vec<float> z = x + magic, f = x - (z - magic);
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

// lane i of the result is lane pick[i] of a, or lane pick[i] - VL of b. `pick` is known when compiled.
template <class T> FASTGPT_INLINE vec<T> shuffle(vec<T> a, vec<T> b, mask<T> pick) {
#ifdef __clang__
    vec<T> out;
    for (int i = 0; i < VL<T>; i++) out[i] = pick[i] < VL<T> ? a[pick[i]] : b[pick[i] - VL<T>];
    return out;
#else
    return __builtin_shuffle(a, b, pick);
#endif
}

// Sum of all lanes, always in the same order: halves onto each other.
template <class T> FASTGPT_INLINE T sum(vec<T> v) {
#pragma GCC unroll 8
    for (int half = VL<T> / 2; half > 0; half /= 2) {
        mask<T> pick;
        for (int i = 0; i < VL<T>; i++) pick[i] = i ^ half;
        v += shuffle<T>(v, v, pick);
    }
    return v[0];
}

// A VL x VL block of registers becomes its transpose: in step s, the lanes with bit s swap places with the rows with
// bit s. log2(VL) steps of VL two-register shuffles.
template <class T> FASTGPT_INLINE vec<T> interleave(vec<T> a, vec<T> b, int s, bool upper) {
    mask<T> pick;
    for (int i = 0; i < VL<T>; i++) {
        const bool stays = bool(i & s) == upper;
        pick[i] = upper ? (stays ? VL<T> + i : i + s) : (stays ? i : VL<T> + i - s);
    }
    return shuffle<T>(a, b, pick);
}

template <class T> FASTGPT_INLINE void transpose_block(vec<T> (&v)[VL<T>]) {
#pragma GCC unroll 8
    for (int s = 1; s < VL<T>; s *= 2)
#pragma GCC unroll 16
        for (int row = 0; row < VL<T>; row++)
            if (!(row & s)) {
                vec<T> a = v[row], b = v[row + s];
                v[row] = interleave<T>(a, b, s, false);
                v[row + s] = interleave<T>(a, b, s, true);
            }
}

// to[c][r] = from[r][c] * scale for all r < rows, c < cols; lines are from_line and to_line values apart.
// With `pad`, r runs on to the next multiple of VL and is zero there.
template <class T> FASTGPT_NOINLINE void transpose(int rows, int cols, const T* from, long from_line, T* to,
                                                   long to_line, T scale, bool pad) {
    for (int r = 0; r < rows; r += VL<T>)
        for (int c = 0; c < cols; c += VL<T>) {
            vec<T> v[VL<T>];
            const int height = rows - r < VL<T> ? rows - r : VL<T>, width = cols - c < VL<T> ? cols - c : VL<T>;
            if (height == VL<T> && width == VL<T>) {
#pragma GCC unroll 16
                for (int i = 0; i < VL<T>; i++) v[i] = load(from + (r + i) * from_line + c) * broadcast(scale);
                transpose_block<T>(v);
#pragma GCC unroll 16
                for (int i = 0; i < VL<T>; i++) store(to + (c + i) * to_line + r, v[i]);
                continue;
            }
            for (int i = 0; i < width; i++)
                for (int j = 0; j < (pad ? VL<T> : height); j++)
                    to[(c + i) * to_line + r + j] = j < height ? from[(r + j) * from_line + c + i] * scale : T(0);
        }
}
