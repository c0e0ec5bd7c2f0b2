// The second half of a deterministic reduction: adds the partial sums that a grid left behind.
#pragma once

#include "common/rows.cuh"

namespace gpt1 {

/// A block adds 32 columns of one sum: a lane owns a column, a warp every sixteenth row. The warps'
/// shares are then added in order. 32 registers, 2 KB of shared memory, 4 blocks a processor.
struct SumPartials {
    static constexpr int kMostSums = 3;
    static constexpr int kWarps = 16;

    struct Params {
        Global<const float> partials;  // (sums, P, C)
        FloatArray<false> totals[kMostSums];  // of (C,)
        std::int64_t P, C;
        std::string shape() const { return shape_text("P", P, "C", C); }
    };
    static constexpr const char* kName = "sum_partials";
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = kThreads * 4;

    __device__ static void run(const Params& p) {
        const std::int64_t blocks = (p.C + 31) / 32;
        const int sum = static_cast<int>(block_index() / blocks);
        const std::int64_t column = block_index() % blocks * 32 + lane_index();
        const bool inside = column < p.C;
        const std::int64_t first = sum * p.P * p.C + column;

        float total = 0.0f;
#pragma unroll 4
        for (std::int64_t row = warp_index(); row < p.P; row += kWarps) {
            total += p.partials.load(first + row * p.C, inside);
        }
        SharedArena arena;
        const Shared<float> shares = arena.take<float>(kThreads);
        shares.store(thread_index(), total);
        barrier();
        if (warp_index() > 0) return;
        total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += shares.load(warp * 32 + lane_index());
#pragma unroll
        for (int i = 0; i < kMostSums; ++i) {
            if (i == sum) p.totals[i].store(column, total, inside);
        }
    }

    /// Adds `sums` partial sums of P rows each; all of them in one launch.
    static void start(Array partials, std::int64_t P, std::int64_t C, const std::vector<TypedArray>& totals,
                      Stream stream) {
        Params p{};
        p.partials = Global<const float>(partials);
        for (std::size_t i = 0; i < totals.size(); ++i) p.totals[i] = FloatArray<false>(totals[i]);
        p.P = P;
        p.C = C;
        const std::int64_t blocks = (C + 31) / 32;
        launch<SumPartials>(static_cast<std::int64_t>(totals.size()) * blocks, kMaxSharedBytes, stream, p);
    }
};

}  // namespace gpt1
