// The only file that knows Python: checks every argument, lets go of the interpreter lock, calls the chosen kernels.
//
// Tensors arrive as NumPy arrays that share their memory, results are written into arrays that the caller made. Nothing
// is ever converted or copied: what does not fit is refused with the argument's name, what came and what was expected.

#include "kernels.h"
#include "parallel.h"
#include "sample.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <vector>

namespace py = pybind11;
using std::string;

namespace fastgpt {
ThreadPool pool;
}

using namespace fastgpt;

namespace {

const Kernels* kernels = nullptr; // the chosen ones

template <class T> const KernelsFor<T>& chosen();
template <> const KernelsFor<float>& chosen<float>() { return kernels->f32; }
template <> const KernelsFor<double>& chosen<double>() { return kernels->f64; }

// ------------------------------------------------------------------------------------------------ checks

using Shape = std::vector<py::ssize_t>;

string spell(const Shape& shape) {
    string s = "(";
    for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + (shape.size() == 1 ? ",)" : ")");
}

Shape shape_of(const py::array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

// An argument with what error messages need to know of it.
struct Argument {
    const char* op;
    const char* name;
    const py::array& array;

    [[noreturn]] void refuse(const string& got, const string& expected) const {
        throw py::value_error(string(op) + ": " + name + " " + got + ", expected " + expected);
    }

    bool is(int type_number) const {
        return array.dtype().num() == type_number && array.dtype().byteorder() != '>' &&
               array.dtype().byteorder() != '!';
    }

    string dtype() const { return py::str(array.dtype()); }

    template <class T> void expect_dtype(const char* like) const {
        if (!is(py::dtype::of<T>().num()))
            throw py::type_error(string(op) + ": " + name + " has dtype " + dtype() + ", expected " +
                                 string(py::str(py::dtype::of<T>())) + like);
    }

    void expect_rank(int rank, const char* axes) const {
        if (array.ndim() != rank) refuse("has shape " + spell(shape_of(array)), string("shape ") + axes);
    }

    void expect_shape(const Shape& shape) const {
        if (shape_of(array) != shape) refuse("has shape " + spell(shape_of(array)), spell(shape));
    }

    // Values of the last dimension side by side, and every stride a whole number of values.
    void expect_adjacent() const {
        const auto item = array.itemsize();
        const int last = int(array.ndim()) - 1;
        if (array.size() == 0) return;
        if (array.shape(last) > 1 && array.strides(last) != item)
            refuse("has stride " + std::to_string(array.strides(last) / item) + " in its last dimension",
                   "stride 1 (call .contiguous())");
        for (int i = 0; i < last; i++)
            if (array.shape(i) > 1 && array.strides(i) % item)
                refuse("has a stride of " + std::to_string(array.strides(i)) + " bytes", "whole values");
        if (reinterpret_cast<uintptr_t>(array.data()) % item) refuse("is not aligned", "aligned memory");
    }

    void expect_contiguous() const {
        if (!(array.flags() & py::array::c_style)) refuse("is not contiguous", "contiguous memory");
    }

    // A result: right dtype and shape, contiguous, writable.
    template <class T> T* output(const Shape& shape) const {
        expect_dtype<T>(" like the input");
        expect_shape(shape);
        expect_contiguous();
        if (!array.writeable()) refuse("is read-only", "memory to write to");
        return static_cast<T*>(const_cast<void*>(array.data()));
    }

    // An input that is read as one piece.
    template <class T> const T* input(const Shape& shape) const {
        expect_dtype<T>(" like the input");
        expect_shape(shape);
        expect_contiguous();
        return static_cast<const T*>(array.data());
    }

    template <class T> Rows<const T> rows() const {
        expect_adjacent();
        Rows<const T> rows;
        rows.data = static_cast<const T*>(array.data());
        for (int i = 0; i < array.ndim() - 1; i++) {
            const long size = array.shape(i), stride = array.strides(i) / py::ssize_t(sizeof(T));
            rows.count *= size;
            if (size == 1) continue;
            if (rows.rank && rows.stride[rows.rank - 1] == size * stride) { // one row of rows with the dimension before
                rows.size[rows.rank - 1] *= size, rows.stride[rows.rank - 1] = stride;
                continue;
            }
            if (rows.rank == Rows<const T>::max_rank)
                refuse("has " + std::to_string(array.ndim()) + " dimensions that can't be merged", "at most 8");
            rows.size[rows.rank] = size, rows.stride[rows.rank++] = stride;
        }
        return rows;
    }

    template <class T> Sequence<const T> sequence() const {
        expect_adjacent();
        const py::ssize_t item = sizeof(T);
        return {static_cast<const T*>(array.data()), array.strides(0) / item, array.strides(1) / item};
    }
};

// body(float()) or body(double()), whichever `a` holds.
template <class Body> void with_dtype(const Argument& a, const Body& body) {
    if (a.is(py::dtype::of<float>().num())) return body(float());
    if (a.is(py::dtype::of<double>().num())) return body(double());
    throw py::type_error(string(a.op) + ": " + a.name + " has dtype " + a.dtype() + ", expected float32 or float64");
}

// Runs without the interpreter lock.
template <class Body> void compute(const Body& body) {
    py::gil_scoped_release unlocked;
    body();
}

// -------------------------------------------------------------------------------------------- layer_norm

py::ssize_t channels(const Argument& x) {
    if (x.array.ndim() < 1) x.refuse("has shape ()", "shape (..., C)");
    const auto C = x.array.shape(x.array.ndim() - 1);
    if (C == 0) x.refuse("has shape " + spell(shape_of(x.array)), "at least one channel");
    return C;
}

// mean and rstd of each row, one behind the other: (2, ...)
Shape stats_shape(const py::array& x) {
    Shape shape(x.shape(), x.shape() + x.ndim() - 1);
    shape.insert(shape.begin(), 2);
    return shape;
}

void layer_norm_forward(const py::array& x, const py::array& weight, const py::array& bias, double eps,
                        const py::array& out, const py::array& stats) {
    const char* op = "layer_norm";
    const Argument input{op, "x", x};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        const auto C = channels(input);
        const auto rows = input.rows<T>();
        const T* w = Argument{op, "weight", weight}.input<T>({C});
        const T* b = Argument{op, "bias", bias}.input<T>({C});
        if (!(eps >= 0) || std::isinf(eps))
            throw py::value_error("layer_norm: eps is " + std::to_string(eps) + ", expected a number >= 0");
        T* y = Argument{op, "out", out}.output<T>(shape_of(x));
        T* mean = Argument{op, "stats", stats}.output<T>(stats_shape(x));
        compute([&] { chosen<T>().layer_norm_forward(rows, w, b, T(eps), C, y, mean, mean + rows.count); });
    });
}

