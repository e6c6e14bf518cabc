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
// MR x NV accumulators stay in registers for the whole loop over k: 4 x 3 with AVX2's 16 registers, 8 x 3 with the 32
// of AVX-512. That is enough independent additions to keep two FMA units busy, and each loaded value is used MR or NV
// times (the names are those of BLIS, Van Zee and van de Geijn 2015).

constexpr int MR = FASTGPT_MR, NV = FASTGPT_NV;

// Where the microkernel finds A: at(i, k) is row i, term k of a block of MR rows; below(), the next MR rows.
template <class T> struct RowsOf { // rows as they lie in memory, `stride` values apart
    const T* data;
    long stride;
    FASTGPT_INLINE T at(long i, long k) const { return data[i * stride + k]; }
    FASTGPT_INLINE RowsOf below() const { return {data + MR * stride, stride}; }
};
template <class T> struct StripsOf { // strips of MR rows, term by term: read from front to back; `strip` values apart
    const T* data;
    long strip;
    FASTGPT_INLINE T at(long i, long k) const { return data[k * MR + i]; }
    FASTGPT_INLINE StripsOf below() const { return {data + strip, strip}; }
};

template <class T, int ROWS, int VECS, bool ACCUMULATE, class Left>
FASTGPT_INLINE void microkernel(long K, const Left& A, const T* B, long b_row, T* C, long c_row) {
    vec<T> c[ROWS][VECS] = {};
    for (long k = 0; k < K; k++) {
        vec<T> b[VECS];
#pragma GCC unroll 8
        for (int j = 0; j < VECS; j++) b[j] = load(B + k * b_row + j * VL<T>);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const vec<T> a = broadcast(A.at(i, k));
#pragma GCC unroll 8
            for (int j = 0; j < VECS; j++) c[i][j] += a * b[j];
        }
    }
    // What C held is added last: K terms and then one sum round less than one long chain over all calls.
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECS; j++) {
            T* to = C + i * c_row + j * VL<T>;
            store(to, ACCUMULATE ? load(to) + c[i][j] : c[i][j]);
        }
}

// The same for M rows (a multiple of MR) and `vectors` <= NV registers.
template <class T, bool ACCUMULATE, class Left>
FASTGPT_NOINLINE void panel_product(int M, int vectors, long K, Left A, const T* B, long b_row, T* C, long c_row) {
    static_assert(NV == 2 || NV == 3, "one case for each possible number of registers");
    for (int m = 0; m < M; m += MR, A = A.below(), C += MR * c_row) {
        if (vectors == NV) microkernel<T, MR, NV, ACCUMULATE>(K, A, B, b_row, C, c_row);
        else if (vectors == 2) microkernel<T, MR, 2, ACCUMULATE>(K, A, B, b_row, C, c_row);
        else microkernel<T, MR, 1, ACCUMULATE>(K, A, B, b_row, C, c_row);
    }
}

// Copies that make strips, `strip` values apart; values behind the last row become zero, up to a whole strip.
template <class T> struct StripWriter {
    T* to;
    long strip;
    // The register v holds term k of rows m, m + 1, ...; m is a multiple of VL.
    FASTGPT_INLINE void operator()(long k, long m, vec<T> v) const {
        constexpr int piece = MR < VL<T> ? MR : VL<T>;
        T values[VL<T>];
        store(values, v);
#pragma GCC unroll 4
        for (int i = 0; i < VL<T>; i += piece)
            __builtin_memcpy(to + (m + i) / MR * strip + k * MR + (m + i) % MR, values + i, piece * sizeof(T));
    }
    // The rest of the last strip, where a register is less than a strip.
    FASTGPT_INLINE void end(long rows, long terms) const {
        for (long m = round_up(rows, VL<T>); m < round_up(rows, MR); m += VL<T>)
            for (long k = 0; k < terms; k++) (*this)(k, m, vec<T>{});
    }
};

// line(m) holds all terms of row m.
template <class T, class Line>
FASTGPT_INLINE void strips_from_rows(long rows, long terms, const Line& line, T* to, long strip) {
    const StripWriter<T> put{to, strip};
    for_columns<T>(rows, terms, line, put);
    put.end(rows, terms);
}

// line(k) holds term k of all rows.
template <class T, class Line>
FASTGPT_INLINE void strips_from_terms(long rows, long terms, const Line& line, T* to, long strip) {
    constexpr long some = 64; // values of a line at a time
    const StripWriter<T> put{to, strip};
    for (long m = 0; m < rows; m += some)
        for (long k = 0; k < terms; k++) {
            const T* from = line(k) + m;
            for_channels<T>(rows - m < some ? rows - m : some,
                            [&](long i, int n) FASTGPT_LAMBDA { put(k, m + i, load_first(from + i, n)); });
        }
    put.end(rows, terms);
}

// How a row of `vectors` registers is cut into panels of at most NV: as evenly as can be, 4 = 2 + 2 and not 3 + 1.
struct Panels {
    int left, vectors = 0, begin = 0; // the panel at hand: first register, number of registers
    explicit Panels(int total) : left(total) {}
    bool next() {
        begin += vectors;
        if (left == 0) return false;
        const int panels = (left + NV - 1) / NV;
        vectors = (left + panels - 1) / panels;
        left -= vectors;
        return true;
    }
};

// The same for any number of registers.
template <class T, bool ACCUMULATE, class Left>
FASTGPT_INLINE void product(int M, int vectors, long K, const Left& A, const T* B, long b_row, T* C, long c_row) {
    for (Panels p(vectors); p.next();)
        panel_product<T, ACCUMULATE>(M, p.vectors, K, A, B + p.begin * VL<T>, b_row, C + p.begin * VL<T>, c_row);
}
