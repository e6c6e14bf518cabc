// A right answer to every exercise in plain C++, as a learner might write it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

static float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void add(float* y, float factor, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

extern "C" void linear(const float* x, const float* weight, const float* bias, float* out, int64_t M, int64_t N,
                       int64_t K) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) out[m * N + n] = dot(x + m * K, weight + n * K, K) + (bias ? bias[n] : 0);
}

extern "C" void linear_backward(const float* dout, const float* x, const float* weight, float* dx, float* dweight,
                                float* dbias, int64_t M, int64_t N, int64_t K) {
    std::fill(dx, dx + M * K, 0.0f);
    std::fill(dweight, dweight + N * K, 0.0f);
    if (dbias) std::fill(dbias, dbias + N, 0.0f);
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            add(dx + m * K, dout[m * N + n], weight + n * K, K);
            add(dweight + n * K, dout[m * N + n], x + m * K, K);
            if (dbias) dbias[n] += dout[m * N + n];
        }
}

static const float root = std::sqrt(2 / 3.14159265358979323846), cubic = 0.044715f;

extern "C" void gelu(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = 0.5f * x[i] * (1 + std::tanh(root * (x[i] + cubic * x[i] * x[i] * x[i])));
}

extern "C" void gelu_backward(const float* dout, const float* x, float* dx, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float t = std::tanh(root * (x[i] + cubic * x[i] * x[i] * x[i]));
        dx[i] = dout[i] * (0.5f * (1 + t) + 0.5f * x[i] * (1 - t * t) * root * (1 + 3 * cubic * x[i] * x[i]));
    }
}

static void moments(const float* x, int64_t C, float eps, float& mean, float& rstd) {
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < C; c++) sum += x[c];
    for (int64_t c = 0; c < C; c++) squares += (x[c] - sum / C) * (x[c] - sum / C);
    mean = static_cast<float>(sum / C);
    rstd = static_cast<float>(1 / std::sqrt(squares / C + eps));
}

extern "C" void layer_norm(const float* x, const float* weight, const float* bias, float* out, int64_t rows, int64_t C,
                           float eps) {
    for (int64_t r = 0; r < rows; r++, x += C, out += C) {
        float mean, rstd;
        moments(x, C, eps, mean, rstd);
        for (int64_t c = 0; c < C; c++) out[c] = (x[c] - mean) * rstd * weight[c] + bias[c];
    }
}

extern "C" void layer_norm_backward(const float* dout, const float* x, const float* weight, float* dx, float* dweight,
                                    float* dbias, int64_t rows, int64_t C, float eps) {
    std::fill(dweight, dweight + C, 0.0f);
    std::fill(dbias, dbias + C, 0.0f);
    for (int64_t r = 0; r < rows; r++, x += C, dout += C, dx += C) {
        float mean, rstd;
        moments(x, C, eps, mean, rstd);
        double sum = 0, product = 0;
        for (int64_t c = 0; c < C; c++) {
            const double g = dout[c] * weight[c];
            sum += g;
            product += g * (x[c] - mean) * rstd;
        }
        for (int64_t c = 0; c < C; c++) {
            const float xhat = (x[c] - mean) * rstd;
            dweight[c] += dout[c] * xhat;
            dbias[c] += dout[c];
            dx[c] = static_cast<float>(rstd * (dout[c] * weight[c] - sum / C - xhat * product / C));
        }
    }
}

extern "C" void linear_gelu(const float* x, const float* weight, const float* bias, float* out, int64_t M, int64_t N,
                            int64_t K) {
    for (int64_t m = 0; m < M; m++) {
        linear(x + m * K, weight, bias, out + m * N, 1, N, K);
        gelu(out + m * N, out + m * N, N);  // while the row is in the cache
    }
}

extern "C" void linear_gelu_backward(const float* dout, const float* x, const float* weight, const float* bias,
                                     float* dx, float* dweight, float* dbias, int64_t M, int64_t N, int64_t K) {
    std::vector<float> u(M * N), du(M * N);
    linear(x, weight, bias, u.data(), M, N, K);
    gelu_backward(dout, u.data(), du.data(), M * N);
    linear_backward(du.data(), x, weight, dx, dweight, dbias, M, N, K);
}

// The weights of a query for n keys, stride numbers apart.
static void weigh(const float* q, const float* keys, int64_t n, int64_t stride, int64_t D, float* p) {
    float largest = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) largest = std::max(largest, p[j] = dot(q, keys + j * stride, D) / std::sqrt(float(D)));
    for (int64_t j = 0; j < n; j++) sum += p[j] = std::exp(p[j] - largest);
    for (int64_t j = 0; j < n; j++) p[j] /= sum;
}

extern "C" void attention(const float* qkv, float* out, int64_t B, int64_t T, int64_t H, int64_t D) {
    const int64_t C = H * D;
    std::vector<float> p(T);
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < T; i++) {
                const float* head = qkv + b * T * 3 * C + h * D;
                weigh(head + i * 3 * C, head + C, i + 1, 3 * C, D, p.data());
                float* y = out + (b * T + i) * C + h * D;
                std::fill(y, y + D, 0.0f);
                for (int64_t j = 0; j <= i; j++) add(y, p[j], head + j * 3 * C + 2 * C, D);
            }
}

