#pragma once

#include "platform/types.h"

namespace gpt1 {

/// Rows of both tables, added, and dropped out. An id out of range gives NaN and is written to an
/// error record: [1 once there is an error, the first such id].
void embedding_fwd(DType dtype,
                   TypedArray out,         // (B, T, C)
                   Array ids,              // (B, T), int64
                   Array w_token,          // (V, C)
                   Array w_position,       // (P, C)
                   Array position_ids,     // (B, T), int64, or absent: by order
                   Array token_type_ids,   // (B, T), int64, or absent
                   Array seed,             // (2,), absent without dropout
                   Array token_error,      // (2,), int64
                   Array position_error,   // (2,), int64, absent where position_ids is
                   std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t V, std::int64_t P,
                   std::uint32_t threshold, float keep_scale, std::int64_t row_offset, Stream stream);

/// Adds each row of dout to the row of dw that its id names.
void embedding_bwd(DType dtype,
                   Array dout,        // (N, C)
                   Array sorted_ids,  // (M,), int64; M is N, or 2N where a token type reads a second row
                   Array order,       // (M,), int64, where the sorted ids came from
                   TypedArray dw,     // (V, C), zeros
                   Array partials,    // (ceil(M / 64), 2, C rounded up to a multiple of 8), fp32
                   Array seed,        // (2,), absent without dropout
                   std::int64_t M, std::int64_t N, std::int64_t C, std::int64_t V, std::uint32_t threshold,
                   float keep_scale, std::int64_t row_offset, Stream stream);

/// Adds dout over the batch, where the positions are those of the order.
void embedding_bwd_positions(DType dtype,
                             Array dout,     // (B, T, C)
                             TypedArray dw,  // (P, C), of which the first T rows are written
                             Array seed,     // (2,), absent without dropout
                             std::int64_t B, std::int64_t T, std::int64_t C, std::uint32_t threshold,
                             float keep_scale, std::int64_t row_offset, Stream stream);

}  // namespace gpt1
