// GPT-2 for generation: all layers of a token in one call. gpt.py's GPT.hidden with a KV cache, then the logits.
//
//   x = wte[id] + wpe[position]
//   x = x + c_proj(attention(c_attn(ln_1(x))))        for each layer
//   x = x + c_proj(gelu(c_fc(ln_2(x))))
//   logits = wte ln_f(x)
//
// Weights lie in strips of 16 rows (strips.h). A layer has four stages, each one parallel region:
//
//   a task a head     its rows of c_attn's result; k and v go to the cache; attention over all positions so far
//   some strips       c_proj, added to x
//   some strips       c_fc and gelu
//   some strips       c_proj, added to x
//
// Between them the calling thread normalizes x. Several tokens share each strip that is read: the next ones of several
// sequences, or several of one. A token's bits do not depend on the others.
//
// The cache holds, for each slot, layer and head, two matrices in strips: keys, whose rows are positions, and values,
// whose rows are channels and whose k are positions. So q K^T and p V are both products of strips with one row.
//
//            channels ->                     positions ->
//        +-----------------+             +-----------------------------+
//     16 | keys 0 .. 15    |          16 | values, channels 0 .. 15    |
//        +-----------------+             +-----------------------------+
//     16 | keys 16 .. 31   |          16 | values, channels 16 .. 31   |
//        +-----------------+             +-----------------------------+
//
// A prompt's many tokens take `prefill`: the same through matmul and attention, in blocks of rows. With fast_prompts,
// products round both sides alike, to bfloat16 (bfloat16.h) or int8 (matmul_int8.h), but for the last one, the logits.
//
// Compiled once for each instruction set.

constexpr int64_t rows_at_once = 8;

// Rows of x for products with strips, with zeros past K.
class ActivationRows {
  public:
    ActivationRows(int64_t n, int64_t K)
        : n_(n), stride_(round_up(K, 2 * GROUP)), x_(1, n * stride_), q_(1, n * stride_),
          scales_(1, n * stride_ / GROUP), sums_(1, n * stride_ / GROUP) {
        for (int64_t b = 0; b < n; b++)
            for (int64_t k = K; k < stride_; k++) (*this)[b][k] = 0;
    }
    float* operator[](int64_t b) const { return &x_[b * stride_]; }

    Activations for_matrix(const PackedMatrix& w) const { // with what its packing takes
        const Activations a{&x_[0], stride_, &q_[0], &scales_[0], &sums_[0]};
        if (w.packing == Packing::int4)
            for (int64_t b = 0; b < n_; b++) {
                const int64_t groups = b * stride_ / GROUP;
                round_to_int8((*this)[b], stride_, &q_[b * stride_], &scales_[groups], &sums_[groups]);
            }
        return a;
    }

  private:
    int64_t n_, stride_;
    Scratch<float> x_;
    Scratch<int8_t> q_;
    Scratch<float> scales_, sums_;
};

inline FASTGPT_NOINLINE void normalize(const float* x, const float* weight, const float* bias, int64_t C, float* y) {
    float mean, rstd;
    layer_norm_forward_rows<float, 1>(Rows<const float>::contiguous(x, 1, C), weight, bias, 1e-5f, C, 0, y, &mean,
                                      &rstd);
}

// out(row, b, y, lanes) for rows row .. row + lanes - 1 of w and each of n rows of x: y = (w x)[row ...]
template <class Out> FASTGPT_INLINE void multiply_some(const PackedMatrix& w, int64_t begin, int64_t end,
                                                       const Activations& a, int64_t n, const Out& out) {
    const int64_t bytes = strip_bytes(w.packing, w.K);
    float y[rows_at_once * LANES];
    for (int64_t strip = begin; strip < end; strip++)
        for (int64_t b = 0; b < n; b += rows_at_once) {
            const int64_t some = min(rows_at_once, n - b), row = strip * LANES;
            multiply_strip(w.packing, w.data + strip * bytes, w.K, a.from(b), some, y);
            for (int64_t i = 0; i < some; i++) out(row, b + i, y + i * LANES, int(min(LANES, w.N - row)));
        }
}

// The same for all of w, in parallel.
template <class Out>
FASTGPT_INLINE void multiply_all(const PackedMatrix& w, const Activations& a, int64_t n, const Out& out) {
    constexpr int64_t task_bytes = 1 << 15;
    const int64_t strips = ceil_div(w.N, LANES), each = 1 + task_bytes / strip_bytes(w.packing, w.K);
    parallel_tasks((strips + each - 1) / each,
                   [&](int64_t task) { multiply_some(w, task * each, min(strips, (task + 1) * each), a, n, out); });
}

