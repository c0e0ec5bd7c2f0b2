#include "linear_cross_entropy/cross_entropy_kernel.cuh"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace gpt1 {

void cross_entropy(DType dtype, Array logits, std::int64_t rows, std::int64_t columns, std::int64_t V,
                   Array targets, Array weight, Array gain, Array losses, Array error,
                   std::int64_t ignore_index, bool gradient, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using T = decltype(element);
        typename CrossEntropy<T>::Params p{};
        p.logits = Global<T>(logits);
        p.targets = Global<const std::int64_t>(targets);
        p.weight = Global<const float>(weight);
        p.gain = Global<const float>(gain);
        p.losses = Global<float>(losses);
        p.error = Global<std::int64_t>(error);
        p.columns = static_cast<int>(columns);
        p.V = static_cast<int>(V);
        p.ignore_index = ignore_index;
        p.gradient = gradient;
        using Kernel = CrossEntropy<T>;
        const int held = p.columns < Kernel::kHeldColumns ? p.columns : Kernel::kHeldColumns;
        launch<Kernel>(rows, Kernel::kPartialBytes + held * sizeof(T), stream, p);
    });
}

void scale_gradient(DType x_dtype, Array x, Array scale, DType y_dtype, Array y, std::int64_t count,
                    Stream stream) {
    dispatch(x_dtype, [&](auto in) {
        dispatch(y_dtype, [&](auto out) {
            using In = decltype(in);
            using Out = decltype(out);
            if constexpr (std::is_same_v<In, float> || std::is_same_v<In, Out>) {
                using Kernel = ScaleGradient<Out, In>;
                const typename Kernel::Params p{Global<const In>(x), Global<const float>(scale),
                                                Global<Out>(y), count};
                launch<Kernel>((count + Kernel::kBlock - 1) / Kernel::kBlock, 0, stream, p);
            } else {
                throw std::invalid_argument(
                    "scale_gradient: " + shape_text("x_dtype", x_dtype, "y_dtype", y_dtype) +
                    ", expected fp32 to any, or a dtype to itself");
            }
        });
    });
}

}  // namespace gpt1
