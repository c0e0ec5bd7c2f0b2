// GELU in its tanh form (Hendrycks & Gimpel 2016): the tanh is a sigmoid, gelu(u) = ½ u (1 + tanh z)
// = u σ(2z) with z = √(2/π) (u + 0.044715 u³), which loses no digits for small u.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

inline constexpr float kTwiceSqrt2OverPi = 1.5957691216057308f;
inline constexpr float kGeluCubic = 0.044715f;

/// σ(2z).
__device__ __forceinline__ float gelu_gate(float u) {
    constexpr float kLog2E = 1.4426950408889634f;
    constexpr float kLinear = -kTwiceSqrt2OverPi * kLog2E;
    return fast_reciprocal(1.0f + fast_exp2(u * (kLinear + kLinear * kGeluCubic * u * u)));
}

/// gelu'(u), of a gate that is gelu_gate(u).
__device__ __forceinline__ float gelu_slope(float u, float gate) {
    const float slope = kTwiceSqrt2OverPi + 3.0f * kTwiceSqrt2OverPi * kGeluCubic * u * u;  // of 2z
    return gate + u * (slope * (gate * (1.0f - gate)));  // in this order a large u does not overflow
}

}  // namespace gpt1
