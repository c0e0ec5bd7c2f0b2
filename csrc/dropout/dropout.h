#pragma once

#include "platform/types.h"

namespace gpt1 {

/// Draws the bits of `matrices` of (rows, columns), 32 to a word; row i needs the words of the
/// columns up to i + last_column, the others may stay unwritten.
void dropout_mask(Array bits,  // (matrices, rows, ceil(columns / 32)), int32
                  Array seed,  // (2,), int64
                  std::int64_t matrices, std::int64_t rows, std::int64_t columns, std::int64_t last_column,
                  std::uint32_t threshold, std::int64_t row_offset, Stream stream);

}  // namespace gpt1
