// The launch of a product with any epilogue.
#pragma once

#include <limits>

#include "common/product.cuh"
#include "matmul/matrix.h"

namespace gpt1 {

/// The tiles of a product, which select the kernel: one of those for Hopper, or the one for every chip, which
/// also runs products with K = 0.
inline TileShape product_tile(std::int64_t K, int device) {
    constexpr std::int64_t kShortSum = 1024;  // beside which an epilogue takes long
    if (K == 0 || !is_hopper(device)) return kTile;
    return K <= kShortSum ? HopperPingPong::kTile : HopperCooperative::kTile;
}

/// How a product is cut on a device, and its sums into `chunks`.
inline ProductGrid product_grid(
    std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t chunks, int device) {
    return {M, N, K, product_tile(K, device), chunks};
}

/// How many of a grid's blocks, or clusters of them, a device works on at a time.
inline std::int64_t product_slots(const ProductGrid& grid, int device) {
    const std::int64_t count = processors(device);
    return grid.tile == kTile ? count * kTileBlocksPerProcessor : count / kHopperCluster;
}

/// Throws unless a kernel can read the matrix.
inline void check_operand(const Matrix& matrix) {
    const auto& [array, rows, columns, stride] = matrix;
    constexpr std::int64_t kMost = std::numeric_limits<int>::max() - 1024;  // Fetch counts down in int
    const bool aligned = columns % 8 == 0 && stride % 8 == 0 && array.address % 16 == 0;
    if (rows > kMost || columns > kMost || !(aligned || rows * columns == 0)) {
        throw std::invalid_argument(
            "operand of " + shape_text("rows", rows, "columns", columns, "stride", stride) +
            ": expected rows of whole 16 bytes and fewer than 2^31 - 1024 of them");
    }
}

template <class T>
Operand<T> operand(const Matrix& matrix) {
    const auto& [array, rows, columns, stride] = matrix;
    return {Global<const T>(array), rows, columns, stride};
}

/// The launch of a kernel for Hopper, in source files that are compiled for it alone.
template <class T, class Epilogue, bool kATransposed>
struct HopperLaunch {
    static void start(const Matrix& a, const Matrix& b, bool b_transposed, const ProductGrid& grid,
                      const typename Epilogue::Params& epilogue, Stream stream);
};

/// Starts a product; a transposed A is only met in weight gradients, whose B never is.
template <class T, class Epilogue, bool kATransposed = false>
void launch_product(
    const Matrix& a, const Matrix& b, bool b_transposed, const ProductGrid& grid,
    const typename Epilogue::Params& epilogue, Stream stream) {
    if (kATransposed && b_transposed) throw std::invalid_argument("matmul: a and b are both transposed");
    check_operand(a);
    check_operand(b);
    if (grid.tile != kTile) {
        HopperLaunch<T, Epilogue, kATransposed>::start(a, b, b_transposed, grid, epilogue, stream);
        return;
    }
    const auto start = [&]<bool kBTransposed>() {
        using Kernel = Product<T, kATransposed, kBTransposed, Epilogue>;
        typename Kernel::Params p{operand<T>(a), operand<T>(b), grid, epilogue};
        launch<Kernel>(grid.parts(), Kernel::kMaxSharedBytes, stream, p);
    };
    if constexpr (kATransposed) start.template operator()<false>();
    else b_transposed ? start.template operator()<true>() : start.template operator()<false>();
}

}  // namespace gpt1
