#pragma once

#include <vector>

#include "matmul/matrix.h"

namespace gpt1 {

/// Sums over runs of `run` rows, of up to three matrices in one launch: as many as there are `totals`.
void column_sums(DType dtype,
                 Matrix x,  // the first matrix; the others follow, their rows at the same stride
                 const std::vector<TypedArray>& totals,  // of (ceil(rows / run), columns)
                 std::int64_t run, Stream stream);

}  // namespace gpt1
