// The kernels alone, without Python: each against its formula in plain loops, on every instruction set that this
// processor has. For processors that only an emulator has, and for sanitizers.
//
// The rule is fastgpt/check.py's: truth is the formula in more digits (here long double), and a kernel may be as far
// from it as the formula may be by its own rounding, for the largest error and for the mean square. How far that is
// shows a sample: the same loops over numbers that err at random after each operation (Noisy). Exit status: 1 if any
// tensor fails.

#include "../../csrc/kernels.h"
#include "../../csrc/parallel.h"
#include "../../csrc/sample.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace fastgpt {
ThreadPool pool;
}
using namespace fastgpt;

using Real = long double; // for the truth

template <class T> using Values = std::vector<T>;
template <class To, class From> Values<To> as(const Values<From>& x) { return Values<To>(x.begin(), x.end()); }

static std::mt19937_64 generator(1);
static Values<Real> normal(int64_t n, double scale = 1, double shift = 0) {
    std::normal_distribution<double> d(shift, scale);
    Values<Real> x(n);
    for (auto& v : x) v = float(d(generator)); // exact in every type
    return x;
}

// A double that loses after each operation what a float may lose: up to 2^-24 of its value, evenly spread.
struct Noisy {
    double v = 0;
    Noisy() = default;
    template <class Number> Noisy(Number x) : v(double(x)) {}
    static Noisy rounded(double x) {
        static uint64_t state = 1;
        state = state * 6364136223846793005u + 1442695040888963407u; // Knuth's generator
        Noisy y;
        y.v = x + x * 0x1p-24 * (double(int64_t(state)) * 0x1p-63);
        return y;
    }
    Noisy& operator+=(Noisy b) { return *this = rounded(v + b.v); }
    Noisy& operator*=(Noisy b) { return *this = rounded(v * b.v); }
    Noisy& operator/=(Noisy b) { return *this = rounded(v / b.v); }
    friend Noisy operator+(Noisy a, Noisy b) { return rounded(a.v + b.v); }
    friend Noisy operator-(Noisy a, Noisy b) { return rounded(a.v - b.v); }
    friend Noisy operator*(Noisy a, Noisy b) { return rounded(a.v * b.v); }
    friend Noisy operator/(Noisy a, Noisy b) { return rounded(a.v / b.v); }
    friend bool operator<(Noisy a, Noisy b) { return a.v < b.v; }
    friend Noisy sqrt(Noisy x) { return rounded(std::sqrt(x.v)); }
    friend Noisy exp(Noisy x) { return rounded(std::exp(x.v)); }
    friend Noisy log(Noisy x) { return rounded(std::log(x.v)); }
    friend Noisy tanh(Noisy x) { return rounded(std::tanh(x.v)); }
};
using std::exp, std::log, std::sqrt, std::tanh;

static int failed = 0, compared = 0;
constexpr int runs = 12;
constexpr double false_alarm = 1e-6; // the chance of it in a tensor that errs as its formula does

// The bounds are fastgpt/check.py's, which says where they come from.
template <class T> void compare(const std::string& what, const Values<Real>& truth,
                                const std::vector<Values<Noisy>>& sample, const Values<T>& kernel) {
    const size_t N = truth.size();
    const double scale = sizeof(T) == 4 ? 1 : 0x1p-29, smallest = std::numeric_limits<T>::min();
    Values<double> variance(N);
    double average = 0, spread = 0, mean_square = 0, largest = 0, mean = 0;
    Values<double> squares(runs);
    for (size_t i = 0; i < N; i++) {
        for (int r = 0; r < runs; r++) variance[i] += std::pow((sample[r][i].v - double(truth[i])) * scale, 2) / runs;
        average += variance[i] / double(N);
    }
    for (size_t i = 0; i < N; i++) {
        variance[i] = std::max({variance[i], average, smallest * smallest, 1e-300});
        for (int r = 0; r < runs; r++)
            squares[r] += std::pow((sample[r][i].v - double(truth[i])) * scale, 2) / variance[i] / double(N);
        const double error = std::fabs(double(kernel[i] - truth[i]));
        mean_square += error * error / variance[i] / double(N);
        if (!(error / std::sqrt(variance[i]) <= largest)) largest = error / std::sqrt(variance[i]); // a NaN is one
        if (largest != largest) break;
    }
    for (double q : squares) mean += q / runs;
    for (double q : squares) spread += (q - mean) * (q - mean) / (runs - 1);
    const double t = std::sqrt(runs * (std::pow(4 * double(N) / false_alarm, 2.0 / runs) - 1));
    const double x = std::log(2 / false_alarm);
    const double limit = runs / (runs - 2.0) * (1 + std::sqrt(2 * spread * x) + spread * x);
    compared++;
    if (N && !(largest <= t && mean_square <= limit)) {
        failed++;
        printf(
            "FAILED %s: the largest error is %.2f of the formula's deviations, expected <= %.2f; the mean square %.3f, "
            "expected <= %.3f\n",
            what.c_str(), largest, t, mean_square, limit);
    }
}