// Rows of c_attn for each head: q, k and v, padded to whole strips.
FASTGPT_INLINE int64_t head_rows(int64_t D) { return round_up(3 * D, LANES); }

struct CachedHead {
    Packing packing;
    int64_t D;
    char *keys, *values;
    int64_t key_strip, value_strip; // bytes

    // Position t. The position after an even one is cleared: a cell of bfloat16 holds both.
    template <class Format> void append(int64_t t, const float* k, const float* v) const {
        char* at = keys + t / LANES * key_strip;
        for (int64_t d = 0; d < D; d++) Format::put(at, t % LANES, d, k[d]);
        for (int64_t d = 0; d < D; d++) {
            char* strip = values + d / LANES * value_strip;
            Format::put(strip, d % LANES, t, v[d]);
            if (t % 2 == 0) Format::put(strip, d % LANES, t + 1, 0);
        }
    }
    void append(int64_t t, const float* k, const float* v) const {
        packing == Packing::float32 ? append<Float32>(t, k, v) : append<BFloat16>(t, k, v);
    }
};

inline int64_t head_bytes(const DecoderCache& cache, int64_t D) {
    return cache.capacity / LANES * strip_bytes(cache.packing, D) +
           ceil_div(D, LANES) * strip_bytes(cache.packing, cache.capacity);
}
inline int64_t cache_bytes(const DecoderModel& m, const DecoderCache& cache) {
    return m.n_layer * m.H * head_bytes(cache, m.C / m.H);
}
inline CachedHead cached_head(const DecoderModel& m, const DecoderCache& cache, int64_t slot, int64_t layer,
                              int64_t head) {
    const int64_t D = m.C / m.H, key_strip = strip_bytes(cache.packing, D);
    char* keys = cache.data + ((slot * m.n_layer + layer) * m.H + head) * head_bytes(cache, D);
    return {cache.packing, D,
            keys,          keys + cache.capacity / LANES * key_strip,
            key_strip,     strip_bytes(cache.packing, cache.capacity)};
}

// y (D) = softmax(q K^T / sqrt(D)) V over T positions. q: D values, and a zero if D is odd; p: scratch, T to a
// multiple of 16.
inline FASTGPT_NOINLINE void attend(const CachedHead& head, const float* q, int64_t T, float* p, float* y) {
    const int64_t D = head.D, padded = round_up(T, LANES);
    for (int64_t t = 0; t < padded; t += LANES)
        multiply_strip(head.packing, head.keys + t / LANES * head.key_strip, D, {q, 0}, 1, p + t);
    for (int64_t t = T; t < padded; t++) p[t] = -__builtin_inff();
    vec<float> row_max = load(p), sums{};
    for (int64_t t = 0; t < padded; t += VL<float>) row_max = max(row_max, load(p + t));
    float largest = row_max[0];
    for (int i = 1; i < VL<float>; i++) largest = max(largest, row_max[i]);
    const vec<float> m = broadcast(largest), scale = broadcast(float(log2e / __builtin_sqrt(double(D))));
    for (int64_t t = 0; t < padded; t += VL<float>) {
        const vec<float> e = exp2((load(p + t) - m) * scale);
        store(p + t, e);
        sums += e;
    }
    const float inverse = 1 / sum<float>(sums);
    for (int64_t d = 0; d < D; d += LANES) {
        float o[LANES];
        multiply_strip(head.packing, head.values + d / LANES * head.value_strip, T, {p, 0}, 1, o);
        for (int64_t i = 0; i < min(LANES, D - d); i++) y[d + i] = o[i] * inverse;
    }
}

// Stage 1 for one head: a = ln_1(x) becomes the head's channels of y.
inline void attention_of_head(const DecoderModel& m, const DecoderCache& cache, int64_t layer, int64_t head,
                              const DecoderToken* tokens, int64_t n, const Activations& a, float* qkv, float* p,
                              const ActivationRows& y) {
    const int64_t D = m.C / m.H, R = head_rows(D), strips = R / LANES;
    const PackedMatrix& w = m.layers[layer].c_attn;
    multiply_some(w, head * strips, (head + 1) * strips, a, n, [&](int64_t row, int64_t b, const float* sums, int) {
        float* to = qkv + b * R + row - head * R;
        for (int64_t i = 0; i < LANES; i++) to[i] = sums[i] + w.bias[row + i];
    });
    for (int64_t b = 0; b < n; b++)
        cached_head(m, cache, tokens[b].slot, layer, head)
            .append(tokens[b].position, qkv + b * R + D, qkv + b * R + 2 * D);
    for (int64_t b = 0; b < n; b++) {
        float* q = qkv + b * R;
        for (int64_t d = D; d < min(R, round_up(D, 2)); d++) q[d] = 0; // past q
        attend(cached_head(m, cache, tokens[b].slot, layer, head), q, tokens[b].position + 1, p, y[b] + head * D);
    }
}

