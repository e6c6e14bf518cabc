// Attention's matrix products on AMX: what attention_fma.h does, with each operand split into AMX tiles (matmul_amx.h).
//
// K, V and a block's queries are split once; P and dS, which are computed tile by tile, are split there. The sums go
// straight to where they are wanted: S, dP, O^T, dQ^T, dK and dV.
//
// Compiled once per instruction set (all_kernels.h).

template <int PARTS> class AttentionEngine<AmxTiles<PARTS>> {
    using Tiles = AmxTiles<PARTS>;

  public:
    static constexpr int NR = Tiles::NR, row_unit = Tiles::MR;

    static int padded(int64_t D) { return int(round_up(D, 32)); }

    // Floats, for at most `keys` keys; the forward needs no more than queries, K, V, Q and NR columns of P.
    static int64_t forward_size(int64_t keys, int64_t D) {
        return NQ * D + 2 * packed_size(round_up(keys, NK), D) + packed_size(NQ, D) + packed_size(NK, NR);
    }
    static int64_t backward_size(int64_t keys, int64_t D) {
        return NQ * D + 3 * packed_size(round_up(keys, NK), D) + 4 * packed_size(NQ, D) + 3 * packed_size(NK, NQ);
    }
    AttentionEngine(float* memory, int64_t keys, int64_t D) : D(D), Dp(padded(D)) {
        const auto take = [&](int64_t floats) {
            float* taken = memory;
            memory += floats;
            return taken;
        };
        const int64_t of_keys = packed_size(round_up(keys, NK), D);
        const int64_t of_queries = packed_size(NQ, D);
        const int64_t of_tile = packed_size(NK, NQ);
        scaled = take(NQ * D);
        K.data = take(of_keys);
        V.data = take(of_keys);
        Q.data = take(of_queries);
        P.data = take(of_tile);
        dS.data = take(of_tile);
        dST.data = take(of_tile);
        KT.data = take(of_keys);
        dO.data = take(of_queries);
        QT.data = take(of_queries);
        dOT.data = take(of_queries);
    }

    static FASTGPT_INLINE void begin() { Tiles::begin(); }
    static FASTGPT_INLINE void end() { Tiles::end(); }

    // v as the products see it.
    static FASTGPT_INLINE vec<float> operand(vec<float> v) { return PARTS == 1 ? Tiles::to_bfloat16(v) : v; }

    // ---- forward

    bool pack_keys_and_values(int64_t new_head, int64_t n, HeadRows<float> k, HeadRows<float> v) {
        if (head == new_head && packed_keys >= n) return true;
        const bool ok = K.template from_rows<A>(k, n, D) && V.template from_columns<A>(v, D, n);
        head = ok ? new_head : -1;
        packed_keys = n;
        return ok;
    }
    bool pack_queries(HeadRows<float> q, int n) { return Q.template from_rows<B>(times_scale(q, n), n, D); }

    void scores(const Tile<float>& tile, int p, float* S) const { // S^T = K Q^T
        for (int64_t i = 0; i < tile.rows; i += 32)
            if (tile.k0 + i < tile.q0 + tile.lanes) multiply(K, tile.k0 + i, 0, Q, p, 0, D, S + i * NR, NR, false);
    }
    bool add_values(const Tile<float>& tile, const float* weights, float* OT) { // O^T += V^T P^T
        const int64_t keys = round_up(tile.rows, 32);
        if (!P.template from_columns<B>({weights, NR}, NR, keys)) return false;
        for (int64_t d = 0; d < Dp; d += 32) multiply(V, d, tile.k0, P, 0, 0, keys, OT + d * NR, NR, true);
        return true;
    }

    // ---- backward: K and V of a range of keys; `j` counts from its first

    bool pack_range(int64_t n, HeadRows<float> k, HeadRows<float> v) {
        return K.template from_rows<A>(k, n, D) && V.template from_rows<A>(v, n, D) &&
               KT.template from_columns<A>(k, D, n);
    }
    bool pack_queries_and_gradients(HeadRows<float> q, HeadRows<float> dout, int n) {
        return Q.template from_rows<B>(times_scale(q, n), n, D) && dO.template from_rows<B>(dout, n, D) &&
               QT.template from_columns<B>(q, D, n) && dOT.template from_columns<B>(dout, D, n);
    }
    void scores_and_gradients(const Tile<float>& tile, int64_t j, float* S, float* dP) const {
        for (int64_t i = 0; i < tile.rows; i += 32)
            for (int64_t q = 0; q < tile.lanes; q += 32)
                if (tile.k0 + i < tile.q0 + q + 32) {
                    multiply(K, j + i, 0, Q, q, 0, D, S + i * NQ + q, NQ, false);
                    multiply(V, j + i, 0, dO, q, 0, D, dP + i * NQ + q, NQ, false);
                }
    }
    bool add_gradients(const Tile<float>& tile, int64_t j, int n, const float* weights, const float* dscores, float* dV,
                       float* dK, float* dQT) {
        const int64_t keys = round_up(tile.rows, 32);
        if (!P.template from_rows<A>({weights, NQ}, keys, n) || !dS.template from_rows<A>({dscores, NQ}, keys, n) ||
            !dST.template from_columns<B>({dscores, NQ}, n, keys))
            return false;
        for (int64_t i = 0; i < keys; i += 32) {
            const int64_t first = max<int64_t>(tile.k0 + i - tile.q0, 0) / 32 * 32; // query that sees one of these keys
            for (int64_t d = 0; d < Dp && first < n; d += 32) {
                multiply(P, i, first, dOT, d, first, n - first, dV + (j + i) * Dp + d, Dp, true);
                multiply(dS, i, first, QT, d, first, n - first, dK + (j + i) * Dp + d, Dp, true);
            }
        }
        for (int64_t q = 0; q < n; q += 32) {
            const int64_t seen = min(tile.q0 + q + 32 - tile.k0, keys);
            for (int64_t d = 0; d < Dp && seen > 0; d += 32)
                multiply(KT, d, j, dST, q, 0, seen, dQT + d * NQ + q, NQ, true);
        }
        return true;
    }

  private:
    static constexpr bool A = false, B = true; // Tiles::pack's OF_B: the side of a product that a matrix is on

    // Floats of `count` rows or columns, `depth` long, in its parts.
    static int64_t packed_size(int64_t count, int64_t depth) {
        return round_up(count, 32) * round_up(depth, 32) * Tiles::bytes / 4;
    }

    // `count` rows (of A) or columns (of B), `depth` long, as AMX tiles.
    struct Packed {
        float* data = nullptr;
        int64_t depth = 0;

        // x(i) is row or column i; or x(k) is element k of all of them. -> has every value its parts?
        template <bool SIDE> bool from_rows(HeadRows<float> x, int64_t count, int64_t depth_) {
            depth = depth_;
            const auto rows = Rows<const float>::contiguous(x.data, count, x.ld);
            return Tiles::template pack<SIDE>(rows, false, 0, count, 0, depth, data);
        }
        template <bool SIDE> bool from_columns(HeadRows<float> x, int64_t count, int64_t depth_) {
            depth = depth_;
            const auto rows = Rows<const float>::contiguous(x.data, depth, x.ld);
            return Tiles::template pack<SIDE>(rows, true, 0, count, 0, depth, data);
        }
        // The AMX tiles of row or column i from k on, both multiples of 32.
        FASTGPT_INLINE const float* at(int64_t i, int64_t k) const {
            return data + (i * round_up(depth, 32) + k * 32) * Tiles::bytes / 4;
        }
    };

    // C (32, 32) = or += 32 rows of x from i on, times 32 columns of y from j on; `depth` from k_x and k_y on.
    static FASTGPT_INLINE void multiply(const Packed& x, int64_t i, int64_t k_x, const Packed& y, int64_t j,
                                        int64_t k_y, int64_t depth, float* C, int64_t ldc, bool accumulate) {
        Tiles::multiply(depth, x.at(i, k_x), y.at(j, k_y), NR, C, ldc, accumulate);
    }

    HeadRows<float> times_scale(HeadRows<float> q, int n) const {
        const float scale = base2_scale<float>(D);
        for (int64_t i = 0; i < n; i++)
            for (int64_t d = 0; d < D; d++) scaled[i * D + d] = q(i)[d] * scale;
        return {scaled, D};
    }

    const int64_t D, Dp;
    int64_t head = -1, packed_keys = 0;
    float* scaled;                               // queries
    Packed K, V, Q, P, dS, dST, KT, dO, QT, dOT; // T: the other order, for products over keys or queries
};