// One formula evaluated in R; `run` gets the inputs in R and returns all results, one after the other.
using Inputs = std::vector<Values<Real>>;
template <class T, class Formula, class Kernel>
void check(const std::string& what, const Inputs& inputs, const Formula& formula, const Kernel& kernel) {
    std::vector<Values<T>> typed;
    std::vector<Values<Noisy>> noisy;
    for (const auto& x : inputs) {
        typed.push_back(as<T>(x));
        noisy.push_back(as<Noisy>(x));
    }
    const auto truth = formula(inputs);
    const auto fast = kernel(typed);
    std::vector<std::vector<Values<Noisy>>> sample(truth.size());
    for (int r = 0; r < runs; r++) {
        auto results = formula(noisy);
        for (size_t i = 0; i < truth.size(); i++) sample[i].push_back(std::move(results[i]));
    }
    for (size_t i = 0; i < truth.size(); i++)
        compare<T>(what + " result " + std::to_string(i), truth[i], sample[i], fast[i]);
}

template <class T> const KernelsFor<T>& of(const Kernels& k);
template <> const KernelsFor<float>& of(const Kernels& k) { return k.f32; }
template <> const KernelsFor<double>& of(const Kernels& k) { return k.f64; }

template <class T> Rows<const T> rows(const Values<T>& x, int64_t width) {
    return Rows<const T>::contiguous(x.data(), width ? int64_t(x.size()) / width : 0, width);
}

template <class T> void layer_norm(const Kernels& k, const std::string& isa, int64_t R, int64_t C) {
    const auto formula = [=](const auto& in) {
        using V = std::decay_t<decltype(in[0])>;
        using F = typename V::value_type;
        const V &x = in[0], &w = in[1], &b = in[2], &dy = in[3];
        V y(R * C), dx(R * C), dw(C), db(C);
        for (int64_t r = 0; r < R; r++) {
            F mean = 0, variance = 0, sum_g = 0, sum_gx = 0;
            for (int64_t i = 0; i < C; i++) mean += x[r * C + i];
            mean /= F(C);
            for (int64_t i = 0; i < C; i++) variance += (x[r * C + i] - mean) * (x[r * C + i] - mean);
            const F rstd = 1 / sqrt(variance / F(C) + F(1e-5L));
            for (int64_t i = 0; i < C; i++) {
                const F xhat = (x[r * C + i] - mean) * rstd;
                y[r * C + i] = xhat * w[i] + b[i];
                dw[i] += dy[r * C + i] * xhat;
                db[i] += dy[r * C + i];
                sum_g += dy[r * C + i] * w[i];
                sum_gx += dy[r * C + i] * w[i] * xhat;
            }
            for (int64_t i = 0; i < C; i++)
                dx[r * C + i] =
                    rstd * (dy[r * C + i] * w[i] - sum_g / F(C) - (x[r * C + i] - mean) * rstd * sum_gx / F(C));
        }
        return std::vector<V>{y, dx, dw, db};
    };
    check<T>(isa + " layer_norm", {normal(R * C, 2, .5), normal(C, 1, 1), normal(C), normal(R * C)}, formula,
             [&](const std::vector<Values<T>>& in) {
                 Values<T> y(R * C), dx(R * C), dw(C), db(C), mean(R), rstd(R);
                 of<T>(k).layer_norm_forward(rows(in[0], C), in[1].data(), in[2].data(), T(1e-5), C, y.data(),
                                             mean.data(), rstd.data());
                 of<T>(k).layer_norm_backward(rows(in[3], C), rows(in[0], C), in[1].data(), mean.data(), rstd.data(), C,
                                              dx.data(), dw.data(), db.data());
                 return std::vector<Values<T>>{y, dx, dw, db};
             });
}

template <class F> F gelu(F x) {
    return x / 2 * (1 + tanh(F(0.797884560802865355879892119868763737L) * (x + F(0.044715L) * x * x * x)));
}

