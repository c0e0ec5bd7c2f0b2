#pragma once

#include <tuple>

#include "platform/types.h"

namespace gpt1 {

/// A matrix as it lies in memory: its array, rows, columns (a multiple of 8), and the rows' stride, which is
/// at least `columns`: the copy engine of Hopper reads no rows that overlap.
using Matrix = std::tuple<Array, std::int64_t, std::int64_t, std::int64_t>;

}  // namespace gpt1
