// The arguments of a kernel as Python hands them over: NumPy arrays, checked and turned into what kernels.h speaks of.
//
// Nothing is ever converted or copied: what does not fit is refused with the argument's name, what came and what was
// expected. Here alone: Python checks only what NumPy can't take.
#pragma once
#include "kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h> // std::optional

#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace fastgpt {

namespace py = pybind11;
using std::string;

using Array = py::array;
using OptionalArray = std::optional<py::array>;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

// (...) of (..., C)
inline Shape leading_shape(const Array& a) { return Shape(a.shape(), a.shape() + a.ndim() - 1); }

inline string spell(const Shape& shape) {
    string s = "(";
    for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + (shape.size() == 1 ? ",)" : ")");
}

template <class T> bool holds(const Array& a) {
    const char order = a.dtype().byteorder();
    return a.dtype().num() == py::dtype::of<T>().num() && order != '>' && order != '!';
}

// Reads the arguments of one op, which all have the dtype of one of them.
template <class T> struct Arguments {
    const char* op;
    const char* leader = nullptr; // whose dtype it is

    // An input that is read as one piece.
    const T* input(const char* name, const Array& a, const Shape& shape) const {
        expect_dtype(name, a);
        expect_shape(name, a, shape);
        expect_contiguous(name, a);
        return static_cast<const T*>(a.data());
    }
    const T* input(const char* name, const OptionalArray& a, const Shape& shape) const {
        return a ? input(name, *a, shape) : nullptr;
    }

    // A result: contiguous and writable.
    T* output(const char* name, const Array& a, const Shape& shape) const {
        expect_dtype(name, a);
        expect_shape(name, a, shape);
        expect_contiguous(name, a);
        if (!a.writeable()) refuse(name, "is read-only", "memory to write to");
        return static_cast<T*>(const_cast<void*>(a.data()));
    }
    // A result that isn't wanted if its array is empty: then null.
    T* optional_output(const char* name, const Array& a, const Shape& shape) const {
        return a.ndim() == 1 && a.size() == 0 ? nullptr : output(name, a, shape);
    }

    // (..., C), of any strides but the last.
    Rows<const T> rows(const char* name, const Array& a) const {
        expect_dtype(name, a);
        if (a.ndim() < 1) refuse_shape(name, a, "shape (..., C)");
        expect_adjacent(name, a);
        Rows<const T> rows;
        rows.data = static_cast<const T*>(a.data());
        for (int i = 0; i < a.ndim() - 1; i++) {
            const int64_t size = a.shape(i), stride = a.strides(i) / int64_t(sizeof(T));
            rows.count *= size;
            if (size == 1) continue;
            if (rows.rank && rows.stride[rows.rank - 1] == size * stride) { // one row of rows with the dimension before
                rows.size[rows.rank - 1] *= size;
                rows.stride[rows.rank - 1] = stride;
                continue;
            }
            if (rows.rank == Rows<const T>::max_rank)
                refuse(name, "has " + std::to_string(a.ndim()) + " dimensions that can't be merged", "at most 8");
            rows.size[rows.rank] = size;
            rows.stride[rows.rank++] = stride;
        }
        return rows;
    }
    Rows<const T> rows(const char* name, const Array& a, const Shape& shape) const {
        expect_shape(name, a, shape);
        return rows(name, a);
    }

    // (N, K), a row for each n; `N` is how messages call the first dimension.
    Rows<const T> matrix(const char* name, const Array& a, const char* N, int64_t K) const {
        if (a.ndim() != 2 || a.shape(1) != K) refuse_shape(name, a, string("(") + N + ", " + std::to_string(K) + ")");
        return rows(name, a);
    }

    // (B, T, channels), of any strides but the last.
    Sequence<const T> sequence(const char* name, const Array& a, const Shape& shape) const {
        expect_dtype(name, a);
        expect_shape(name, a, shape);
        expect_adjacent(name, a);
        const int64_t item = sizeof(T);
        return {static_cast<const T*>(a.data()), a.strides(0) / item, a.strides(1) / item};
    }

    // The size of the last dimension.
    int64_t channels(const char* name, const Array& a) const {
        const int64_t C = a.ndim() < 1 ? 0 : a.shape(a.ndim() - 1);
        if (C == 0) refuse_shape(name, a, "at least one channel");
        return C;
    }

    void expect_eps(double eps) const {
        if (!(eps >= 0) || std::isinf(eps)) refuse("eps", "is " + std::to_string(eps), "a number >= 0");
    }

    [[noreturn]] void refuse(const char* name, const string& got, const string& expected) const {
        throw py::value_error(string(op) + ": " + name + " " + got + ", expected " + expected);
    }
    [[noreturn]] void refuse_shape(const char* name, const Array& a, const string& expected) const {
        refuse(name, "has shape " + spell(shape_of(a)), expected);
    }

    void expect_dtype(const char* name, const Array& a) const {
        if (!holds<T>(a))
            throw py::type_error(string(op) + ": " + name + " has dtype " + string(py::str(a.dtype())) + ", expected " +
                                 string(py::str(py::dtype::of<T>())) + (leader ? string(" like ") + leader : ""));
    }
    void expect_shape(const char* name, const Array& a, const Shape& shape) const {
        if (shape_of(a) != shape) refuse_shape(name, a, spell(shape));
    }
    void expect_rank(const char* name, const Array& a, int rank, const char* axes) const {
        if (a.ndim() != rank) refuse_shape(name, a, axes);
    }
    void expect_contiguous(const char* name, const Array& a) const {
        if (!(a.flags() & Array::c_style)) refuse(name, "is not contiguous", "contiguous memory");
    }
    // Values of the last dimension side by side, and every stride a whole number of values.
    void expect_adjacent(const char* name, const Array& a) const {
        const auto item = a.itemsize();
        const int last = int(a.ndim()) - 1;
        if (a.size() == 0) return;
        if (a.shape(last) > 1 && a.strides(last) != item)
            refuse(name, "has stride " + std::to_string(a.strides(last) / item) + " in its last dimension",
                   "stride 1 (call .contiguous())");
        for (int i = 0; i < last; i++)
            if (a.shape(i) > 1 && a.strides(i) % item)
                refuse(name, "has a stride of " + std::to_string(a.strides(i)) + " bytes", "whole values");
        if (reinterpret_cast<uintptr_t>(a.data()) % item) refuse(name, "is not aligned", "aligned memory");
    }
};

// body(Arguments<float>) or body(Arguments<double>), whichever `leader` holds.
template <class Body> void with_dtype_of(const char* op, const char* leader, const Array& a, const Body& body) {
    if (holds<float>(a)) return body(Arguments<float>{op, leader});
    if (holds<double>(a)) return body(Arguments<double>{op, leader});
    throw py::type_error(string(op) + ": " + leader + " has dtype " + string(py::str(a.dtype())) +
                         ", expected float32 or float64");
}

// Runs without the interpreter lock.
template <class Body> void compute(const Body& body) {
    py::gil_scoped_release unlocked;
    body();
}

} // namespace fastgpt
