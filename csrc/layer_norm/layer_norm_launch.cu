#include <algorithm>

#include "column_sums/column_sums.h"
#include "layer_norm/layer_norm.h"
#include "layer_norm/layer_norm_kernel.cuh"

namespace gpt1 {

namespace {

/// Calls `function` with the layout of rows of C columns: a warp owns a row up to the width at which the
/// registers that sum its gradients still allow three blocks (in bf16), beyond it a block does.
template <class T, class Function>
auto with_layout(std::int64_t C, Function function) {
    if (C <= 256) return function(RowLayout<T, 4, 1, 8>{});
    if (C <= 768) return function(RowLayout<T, 4, 1, 24>{});
    if (C <= 1024) return function(RowLayout<T, 4, 4, 8>{});
    if (C <= 2048) return function(RowLayout<T, 8, 8, 8>{});
    if (C <= 8192) return function(RowLayout<T, 16, 16, 16>{});
    throw std::invalid_argument(shape_text("C", C) + ", expected at most 8192");
}

template <class Kernel, class Layout>
std::int64_t blocks(std::int64_t N, int device) {
    const std::int64_t resident = std::int64_t{processors(device)} * Kernel::kBlocksPerProcessor;
    return std::min((N + Layout::kRows - 1) / Layout::kRows, resident);
}

}  // namespace

void layer_norm_fwd(DType dtype, Array x, Array residual, TypedArray w, TypedArray b, TypedArray x_bias,
                    Array seed, Array y, Array total, Array mean, Array rstd, std::int64_t N,
                    std::int64_t C, std::int64_t stride_xn, std::int64_t stride_rn, float eps,
                    std::uint32_t threshold, float keep_scale, std::int64_t row_offset, Stream stream) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        with_layout<T>(C, [&](auto layout) {
            using Layout = decltype(layout);
            using Kernel = LayerNormFwd<T, Layout>;
            typename Kernel::Params p{};
            p.x = Global<const T>(x);
            p.residual = Global<const T>(residual);
            p.w = FloatArray<true>(w);
            p.b = FloatArray<true>(b);
            p.x_bias = FloatArray<true>(x_bias);
            p.y = Global<T>(y);
            p.total = Global<T>(total);
            p.mean = Global<float>(mean);
            p.rstd = Global<float>(rstd);
            p.dropout = {Global<const std::int64_t>(seed), threshold, keep_scale, row_offset};
            p.N = N;
            p.stride_xn = stride_xn;
            p.stride_rn = stride_rn;
            p.C = static_cast<int>(C);
            p.eps = eps;
            p.aligned = aligned_rows<T>(x, stride_xn, C) && aligned_rows<T>(residual, stride_rn, C) &&
                        aligned_rows<T>(y, C, C) && aligned_rows<T>(total, C, C);
            launch<Kernel>(blocks<Kernel, Layout>(N, stream.first), Kernel::kMaxSharedBytes, stream, p);
        });
    });
}

void layer_norm_bwd(DType dtype, Array dy, Array dy_residual, Array total, TypedArray w, Array mean,
                    Array rstd, Array seed, Array dtotal, Array dx, Array partials, TypedArray dw,
                    TypedArray db, TypedArray dx_bias, std::int64_t N, std::int64_t C, std::int64_t stride_tn,
                    std::uint32_t threshold, float keep_scale, std::int64_t row_offset, Stream stream) {
    std::vector<TypedArray> sums;
    const auto wanted = [&](TypedArray sum) {
        if (sum.array.extent == 0) return -1;
        sums.push_back(sum);
        return static_cast<int>(sums.size()) - 1;
    };
    const int dw_number = wanted(dw), db_number = wanted(db), dx_bias_number = wanted(dx_bias);
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        with_layout<T>(C, [&](auto layout) {
            using Layout = decltype(layout);
            using Kernel = LayerNormBwd<T, Layout>;
            typename Kernel::Params p{};
            p.dy = Global<const T>(dy);
            p.dy_residual = Global<const T>(dy_residual);
            p.total = Global<const T>(total);
            p.w = FloatArray<true>(w);
            p.mean = Global<const float>(mean);
            p.rstd = Global<const float>(rstd);
            p.dtotal = Global<T>(dtotal);
            p.dx = Global<T>(dx);
            p.partials = Global<float>(partials);
            p.dw = dw_number;
            p.db = db_number;
            p.dx_bias = dx_bias_number;
            p.dropout = {Global<const std::int64_t>(seed), threshold, keep_scale, row_offset};
            p.N = N;
            p.stride_tn = stride_tn;
            p.C = static_cast<int>(C);
            p.aligned = aligned_rows<T>(dy, C, C) && aligned_rows<T>(dy_residual, C, C) &&
                        aligned_rows<T>(total, stride_tn, C) && aligned_rows<T>(dtotal, C, C) &&
                        aligned_rows<T>(dx, C, C);
            p.stride_p = (C + 3) / 4 * 4;
            const std::int64_t grid = blocks<Kernel, Layout>(N, stream.first);
            launch<Kernel>(grid, Kernel::kMaxSharedBytes, stream, p);
            if (!sums.empty()) column_sums(kFloat32, {partials, grid, C, p.stride_p}, sums, grid, stream);
        });
    });
}

std::int64_t layer_norm_bwd_blocks(DType dtype, std::int64_t N, std::int64_t C, int device) {
    std::int64_t grid = 0;
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        grid = with_layout<T>(C, [&](auto layout) {
            using Layout = decltype(layout);
            return blocks<LayerNormBwd<T, Layout>, Layout>(N, device);
        });
    });
    return grid;
}

}  // namespace gpt1