extern "C" void attention_backward(const float* dout, const float* qkv, float* dqkv, int64_t B, int64_t T, int64_t H,
                                   int64_t D) {
    const int64_t C = H * D;
    const float scale = 1 / std::sqrt(float(D));
    std::vector<float> p(T), dp(T);
    std::fill(dqkv, dqkv + B * T * 3 * C, 0.0f);
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t i = 0; i < T; i++) {
                const float *head = qkv + b * T * 3 * C + h * D, *dy = dout + (b * T + i) * C + h * D;
                float* dhead = dqkv + b * T * 3 * C + h * D;
                weigh(head + i * 3 * C, head + C, i + 1, 3 * C, D, p.data());
                float sum = 0;
                for (int64_t j = 0; j <= i; j++) {
                    dp[j] = dot(dy, head + j * 3 * C + 2 * C, D);
                    sum += p[j] * dp[j];
                    add(dhead + j * 3 * C + 2 * C, p[j], dy, D);
                }
                for (int64_t j = 0; j <= i; j++) {
                    const float ds = p[j] * (dp[j] - sum) * scale;
                    add(dhead + i * 3 * C, ds, head + j * 3 * C + C, D);
                    add(dhead + j * 3 * C + C, ds, head + i * 3 * C, D);
                }
            }
}

// A row's logits. -> log(sum(exp(logit)))
static float row_logits(const float* hidden, const float* weight, int64_t C, int64_t V, float* logits) {
    for (int64_t v = 0; v < V; v++) logits[v] = dot(hidden, weight + v * C, C);
    const float largest = *std::max_element(logits, logits + V);
    double sum = 0;
    for (int64_t v = 0; v < V; v++) sum += std::exp(logits[v] - largest);
    return largest + static_cast<float>(std::log(sum));
}

extern "C" void lm_loss(const float* hidden, const float* weight, const int64_t* targets, float* out, int64_t rows,
                        int64_t C, int64_t V) {
    std::vector<float> logits(V);
    double sum = 0;
    int64_t count = 0;
    for (int64_t r = 0; r < rows; r++) {
        if (targets[r] == -1) continue;
        const float lse = row_logits(hidden + r * C, weight, C, V, logits.data());
        sum += lse - logits[targets[r]];
        count++;
    }
    *out = static_cast<float>(sum / count);
}

extern "C" void lm_loss_backward(const float* dout, const float* hidden, const float* weight, const int64_t* targets,
                                 float* dhidden, float* dweight, int64_t rows, int64_t C, int64_t V) {
    std::vector<float> logits(V);
    std::fill(dhidden, dhidden + rows * C, 0.0f);
    std::fill(dweight, dweight + V * C, 0.0f);
    const auto count = static_cast<float>(rows - std::count(targets, targets + rows, -1));
    for (int64_t r = 0; r < rows; r++) {
        if (targets[r] == -1) continue;
        const float lse = row_logits(hidden + r * C, weight, C, V, logits.data());
        for (int64_t v = 0; v < V; v++) {
            const float d = (std::exp(logits[v] - lse) - float(v == targets[r])) / count * *dout;
            add(dhidden + r * C, d, weight + v * C, C);
            add(dweight + v * C, d, hidden + r * C, C);
        }
    }
}

extern "C" int64_t sample(const float* logits, int64_t V, double temperature, int64_t top_k, double top_p, double u) {
    std::vector<int64_t> order(V);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
    if (temperature == 0) return order[0];
    std::vector<double> p(top_k);
    double sum = 0, before = 0;
    for (int64_t i = 0; i < top_k; i++) sum += p[i] = std::exp((double(logits[order[i]]) - logits[order[0]]) / temperature);
    int64_t left = 0;
    while (left < top_k && before < top_p) before += p[left++] /= sum;
    double running = 0;
    for (int64_t i = 0; i < left; i++)
        if ((running += p[i]) > u * before) return order[i];
    return order[left - 1];
}

extern "C" void cached_attention(const float* qkv, float* keys, float* values, float* out, int64_t B, int64_t t,
                                 int64_t past, int64_t room, int64_t H, int64_t D) {
    const int64_t C = H * D;
    std::vector<float> p(past + t);
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < t; i++) {
            const float* row = qkv + (b * t + i) * 3 * C;
            float *k = keys + b * room * C, *v = values + b * room * C, *y = out + (b * t + i) * C;
            std::copy(row + C, row + 2 * C, k + (past + i) * C);
            std::copy(row + 2 * C, row + 3 * C, v + (past + i) * C);
            std::fill(y, y + C, 0.0f);
            for (int64_t h = 0; h < H; h++) {
                weigh(row + h * D, k + h * D, past + i + 1, C, D, p.data());
                for (int64_t j = 0; j <= past + i; j++) add(y + h * D, p[j], v + j * C + h * D, D);
            }
        }
}