template <class T> void gelus(const Kernels& k, const std::string& isa, int64_t R, int64_t C) {
    const auto formula = [=](const auto& in) {
        using V = std::decay_t<decltype(in[0])>;
        using F = typename V::value_type;
        V y(R * C), dx(R * C);
        for (int64_t i = 0; i < R * C; i++) {
            const F x = in[0][i], root = F(0.797884560802865355879892119868763737L),
                    t = tanh(root * (x + F(0.044715L) * x * x * x));
            y[i] = gelu(x);
            dx[i] = in[1][i] * ((1 + t) / 2 + x / 2 * (1 - t * t) * root * (1 + 3 * F(0.044715L) * x * x));
        }
        return std::vector<V>{y, dx};
    };
    check<T>(isa + " gelu", {normal(R * C, 3), normal(R * C)}, formula, [&](const std::vector<Values<T>>& in) {
        Values<T> y(R * C), dx(R * C);
        of<T>(k).gelu_forward(rows(in[0], C), C, y.data());
        of<T>(k).gelu_backward(rows(in[1], C), rows(in[0], C), C, dx.data());
        return std::vector<Values<T>>{y, dx};
    });
}

static Values<Real> unchanged(Values<Real> x) { return x; }
static Values<Real> bfloat16(Values<Real> x) { // rounded already: then bfloat16 products are as exact as float32's
    for (auto& v : x) {
        float f = float(v);
        uint32_t bits;
        memcpy(&bits, &f, 4);
        bits = (bits + 0x8000) & 0xFFFF0000;
        memcpy(&f, &bits, 4);
        v = f;
    }
    return x;
}

template <class T> void matmul(const ProductsFor<T>& products, const std::string& isa, int64_t M, int64_t N, int64_t K,
                               bool A_transposed, bool B_transposed, Values<Real> as_operand(Values<Real>)) {
    const auto formula = [=](const auto& in) {
        using V = std::decay_t<decltype(in[0])>;
        using F = typename V::value_type;
        V c(M * N), y(M * N), g(M * N);
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = 0; n < N; n++) {
                F sum = 0;
                for (int64_t i = 0; i < K; i++)
                    sum += in[0][A_transposed ? i * M + m : m * K + i] * in[1][B_transposed ? n * K + i : i * N + n];
                c[m * N + n] = in[3][m * N + n] + sum;
                y[m * N + n] = sum + in[2][n];
                g[m * N + n] = gelu(sum + in[2][n]);
            }
        return std::vector<V>{c, y, g, g};
    };
    check<T>(isa + " matmul", {as_operand(normal(M * K)), as_operand(normal(K * N, .2)), normal(N), normal(M * N)},
             formula, [&](const std::vector<Values<T>>& in) {
                 Values<T> c = in[3], y(M * N), g(M * N), alone(M * N);
                 const auto A = rows(in[0], A_transposed ? M : K), B = rows(in[1], B_transposed ? K : N);
                 products.matmul({M, N, K, A, A_transposed, B, B_transposed, c.data(), true});
                 products.matmul({M, N, K, A, A_transposed, B, B_transposed, y.data(), false, in[2].data(), g.data()});
                 products.matmul(
                     {M, N, K, A, A_transposed, B, B_transposed, alone.data(), false, in[2].data(), alone.data()});
                 return std::vector<Values<T>>{c, y, g, alone};
             });
}

template <class T> void matmuls(const ProductsFor<T>& products, const std::string& isa,
                                Values<Real> as_operand(Values<Real>) = unchanged) {
    for (bool a : {false, true})
        for (bool b : {false, true}) {
            matmul<T>(products, isa, 65, 51, 300, a, b, as_operand);
            matmul<T>(products, isa, 1, 1, 1, a, b, as_operand);
            matmul<T>(products, isa, 96, 96, 64, a, b, as_operand);
            matmul<T>(products, isa, 530, 33, 20, a, b, as_operand);
            matmul<T>(products, isa, 3, 5, 0, a, b, as_operand);
            matmul<T>(products, isa, 9, 17, 1201, a, b, as_operand);
        }
}

template <class T> void lm_loss(const Kernels& k, const std::string& isa, int64_t M, int64_t C, int64_t V_) {
    std::vector<int64_t> targets(M);
    int64_t count = 0;
    for (int64_t i = 0; i < M; i++) {
        targets[i] = i % 5 == 3 ? -1 : int64_t(generator() % V_);
        count += targets[i] >= 0;
    }
    const auto formula = [=](const auto& in) {
        using V = std::decay_t<decltype(in[0])>;
        using F = typename V::value_type;
        const V &h = in[0], &w = in[1];
        V loss(1), dh(M * C), dw(V_ * C), l(V_);
        for (int64_t m = 0; m < M; m++) {
            if (targets[m] < 0) continue;
            F row_max = -1e30, row_sum = 0;
            for (int64_t v = 0; v < V_; v++) {
                l[v] = 0;
                for (int64_t c = 0; c < C; c++) l[v] += h[m * C + c] * w[v * C + c];
                row_max = std::max(row_max, l[v]);
            }
            for (int64_t v = 0; v < V_; v++) row_sum += exp(l[v] - row_max);
            loss[0] += (log(row_sum) + row_max - l[targets[m]]) / F(count);
            for (int64_t v = 0; v < V_; v++) {
                const F dl = (exp(l[v] - row_max) / row_sum - F(v == targets[m])) / F(count);
                for (int64_t c = 0; c < C; c++) {
                    dh[m * C + c] += dl * w[v * C + c];
                    dw[v * C + c] += dl * h[m * C + c];
                }
            }
        }
        return std::vector<V>{loss, dh, dw};
    };
    check<T>(isa + " lm_loss", {normal(M * C), normal(V_ * C, .2)}, formula, [&](const std::vector<Values<T>>& in) {
        Values<T> loss(1), dh(M * C), dw(V_ * C);
        loss[0] = T(of<T>(k).lm_loss(rows(in[0], C), rows(in[1], C), targets.data(), M, C, V_, dh.data(), dw.data()));
        return std::vector<Values<T>>{loss, dh, dw};
    });
}

