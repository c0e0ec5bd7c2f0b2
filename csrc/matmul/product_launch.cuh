// The launch of a product with any epilogue.
#pragma once

#include <limits>

#include "common/product.cuh"
#include "matmul/matrix.h"

namespace gpt1 {

template <class T>
Operand<T> operand(const Matrix& matrix) {
    const auto& [array, rows, columns, stride] = matrix;
    constexpr std::int64_t kMost = std::numeric_limits<int>::max() - 1024;  // Fetch counts down in int
    const bool aligned = columns % 8 == 0 && stride % 8 == 0 && array.first % 16 == 0;
    if (rows > kMost || columns > kMost || !(aligned || rows * columns == 0)) {
        throw std::invalid_argument(
            "operand of " + shape_text("rows", rows, "columns", columns, "stride", stride) +
            ": expected rows of whole 16 bytes and fewer than 2^31 - 1024 of them");
    }
    return {Global<const T>(array), rows, columns, stride};
}

/// Starts a product; a transposed A is only met in weight gradients, whose B never is.
template <class T, class Epilogue, bool kATransposed = false>
void launch_product(
    const Matrix& a, const Matrix& b, bool b_transposed, const ProductGrid& grid,
    const typename Epilogue::Params& epilogue, Stream stream) {
    const auto start = [&]<bool kBTransposed>() {
        using Kernel = Product<T, kATransposed, kBTransposed, Epilogue>;
        typename Kernel::Params p{operand<T>(a), operand<T>(b), grid, epilogue};
        launch<Kernel>(grid.blocks(), Kernel::kMaxSharedBytes, stream, p);
    };
    if constexpr (kATransposed) {
        if (b_transposed) throw std::invalid_argument("matmul: a and b are both transposed");
        start.template operator()<false>();
    } else {
        b_transposed ? start.template operator()<true>() : start.template operator()<false>();
    }
}

}  // namespace gpt1
