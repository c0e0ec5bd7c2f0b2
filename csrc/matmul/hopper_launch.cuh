// The launch of products on Hopper's GPUs, for source files that are compiled for them alone.
#pragma once

#include <algorithm>

#include "common/hopper_product.cuh"
#include "matmul/product_launch.cuh"

namespace gpt1 {

template <class Kernel>
void launch_hopper(const Matrix& a, const Matrix& b, const ProductGrid& grid,
                   const typename Kernel::EpilogueParams& epilogue, Stream stream) {
    const CurrentDevice current(stream.first);  // the driver needs a context to make tensor maps
    const auto map = [](const Matrix& matrix, int box_rows) {
        const auto& [array, rows, columns, stride] = matrix;
        return tensor_map(array.address, Kernel::kIsBf16, rows, columns, stride, box_rows);
    };
    const typename Kernel::Params p{map(a, Kernel::kBoxRowsA), map(b, Kernel::kBoxRowsB), grid, epilogue};
    const std::int64_t clusters = processors(stream.first) / Kernel::kCluster;
    launch<Kernel>(std::min(clusters, grid.parts()) * Kernel::kCluster, Kernel::kMaxSharedBytes, stream, p);
}

template <class T, class Epilogue, bool kATransposed>
void HopperLaunch<T, Epilogue, kATransposed>::start(
    const Matrix& a, const Matrix& b, bool b_transposed, const ProductGrid& grid,
    const typename Epilogue::Params& epilogue, Stream stream) {
    const auto start = [&]<bool kBTransposed>() {
        const auto in_form = [&]<class Form>() {
            using Kernel = HopperProduct<T, kATransposed, kBTransposed, Epilogue, Form>;
            launch_hopper<Kernel>(a, b, grid, epilogue, stream);
        };
        if (grid.tile == HopperPingPong::kTile) in_form.template operator()<HopperPingPong>();
        else in_form.template operator()<HopperCooperative>();
    };
    if constexpr (kATransposed) start.template operator()<false>();
    else b_transposed ? start.template operator()<true>() : start.template operator()<false>();
}

}  // namespace gpt1