void layer_norm_backward(const py::array& dout, const py::array& x, const py::array& weight, const py::array& stats,
                         const py::array& dx, const py::array& dweight, const py::array& dbias) {
    const char* op = "layer_norm_backward";
    const Argument input{op, "x", x}, gradient{op, "dout", dout};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        const auto C = channels(input);
        const auto rows = input.rows<T>();
        gradient.expect_dtype<T>(" like x");
        gradient.expect_shape(shape_of(x));
        const auto gradient_rows = gradient.rows<T>();
        const T* w = Argument{op, "weight", weight}.input<T>({C});
        const T* mean = Argument{op, "stats", stats}.input<T>(stats_shape(x));
        const T* rstd = mean + rows.count;
        T* to_x = Argument{op, "dx", dx}.output<T>(shape_of(x));
        T* to_weight = Argument{op, "dweight", dweight}.output<T>({C});
        T* to_bias = Argument{op, "dbias", dbias}.output<T>({C});
        compute(
            [&] { chosen<T>().layer_norm_backward(gradient_rows, rows, w, mean, rstd, C, to_x, to_weight, to_bias); });
    });
}

// -------------------------------------------------------------------------------------------------- gelu

void gelu_forward(const py::array& x, const py::array& out) {
    const char* op = "gelu";
    const Argument input{op, "x", x};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        if (x.ndim() < 1) input.refuse("has shape ()", "at least one dimension");
        const auto rows = input.rows<T>();
        T* y = Argument{op, "out", out}.output<T>(shape_of(x));
        const long C = x.shape(x.ndim() - 1);
        compute([&] { chosen<T>().gelu_forward(rows, C, y); });
    });
}

