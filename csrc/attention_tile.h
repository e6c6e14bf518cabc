// A tile of attention, that is a block of scores: which queries and keys it has and which of them see each other. And
// what else attention.h shares with its engines.
//
// Compiled once per instruction set (all_kernels.h).

constexpr int NQ = 96, NK = 64; // NQ is a multiple of NV * VL for every instruction set, NK of MR and VL
static_assert(NQ % (NV * VL<float>) == 0 && NK % MR == 0 && NK % VL<float> == 0);

// Queries q0 .. q0 + n - 1 (columns) and keys k0 .. k0 + keys - 1 (rows).
template <class T> struct Tile {
    int64_t q0, k0;
    int lanes; // queries, up to a whole register
    int rows;  // keys, up to a whole MR
    int keys;

    FASTGPT_INLINE Tile(int64_t q0, int n, int64_t k0, int64_t k_end)
        : q0(q0), k0(k0), lanes(int(round_up(n, VL<T>))), keys(int(min<int64_t>(k_end - k0, NK))) {
        rows = int(round_up(keys, MR));
    }
    // Rows that any query before column `end` sees.
    FASTGPT_INLINE int visible(int end) const {
        return int(min<int64_t>(round_up(max<int64_t>(q0 + end - k0, 0), MR), rows));
    }
    // step(row, rows, c): `rows` rows from `row` on, columns c .. end - 1. A full tile is one call; a tile on the
    // diagonal is one call per register of queries, each starting at the first key that the previous one could not see.
    template <class Step> FASTGPT_INLINE void for_each_causal_block(int c, int end, const Step& step) const {
        for (int row = 0; c < end; c += VL<T>) {
            const int row_end = visible(c + VL<T>);
            if (row_end > row) step(row, row_end - row, c);
            row = row_end;
        }
    }
    // Do the queries of the register at column c see no key outside this tile?
    FASTGPT_INLINE bool has_all_keys_of(int c) const { return k0 == 0 && q0 + c + VL<T> <= NK; }
    FASTGPT_INLINE bool on_diagonal() const { return k0 + rows > q0 + 1; }
    // S = -inf where the key comes after the query.
    FASTGPT_NOINLINE void mask(T* S, int64_t ld) const {
        for (int64_t j = max<int64_t>(q0 + 1 - k0, 0); j < rows; j++) {
            const int64_t end = min<int64_t>(k0 + j - q0, lanes);
            for (int64_t i = 0; i < end; i++) S[j * ld + i] = -__builtin_inf();
        }
    }
};

// The scale of the scores, folded into Q, for softmax in base 2.
template <class T> FASTGPT_INLINE T base2_scale(int64_t D) { return T(log2e / __builtin_sqrt(double(D))); }

// The rows of one head in q, k, v or dout.
template <class T> struct HeadRows {
    const T* data;
    int64_t ld;
    FASTGPT_INLINE const T* operator()(int64_t i) const { return data + i * ld; }
};

// What attention asks of an engine (matmul.h): its matrix products, and the copies of Q, K, V and dO that they read.
// S, P, dP and dS have a row per key and a column per query. A method that returns bool tells whether the engine can
// take the values; if not, Fma's does it again. attention_fma.h has each method's formula.
template <class Engine> class AttentionEngine;
