#pragma once

#include "matmul/matrix.h"

namespace gpt1 {

/// Split-K: the elements of `matmul`'s fp32 workspace, and the chunks into which it cuts the sums; (0, 1)
/// where it leaves them whole.
std::pair<std::int64_t, std::int64_t> split_of_matmul(
    std::int64_t M, std::int64_t N, std::int64_t K, int device);

/// out = scale · a b + bias, or out += scale · a b.
void matmul(DType dtype,
            Matrix a, bool a_transposed,  // (M, K), or stored as (K, M)
            Matrix b, bool b_transposed,  // (K, N), or stored as (N, K)
            Matrix out, DType out_dtype,    // (M, N), that of the operands or fp32
            TypedArray bias,              // (N,), may be absent
            Array scale,                  // (), fp32; may be absent
            bool accumulate,              // into an fp32 out
            Array parts, std::int64_t chunks,  // of split_of_matmul
            Stream stream);

}  // namespace gpt1