void gelu_backward(const py::array& dout, const py::array& x, const py::array& dx) {
    const char* op = "gelu_backward";
    const Argument input{op, "x", x}, gradient{op, "dout", dout};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        if (x.ndim() < 1) input.refuse("has shape ()", "at least one dimension");
        gradient.expect_dtype<T>(" like x");
        gradient.expect_shape(shape_of(x));
        const auto rows = input.rows<T>(), gradient_rows = gradient.rows<T>();
        T* to_x = Argument{op, "dx", dx}.output<T>(shape_of(x));
        const long C = x.shape(x.ndim() - 1);
        compute([&] { chosen<T>().gelu_backward(gradient_rows, rows, C, to_x); });
    });
}

// ------------------------------------------------------------------------------------------------ linear

// Where an optional result goes; null for None.
template <class T> T* optional_output(const char* op, const char* name, const py::object& object, const Shape& shape) {
    if (object.is_none()) return nullptr;
    const auto array = py::cast<py::array>(object);
    return Argument{op, name, array}.output<T>(shape);
}

// Lines of a matrix: all leading dimensions are one.
template <class T> Rows<const T> lines(const Argument& a, long& count, long& width) {
    a.expect_dtype<T>(" like the other arguments");
    width = channels(a);
    const auto rows = a.rows<T>();
    count = rows.count;
    return rows;
}

void refuse_product(const Argument& a, const string& expected) {
    a.refuse("has shape " + spell(shape_of(a.array)), expected);
}

// The weight of a product: a matrix of lines as wide as the input. axes: "(N, K)"
template <class T> Rows<const T> weight_lines(const Argument& weight, const string& axes, long K, long& N) {
    long width;
    weight.expect_rank(2, axes.c_str());
    const auto rows = lines<T>(weight, N, width);
    if (width != K) refuse_product(weight, axes.substr(0, 3) + " " + std::to_string(K) + ")");
    return rows;
}

// With `activated`: out = y, activated = gelu(y). They may be one array, which then holds gelu(y) alone.
void linear_forward(const py::array& x, const py::array& weight, const py::object& bias, const py::array& out,
                    const py::object& activated) {
    const char* op = activated.is_none() ? "linear" : "linear_gelu";
    const Argument input{op, "x", x}, matrix{op, "weight", weight};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        long M, K, N;
        const auto A = lines<T>(input, M, K);
        const auto B = weight_lines<T>(matrix, "(N, K)", K, N);
        const T* b = nullptr;
        if (!bias.is_none()) {
            const auto array = py::cast<py::array>(bias);
            b = Argument{op, "bias", array}.input<T>({N});
        }
        Shape shape = shape_of(x);
        shape.back() = N;
        T* y = Argument{op, "out", out}.output<T>(shape);
        T* g = optional_output<T>(op, "activated", activated, shape);
        compute([&] { chosen<T>().matmul({M, N, K, A, false, B, true, y, false, b, g}); });
    });
}

