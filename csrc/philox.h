// Which attention weights dropout keeps: gpt.py's dropout_mask, computed tile by tile where it is needed.
//
// Philox4x32-10 (Salmon et al. 2011): ten rounds of two 32 x 32 -> 64 bit products turn a counter into four random
// words. The counter is (query, key / 4, head, 0), so the mask of any tile can be computed in any order, by any thread,
// in the forward and again in the backward, and is never stored.
//
// Compiled once per instruction set (all_kernels.h).

// keep[j][i] = 1 / (1 - dropout) or 0, for keys k0 + j, j < keys, and queries q0 + i, i < NQ; rows are NQ long.
// k0 is a multiple of 4; rows up to the next multiple of 4 are written.
template <class T, int NQ> FASTGPT_NOINLINE void dropout_tile(double dropout, uint64_t seed, int64_t head, int64_t q0,
                                                              int64_t k0, int keys, T* keep) {
    const uint64_t threshold = uint64_t(__builtin_nearbyint(dropout * 4294967296.0));
    const T scale = T(1 / (1 - dropout));
    for (int j = 0; j < keys; j += 4) {
        uint32_t c[4][NQ];
        for (int i = 0; i < NQ; i++) {
            c[0][i] = uint32_t(q0 + i);
            c[1][i] = uint32_t((k0 + j) / 4);
            c[2][i] = uint32_t(head);
            c[3][i] = 0;
        }
        uint32_t key0 = uint32_t(seed);
        uint32_t key1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; round++) {
            for (int i = 0; i < NQ; i++) {
                const uint64_t p0 = uint64_t(c[0][i]) * 0xD2511F53u;
                const uint64_t p1 = uint64_t(c[2][i]) * 0xCD9E8D57u;
                c[0][i] = uint32_t(p1 >> 32) ^ c[1][i] ^ key0;
                c[1][i] = uint32_t(p1);
                c[2][i] = uint32_t(p0 >> 32) ^ c[3][i] ^ key1;
                c[3][i] = uint32_t(p0);
            }
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        for (int word = 0; word < 4; word++)
            for (int i = 0; i < NQ; i++) keep[(j + word) * NQ + i] = c[word][i] >= threshold ? scale : T(0);
    }
}

// The factor of one weight: 1 / (1 - dropout) or 0.
template <class T>
FASTGPT_NOINLINE T dropout_factor(double dropout, uint64_t seed, int64_t head, int64_t query, int64_t key) {
    T keep[4];
    dropout_tile<T, 1>(dropout, seed, head, query, key / 4 * 4, 4, keep);
    return keep[key % 4];
}
