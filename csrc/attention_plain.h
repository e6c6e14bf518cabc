// Attention of one head, as gpt.py states it: no tiles, no vectors. attention.h computes the same, fast.
//
//   S_ij = q_i . k_j / sqrt(D), and -inf for j > i        P_i = softmax(S_i)        o_i = sum_j z_ij P_ij v_j
//   dP_ij = z_ij dout_i . v_j        dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij) / sqrt(D), and 0 for j > i
//   dv_j = sum_i z_ij P_ij dout_i        dq_i = sum_j dS_ij k_j        dk_j = sum_i dS_ij q_i
//
// All sums run over all T positions, masked ones too: where a NaN or an infinity stands, 0 * NaN is NaN, and the
// results have it wherever the formula has it. So this serves for heads with such values, and is the reference of the
// tests.
//
// Compiled once per instruction set (all_kernels.h).

template <class T> struct PlainAttention {
    const AttentionShape& shape;
    Sequence<const T> qkv;
    int64_t head;
    int64_t D = shape.D, C = shape.H * D;
    int64_t b = head / shape.H, h = head % shape.H;

    FASTGPT_INLINE const T* row(int64_t t, int64_t part) const {
        return qkv.at(b, t) + part * C + h * D;
    } // 0 q, 1 k, 2 v

    static FASTGPT_INLINE T dot(const T* x, const T* y, int64_t n) {
        T sum = 0;
        for (int64_t d = 0; d < n; d++) sum += x[d] * y[d];
        return sum;
    }
    static FASTGPT_INLINE void add(T* to, T factor, const T* x, int64_t n) { // to += factor x
        for (int64_t d = 0; d < n; d++) to[d] += factor * x[d];
    }

    // P (T) of query i, and z P in `kept` (T).
    FASTGPT_NOINLINE void weights(int64_t i, T* P, T* kept) const {
        const T root = T(__builtin_sqrt(double(D)));
        T row_max = -__builtin_inf();
        T row_sum = 0;
        for (int64_t j = 0; j < shape.T; j++) {
            P[j] = j > i ? -__builtin_inf() : dot(row(i, 0), row(j, 1), D) / root;
            if (!(P[j] <= row_max) && row_max == row_max) row_max = P[j]; // a NaN is one, and stays
        }
        for (int64_t j = 0; j < shape.T; j++) {
            P[j] = T(__builtin_exp(double(P[j] - row_max)));
            row_sum += P[j];
        }
        for (int64_t j = 0; j < shape.T; j++) P[j] /= row_sum;
        for (int64_t j = 0; j < shape.T; j++)
            kept[j] = shape.dropout > 0 ? P[j] * dropout_factor<T>(shape.dropout, shape.seed, head, i, j) : P[j];
    }

    FASTGPT_NOINLINE void forward(T* P, T* out) const { // P: memory for 2 T values
        for (int64_t i = 0; i < shape.T; i++) {
            T* kept = P + shape.T;
            T* o = out + (b * shape.T + i) * C + h * D;
            weights(i, P, kept);
            for (int64_t d = 0; d < D; d++) o[d] = 0;
            for (int64_t j = 0; j < shape.T; j++) add(o, kept[j], row(j, 2), D);
        }
    }

    FASTGPT_NOINLINE void backward(T* P, Sequence<const T> dout, T* dqkv) const {
        const T root = T(__builtin_sqrt(double(D)));
        const auto gradient = [&](int64_t t, int64_t part)
                                  FASTGPT_LAMBDA { return dqkv + ((b * shape.T + t) * 3 + part) * C + h * D; };
        for (int64_t t = 0; t < shape.T; t++)
            for (int64_t part = 0; part < 3; part++)
                for (int64_t d = 0; d < D; d++) gradient(t, part)[d] = 0;
        for (int64_t i = 0; i < shape.T; i++) {
            T* kept = P + shape.T;
            T* dP = kept + shape.T;
            T mean = 0;
            const T* dout_i = dout.at(b, i) + h * D;
            weights(i, P, kept);
            for (int64_t j = 0; j < shape.T; j++) {
                add(gradient(j, 2), kept[j], dout_i, D);
                dP[j] = dot(dout_i, row(j, 2), D);
                if (shape.dropout > 0) dP[j] *= dropout_factor<T>(shape.dropout, shape.seed, head, i, j);
                mean += P[j] * dP[j];
            }
            for (int64_t j = 0; j < shape.T; j++) {
                const T dS = j > i ? T(0) : P[j] * (dP[j] - mean) / root;
                add(gradient(i, 0), dS, row(j, 1), D);
                add(gradient(j, 1), dS, row(i, 0), D);
            }
        }
    }
};

// Is every value of these n rows of D finite?
template <class T, class Row> FASTGPT_NOINLINE bool all_finite(int64_t n, int64_t D, const Row& row) {
    vec<T> residue{};
    for (int64_t i = 0; i < n; i++) {
        const T* x = row(i);
        for_channels<T>(D, [&](int64_t d, int lanes) FASTGPT_LAMBDA {
            const vec<T> v = load_first(x + d, lanes);
            residue += v - v; // NaN from an infinity or a NaN
        });
    }
    const T sum_of_residues = sum<T>(residue);
    return sum_of_residues == sum_of_residues;
}
