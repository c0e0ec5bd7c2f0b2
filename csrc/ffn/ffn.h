#pragma once

#include "matmul/matrix.h"

namespace gpt1 {

/// pre = a b + bias, hidden = gelu(pre).
void gelu_product(DType dtype,
                  Matrix a,                    // (M, K)
                  Matrix b, bool b_transposed,  // (K, N), or stored as (N, K)
                  TypedArray bias,              // (N,)
                  Matrix hidden,               // (M, N)
                  Array pre,                   // as hidden; may be absent
                  Stream stream);

/// dpre = a b ∘ gelu'(pre), and its sums over 64 rows each.
void dgelu_product(DType dtype,
                   Matrix a,                    // (M, K)
                   Matrix b, bool b_transposed,  // (K, N), or stored as (N, K)
                   Matrix pre,                  // (M, N)
                   Array dpre,                  // as pre; may be absent
                   Array partial_db,            // (ceil(M / 64), N), fp32; may be absent
                   Stream stream);

}  // namespace gpt1
