// The only file that knows Python, with arguments.h: checks every argument, lets go of the interpreter lock, calls the
// chosen kernels.
//
// A kernel's function takes what its op in fastgpt/ops.py takes, and then an array to write into for each result.

#include "arguments.h"
#include "kernels.h"
#include "parallel.h"
#include "sample.h"

namespace fastgpt {
ThreadPool pool;
}

using namespace fastgpt;
using namespace py::literals;

namespace {

const Kernels* kernels = nullptr; // the chosen ones
const KernelsFor<float>& chosen(const Arguments<float>&) { return kernels->f32; }
const KernelsFor<double>& chosen(const Arguments<double>&) { return kernels->f64; }

bool has_bfloat16() { return kernels->has_bfloat16(); }

// Throws where there are no bfloat16 products.
void expect_bfloat16(const string& who) {
    if (has_bfloat16()) return;
    string here;
    for (const Kernels* k = kernels_begin; k < kernels_end; k++)
        if (k->runs_here())
            here += (here.empty() ? "" : ", ") + string(k->name) + (k->has_bfloat16() ? " with bfloat16" : "");
    throw py::value_error(who + ": bfloat16 products need AVX-512 BF16, AMX or ARM's BF16; in use is " + kernels->name +
                          ", and this processor has " + here);
}

// The kernels that are made of matrix products: on float32 or float64, or on float32 in bfloat16 products.
const ProductsFor<float>& products(const Arguments<float>& args, bool bfloat16) {
    if (bfloat16) expect_bfloat16(args.op);
    return bfloat16 ? kernels->bfloat16 : kernels->f32;
}
const ProductsFor<double>& products(const Arguments<double>& args, bool bfloat16) {
    if (bfloat16)
        throw py::type_error(string(args.op) + ": " + args.leader +
                             " has dtype float64, expected float32 (bfloat16 products)");
    return kernels->f64;
}

// Below, x_ is an array from Python, and x what a kernel gets of it.

// -------------------------------------------------------------------------------------------- layer_norm

// mean and rstd of each row, one after the other: (2, ...)
Shape stats_shape(const Array& x_) {
    Shape shape = leading_shape(x_);
    shape.insert(shape.begin(), 2);
    return shape;
}

void layer_norm_forward(const Array& x_, const Array& weight_, const Array& bias_, double eps, const Array& out_,
                        const Array& stats_) {
    with_dtype_of("layer_norm", "x", x_, [&](auto args) {
        const auto x = args.rows("x", x_);
        const int64_t C = args.channels("x", x_);
        const auto weight = args.input("weight", weight_, {C});
        const auto bias = args.input("bias", bias_, {C});
        args.expect_eps(eps);
        const auto out = args.output("out", out_, shape_of(x_));
        const auto mean = args.output("stats", stats_, stats_shape(x_)), rstd = mean + x.count;
        compute([&] { chosen(args).layer_norm_forward(x, weight, bias, eps, C, out, mean, rstd); });
    });
}

void layer_norm_backward(const Array& dout_, const Array& x_, const Array& weight_, const Array& stats_,
                         const Array& dx_, const Array& dweight_, const Array& dbias_) {
    with_dtype_of("layer_norm_backward", "x", x_, [&](auto args) {
        const auto x = args.rows("x", x_), dout = args.rows("dout", dout_, shape_of(x_));
        const int64_t C = args.channels("x", x_);
        const auto weight = args.input("weight", weight_, {C});
        const auto mean = args.input("stats", stats_, stats_shape(x_)), rstd = mean + x.count;
        const auto dx = args.output("dx", dx_, shape_of(x_));
        const auto dweight = args.output("dweight", dweight_, {C}), dbias = args.output("dbias", dbias_, {C});
        compute([&] { chosen(args).layer_norm_backward(dout, x, weight, mean, rstd, C, dx, dweight, dbias); });
    });
}

// -------------------------------------------------------------------------------------------------- gelu

void gelu_forward(const Array& x_, const Array& out_) {
    with_dtype_of("gelu", "x", x_, [&](auto args) {
        const auto x = args.rows("x", x_);
        const int64_t C = shape_of(x_).back();
        const auto out = args.output("out", out_, shape_of(x_));
        compute([&] { chosen(args).gelu_forward(x, C, out); });
    });
}

void gelu_backward(const Array& dout_, const Array& x_, const Array& dx_) {
    with_dtype_of("gelu_backward", "x", x_, [&](auto args) {
        const auto x = args.rows("x", x_), dout = args.rows("dout", dout_, shape_of(x_));
        const int64_t C = shape_of(x_).back();
        const auto dx = args.output("dx", dx_, shape_of(x_));
        compute([&] { chosen(args).gelu_backward(dout, x, C, dx); });
    });
}

// ------------------------------------------------------------------------------------------------ linear

// What y = x weight^T takes: x (M, K), all its leading dimensions in one, and weight (N, K).
template <class T> struct Operands {
    Rows<const T> x, weight;
    int64_t M, K, N;
    Shape y_shape;

    Operands(const Arguments<T>& args, const char* name, const Array& x_, const Array& weight_, const char* N_name)
        : x(args.rows(name, x_)), y_shape(shape_of(x_)) {
        M = x.count;
        K = args.channels(name, x_);
        weight = args.matrix("weight", weight_, N_name, K);
        y_shape.back() = N = weight.count;
    }
};

void linear_forward(const Array& x_, const Array& weight_, const OptionalArray& bias_, bool bfloat16,
                    const Array& out_) {
    with_dtype_of("linear", "x", x_, [&](auto args) {
        const Operands of(args, "x", x_, weight_, "N");
        const auto bias = args.input("bias", bias_, {of.N});
        const auto out = args.output("out", out_, of.y_shape);
        const auto matmul = products(args, bfloat16).matmul;
        compute([&] { matmul({of.M, of.N, of.K, of.x, false, of.weight, true, out, false, bias}); });
    });
}

// inner: linear's result, for gelu's backward.
void linear_gelu_forward(const Array& x_, const Array& weight_, const OptionalArray& bias_, bool bfloat16,
                         const Array& out_, const Array& inner_) {
    with_dtype_of("linear_gelu", "x", x_, [&](auto args) {
        const Operands of(args, "x", x_, weight_, "N");
        const auto bias = args.input("bias", bias_, {of.N});
        const auto out = args.output("out", out_, of.y_shape);
        const auto inner = args.optional_output("inner", inner_, of.y_shape), y = inner ? inner : out;
        const auto matmul = products(args, bfloat16).matmul;
        compute([&] { matmul({of.M, of.N, of.K, of.x, false, of.weight, true, y, false, bias, out}); });
    });
}

void linear_backward(const Array& dout_, const Array& x_, const Array& weight_, bool bfloat16, const Array& dx_,
                     const Array& dweight_) {
    with_dtype_of("linear_backward", "x", x_, [&](auto args) {
        const Operands of(args, "x", x_, weight_, "N");
        const auto dout = args.rows("dout", dout_, of.y_shape);
        args.channels("dout", dout_);
        const auto dx = args.optional_output("dx", dx_, shape_of(x_));
        const auto dweight = args.optional_output("dweight", dweight_, {of.N, of.K});
        const auto matmul = products(args, bfloat16).matmul;
        compute([&] {
            if (dx) matmul({of.M, of.K, of.N, dout, false, of.weight, false, dx});
            if (dweight) matmul({of.N, of.K, of.M, dout, true, of.x, false, dweight});
        });
    });
}

// ----------------------------------------------------------------------------------------------- lm_loss

// dhidden and dweight: the gradients for dloss = 1.
void lm_loss_forward(const Array& hidden_, const Array& weight_, const Array& targets_, bool bfloat16,
                     const Array& loss_, const Array& dhidden_, const Array& dweight_) {
    with_dtype_of("lm_loss", "hidden", hidden_, [&](auto args) {
        const Operands of(args, "hidden", hidden_, weight_, "V");
        const int64_t V = of.N, C = of.K;
        if (V == 0) args.refuse_shape("weight", weight_, "at least one token");
        const auto targets = Arguments<int64_t>{"lm_loss"}.input("targets", targets_, leading_shape(hidden_));
        for (int64_t i = 0; i < of.M; i++)
            if (targets[i] < -1 || targets[i] >= V)
                args.refuse("targets", "has " + std::to_string(targets[i]),
                            "-1 or 0 <= target < V=" + std::to_string(V));
        const auto loss = args.output("loss", loss_, {});
        const auto dhidden = args.optional_output("dhidden", dhidden_, shape_of(hidden_));
        const auto dweight = args.optional_output("dweight", dweight_, {V, C});
        const auto lm_loss = products(args, bfloat16).lm_loss;
        compute([&] { *loss = lm_loss(of.x, of.weight, targets, of.M, C, V, dhidden, dweight); });
    });
}

// --------------------------------------------------------------------------------------------- attention

template <class T> AttentionShape attention_shape(const Arguments<T>& args, const Array& qkv_, int64_t n_head,
                                                  double dropout, const py::int_& seed) {
    if (qkv_.ndim() != 3) args.refuse_shape("qkv", qkv_, "shape (B, T, 3C)");
    const int64_t channels = args.channels("qkv", qkv_);
    if (n_head < 1) args.refuse("n_head", "is " + std::to_string(n_head), "1 or more");
    if (channels % (3 * n_head))
        throw py::value_error(string(args.op) + ": qkv has " + std::to_string(channels) +
                              " channels, not a multiple of 3*n_head=" + std::to_string(3 * n_head));
    if (!(dropout >= 0 && dropout < 1)) args.refuse("dropout", "is " + std::to_string(dropout), "0 <= dropout < 1");
    int overflow = 0;
    const long long key = PyLong_AsLongLongAndOverflow(seed.ptr(), &overflow);
    if (overflow || key < 0) args.refuse("seed", "is " + string(py::str(seed)), "0 <= seed < 2**63");
    return {int64_t(qkv_.shape(0)), int64_t(qkv_.shape(1)), n_head, channels / (3 * n_head), dropout, uint64_t(key)};
}

void attention_forward(const Array& qkv_, int64_t n_head, double dropout, const py::int_& seed, bool bfloat16,
                       const Array& out_, const Array& stats_) {
    with_dtype_of("attention", "qkv", qkv_, [&](auto args) {
        const auto s = attention_shape(args, qkv_, n_head, dropout, seed);
        const auto qkv = args.sequence("qkv", qkv_, {s.B, s.T, 3 * s.H * s.D});
        const auto out = args.output("out", out_, {s.B, s.T, s.H * s.D});
        const auto stats = args.output("stats", stats_, {2, s.B, s.H, s.T});
        const auto attention = products(args, bfloat16).attention_forward;
        if (s.B > 0 && s.T > 0) compute([&] { attention(s, qkv, out, stats); });
    });
}

void attention_backward(const Array& dout_, const Array& qkv_, const Array& out_, const Array& stats_, int64_t n_head,
                        double dropout, const py::int_& seed, bool bfloat16, const Array& dqkv_) {
    with_dtype_of("attention_backward", "qkv", qkv_, [&](auto args) {
        const auto s = attention_shape(args, qkv_, n_head, dropout, seed);
        const auto qkv = args.sequence("qkv", qkv_, {s.B, s.T, 3 * s.H * s.D});
        const auto dout = args.sequence("dout", dout_, {s.B, s.T, s.H * s.D});
        const auto out = args.sequence("out", out_, {s.B, s.T, s.H * s.D});
        const auto stats = args.input("stats", stats_, {2, s.B, s.H, s.T});
        const auto dqkv = args.output("dqkv", dqkv_, shape_of(qkv_));
        const auto attention = products(args, bfloat16).attention_backward;
        if (s.B > 0 && s.T > 0) compute([&] { attention(s, dout, qkv, out, stats, dqkv); });
    });
}

// ------------------------------------------------------------------------------------------------ decoder

#include "decoder_bindings.h"

// ------------------------------------------------------------------------------- instruction set, threads

py::list isas() {
    py::list names;
    for (const Kernels* k = kernels_begin; k < kernels_end; k++)
        if (k->runs_here()) names.append(k->name);
    return names;
}

void set_isa(const string& name) {
    string known;
    for (const Kernels* k = kernels_begin; k < kernels_end; k++) {
        if (name == k->name && k->runs_here()) {
            kernels = k;
            return;
        }
        known += (known.empty() ? "" : ", ") + string(k->name) + (k->runs_here() ? "" : " (not on this processor)");
    }
    throw py::value_error("FASTGPT_ISA is '" + name + "', expected one of: " + known);
}

double read_work(const Array& data) {
    const float* values = Arguments<float>{"read_work"}.input("data", data, shape_of(data));
    double sum = 0, bytes = 0;
    compute([&] { bytes = kernels->read_work(values, data.size(), &sum); });
    return bytes;
}

} // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "Fused kernels for GPT-2 on NumPy arrays. Results are written into arrays that the caller passes.";
    for (const Kernels* k = kernels_begin; k < kernels_end; k++)
        if (k->runs_here()) kernels = k; // the newest that runs
    if (!kernels)
        throw py::import_error("this build has kernels for " + string(kernels_begin->name) +
                               " alone, which this processor lacks: build again without FASTGPT_BUILD_ISA");

    m.def("layer_norm_forward", layer_norm_forward, "x"_a, "weight"_a, "bias"_a, "eps"_a, "out"_a, "stats"_a);
    m.def("layer_norm_backward", layer_norm_backward, "dout"_a, "x"_a, "weight"_a, "stats"_a, "dx"_a, "dweight"_a,
          "dbias"_a);
    m.def("gelu_forward", gelu_forward, "x"_a, "out"_a);
    m.def("gelu_backward", gelu_backward, "dout"_a, "x"_a, "dx"_a);
    m.def("linear_forward", linear_forward, "x"_a, "weight"_a, "bias"_a, "bfloat16"_a, "out"_a);
    m.def("linear_gelu_forward", linear_gelu_forward, "x"_a, "weight"_a, "bias"_a, "bfloat16"_a, "out"_a, "inner"_a);
    m.def("linear_backward", linear_backward, "dout"_a, "x"_a, "weight"_a, "bfloat16"_a, "dx"_a, "dweight"_a);
    m.def("lm_loss_forward", lm_loss_forward, "hidden"_a, "weight"_a, "targets"_a, "bfloat16"_a, "loss"_a, "dhidden"_a,
          "dweight"_a);
    m.def("attention_forward", attention_forward, "qkv"_a, "n_head"_a, "dropout"_a, "seed"_a, "bfloat16"_a, "out"_a,
          "stats"_a);
    m.def("attention_backward", attention_backward, "dout"_a, "qkv"_a, "out"_a, "stats"_a, "n_head"_a, "dropout"_a,
          "seed"_a, "bfloat16"_a, "dqkv"_a);

    bind_decoder(m);

    m.def("isas", isas, "The instruction sets that this build has and this processor runs, oldest first.");
    m.def(
        "isa", [] { return kernels->name; }, "The instruction set in use.");
    m.def("set_isa", set_isa, "name"_a);
    m.def("has_bfloat16", has_bfloat16, "Does the instruction set in use have bfloat16 products here?");
    m.def("expect_bfloat16", expect_bfloat16, "who"_a, "ValueError, in the name of `who`, where it has none.");
    m.def(
        "use_thread_pool",
        [](uintptr_t parallel_for, uintptr_t threads) {
            pool.parallel_for = reinterpret_cast<decltype(pool.parallel_for)>(parallel_for);
            pool.num_threads = reinterpret_cast<decltype(pool.num_threads)>(threads);
        },
        "torch_parallel_for"_a, "torch_get_num_threads"_a, "Take torch's pool; addresses from ctypes.");
    m.def("num_threads", num_threads);
    m.def(
        "multiply_add_work",
        [](int64_t n, bool bfloat16) {
            const auto work = products(Arguments<float>{"multiply_add_work"}, bfloat16).work;
            double operations = 0;
            compute([&] { operations = work(n); });
            return operations;
        },
        "n"_a, "bfloat16"_a, "n rounds of multiply-adds in registers on every thread -> floating-point operations");
    m.def("read_work", read_work, "data"_a, "Adds up a float32 array on all threads -> bytes read");
}