inline void embed(const DecoderModel& m, int64_t id, int64_t position, float* x) {
    const char* strip = m.wte.data + id / LANES * strip_bytes(m.wte.packing, m.C);
    const float* at = m.wpe + position * round_up(m.C, LANES);
    with_format(m.wte.packing, [&](auto format) {
        for (int64_t c = 0; c < m.C; c++) x[c] = format.value(strip, m.C, id % LANES, c) + at[c];
    });
}

// n tokens, each at its position of its slot: logits (n, V). Tokens of one slot go up in position.
inline void decode(const DecoderModel& m, const DecoderCache& cache, const DecoderToken* tokens, int64_t n,
                   float* logits) {
    const int64_t C = m.C, D = C / m.H;
    const int workers = num_threads();
    Scratch<float> x(1, n * C), qkv(workers, n * head_rows(D)), p(workers, cache.capacity);
    const ActivationRows a(n, C), y(n, C), h(n, 4 * C);
    for (int64_t b = 0; b < n; b++) embed(m, tokens[b].id, tokens[b].position, &x[b * C]);

    const auto normalize_all = [&](const float* weight, const float* bias) {
        for (int64_t b = 0; b < n; b++) normalize(&x[b * C], weight, bias, C, a[b]);
    };
    const auto add_to_x = [&](const PackedMatrix& w, const ActivationRows& rows) {
        multiply_all(w, rows.for_matrix(w), n, [&](int64_t row, int64_t b, const float* sums, int lanes) {
            for (int i = 0; i < lanes; i++) x[b * C + row + i] += sums[i] + w.bias[row + i];
        });
    };
    for (int64_t l = 0; l < m.n_layer; l++) {
        const DecoderLayer& layer = m.layers[l];
        normalize_all(layer.ln_1_weight, layer.ln_1_bias);
        const Activations normed = a.for_matrix(layer.c_attn);
        parallel_tasks(m.H, workers, [&](int64_t head, int worker) {
            attention_of_head(m, cache, l, head, tokens, n, normed, qkv.part(worker), p.part(worker), y);
        });
        add_to_x(layer.c_proj, y);
        normalize_all(layer.ln_2_weight, layer.ln_2_bias);
        multiply_all(layer.c_fc, a.for_matrix(layer.c_fc), n,
                     [&](int64_t row, int64_t b, const float* sums, int lanes) {
                         for (int i = 0; i < lanes; i += VL<float>) {
                             const vec<float> v = load(sums + i) + load(layer.c_fc.bias + row + i);
                             store_first(h[b] + row + i, v * gelu_sigmoid<float>(v), lanes - i);
                         }
                     });
        add_to_x(layer.mlp_c_proj, h);
    }
    normalize_all(m.ln_f_weight, m.ln_f_bias);
    multiply_all(m.wte, a.for_matrix(m.wte), n, [&](int64_t row, int64_t b, const float* sums, int lanes) {
        __builtin_memcpy(logits + b * m.V + row, sums, size_t(lanes) * sizeof(float));
    });
}

// x (M, K) to int8 and back, as products with int4 meet it.
inline void round_rows(float* x, int64_t M, int64_t K) {
    const int64_t padded = round_up(K, GROUP), groups = padded / GROUP;
    const int workers = num_threads();
    Scratch<float> rows(workers, padded + 2 * groups);
    Scratch<int8_t> q(workers, padded);
    parallel_tasks(M, workers, [&](int64_t i, int worker) {
        float *row = rows.part(worker), *scales = row + padded, *to = x + i * K;
        int8_t* whole = q.part(worker);
        for (int64_t k = 0; k < padded; k++) row[k] = k < K ? to[k] : 0;
        round_to_int8(row, padded, whole, scales, scales + groups);
        for (int64_t k = 0; k < K; k++) to[k] = float(whole[k]) * scales[k / GROUP];
    });
}

inline void attend_prompt(const AttentionShape& shape, Sequence<const float> qkv, float* y, float* stats,
                          [[maybe_unused]] bool in_bfloat16) {
#if defined(FASTGPT_AMX) || defined(FASTGPT_BFLOAT16)
    if (in_bfloat16) return attention_forward<float, BFloat16Engine>(shape, qkv, y, stats);
#endif
    attention_forward<float>(shape, qkv, y, stats);
}

