// Launchers take PyTorch's tensors by the tensors' own attributes, so that no header of PyTorch is needed.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <array>

#include "attention/attention.h"
#include "matmul/matrix.h"

namespace gpt1 {

/// The name of an attribute or of a method without arguments, made once.
class Name {
public:
    explicit Name(const char* text) : name_(PyUnicode_InternFromString(text)) {}

    pybind11::object of(pybind11::handle object) const {
        return checked(PyObject_GetAttr(object.ptr(), name_));
    }
    pybind11::object call(pybind11::handle object) const {
        return checked(PyObject_CallMethodNoArgs(object.ptr(), name_));
    }

private:
    static pybind11::object checked(PyObject* result) {
        if (result == nullptr) throw pybind11::error_already_set();
        return pybind11::reinterpret_steal<pybind11::object>(result);
    }

    PyObject* name_;
};

inline std::int64_t number(pybind11::handle object) { return object.cast<std::int64_t>(); }

inline pybind11::tuple sizes_of(pybind11::handle tensor) {
    static const Name shape("shape");
    return shape.of(tensor);
}

inline pybind11::tuple strides_of(pybind11::handle tensor) {
    static const Name stride("stride");
    return stride.call(tensor);
}

inline Array array_of(pybind11::handle tensor) {
    static const Name numel("numel"), data_ptr("data_ptr"), is_contiguous("is_contiguous");
    if (tensor.is_none()) return {};
    std::int64_t extent = number(numel.call(tensor));
    if (extent == 0) return {};
    if (!is_contiguous.call(tensor).cast<bool>()) {
        const pybind11::tuple sizes = sizes_of(tensor), strides = strides_of(tensor);
        extent = 1;
        for (std::size_t i = 0; i < sizes.size(); ++i) extent += (number(sizes[i]) - 1) * number(strides[i]);
    }
    return {data_ptr.call(tensor).cast<std::uintptr_t>(), extent};
}

/// The dtypes of PyTorch, in the order of DType.
inline const std::array<pybind11::handle, 3>& dtypes() {
    using Dtypes = std::array<pybind11::handle, 3>;
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<Dtypes> storage;
    return storage
        .call_once_and_store_result([] {
            const auto torch = pybind11::module_::import("torch");
            const auto dtype = [&](const char* name) { return pybind11::object(torch.attr(name)).release(); };
            return Dtypes{dtype("float32"), dtype("bfloat16"), dtype("float16")};
        })
        .get_stored();
}

inline void read(pybind11::handle source, DType& dtype) {
    for (std::size_t i = 0; i < dtypes().size(); ++i) {
        if (source.is(dtypes()[i])) {
            dtype = static_cast<DType>(i);
            return;
        }
    }
    throw pybind11::type_error(std::string(pybind11::str(source)) +
                               ", expected float32, bfloat16 or float16");
}

inline void read(pybind11::handle tensor, Array& array) { array = array_of(tensor); }

inline void read(pybind11::handle tensor, TypedArray& array) {
    static const Name dtype("dtype");
    if (tensor.is_none()) return;
    array.array = array_of(tensor);
    read(dtype.of(tensor), array.dtype);
}

inline void read(pybind11::handle tensor, Matrix& matrix) {
    const pybind11::tuple sizes = sizes_of(tensor);
    matrix = {array_of(tensor), number(sizes[0]), number(sizes[1]), number(strides_of(tensor)[0])};
}

inline void read(pybind11::handle tensor, HeadsArray& heads) {
    if (tensor.is_none()) return;
    const pybind11::tuple strides = strides_of(tensor);
    heads = {array_of(tensor), number(strides[0]), number(strides[1]), number(strides[2])};
}

}  // namespace gpt1

namespace pybind11::detail {

template <class T>
struct gpt1_caster {
    PYBIND11_TYPE_CASTER(T, const_name("torch.Tensor | None"));
    bool load(handle source, bool) {
        gpt1::read(source, value);
        return true;
    }
};

template <>
struct type_caster<gpt1::DType> : gpt1_caster<gpt1::DType> {};
template <>
struct type_caster<gpt1::Array> : gpt1_caster<gpt1::Array> {};
template <>
struct type_caster<gpt1::TypedArray> : gpt1_caster<gpt1::TypedArray> {};
template <>
struct type_caster<gpt1::Matrix> : gpt1_caster<gpt1::Matrix> {};
template <>
struct type_caster<gpt1::HeadsArray> : gpt1_caster<gpt1::HeadsArray> {};

}  // namespace pybind11::detail
