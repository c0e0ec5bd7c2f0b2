#pragma once

#include <tuple>

#include "platform/types.h"

namespace gpt1 {

/// (B, T, H, D) with a contiguous last axis, or absent. A head's rows start at multiples of 16 bytes, and D
/// is a multiple of 8.
struct HeadsArray {
    Array array;
    std::int64_t stride_b = 0, stride_t = 0, stride_h = 0;
};

/// B, H, Tq, Tk and D.
using AttentionSizes = std::tuple<int, int, int, int, int>;

/// O and lse of causal attention; bf16 and fp16, D up to 128, none of B, H, Tq is 0.
void causal_attention_fwd(HeadsArray q, HeadsArray k, HeadsArray v,
                          Array keep_bits,  // (B, H, Tq, ceil(Tk / 32)), int32, or absent
                          Array first_key,  // (B,), int32, or absent
                          HeadsArray o,
                          Array lse,  // (B, H, Tq), fp32
                          AttentionSizes sizes, float scale, float keep_scale, DType dtype, Stream stream);

/// dQ, dK and dV, those that are not absent. A chip with enough shared memory needs one kernel for a
/// head of up to 512 queries; elsewhere there is one for dQ and delta, and one for dK and dV.
void causal_attention_bwd(HeadsArray dout, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray o, Array lse,
                          Array keep_bits, Array first_key,
                          Array delta,  // (B, H, Tq), fp32, a workspace
                          HeadsArray dq, HeadsArray dk, HeadsArray dv, AttentionSizes sizes, float scale,
                          float keep_scale, DType dtype, Stream stream);

}  // namespace gpt1