// dx unless it is None, dweight unless it is None.
void linear_backward(const py::array& dout, const py::array& x, const py::array& weight, const py::object& dx,
                     const py::object& dweight) {
    const char* op = "linear_backward";
    const Argument input{op, "x", x}, matrix{op, "weight", weight}, gradient{op, "dout", dout};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        long M, K, N, M_gradient, N_gradient;
        const auto X = lines<T>(input, M, K);
        const auto W = weight_lines<T>(matrix, "(N, K)", K, N);
        Shape shape = shape_of(x);
        shape.back() = N;
        gradient.expect_shape(shape);
        const auto G = lines<T>(gradient, M_gradient, N_gradient);
        T* to_x = optional_output<T>(op, "dx", dx, shape_of(x));
        T* to_weight = optional_output<T>(op, "dweight", dweight, {N, K});
        compute([&] {
            if (to_x) chosen<T>().matmul({M, K, N, G, false, W, false, to_x});
            if (to_weight) chosen<T>().matmul({N, K, M, G, true, X, false, to_weight});
        });
    });
}

// ----------------------------------------------------------------------------------------------- lm_loss

// -> the loss; the gradients for dloss = 1 into dhidden and dweight, unless they are None.
double lm_loss(const py::array& hidden, const py::array& weight, const py::array& targets, const py::object& dhidden,
               const py::object& dweight) {
    const char* op = "lm_loss";
    const Argument input{op, "hidden", hidden}, matrix{op, "weight", weight}, indices{op, "targets", targets};
    double loss = 0;
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        long M, C, V;
        const auto H = lines<T>(input, M, C);
        const auto W = weight_lines<T>(matrix, "(V, C)", C, V);
        if (V == 0) refuse_product(matrix, "at least one token");
        Shape shape = shape_of(hidden);
        shape.pop_back();
        const int64_t* t = indices.input<int64_t>(shape);
        for (long i = 0; i < M; i++)
            if (t[i] < -1 || t[i] >= V)
                throw py::value_error("lm_loss: targets has " + std::to_string(t[i]) +
                                      ", expected -1 or 0 <= target < V=" + std::to_string(V));
        T* to_hidden = optional_output<T>(op, "dhidden", dhidden, shape_of(hidden));
        T* to_weight = optional_output<T>(op, "dweight", dweight, {V, C});
        compute([&] { loss = chosen<T>().lm_loss(H, W, t, M, C, V, to_hidden, to_weight); });
    });
    return loss;
}

// --------------------------------------------------------------------------------------------- attention

AttentionShape attention_shape(const Argument& qkv, long n_head, double dropout, uint64_t seed) {
    qkv.expect_rank(3, "(B, T, 3C)");
    const long channels = qkv.array.shape(2);
    if (n_head < 1)
        throw py::value_error(string(qkv.op) + ": n_head is " + std::to_string(n_head) + ", expected 1 or more");
    if (channels == 0) qkv.refuse("has shape " + spell(shape_of(qkv.array)), "at least one channel");
    if (channels % (3 * n_head))
        throw py::value_error(string(qkv.op) + ": qkv has " + std::to_string(channels) +
                              " channels, not a multiple of 3*n_head=" + std::to_string(3 * n_head));
    if (!(dropout >= 0 && dropout < 1))
        throw py::value_error(string(qkv.op) + ": dropout is " + std::to_string(dropout) +
                              ", expected 0 <= dropout < 1");
    return {long(qkv.array.shape(0)), long(qkv.array.shape(1)), n_head, channels / (3 * n_head), dropout, seed};
}

void attention_forward(const py::array& qkv, long n_head, double dropout, uint64_t seed, const py::array& out,
                       const py::array& stats) {
    const char* op = "attention";
    const Argument input{op, "qkv", qkv};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        const auto s = attention_shape(input, n_head, dropout, seed);
        const auto packed = input.sequence<T>();
        T* o = Argument{op, "out", out}.output<T>({s.B, s.T, s.H * s.D});
        T* m = Argument{op, "stats", stats}.output<T>({2, s.B, s.H, s.T});
        if (s.B > 0 && s.T > 0) compute([&] { chosen<T>().attention_forward(s, packed, o, m); });
    });
}

