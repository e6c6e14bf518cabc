// C (+)= A B for a block of C that fits in registers: the one inner loop that all matrix products here share.
//
//            NV registers of VL values
//          +--------+--------+--------+
//     B[k] |   b0   |   b1   |   b2   |        one row of B, loaded once per k
//          +--------+--------+--------+
//   A[0,k] | c[0,0] | c[0,1] | c[0,2] |
//   A[1,k] | c[1,0] |  ...   |        |        MR rows: one value of A is broadcast
//     ...  |        |        |        |        and multiplied with all of B[k]
//          +--------+--------+--------+
//
// This register block of MR x NV accumulators stays for the whole loop over k: 4 x 3 with AVX2's 16 registers, 8 x 3
// with the 32 of AVX-512. That is enough independent additions to keep two FMA units busy, and each loaded value is
// used MR or NV times (the names are those of BLIS, Van Zee and van de Geijn 2015).
//
// A and B hold values of T, or of X where that is not T: pairs of bfloat16 (bfloat16.h), of which a lane of C takes
// both products at once, so that k counts pairs.
//
// Compiled once per instruction set (all_kernels.h).

constexpr int MR = FASTGPT_MR, NV = FASTGPT_NV;

// Where the microkernel finds A: at(i, k) is row i, column k of a group of MR rows; next(), the next MR rows.
template <class T> struct UnpackedA { // rows as they lie in memory
    const T* data;
    int64_t lda;
    FASTGPT_INLINE T at(int64_t i, int64_t k) const { return data[i * lda + k]; }
    FASTGPT_INLINE UnpackedA next() const { return {data + MR * lda, lda}; }
};
template <class T> struct PackedA { // micro-panels (packing.h), `stride` values apart
    const T* data;
    int64_t stride;
    FASTGPT_INLINE T at(int64_t i, int64_t k) const { return data[k * MR + i]; }
    FASTGPT_INLINE PackedA next() const { return {data + stride, stride}; }
};

FASTGPT_INLINE void multiply_add(vec<float>& c, vec<float> a, vec<float> b) { c += a * b; }
FASTGPT_INLINE void multiply_add(vec<double>& c, vec<double> a, vec<double> b) { c += a * b; }

template <class T, int VECTORS, bool ACCUMULATE, class MatrixA, class X>
FASTGPT_INLINE void microkernel(int64_t K, const MatrixA& A, const X* B, int64_t ldb, T* C, int64_t ldc) {
    vec<T> c[MR][VECTORS] = {};
    for (int64_t k = 0; k < K; k++) {
        vec<X> b[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) b[j] = load(B + k * ldb + j * VL<X>);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            const vec<X> a = broadcast(A.at(i, k));
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) multiply_add(c[i][j], a, b[j]);
        }
    }
    // What C held is added last: K products and then one sum round less than one long chain over all calls.
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < VECTORS; j++) {
            T* to = C + i * ldc + j * VL<T>;
            store(to, ACCUMULATE ? load(to) + c[i][j] : c[i][j]);
        }
}

// The same for M rows (a multiple of MR) and `vectors` <= NV registers.
template <class T, bool ACCUMULATE, class MatrixA, class X> FASTGPT_NOINLINE void
panel_product(int M, int vectors, int64_t K, MatrixA A, const X* B, int64_t ldb, T* C, int64_t ldc) {
    static_assert(NV == 2 || NV == 3, "one case for each possible number of registers");
    for (int m = 0; m < M; m += MR) {
        if (vectors == NV) microkernel<T, NV, ACCUMULATE>(K, A, B, ldb, C, ldc);
        else if (vectors == 2) microkernel<T, 2, ACCUMULATE>(K, A, B, ldb, C, ldc);
        else microkernel<T, 1, ACCUMULATE>(K, A, B, ldb, C, ldc);
        A = A.next();
        C += MR * ldc;
    }
}

// How a row of `vectors` registers is cut into panels of at most NV: as evenly as can be, 4 = 2 + 2 and not 3 + 1.
struct Panels {
    int left;
    int vectors = 0; // of the panel at hand
    int begin = 0;   // its first register
    explicit Panels(int total) : left(total) {}
    bool next() {
        begin += vectors;
        if (left == 0) return false;
        vectors = int(ceil_div(left, ceil_div(left, NV)));
        left -= vectors;
        return true;
    }
};

// The same for any number of registers.
template <class T, bool ACCUMULATE, class MatrixA, class X> FASTGPT_INLINE void
block_product(int M, int vectors, int64_t K, const MatrixA& A, const X* B, int64_t ldb, T* C, int64_t ldc) {
    for (Panels p(vectors); p.next();)
        panel_product<T, ACCUMULATE>(M, p.vectors, K, A, B + p.begin * VL<T>, ldb, C + p.begin * VL<T>, ldc);
}
