// Sums and maxima over the lanes of a warp, or the warps of a block, in an order that never changes.
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

/// Sums over a block of kWarps warps that share a row, or over each warp of a block alone.
template <int kWarps>
class RowSum {
public:
    static constexpr int kSize = kWarps == 1 ? 0 : 2 * kWarps;  // floats of shared memory

    __device__ __forceinline__ explicit RowSum(SharedArena& arena) : memory_(arena.take<float>(kSize)) {}

    /// In every thread.
    __device__ __forceinline__ float operator()(float value) {
        value = warp_sum(value);
        if constexpr (kWarps > 1) {
            // Two sets of slots, alternating: threads may still be reading those of the last sum.
            const Shared<float> slots = memory_.slice(turn_ * kWarps, kWarps);
            turn_ ^= 1;
            slots.store(warp_index(), value, lane_index() == 0);
            barrier();
            value = 0.0f;
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) value += slots.load(warp);
        }
        return value;
    }

private:
    Shared<float> memory_;
    int turn_ = 0;
};

}  // namespace gpt1