void attention_backward(const py::array& dout, const py::array& qkv, const py::array& out, const py::array& stats,
                        long n_head, double dropout, uint64_t seed, const py::array& dqkv) {
    const char* op = "attention_backward";
    const Argument input{op, "qkv", qkv}, gradient{op, "dout", dout}, output{op, "out", out};
    with_dtype(input, [&](auto zero) {
        using T = decltype(zero);
        const auto s = attention_shape(input, n_head, dropout, seed);
        const auto packed = input.sequence<T>();
        for (const Argument* a : {&gradient, &output}) {
            a->expect_dtype<T>(" like qkv");
            a->expect_shape({s.B, s.T, s.H * s.D});
        }
        const auto g = gradient.sequence<T>(), o = output.sequence<T>();
        const T* m = Argument{op, "stats", stats}.input<T>({2, s.B, s.H, s.T});
        T* to_qkv = Argument{op, "dqkv", dqkv}.output<T>({s.B, s.T, 3 * s.H * s.D});
        if (s.B > 0 && s.T > 0) compute([&] { chosen<T>().attention_backward(s, g, packed, o, m, to_qkv); });
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

double read_work(const py::array& data) {
    const Argument a{"read_work", "data", data};
    a.expect_dtype<float>("");
    a.expect_contiguous();
    double sum = 0, bytes = 0;
    compute([&] { bytes = kernels->read_work(static_cast<const float*>(data.data()), data.size(), &sum); });
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

    const auto arg = [](const char* name) { return py::arg(name).noconvert(); };
    m.def("layer_norm_forward", layer_norm_forward, arg("x"), arg("weight"), arg("bias"), py::arg("eps"), arg("out"),
          arg("stats"));
    m.def("layer_norm_backward", layer_norm_backward, arg("dout"), arg("x"), arg("weight"), arg("stats"), arg("dx"),
          arg("dweight"), arg("dbias"));
    m.def("gelu_forward", gelu_forward, arg("x"), arg("out"));
    m.def("gelu_backward", gelu_backward, arg("dout"), arg("x"), arg("dx"));
    m.def("linear_forward", linear_forward, arg("x"), arg("weight"), py::arg("bias"), arg("out"),
          py::arg("activated") = py::none());
    m.def("linear_backward", linear_backward, arg("dout"), arg("x"), arg("weight"), py::arg("dx"), py::arg("dweight"));
    m.def("lm_loss", lm_loss, arg("hidden"), arg("weight"), arg("targets"), py::arg("dhidden"), py::arg("dweight"));
    m.def("attention_forward", attention_forward, arg("qkv"), py::arg("n_head"), py::arg("dropout"), py::arg("seed"),
          arg("out"), arg("stats"));
    m.def("attention_backward", attention_backward, arg("dout"), arg("qkv"), arg("out"), arg("stats"),
          py::arg("n_head"), py::arg("dropout"), py::arg("seed"), arg("dqkv"));

    bind_decoder(m);

    m.def("isas", isas, "The instruction sets that this build has and this processor runs, oldest first.");
    m.def(
        "isa", [] { return kernels->name; }, "The instruction set in use.");
    m.def("set_isa", set_isa, py::arg("name"));
    m.def(
        "use_thread_pool",
        [](uintptr_t parallel_for, uintptr_t threads) {
            pool.parallel_for = reinterpret_cast<decltype(pool.parallel_for)>(parallel_for);
            pool.num_threads = reinterpret_cast<decltype(pool.num_threads)>(threads);
        },
        py::arg("torch_parallel_for"), py::arg("torch_get_num_threads"), "Take torch's pool; addresses from ctypes.");
    m.def("num_threads", num_threads);
    m.def(
        "fma_work",
        [](long n) {
            double operations = 0;
            compute([&] { operations = kernels->fma_work(n); });
            return operations;
        },
        py::arg("n"), "n rounds of multiply-adds in registers on every thread -> floating-point operations");
    m.def("read_work", read_work, arg("data"), "Adds up a float32 array on all threads -> bytes read");
}
