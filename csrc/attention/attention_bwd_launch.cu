#include "attention/attention_dkdv_kernel.cuh"
#include "attention/attention_dq_kernel.cuh"

namespace gpt1 {

void causal_attention_bwd_dq(HeadsArray dout, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray o,
                             Array lse, Array keep_bits, Array first_key, Array delta, HeadsArray dq,
                             AttentionSizes sizes, float scale, float keep_scale, int dtype, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_head_size(std::get<4>(sizes), [&](auto columns) {
            using Kernel = AttentionBackwardDq<T, columns()>;
            const typename Kernel::Params p{{keep_bits, first_key, sizes, scale, keep_scale},
                                            Heads<const T>(dout),
                                            Heads<const T>(q),
                                            Heads<const T>(k),
                                            Heads<const T>(v),
                                            Heads<const T>(o),
                                            Global<const float>(lse),
                                            Global<float>(delta),
                                            Heads<T>(dq)};
            const std::int64_t tiles = (p.Tq + Kernel::kQueries - 1) / Kernel::kQueries;
            launch<Kernel>(p.B * p.H * tiles, Kernel::kMaxSharedBytes, stream, p);
        });
    });
}

void causal_attention_bwd_dkdv(HeadsArray dout, HeadsArray q, HeadsArray k, HeadsArray v, Array lse,
                               Array delta, Array keep_bits, Array first_key, HeadsArray dk, HeadsArray dv,
                               AttentionSizes sizes, float scale, float keep_scale, int dtype, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using T = decltype(element);
        dispatch_head_size(std::get<4>(sizes), [&](auto columns) {
            using Kernel = AttentionBackwardDkDv<T, columns()>;
            const typename Kernel::Params p{{keep_bits, first_key, sizes, scale, keep_scale},
                                            Heads<const T>(dout),
                                            Heads<const T>(q),
                                            Heads<const T>(k),
                                            Heads<const T>(v),
                                            Global<const float>(lse),
                                            Global<const float>(delta),
                                            Heads<T>(dk),
                                            Heads<T>(dv)};
            const std::int64_t tiles = (p.Tk + Kernel::kKeys - 1) / Kernel::kKeys;
            launch<Kernel>(p.B * p.H * tiles, Kernel::kMaxSharedBytes, stream, p);
        });
    });
}

}  // namespace gpt1
