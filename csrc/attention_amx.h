// Attention's matrix products on AMX: what FmaAttention (attention.h) does, with each operand split into tiles (amx.h).
//
// K, V and a block's queries are split once; P and dS, which are made tile by tile, are split where they are made. The
// sums go straight to where they are wanted: S, dP, O^T, dQ^T, dK and dV.

class AmxAttention {
  public:
    static constexpr int NR = Amx::NR, row_unit = Amx::MR;

    static int padded(long D) { return int(round_up(D, 32)); }
    static long forward_size(long keys, long D) {
        return 2 * tiles(round_up(keys, NK), D) + tiles(NQ, D) + tiles(NK, NR) + NQ * D;
    }
    static long backward_size(long keys, long D) {
        return 3 * tiles(round_up(keys, NK), D) + 4 * tiles(NQ, D) + 3 * tiles(NK, NQ) + NQ * D;
    }
    static FASTGPT_INLINE void begin() { Amx::begin(); }
    static FASTGPT_INLINE void end() { Amx::end(); }

    AmxAttention(float* memory, long keys, long D) : D(D), Dp(padded(D)) {
        const auto take = [&](long floats) { return memory += floats, memory - floats; };
        const long all = tiles(round_up(keys, NK), D);
        scaled = take(NQ * D);
        K.data = take(all), V.data = take(all), Q.data = take(tiles(NQ, D));
        P.data = take(tiles(NK, NQ)); // of the forward only tiles(NK, NR), and nothing behind
        dS.data = take(tiles(NK, NQ)), dST.data = take(tiles(NK, NQ));
        KT.data = take(all), G.data = take(tiles(NQ, D)), QT.data = take(tiles(NQ, D)), GT.data = take(tiles(NQ, D));
    }

    // ---- forward

    bool keys_and_values(long new_head, long n, HeadRows<float> k, HeadRows<float> v) {
        if (head == new_head && filled >= n) return true;
        const bool good = K.from_rows<A>(k, n, D) && V.from_terms<A>(v, D, n);
        head = good ? new_head : -1, filled = n;
        return good;
    }
    bool queries(HeadRows<float> q, int n) { return Q.from_rows<B>(times_scale(q, n), n, D); }

    void scores(const Tile<float>& tile, int p, float* S) const { // S^T = K Q^T
        for (long i = 0; i < tile.rows; i += 32)
            if (tile.k0 + i < tile.q0 + tile.lanes) multiply(K, tile.k0 + i, 0, Q, p, 0, D, S + i * NR, NR, false);
    }
    bool add_values(const Tile<float>& tile, const float* weights, float* O) { // O^T += V^T P^T
        const long keys = round_up(tile.rows, 32);
        if (!P.from_terms<B>({weights, NR}, NR, keys)) return false;
        for (long d = 0; d < Dp; d += 32) multiply(V, d, tile.k0, P, 0, 0, keys, O + d * NR, NR, true);
        return true;
    }

    // ---- backward

    bool range(long n, HeadRows<float> k, HeadRows<float> v) {
        return K.from_rows<A>(k, n, D) && V.from_rows<A>(v, n, D) && KT.from_terms<A>(k, D, n);
    }
    bool queries_and_gradients(HeadRows<float> q, HeadRows<float> g, int n) {
        return Q.from_rows<B>(times_scale(q, n), n, D) && G.from_rows<B>(g, n, D) && QT.from_terms<B>(q, D, n) &&
               GT.from_terms<B>(g, D, n);
    }
    void scores_and_gradients(const Tile<float>& tile, long j, float* S, float* dP) const {
        for (long i = 0; i < tile.rows; i += 32)
            for (long q = 0; q < tile.lanes; q += 32)
                if (tile.k0 + i < tile.q0 + q + 32) {
                    multiply(K, j + i, 0, Q, q, 0, D, S + i * NQ + q, NQ, false);
                    multiply(V, j + i, 0, G, q, 0, D, dP + i * NQ + q, NQ, false);
                }
    }
    bool add_gradients(const Tile<float>& tile, long j, int n, const float* weights, const float* dscores, float* dV,
                       float* dK, float* dQT) {
        const long keys = round_up(tile.rows, 32);
        if (!P.from_rows<A>({weights, NQ}, keys, n) || !dS.from_rows<A>({dscores, NQ}, keys, n) ||
            !dST.from_terms<B>({dscores, NQ}, n, keys))
            return false;
        for (long i = 0; i < keys; i += 32) {
            const long before = tile.k0 + i - tile.q0, first = before > 0 ? before / 32 * 32 : 0; // they see nothing
            for (long d = 0; d < Dp && first < n; d += 32) {
                multiply(P, i, first, GT, d, first, n - first, dV + (j + i) * Dp + d, Dp, true);
                multiply(dS, i, first, QT, d, first, n - first, dK + (j + i) * Dp + d, Dp, true);
            }
        }
        for (long q = 0; q < n; q += 32) {
            const long until = tile.q0 + q + 32 - tile.k0, seen = until < keys ? until : keys;
            for (long d = 0; d < Dp && seen > 0; d += 32)
                multiply(KT, d, j, dST, q, 0, seen, dQT + d * NQ + q, NQ, true);
        }
        return true;
    }

  private:
    static constexpr bool A = false, B = true; // the side of a product that a matrix is on

    // Floats that the tiles of a matrix take.
    static long tiles(long count, long terms) { return round_up(count, 32) * round_up(terms, 32) * Amx::bytes / 4; }

    // `count` rows (of A) or columns (of B), `terms` long, as tiles.
    struct Split {
        float* data = nullptr;
        long terms = 0;

        // x(i) is row or column i; or x(i) is term i of all. -> has every value a split?
        template <bool SIDE> bool from_rows(HeadRows<float> x, long count, long terms_) {
            terms = terms_;
            return Amx::pack<SIDE>(Rows<const float>::contiguous(x.data, count, x.stride), false, 0, count, 0, terms,
                                   data);
        }
        template <bool SIDE> bool from_terms(HeadRows<float> x, long count, long terms_) {
            terms = terms_;
            return Amx::pack<SIDE>(Rows<const float>::contiguous(x.data, terms, x.stride), true, 0, count, 0, terms,
                                   data);
        }
        // The tiles of row or column i and term k, both multiples of 32.
        FASTGPT_INLINE const float* at(long i, long k) const {
            return data + (i * round_up(terms, 32) + k * 32) * Amx::bytes / 4;
        }
    };

    // to (32, 32) = or += 32 rows of x from i on, times 32 columns of y from j on; `count` terms from k_x and k_y on.
    static FASTGPT_INLINE void multiply(const Split& x, long i, long k_x, const Split& y, long j, long k_y, long count,
                                        float* to, long line, bool add) {
        Amx::tile(count, x.at(i, k_x), y.at(j, k_y), NR, to, line, add);
    }

    HeadRows<float> times_scale(HeadRows<float> q, int n) const {
        const float scale = base2_scale<float>(D);
        for (long i = 0; i < n; i++)
            for (long d = 0; d < D; d++) scaled[i * D + d] = q(i)[d] * scale;
        return {scaled, D};
    }

    const long D, Dp;
    long head = -1, filled = 0;
    float* scaled;
    Split K, V, Q, P, dS, dST, KT, G, QT, GT; // T: the other order, for products over keys or queries
};
