#pragma once

#include "platform/types.h"

namespace gpt1 {

/// LayerNorm of residual + dropout(x + x_bias), or of x where the optional tensors are absent:
/// y, the sum if wanted, and the statistics.
void layer_norm_fwd(DType dtype,
                    Array x,             // (N, C), rows stride_xn apart
                    Array residual,      // (N, C) or absent, rows stride_rn apart
                    TypedArray w,        // (C,)
                    TypedArray b,        // (C,)
                    TypedArray x_bias,   // (C,) or absent
                    Array seed,          // (2,), absent without dropout
                    Array y,             // (N, C)
                    Array total,         // (N, C) or absent
                    Array mean,          // (N,), fp32
                    Array rstd,          // (N,), fp32
                    std::int64_t N, std::int64_t C, std::int64_t stride_xn, std::int64_t stride_rn, float eps,
                    std::uint32_t threshold, float keep_scale, std::int64_t row_offset, Stream stream);

/// Its gradients, those that are not absent. The parameters' are summed in two steps: `partials` has
/// a row for each of `layer_norm_bwd_blocks` and each of dw, db, dx_bias that is wanted.
void layer_norm_bwd(DType dtype,
                    Array dy,            // (N, C)
                    Array dy_residual,   // (N, C), added to it, or absent
                    Array total,         // (N, C), rows stride_tn apart
                    TypedArray w,        // (C,)
                    Array mean,          // (N,), fp32
                    Array rstd,          // (N,), fp32
                    Array seed,          // (2,), absent without dropout
                    Array dtotal,        // (N, C) or absent
                    Array dx,            // (N, C) or absent
                    Array partials,      // (wanted sums, blocks, C rounded up to a multiple of 4), fp32
                    TypedArray dw,       // (C,) or absent
                    TypedArray db,       // (C,) or absent
                    TypedArray dx_bias,  // (C,) or absent
                    std::int64_t N, std::int64_t C, std::int64_t stride_tn, std::uint32_t threshold,
                    float keep_scale, std::int64_t row_offset, Stream stream);

/// How many blocks `layer_norm_bwd` runs.
std::int64_t layer_norm_bwd_blocks(DType dtype, std::int64_t N, std::int64_t C, int device);

}  // namespace gpt1
