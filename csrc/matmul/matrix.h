#pragma once

#include "platform/types.h"

namespace gpt1 {

/// A matrix as it lies in memory: its array, rows, columns (a multiple of 8), and the rows' stride, which is
/// at least `columns`: Hopper's TMA reads no rows that overlap.
struct Matrix {
    Array array;
    std::int64_t rows, columns, stride;
};

}  // namespace gpt1