template <class T>
void attention(const Kernels& k, const std::string& isa, int64_t B, int64_t T_, int64_t H, int64_t D) {
    const int64_t C = H * D;
    const auto formula = [=](const auto& in) {
        using V = std::decay_t<decltype(in[0])>;
        using F = typename V::value_type;
        const V &x = in[0], &dout = in[1];
        V out(B * T_ * C), dx(B * T_ * 3 * C), p(T_), dp(T_);
        const F scale = 1 / sqrt(F(D));
        for (int64_t b = 0; b < B; b++)
            for (int64_t h = 0; h < H; h++)
                for (int64_t i = 0; i < T_; i++) {
                    const auto at = [&](int64_t t, int64_t part) { return (b * T_ + t) * 3 * C + part * C + h * D; };
                    const int64_t o = (b * T_ + i) * C + h * D;
                    F row_max = -1e30, row_sum = 0, mean = 0;
                    for (int64_t j = 0; j <= i; j++) {
                        p[j] = 0;
                        dp[j] = 0;
                        for (int64_t d = 0; d < D; d++) {
                            p[j] += x[at(i, 0) + d] * x[at(j, 1) + d];
                            dp[j] += dout[o + d] * x[at(j, 2) + d];
                        }
                        p[j] *= scale;
                        row_max = std::max(row_max, p[j]);
                    }
                    for (int64_t j = 0; j <= i; j++) {
                        p[j] = exp(p[j] - row_max);
                        row_sum += p[j];
                    }
                    for (int64_t j = 0; j <= i; j++) {
                        p[j] /= row_sum;
                        mean += p[j] * dp[j];
                    }
                    for (int64_t j = 0; j <= i; j++)
                        for (int64_t d = 0; d < D; d++) {
                            const F ds = p[j] * (dp[j] - mean) * scale;
                            out[o + d] += p[j] * x[at(j, 2) + d];
                            dx[at(j, 2) + d] += p[j] * dout[o + d];
                            dx[at(i, 0) + d] += ds * x[at(j, 1) + d];
                            dx[at(j, 1) + d] += ds * x[at(i, 0) + d];
                        }
                }
        return std::vector<V>{out, dx};
    };
    check<T>(isa + " attention", {normal(B * T_ * 3 * C), normal(B * T_ * C)}, formula,
             [&](const std::vector<Values<T>>& in) {
                 Values<T> out(B * T_ * C), dx(B * T_ * 3 * C), stats(2 * B * H * T_);
                 const AttentionShape shape{B, T_, H, D, 0, 0};
                 const Sequence<const T> qkv{in[0].data(), T_ * 3 * C, 3 * C};
                 const Sequence<const T> dout{in[1].data(), T_ * C, C};
                 of<T>(k).attention_forward(shape, qkv, out.data(), stats.data());
                 of<T>(k).attention_backward(shape, dout, qkv, {out.data(), T_ * C, C}, stats.data(), dx.data());
                 return std::vector<Values<T>>{out, dx};
             });
}

template <class T> void all(const Kernels& k, const std::string& isa) {
    for (int64_t C : {5, 48, 769}) layer_norm<T>(k, isa, 37, C);
    for (int64_t C : {1, 31, 9000}) gelus<T>(k, isa, 3, C);
    matmuls<T>(of<T>(k), isa);
    lm_loss<T>(k, isa, 9, 16, 5003);
    lm_loss<T>(k, isa, 70, 33, 65);
    for (int64_t t : {1, 2, 63, 65, 97, 130}) attention<T>(k, isa, t < 97 ? 2 : 1, t, 2, t % 2 ? 16 : 64);
    attention<T>(k, isa, 1, 100, 1, 5);
    attention<T>(k, isa, 1, 130, 1, 80);
    attention<T>(k, isa, 1, 40, 1, 600);
}

