// Sums and maxima over the lanes of a warp, in an order that never changes.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

/// The sum over groups of kLanes neighbouring lanes, in each of them.
template <int kLanes = 32>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

template <int kLanes = 32>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

}  // namespace gpt1
