#pragma once

#include "ffn/ffn_launch.cuh"
#include "ffn/gelu_epilogue.cuh"
#include "matmul/product_launch.cuh"

namespace gpt1 {

template <class T>
void FfnLaunch<T>::gelu_product(const Matrix& a, const Matrix& b, bool b_transposed, TypedArray bias,
                                const Matrix& hidden, Array pre, Stream stream) {
    const auto& [array, M, N, stride] = hidden;
    const typename Gelu<T>::Params epilogue{Global<T>(array), Global<T>(pre), stride,
                                            FloatArray<true>(bias)};
    const ProductGrid grid = product_grid(M, N, a.columns, 1, stream.first);
    launch_product<T, Gelu<T>>(a, b, b_transposed, grid, epilogue, stream);
}

template <class T>
void FfnLaunch<T>::dgelu_product(const Matrix& a, const Matrix& b, bool b_transposed, const Matrix& pre,
                                 Array dpre, Array partial_db, Stream stream) {
    const auto& [array, M, N, stride] = pre;
    const typename Dgelu<T>::Params epilogue{Global<const T>(array), Global<T>(dpre),
                                             Global<float>(partial_db), stride};
    const ProductGrid grid = product_grid(M, N, a.columns, 1, stream.first);
    launch_product<T, Dgelu<T>>(a, b, b_transposed, grid, epilogue, stream);
}

}  // namespace gpt1