// Rounding to whole numbers. Where a value is as near to the middle of two as float's errors reach, no kernel can be
// told right from wrong, so inputs that come so near are drawn again.
static double nearest_tie = 1;
static double value_of(Real x) { return double(x); }
static double value_of(Noisy x) { return x.v; }
template <class F> double whole(F x) {
    const double v = value_of(x), below = std::floor(v);
    if (std::is_same_v<F, Real>) nearest_tie = std::min(nearest_tie, std::fabs(v - below - 0.5));
    return v - below < 0.5 ? below : below + 1;
}
template <class F> F to_bfloat16(F x) { // 8 bits
    int exponent;
    std::frexp(value_of(x), &exponent);
    return value_of(x) == 0 ? x : F(std::ldexp(whole(x * F(std::ldexp(1, 8 - exponent))), exponent - 8));
}
template <class F> Values<F> to_int8(const Values<F>& x, size_t size) { // and back, with a scale for each group
    Values<F> y(x.size());
    for (size_t k = 0; k < x.size(); k++) {
        F largest = 0;
        const size_t group = k / size * size;
        for (size_t i = group; i < std::min(group + size, x.size()); i++) {
            const F magnitude = x[i] < F(0) ? F(0) - x[i] : x[i];
            if (largest < magnitude) largest = magnitude;
        }
        y[k] = F(whole(x[k] * (F(127) / largest))) * (largest / F(127));
    }
    return y;
}

// A GPT-2 of `layers` layers, its parameters in the order of DecoderModel, c_attn's rows head by head as it stores
// them.
struct Gpt2 {
    int64_t layers, H, D, V, T;
    Packing packing, cache;
    bool fast_prompts = false;
    int64_t C() const { return H * D; }
    int64_t R() const { return (3 * D + 15) / 16 * 16; } // rows of c_attn for each head
    Packing head_packing() const { return packing == Packing::int4 ? Packing::int8 : packing; }
    std::vector<std::pair<int64_t, int64_t>> shapes() const { // (N, K) of matrices; K is 0 for vectors
        std::vector<std::pair<int64_t, int64_t>> all{{V, C()}, {T, C()}};
        for (int64_t l = 0; l < layers; l++)
            for (const auto& shape : std::vector<std::pair<int64_t, int64_t>>{{C(), 0},
                                                                              {C(), 0},
                                                                              {H * R(), C()},
                                                                              {H * R(), 0},
                                                                              {C(), C()},
                                                                              {C(), 0},
                                                                              {C(), 0},
                                                                              {C(), 0},
                                                                              {4 * C(), C()},
                                                                              {4 * C(), 0},
                                                                              {C(), 4 * C()},
                                                                              {C(), 0}})
                all.push_back(shape);
        all.push_back({C(), 0}), all.push_back({C(), 0});
        return all;
    }
    int64_t id(int64_t t) const { return t * 7 % V; }

