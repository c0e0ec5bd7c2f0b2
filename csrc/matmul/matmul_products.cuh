#pragma once

#include "matmul/matmul_launch.cuh"
#include "matmul/product_launch.cuh"
#include "matmul/store.cuh"

namespace gpt1 {

template <class T>
void MatmulLaunch<T>::start(
    const Matrix& a, bool a_transposed, const Matrix& b, bool b_transposed, const Matrix& out,
    DType out_dtype, TypedArray bias, Array scale, bool accumulate, Array parts, std::int64_t chunks,
    Stream stream) {
    const auto& [array, M, N, stride] = out;
    const std::int64_t K = a_transposed ? a.rows : a.columns;
    const ProductGrid grid = product_grid(M, N, K, chunks, stream.first);

    const auto multiply = [&]<class Out>(const typename Store<Out, T>::Params& epilogue) {
        if (a_transposed) launch_product<T, Store<Out, T>, true>(a, b, b_transposed, grid, epilogue, stream);
        else launch_product<T, Store<Out, T>>(a, b, b_transposed, grid, epilogue, stream);
    };
    const auto finish = [&]<class Out>() {
        const auto params = [&]<int kWidth>() {
            return typename Store<Out, T, kWidth>::Params{
                Global<Out>(out.array), out.stride, FloatArray<true>(bias),
                Global<const float>(scale), accumulate};
        };
        if (grid.split()) {
            using Kernel = SumParts<Store<Out, T, 4>>;
            typename Kernel::Params p{Global<const float>(parts), grid, params.template operator()<4>()};
            launch<Kernel>(grid.tiles() * Kernel::slices(grid), 0, stream, p);
        } else {
            multiply.template operator()<Out>(params.template operator()<kVector<Out>>());
        }
    };
    if (grid.split()) {
        typename Store<float, T>::Params epilogue{};
        epilogue.out = Global<float>(parts);
        epilogue.stride = grid.tile.n;
        multiply.template operator()<float>(epilogue);
    }
    out_dtype == kFloat32 ? finish.template operator()<float>() : finish.template operator()<T>();
}

}  // namespace gpt1
