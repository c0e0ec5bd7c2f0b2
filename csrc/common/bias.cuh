// A bias, of the activations' dtype or fp32.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

template <class T>
class Bias {
public:
    Bias() = default;
    Bias(Array array, int dtype) {
        if (dtype == kFloat32) wide_ = Global<const float>(array);
        else narrow_ = Global<const T>(array);
    }

    /// N neighbours, a multiple of 4; zeros if absent.
    template <int N>
    __device__ __forceinline__ Vector<float, N> load(std::int64_t column, bool mask) const {
        if (narrow_) return widen(narrow_.template load_vector<N>(column, mask));
        Vector<float, N> bias{};
        if (wide_) {
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                const auto four = wide_.template load_vector<4>(column + i, mask);
#pragma unroll
                for (int k = 0; k < 4; ++k) bias[i + k] = four[k];
            }
        }
        return bias;
    }

private:
    Global<const T> narrow_;
    Global<const float> wide_;
};

}  // namespace gpt1