    template <class F> Values<F> rounded(const Values<F>& x, bool in_prompt) const {
        return packing == Packing::int4 ? to_int8(x, 32) : in_prompt && fast_prompts ? to_int8(x, 256) : x;
    }
    template <class F> static Values<F> linear(const Values<F>& x, const Values<F>& w, const Values<F>* bias) {
        const size_t K = x.size(), N = w.size() / K;
        Values<F> y(N);
        for (size_t n = 0; n < N; n++) {
            for (size_t k = 0; k < K; k++) y[n] += x[k] * w[n * K + k];
            if (bias) y[n] += (*bias)[n];
        }
        return y;
    }
    template <class F> static Values<F> normalized(const Values<F>& x, const Values<F>& w, const Values<F>& b) {
        F mean = 0, variance = 0;
        for (F v : x) mean += v;
        mean /= F(x.size());
        for (F v : x) variance += (v - mean) * (v - mean);
        const F rstd = 1 / sqrt(variance / F(x.size()) + F(1e-5L));
        Values<F> y(x.size());
        for (size_t i = 0; i < x.size(); i++) y[i] = (x[i] - mean) * rstd * w[i] + b[i];
        return y;
    }
    // (T, V). The first `prompt` tokens see keys and values before the cache rounds them.
    template <class F> Values<F> logits(const std::vector<Values<F>>& in, int64_t prompt) const {
        Values<F> all;
        std::vector<Values<F>> kept(layers * T); // qkv
        for (int64_t t = 0; t < T; t++) {
            Values<F> x(C());
            for (int64_t c = 0; c < C(); c++) x[c] = in[0][id(t) * C() + c] + in[1][t * C() + c];
            for (int64_t l = 0; l < layers; l++) {
                const Values<F>* p = &in[2 + 12 * l];
                kept[l * T + t] = linear(rounded(normalized(x, p[0], p[1]), t < prompt), p[2], &p[3]);
                std::vector<Values<F>> qkv(kept.begin() + l * T, kept.begin() + l * T + t + 1);
                if (cache == Packing::bfloat16 && t >= prompt)
                    for (auto& row : qkv)
                        for (int64_t i = 0; i < H * R(); i++)
                            if (i % R() >= D) row[i] = to_bfloat16(row[i]);
                Values<F> y(C()), s(t + 1);
                for (int64_t h = 0; h < H; h++) {
                    F row_max = -1e30, row_sum = 0;
                    for (int64_t j = 0; j <= t; j++) {
                        s[j] = 0;
                        for (int64_t d = 0; d < D; d++) s[j] += qkv[t][h * R() + d] * qkv[j][h * R() + D + d];
                        s[j] /= sqrt(F(D));
                        if (row_max < s[j]) row_max = s[j];
                    }
                    for (int64_t j = 0; j <= t; j++) row_sum += s[j] = exp(s[j] - row_max);
                    for (int64_t j = 0; j <= t; j++)
                        for (int64_t d = 0; d < D; d++) y[h * D + d] += s[j] / row_sum * qkv[j][h * R() + 2 * D + d];
                }
                const auto attended = linear(rounded(y, t < prompt), p[4], &p[5]);
                for (int64_t c = 0; c < C(); c++) x[c] += attended[c];
                auto h = linear(rounded(normalized(x, p[6], p[7]), t < prompt), p[8], &p[9]);
                for (F& v : h) v = gelu(v);
                const auto thought = linear(rounded(h, t < prompt), p[10], &p[11]);
                for (int64_t c = 0; c < C(); c++) x[c] += thought[c];
            }
            const auto row =
                linear(normalized(x, in[in.size() - 2], in.back()), in[0], static_cast<Values<F>*>(nullptr));
            all.insert(all.end(), row.begin(), row.end());
        }
        return all;
    }
};

// The same model through a table's kernels.
class PackedGpt2 {
  public:
    PackedGpt2(const DecoderKernels& k, const Gpt2& g, const std::vector<Values<float>>& in)
        : k_(k), g_(g), layers_(size_t(g.layers)) {
        const auto shapes = g.shapes();
        const auto vector = [&](size_t i, int64_t rows = 1) { // rows padded with zeros to a multiple of 16
            const int64_t n = int64_t(in[i].size()) / rows, padded = (n + 15) / 16 * 16;
            floats_.emplace_back(size_t(rows * padded));
            for (int64_t r = 0; r < rows; r++)
                std::copy_n(&in[i][size_t(r * n)], n, &floats_.back()[size_t(r * padded)]);
            return floats_.back().data();
        };
        const auto matrix = [&](size_t i, Packing packing, bool has_bias) {
            const auto [N, K] = shapes[i];
            bytes_.emplace_back(size_t(k.packed_bytes(packing, N, K)));
            k.pack(in[i].data(), packing, N, K, bytes_.back().data());
            return PackedMatrix{packing, N, K, bytes_.back().data(), has_bias ? vector(i + 1) : nullptr};
        };
        size_t at = 2;
        for (DecoderLayer& l : layers_) {
            l.ln_1_weight = vector(at), l.ln_1_bias = vector(at + 1);
            l.c_attn = matrix(at + 2, g.packing, true), l.c_proj = matrix(at + 4, g.packing, true);
            l.ln_2_weight = vector(at + 6), l.ln_2_bias = vector(at + 7);
            l.c_fc = matrix(at + 8, g.packing, true), l.mlp_c_proj = matrix(at + 10, g.packing, true);
            at += 12;
        }
        model_ = {g.layers,
                  g.C(),
                  g.H,
                  g.V,
                  matrix(0, g.head_packing(), false),
                  vector(1, g.T),
                  layers_.data(),
                  vector(at),
                  vector(at + 1),
                  g.fast_prompts};
    }
    Values<float> rounded(size_t i) const { // parameter i, as packed
        const auto [N, K] = g_.shapes()[i];
        const size_t l = (i - 2) / 12, j = (i - 2) % 12;
        const DecoderLayer& layer = layers_[i ? l : 0];
        Values<float> w(size_t(N * K));
        k_.unpack(i == 0   ? model_.wte
                  : j == 2 ? layer.c_attn
                  : j == 4 ? layer.c_proj
                  : j == 8 ? layer.c_fc
                           : layer.mlp_c_proj,
                  w.data());
        return w;
    }

