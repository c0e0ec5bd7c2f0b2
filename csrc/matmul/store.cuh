// The epilogue of a product that is only stored.
#pragma once

#include "common/rows.cuh"

namespace gpt1 {

/// out = scale · acc + bias, or out += scale · acc in fp32; T is the type of the operands.
template <class Out, class T, int kElements = kVector<Out>>
class Store {
public:
    struct Params {
        Global<Out> out;  // (M, N)
        std::int64_t stride;
        FloatArray<true> bias;      // (N,), may be absent
        Global<const float> scale;  // (), may be absent
        bool accumulate;
    };
    static constexpr const char* kName = "matmul";
    static constexpr int kWidth = kElements;
    static constexpr bool kAccumulates = std::is_same_v<Out, float>;

    struct Nothing {};
    using Input = std::conditional_t<kAccumulates, Vector<float, kWidth>, Nothing>;

    /// For columns n to n + kWidth − 1.
    __device__ __forceinline__ Store(const Params& p, std::int64_t n, bool inside)
        : p_(p), n_(n), scale_(p.scale ? p.scale.load(0) : 1.0f),
          bias_(p.bias.template load_columns<kWidth>(n, inside ? kWidth : 0, true)) {}

    /// What `out` holds so far.
    __device__ __forceinline__ static Input read(
        const Params& p, std::int64_t m, std::int64_t n, bool inside) {
        Input sum{};
        if constexpr (kAccumulates) {
            sum = p.out.template load_vector<kWidth>(m * p.stride + n, inside && p.accumulate);
        }
        return sum;
    }

    __device__ __forceinline__ void apply(std::int64_t m, Vector<float, kWidth>& x, const Input& sum) const {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            x[i] = x[i] * scale_ + bias_[i];
            if constexpr (kAccumulates) x[i] += sum[i];
        }
        p_.out.store_vector(m * p_.stride + n_, narrow<Out>(x));
    }

    template <class Rows>
    __device__ __forceinline__ void finish(std::int64_t, std::int64_t, const Rows&) const {}

private:
    const Params& p_;
    std::int64_t n_;
    float scale_;
    Vector<float, kWidth> bias_;
};

}  // namespace gpt1
