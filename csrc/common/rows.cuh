// Rows in registers: neighbouring columns as one vector, and arrays whose dtype is known when a kernel runs.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

/// Whether rows of C columns start at multiples of 16 bytes and end there.
template <class T>
bool aligned_rows(Array array, std::int64_t stride, std::int64_t C) {
    return array.address % 16 == 0 && stride % kVector<T> == 0 && C % kVector<T> == 0;
}

template <int N>
__device__ __forceinline__ void add(Vector<float, N>& sum, const Vector<float, N>& x) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += x[j];
}

// Vectors of 2-byte elements are put together and taken apart by words: the compiler would give each
// element a register of its own, and split a vector as soon as it is loaded.

template <class T>
__device__ __forceinline__ std::uint32_t bits_of(T x) {
    std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t> bits;
    memcpy(&bits, &x, sizeof(T));
    return bits;
}

/// Of a word's lower bits.
template <class T>
__device__ __forceinline__ T element_of(std::uint32_t word) {
    const auto bits = static_cast<std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>>(word);
    T x;
    memcpy(&x, &bits, sizeof(T));
    return x;
}

/// N columns from element i on, of which the row has `count`; zeros beyond. In accesses of 16 bytes
/// where rows are aligned, a branch that all threads take together.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_columns(
    const Global<const T>& from, std::int64_t i, int count, bool aligned, Site site = Site::current()) {
    Vector<T, N> x;
    if (aligned) {
        constexpr int kAccess = N < kVector<T> ? N : kVector<T>;
#pragma unroll
        for (int j = 0; j < N; j += kAccess) {
            const auto part = from.template load_vector<kAccess>(i + j, j < count, site);
            memcpy(&x[j], &part, sizeof(part));
        }
    } else {
        constexpr int kOfWord = 4 / sizeof(T);
#pragma unroll
        for (int j = 0; j < N; j += kOfWord) {
            std::uint32_t word = 0;
#pragma unroll
            for (int k = 0; k < kOfWord; ++k) {
                word |= bits_of(from.load(i + j + k, j + k < count, site)) << 16 * k;
            }
            memcpy(&x[j], &word, 4);
        }
    }
    return x;
}

template <int N, class T>
__device__ __forceinline__ void store_columns(
    const Global<T>& to, std::int64_t i, const Vector<T, N>& x, int count, bool aligned,
    Site site = Site::current()) {
    if (aligned) {
        constexpr int kAccess = N < kVector<T> ? N : kVector<T>;
#pragma unroll
        for (int j = 0; j < N; j += kAccess) {
            Vector<T, kAccess> part;
            memcpy(&part, &x[j], sizeof(part));
            to.store_vector(i + j, part, j < count, site);
        }
    } else {
        constexpr int kOfWord = 4 / sizeof(T);
#pragma unroll
        for (int j = 0; j < N; j += kOfWord) {
            std::uint32_t word;
            memcpy(&word, &x[j], 4);
#pragma unroll
            for (int k = 0; k < kOfWord; ++k) {
                to.store(i + j + k, element_of<T>(word >> 16 * k), j + k < count, site);
            }
        }
    }
}

/// An array of any dtype that `DType` numbers: for parameters, which may be fp32 beside activations
/// that are not, and their gradients.
template <bool kConst>
class FloatArray {
    template <class T>
    using View = Global<std::conditional_t<kConst, const T, T>>;

public:
    FloatArray() = default;
    explicit FloatArray(TypedArray array) {
        dispatch(array.dtype, [&](auto element) {
            using T = decltype(element);
            view<T>() = View<T>(array.array);
        });
    }

    __device__ __forceinline__ explicit operator bool() const { return fp32_ || bf16_ || fp16_; }

    __device__ __forceinline__ float load(
        std::int64_t i, bool mask = true, Site site = Site::current()) const {
        if (fp32_) return fp32_.load(i, mask, site);
        if (bf16_) return to_float(bf16_.load(i, mask, site));
        return to_float(fp16_.load(i, mask, site));
    }

    __device__ __forceinline__ void store(
        std::int64_t i, float value, bool mask = true, Site site = Site::current()) const {
        if (fp32_) fp32_.store(i, value, mask, site);
        else if (bf16_) bf16_.store(i, from_float<bf16>(value), mask, site);
        else fp16_.store(i, from_float<fp16>(value), mask, site);
    }

    /// As gpt1::load_columns; zeros if the array is absent.
    template <int N>
    __device__ __forceinline__ Vector<float, N> load_columns(
        std::int64_t i, int count, bool aligned, Site site = Site::current()) const {
        if (fp32_) return gpt1::load_columns<N>(fp32_, i, count, aligned, site);
        if (bf16_) return widen(gpt1::load_columns<N>(bf16_, i, count, aligned, site));
        if (fp16_) return widen(gpt1::load_columns<N>(fp16_, i, count, aligned, site));
        return {};
    }

    /// As gpt1::store_columns.
    template <int N>
    __device__ __forceinline__ void store_columns(
        std::int64_t i, const Vector<float, N>& x, int count, bool aligned,
        Site site = Site::current()) const {
        if (fp32_) gpt1::store_columns(fp32_, i, x, count, aligned, site);
        else if (bf16_) gpt1::store_columns(bf16_, i, narrow<bf16>(x), count, aligned, site);
        else gpt1::store_columns(fp16_, i, narrow<fp16>(x), count, aligned, site);
    }

private:
    template <class T>
    View<T>& view() {
        if constexpr (std::is_same_v<T, float>) return fp32_;
        else if constexpr (std::is_same_v<T, bf16>) return bf16_;
        else return fp16_;
    }

    View<float> fp32_;
    View<bf16> bf16_;
    View<fp16> fp16_;
};

}  // namespace gpt1