    // Token by token in 15 slots at once, which must agree to the bit; all as one prompt; a prompt, then two at once.
    std::vector<Values<float>> logits(const std::string& what) const {
        constexpr int64_t slots = 15;
        const int64_t T = g_.T, V = g_.V, capacity = (T + 15) / 16 * 16;
        DecoderCache cache{g_.cache, slots, capacity, nullptr};
        std::vector<char> memory(size_t(slots * k_.cache_bytes(model_, cache)), char(0x7f)); // NaN, if it is read
        cache.data = memory.data();
        std::vector<int64_t> ids;
        for (int64_t t = 0; t < T; t++) ids.push_back(g_.id(t));
        Values<float> steps, rows(size_t(slots * V)), whole(size_t(T * V)), parts(size_t(T * V));
        for (int64_t t = 0; t < T; t++) {
            std::vector<DecoderToken> tokens;
            for (int64_t slot = 0; slot < slots; slot++) tokens.push_back({ids[size_t(t)], slot, t});
            k_.decode(model_, cache, tokens.data(), slots, rows.data());
            for (int64_t slot = 1; slot < slots; slot++)
                if (memcmp(&rows[0], &rows[size_t(slot * V)], size_t(V) * sizeof(float))) {
                    failed++;
                    printf("FAILED %s: token %d differs in slot %d\n", what.c_str(), int(t), int(slot));
                }
            steps.insert(steps.end(), rows.begin(), rows.begin() + V);
        }
        std::fill(memory.begin(), memory.end(), char(0x7f));
        const DecoderPrompt prompt{ids.data(), T, 3}, first{ids.data(), T - 2, 4};
        k_.prefill(model_, cache, &prompt, 1, true, whole.data());
        k_.prefill(model_, cache, &first, 1, true, parts.data());
        const DecoderToken last[] = {{ids[size_t(T - 2)], 4, T - 2}, {ids[size_t(T - 1)], 4, T - 1}};
        k_.decode(model_, cache, last, 2, &parts[size_t((T - 2) * V)]);
        return {steps, whole, parts};
    }

  private:
    const DecoderKernels& k_;
    Gpt2 g_;
    std::vector<DecoderLayer> layers_;
    std::vector<std::vector<char>> bytes_;
    std::vector<Values<float>> floats_;
    DecoderModel model_;
};

static void decoder(const Kernels& k, const Gpt2& g) {
    const char* names[] = {"float32", "bfloat16", "int8", "int4"};
    const std::string what = std::string(k.name) + " decoder " + names[int(g.packing)] + ", cache in " +
                             names[int(g.cache)] + (g.fast_prompts ? ", fast prompts" : "") + ", D " +
                             std::to_string(g.D);
    std::vector<Values<float>> in;
    do {
        in.clear();
        for (const auto& [N, K] : g.shapes()) in.push_back(as<float>(normal(N * std::max(K, int64_t(1)), K ? .3 : 1)));
        const PackedGpt2 packed(k.decoder, g, in);
        for (size_t i = 0; i < in.size(); i++)
            if (g.shapes()[i].second && i != 1) in[i] = packed.rounded(i);
        nearest_tie = 1;
        std::vector<Values<Real>> real;
        for (const auto& x : in) real.push_back(as<Real>(x));
        g.logits(real, 0), g.logits(real, g.T);
    } while (nearest_tie < 2e-4);
    Inputs inputs;
    for (const auto& x : in) inputs.push_back(as<Real>(x));
    const auto formula = [&](const auto& values) {
        return std::vector{g.logits(values, 0), g.logits(values, g.T), g.logits(values, g.T - 2)};
    };
    const auto kernel = [&](const std::vector<Values<float>>& values) {
        return PackedGpt2(k.decoder, g, values).logits(what);
    };
    check<float>(what, inputs, formula, kernel);
}

// Prompts in bfloat16 products against those of the same weights in float32 ones: near, and not the same.
static void prompts_in_bfloat16(const Kernels& k) {
    for (int64_t D : {24, 13}) {
        Gpt2 g{2, 3, D, 37, 19, Packing::bfloat16, Packing::float32};
        std::vector<Values<float>> in;
        for (const auto& [N, K] : g.shapes()) in.push_back(as<float>(normal(N * std::max(K, int64_t(1)), K ? .3 : 1)));
        const auto exact = PackedGpt2(k.decoder, g, in).logits("bfloat16")[1];
        g.fast_prompts = true;
        const auto fast = PackedGpt2(k.decoder, g, in).logits("bfloat16, fast prompts")[1];
        double distance = 0, size = 0;
        for (size_t i = 0; i < exact.size(); i++) {
            distance += (fast[i] - exact[i]) * (fast[i] - exact[i]);
            size += exact[i] * exact[i];
        }
        compared++;
        if (distance > 0 && distance < 4e-4 * size) continue; // 8 bits, in two layers
        failed++;
        printf("FAILED %s decoder bfloat16, fast prompts, D %d: distance %g\n", k.name, int(D), sqrt(distance / size));
    }
}

