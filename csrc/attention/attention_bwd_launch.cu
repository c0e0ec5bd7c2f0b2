#include "attention/attention_bwd_kernel.cuh"
#include "attention/attention_dkdv_kernel.cuh"
#include "attention/attention_dq_kernel.cuh"

namespace gpt1 {

namespace {

std::int64_t tiles(int length, int tile) { return (length + tile - 1) / tile; }

}  // namespace

void causal_attention_bwd(HeadsArray dout, HeadsArray q, HeadsArray k, HeadsArray v, HeadsArray o, Array lse,
                          Array keep_bits, Array first_key, Array delta, HeadsArray dq, HeadsArray dk,
                          HeadsArray dv, AttentionSizes sizes, float scale, float keep_scale, DType dtype,
                          Stream stream) {
    const AttentionProblem problem(keep_bits, first_key, sizes, scale, keep_scale);
    const std::int64_t heads = std::int64_t{problem.B} * problem.H;
    dispatch_narrow(dtype, [&](auto element) {
        using T = decltype(element);
        using In = Heads<const T>;
        using Out = Heads<T>;
        const Out dq_out(dq), dk_out(dk), dv_out(dv);
        dispatch_head_size(problem.D, [&](auto columns) {
            using OnChip = AttentionBackward<T>;
            if constexpr (columns() == OnChip::kD) {
                if (dq_out && dk_out && dv_out && problem.Tq <= OnChip::kMostQueries &&
                    shared_memory_limit(stream.first) >= OnChip::kMaxSharedBytes) {
                    return launch<OnChip>(heads, OnChip::kMaxSharedBytes, stream,
                                          {problem, In(dout), In(q), In(k), In(v), In(o),
                                           Global<const float>(lse), dq_out, dk_out, dv_out});
                }
            }
            if ((dq_out || dk_out) && problem.Tq > 0) {
                using Dq = AttentionBackwardDq<T, columns()>;
                launch<Dq>(heads * tiles(problem.Tq, Dq::kQueries), Dq::kMaxSharedBytes, stream,
                           {problem, In(dout), In(q), In(k), In(v), In(o), Global<const float>(lse),
                            Global<float>(delta), dq_out});
            }
            if (dk_out || dv_out) {
                using DkDv = AttentionBackwardDkDv<T, columns()>;
                launch<DkDv>(heads * tiles(problem.Tk, DkDv::kKeys), DkDv::kMaxSharedBytes, stream,
                             {problem, In(dout), In(q), In(k), In(v), Global<const float>(lse),
                              Global<const float>(delta), dk_out, dv_out});
            }
        });
    });
}

}  // namespace gpt1
