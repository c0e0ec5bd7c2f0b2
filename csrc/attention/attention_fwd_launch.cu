#include <cfloat>

#include "attention/attention_fwd_kernel.cuh"

namespace gpt1 {

void causal_attention_fwd(HeadsArray q, HeadsArray k, HeadsArray v, Array keep_bits, Array first_key,
                          HeadsArray o, Array lse, AttentionSizes sizes, float scale, float keep_scale,
                          int dtype, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_head_size(std::get<4>(sizes), [&](auto columns) {
            using Kernel = AttentionForward<T, columns()>;
            typename Kernel::Params p{{keep_bits, first_key, sizes, scale, keep_scale},
                                      Heads<const T>(q),
                                      Heads<const T>(k),
                                      Heads<const T>(v),
                                      Heads<T>(o),
                                      Global<float>(lse),
                                      // Not 0, by which −∞ must not be multiplied.
                                      std::fmax(std::fabs(scale) * kLog2E, FLT_MIN)};
            const std::int64_t tiles = (p.Tq + Kernel::kQueries - 1) / Kernel::kQueries;
            launch<Kernel>(p.B * p.H * tiles, Kernel::kMaxSharedBytes, stream, p);
        });
    });
}

}  // namespace gpt1