// Prompts into their slots, from position 0 on. Logits of each prompt's last token, (n, V), or of all tokens.
inline void prefill(const DecoderModel& m, const DecoderCache& cache, const DecoderPrompt* prompts, int64_t n,
                    bool all_logits, float* logits) {
    constexpr int64_t block = 512; // rows that pass through the MLP at a time
    const int64_t C = m.C, D = C / m.H, R = head_rows(D);
    int64_t M = 0, longest = 0;
    for (int64_t i = 0; i < n; i++) M += prompts[i].T, longest = prompts[i].T > longest ? prompts[i].T : longest;
    const int64_t some = min(block, M);
    Scratch<float> x(1, M * C), y(1, M * C), qkv(1, M * m.H * R), heads(1, longest * C), stats(1, 2 * m.H * longest);
    Scratch<float> a(1, some * C), h(1, some * 4 * C), mean(1, some), rstd(1, some);
    const Packing packing = m.layers[0].c_attn.packing;
    const bool rounded = m.fast_prompts && rounds_prompts(packing);
    for (int64_t i = 0, at = 0; i < n; at += prompts[i++].T)
        parallel_tasks(prompts[i].T, [&](int64_t t) { embed(m, prompts[i].ids[t], t, &x[(at + t) * C]); });

    const auto each_block = [&](const auto& body) {
        for (int64_t r = 0; r < M; r += block) body(r, min(block, M - r));
    };
    const auto normalize_rows = [&](int64_t r, int64_t rows, const float* weight, const float* bias) {
        layer_norm_forward<float>(Rows<const float>::contiguous(&x[r * C], rows, C), weight, bias, 1e-5f, C, &a[0],
                                  &mean[0], &rstd[0]);
    };
    const auto multiply = [&](const PackedMatrix& w, float* from, int64_t rows, float* to, bool add, bool gelu) {
        if (w.packing == Packing::int4) round_rows(from, rows, w.K);
        matmul_packed(w, from, rows, to, add, gelu, rounded && w.data != m.wte.data);
    };
    for (int64_t l = 0; l < m.n_layer; l++) {
        const DecoderLayer& layer = m.layers[l];
        each_block([&](int64_t r, int64_t rows) {
            normalize_rows(r, rows, layer.ln_1_weight, layer.ln_1_bias);
            multiply(layer.c_attn, &a[0], rows, &qkv[r * m.H * R], false, false);
        });
        for (int64_t i = 0, at = 0; i < n; at += prompts[i++].T) { // heads take the place of the batch
            const int64_t T = prompts[i].T;
            const float* rows = &qkv[at * m.H * R];
            attend_prompt({m.H, T, 1, D, 0, 0}, {rows, R, m.H * R}, &heads[0], &stats[0],
                          rounded && packing == Packing::bfloat16);
            parallel_tasks(m.H, [&](int64_t head) {
                const CachedHead cached = cached_head(m, cache, prompts[i].slot, l, head);
                for (int64_t t = 0; t < T; t++) {
                    const float* k = rows + (t * m.H + head) * R + D;
                    cached.append(t, k, k + D);
                    __builtin_memcpy(&y[(at + t) * C + head * D], &heads[(head * T + t) * D],
                                     size_t(D) * sizeof(float));
                }
            });
        }
        each_block([&](int64_t r, int64_t rows) {
            multiply(layer.c_proj, &y[r * C], rows, &x[r * C], true, false);
            normalize_rows(r, rows, layer.ln_2_weight, layer.ln_2_bias);
            multiply(layer.c_fc, &a[0], rows, &h[0], false, true);
            multiply(layer.mlp_c_proj, &h[0], rows, &x[r * C], true, false);
        });
    }
    if (all_logits)
        return each_block([&](int64_t r, int64_t rows) {
            normalize_rows(r, rows, m.ln_f_weight, m.ln_f_bias);
            multiply(m.wte, &a[0], rows, logits + r * m.V, false, false);
        });
    const ActivationRows last(n, C);
    for (int64_t i = 0, at = 0; i < n; i++) {
        at += prompts[i].T;
        normalize(&x[(at - 1) * C], m.ln_f_weight, m.ln_f_bias, C, last[i]);
    }
    multiply_all(m.wte, last.for_matrix(m.wte), n, [&](int64_t row, int64_t i, const float* sums, int lanes) {
        __builtin_memcpy(logits + i * m.V + row, sums, size_t(lanes) * sizeof(float));
    });
}
