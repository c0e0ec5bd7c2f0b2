// The epilogues of the feed-forward network's products: GELU and its gradient.
#pragma once

#include "common/gelu.cuh"
#include "common/rows.cuh"

namespace gpt1 {

/// u = acc + bias; stores gelu(u), and u where it is wanted.
template <class T>
class Gelu {
public:
    struct Params {
        Global<T> hidden;  // (M, N)
        Global<T> pre;     // (M, N), may be absent
        std::int64_t stride;
        FloatArray<true> bias;  // (N,)
    };
    static constexpr const char* kName = "gelu_product";
    static constexpr int kWidth = 8;
    struct Input {};

    __device__ __forceinline__ Gelu(const Params& p, std::int64_t n, bool inside)
        : p_(p), n_(n), bias_(p.bias.template load_columns<kWidth>(n, inside ? kWidth : 0, true)) {}

    __device__ __forceinline__ static Input read(const Params&, std::int64_t, std::int64_t, bool) {
        return {};
    }

    __device__ __forceinline__ void apply(std::int64_t m, Vector<float, kWidth>& x, Input) const {
        const std::int64_t offset = m * p_.stride + n_;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) x[i] += bias_[i];
        // Backward sees the rounded u, so the GELU is that of the rounded u.
        const Vector<T, kWidth> pre = narrow<T>(x);
        if (p_.pre) p_.pre.store_vector(offset, pre);
        Vector<float, kWidth> u = widen(pre);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) u[i] *= gelu_gate(u[i]);
        p_.hidden.store_vector(offset, narrow<T>(u));
    }

    template <class Rows>
    __device__ __forceinline__ void finish(std::int64_t, std::int64_t, const Rows&) const {}

private:
    const Params& p_;
    std::int64_t n_;
    Vector<float, kWidth> bias_;
};

/// du = acc ∘ gelu'(u); stores du and its sums over 64 rows each, as wanted.
template <class T>
class Dgelu {
public:
    struct Params {
        Global<const T> pre;       // (M, N)
        Global<T> dpre;            // (M, N), may be absent
        Global<float> partial_db;  // (ceil(M / 64), N), may be absent
        std::int64_t stride;       // of all of them
    };
    static constexpr const char* kName = "dgelu_product";
    static constexpr int kWidth = 8;
    using Input = Vector<T, kWidth>;

    __device__ __forceinline__ Dgelu(const Params& p, std::int64_t n, bool inside)
        : p_(p), n_(n), inside_(inside) {}

    __device__ __forceinline__ static Input read(
        const Params& p, std::int64_t m, std::int64_t n, bool inside) {
        return p.pre.template load_vector<kWidth>(m * p.stride + n, inside);
    }

    __device__ __forceinline__ void apply(std::int64_t m, Vector<float, kWidth>& x, const Input& pre) {
        const Vector<float, kWidth> u = widen(pre);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            x[i] *= gelu_slope(u[i], gelu_gate(u[i]));
            sum_[i] += x[i];
        }
        if (p_.dpre) p_.dpre.store_vector(m * p_.stride + n_, narrow<T>(x));
    }

    /// `rows` adds over the warps that share 64 rows.
    template <class Rows>
    __device__ __forceinline__ void finish(std::int64_t first_m, std::int64_t M, const Rows& rows) {
        if (!p_.partial_db) return;
        // Lanes 8 apart have the same columns. Of the lanes of two rows, each stores half of its own.
        const bool upper = lane_index() / 8 == 1;
        Vector<float, 4> half;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            sum_[i] += shuffle_xor(sum_[i], 8);
            sum_[i] += shuffle_xor(sum_[i], 16);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) half[i] = upper ? sum_[4 + i] : sum_[i];
        p_.partial_db.store_vector(first_m / 64 * p_.stride + n_ + (upper ? 4 : 0), rows.sum(half),
                                   rows.first() && lane_index() < 16 && inside_ && first_m < M);
    }

private:
    const Params& p_;
    std::int64_t n_;
    bool inside_;
    Vector<float, kWidth> sum_{};
};

}  // namespace gpt1
