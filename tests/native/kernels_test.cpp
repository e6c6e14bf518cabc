// The kernels alone, without Python: each against its formula in plain loops, on every instruction set that this
// processor has. For processors that only an emulator has, and for sanitizers.
//
// The rule is fastgpt/check.py's: truth is the formula in more digits (here long double), and a kernel may be as far
// from it as the formula may be by its own rounding, for the largest error and for the mean square. How far that is
// shows a sample: the same loops over numbers that err at random after each operation (Noisy). Exit status: 1 if any
// tensor fails.

#include "../../csrc/kernels.h"
#include "../../csrc/parallel.h"

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
        printf("%s: done%s\n", k->name, k->has_bfloat16() ? ", with bfloat16 products" : "");
    }
    printf("%d passed, %d failed\n", compared - failed, failed);
    return failed > 0;
}
