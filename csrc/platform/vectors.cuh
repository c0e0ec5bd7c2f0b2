// Conversions of whole vectors, and the choice of a kernel by dtype: the same on GPU and CPU.
#pragma once

#include <cstring>

#include "platform/types.h"

namespace gpt1 {

/// How many elements are 16 bytes, the widest access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

template <class T, int N>
__device__ __forceinline__ Vector<float, N> widen(const Vector<T, N>& x) {
    Vector<float, N> wide;
    if constexpr (sizeof(T) == 4) {
        for (int i = 0; i < N; ++i) wide[i] = x[i];
    } else {
        for (int i = 0; i < N; i += 2) {
            std::uint32_t word;
            memcpy(&word, &x[i], 4);
            const Pair pair = unpack<T>(word);
            wide[i] = pair.low;
            wide[i + 1] = pair.high;
        }
    }
    return wide;
}

template <class T, int N>
__device__ __forceinline__ Vector<T, N> narrow(const Vector<float, N>& x) {
    Vector<T, N> narrowed;
    if constexpr (sizeof(T) == 4) {
        for (int i = 0; i < N; ++i) narrowed[i] = x[i];
    } else {
        for (int i = 0; i < N; i += 2) {
            const std::uint32_t word = pack<T>(x[i], x[i + 1]);
            memcpy(&narrowed[i], &word, 4);
        }
    }
    return narrowed;
}

/// Calls `function` with a value of the type that `dtype` names.
template <class Function>
void dispatch(DType dtype, Function function) {
    switch (dtype) {
        case kFloat32: return function(float{});
        case kBFloat16: return function(bf16{});
        case kFloat16: return function(fp16{});
    }
}

/// As `dispatch`, for kernels on the tensor cores.
template <class Function>
void dispatch_narrow(DType dtype, Function function) {
    switch (dtype) {
        case kBFloat16: return function(bf16{});
        case kFloat16: return function(fp16{});
        default: throw std::invalid_argument("float32, expected bfloat16 or float16");
    }
}

}  // namespace gpt1