// sample.h against the rule in plain words.
static int64_t drawn(const Values<float>& logits, double temperature, int64_t top_k, double top_p, double u) {
    std::vector<int64_t> ids(logits.size());
    for (size_t i = 0; i < ids.size(); i++) ids[i] = int64_t(i);
    std::stable_sort(ids.begin(), ids.end(),
                     [&](int64_t a, int64_t b) { return logits[size_t(a)] > logits[size_t(b)]; });
    if (temperature == 0) return ids[0];
    if (top_k && top_k < int64_t(ids.size())) ids.resize(size_t(top_k));
    Values<double> sums;
    double total = 0, sum = 0;
    const auto weight = [&](int64_t id) {
        return exp((double(logits[size_t(id)]) - logits[size_t(ids[0])]) / temperature);
    };
    for (int64_t id : ids) total += weight(id);
    for (size_t i = 0; i < ids.size() && sum < top_p; i++) sums.push_back(sum += weight(ids[i]) / total);
    const auto at = std::upper_bound(sums.begin(), sums.end(), u * sum) - sums.begin();
    return ids[std::min(size_t(at), sums.size() - 1)];
}

static void sampler() {
    std::uniform_real_distribution<double> uniform;
    for (int64_t V : {1, 7, 3000, 20011})
        for (double temperature : {0., .7, 2.})
            for (int64_t top_k : {0, 1, 40, 100000})
                for (double top_p : {.3, .95, 2.})
                    for (double coarse : {0., 2.}) { // ties
                        Values<float> logits = as<float>(normal(V, 2));
                        for (float& x : logits) x = coarse ? std::round(x * float(coarse)) / float(coarse) : x;
                        const double u = uniform(generator);
                        compared++;
                        if (Sampler(temperature, top_k, top_p).draw(logits.data(), V, u) ==
                            drawn(logits, temperature, top_k, top_p, u))
                            continue;
                        failed++;
                        printf("FAILED sample: V %d temperature %g top_k %d top_p %g\n", int(V), temperature,
                               int(top_k), top_p);
                    }
    const float bad[] = {1, std::numeric_limits<float>::quiet_NaN(), 2};
    compared++;
    failed += Sampler(1, 0, 2).draw(bad, 3, .5) != -1;
}

static bool has_int8_products(const Kernels& k) { return !strcmp(k.name, "avx512") || !strcmp(k.name, "amx"); }

static void decoders(const Kernels& k) {
    const bool dot_products = has_dot_products;
    for (int64_t D : {24, 13}) {
        const int64_t H = D == 24 ? 2 : 3;
        for (Packing packing : {Packing::float32, Packing::bfloat16, Packing::int8})
            decoder(k, {2, H, D, 37, 19, packing, Packing::float32});
        decoder(k, {1, H, D, 37, 5, Packing::float32, Packing::bfloat16});
        for (bool use : {true, false})
            if (dot_products || !use) {
                has_dot_products = use;
                decoder(k, {1, H, D, 37, 5, Packing::int4, Packing::float32});
                if (use && has_int8_products(k)) decoder(k, {1, H, D, 37, 5, Packing::int8, Packing::float32, true});
            }
        has_dot_products = dot_products;
    }
}

// A pool of two threads, so that a sanitizer sees the kernels' sharing.
static int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = begin; i < end; i++) threads.emplace_back([=] { body(i, i + 1, context); });
    for (auto& t : threads) t.join();
    return 0;
}

int main(int count, char** names) {
    pool.parallel_for = parallel_for;
    pool.num_threads = [](uint32_t* n) { return *n = 2, 0; };
    sampler();
    for (const Kernels* k = kernels_begin; k < kernels_end; k++) {
        if (!k->runs_here()) {
            printf("%s: not on this processor\n", k->name);
            continue;
        }
        if (count > 1 && std::none_of(names + 1, names + count, [&](const char* n) { return !strcmp(n, k->name); }))
            continue;
        all<float>(*k, std::string(k->name) + " float");
        all<double>(*k, std::string(k->name) + " double");
        if (k->has_bfloat16()) matmuls<float>(k->bfloat16, std::string(k->name) + " bfloat16", bfloat16);
        decoders(*k);
        if (k->has_bfloat16()) prompts_in_bfloat16(*k);
        printf("%s: done%s\n", k->name, k->has_bfloat16() ? ", with bfloat16 products" : "");
    }
    printf("%d passed, %d failed\n", compared - failed, failed);
    return failed > 0;
}
