#include <cfloat>
#include <cmath>

#include "attention/attention_fwd_kernel.cuh"

namespace gpt1 {

void causal_attention_fwd(HeadsArray q, HeadsArray k, HeadsArray v, Array keep_bits, Array first_key,
                          HeadsArray o, Array lse, AttentionSizes sizes, float scale, float keep_scale,
                          DType dtype, Stream stream) {
    const AttentionProblem problem(keep_bits, first_key, sizes, scale, keep_scale);
    // Not 0, since −∞ · 0 is NaN.
    const float log2_scale = std::fmax(std::fabs(scale) * kLog2E, FLT_MIN);
    dispatch_narrow(dtype, [&](auto element) {
        using T = decltype(element);
        using In = Heads<const T>;
        dispatch_head_size(problem.D, [&](auto columns) {
            using Kernel = AttentionForward<T, columns()>;
            const std::int64_t tiles = (problem.Tq + Kernel::kQueries - 1) / Kernel::kQueries;
            launch<Kernel>(std::int64_t{problem.B} * problem.H * tiles, Kernel::kMaxSharedBytes, stream,
                           {problem, In(q), In(k), In(v), Heads<T>(o), Global<float>(lse), log2_scale});
        });
    });
}

}  // namespace gpt1
