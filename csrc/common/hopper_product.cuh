// Products of matrices on Hopper's GPUs, by wgmma and TMA, which only they have.
//
// The kernel is persistent and warp-specialised: a block walks from tile to tile. One thread starts TMA's
// copies of operands into shared memory, as many steps ahead as there is room for, also across to the next
// tile. Two warpgroups multiply what has arrived, and hand their sums to the epilogue while the next tile's
// operands arrive.
#pragma once

#include "common/epilogue_strip.cuh"
#include "common/product_grid.cuh"
#include "platform/hopper.cuh"

namespace gpt1 {

/// The sums over 64 rows, of which the four warps of a warpgroup have 16 each.
struct RowsOfWarpgroup {
    Shared<float> strips;  // (4, kStrip), of which each warp has one
    int strip_size;

    __device__ __forceinline__ bool first() const { return warp_index() % 4 == 0; }

    /// `x` of lanes 0 to 15; the sum is for the first warp.
    __device__ __forceinline__ Vector<float, 4> sum(const Vector<float, 4>& x) const {
        const int lane = lane_index() % 16 * 4;
        strips.store_vector(warp_index() % 4 * strip_size + lane, x, lane_index() < 16);
        warpgroup_barrier();
        Vector<float, 4> sum{};
#pragma unroll
        for (int warp = 0; warp < 4; ++warp) {
            const auto part = strips.template load_vector<4>(warp * strip_size + lane);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += part[i];
        }
        warpgroup_barrier();  // before the next sums
        return sum;
    }
};

template <class T, bool kATransposed, bool kBTransposed, class Epilogue, class Form>
struct HopperProduct {
    struct Params {
        TensorMap a;  // (M, K), or (K, M) if transposed
        TensorMap b;  // (K, N), or (N, K) if transposed
        ProductGrid grid;
        typename Epilogue::Params epilogue;
        std::string shape() const { return grid.shape(); }
    };
    static constexpr int kBlockM = Form::kBlockM, kBlockN = Form::kBlockN, kBlockK = Form::kBlockK;
    static constexpr int kStages = Form::kStages, kCluster = kHopperCluster;
    static constexpr int kGroups = 2;  // warpgroups that multiply
    static constexpr int kGroupM = Form::kPingPong ? kBlockM : kBlockM / kGroups;
    static constexpr int kSizeA = kBlockM * kBlockK, kSizeB = kBlockN * kBlockK;
    static constexpr int kFetchedN = kBlockN / kCluster;

    // Whether terms (the K axis) are rows of what is stored.
    static constexpr bool kADown = kATransposed, kBDown = !kBTransposed;
    static constexpr int kBoxRowsA = kADown ? kBlockK : kBlockM, kBoxRowsB = kBDown ? kBlockK : kFetchedN;

    using Strip = EpilogueStrip<Epilogue, 16>;

    using EpilogueParams = typename Epilogue::Params;
    static constexpr bool kIsBf16 = std::is_same_v<T, bf16>;

    static constexpr const char* kName = Epilogue::kName;
    static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
    static constexpr int kBlocksPerProcessor = 1;
    static constexpr bool kForHopper = true;
    static constexpr int kMaxSharedBytes = kStages * (kSizeA + kSizeB) * sizeof(T) +
                                           kGroups * 4 * Strip::kSize * sizeof(float) +
                                           3 * 128;  // of barriers, as the arena rounds up
    // Of a thread. At launch each has its share of the multiprocessor's, rounded down to a multiple of 8.
    static constexpr int kLaunchedRegisters = 65536 / kThreads / 8 * 8;
    static constexpr int kMultiplyingRegisters = 232, kFetchingRegisters = 40;

    static_assert(kBlockK == kBoxColumns);  // a box is as wide, where terms are columns
    // A box starts at a multiple of 1024 bytes, as the arena's memory does: before it are boxes alone.
    static_assert(kSizeA * sizeof(T) % 1024 == 0 && kFetchedN * kBlockK * sizeof(T) % 1024 == 0);
    // Claiming more registers than were released would wait for ever.
    static_assert(kGroups * kMultiplyingRegisters + kFetchingRegisters <= (kGroups + 1) * kLaunchedRegisters);

    struct Sums {
        FragmentC values[kGroupM / 64][kBlockN / 8];
    };

    /// The block's shared memory, from the first of its bytes on.
    struct Memory {
        SharedArena arena;
        Shared<T> tiles_a = arena.take<T>(kStages * kSizeA), tiles_b = arena.take<T>(kStages * kSizeB);
        Shared<float> strips = arena.take<float>(kGroups * 4 * Strip::kSize);
        CopyBarriers full{arena.take<std::uint64_t>(kStages)};   // a stage's operands have arrived
        CopyBarriers empty{arena.take<std::uint64_t>(kStages)};  // a stage's operands have been read
        CopyBarriers turns{arena.take<std::uint64_t>(kGroups)};  // a group may multiply; of ping-pong alone
    };

    __device__ static void run(const Params& p) {
        const Memory memory;
        if (thread_index() == 0) {
            for (int i = 0; i < kStages; ++i) {
                memory.full.init(i, 1);
                memory.empty.init(i, kCluster * (Form::kPingPong ? 1 : kGroups) * 4);  // warps
            }
            for (int group = 0; group < kGroups; ++group) memory.turns.init(group, 4);
            fence_copy_barriers();
        }
        cluster_barrier();
        if (warpgroup_index() == kGroups) {
            release_registers<kFetchingRegisters>();
            if (thread_index() == kGroups * kWarpgroup) fetch(p, memory);
        } else {
            claim_registers<kMultiplyingRegisters>();
            consume(p, memory);
        }
        cluster_barrier();  // no block leaves while the other arrives at its barriers
    }

private:
    /// A stage, and the parity of its turn.
    struct Position {
        int stage = 0;
        std::uint32_t parity = 0;

        __device__ __forceinline__ void next() {
            if (++stage == kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
        __device__ __forceinline__ void skip(int steps) {
            stage += steps;
            parity ^= stage / kStages & 1;
            stage %= kStages;
        }
    };

    // A cluster has every `clusters()`-th part, from the one of its own number on.
    __device__ __forceinline__ static Part first_part(const Params& p) {
        return Part(p.grid, block_index() / kCluster);
    }
    __device__ __forceinline__ static std::int64_t clusters() { return grid_size() / kCluster; }

    /// One thread starts the copies of all steps.
    __device__ __forceinline__ static void fetch(const Params& p, const Memory& memory) {
        Position at;
        for (Part part = first_part(p); part; part.skip(clusters())) {
            std::int64_t first_m, first_n;
            p.grid.origin(part.tile, first_m, first_n);
            const int m = static_cast<int>(first_m) + cluster_rank() * kBlockM;
            const int n = static_cast<int>(first_n) + cluster_rank() * kFetchedN;
            for (int step = part.first; step < part.first + part.count; ++step) {
                const int k = step * kBlockK;
                memory.empty.wait(at.stage, at.parity ^ 1);
                memory.full.expect(at.stage, (kSizeA + kSizeB) * sizeof(T));
                if constexpr (kADown) {
#pragma unroll
                    for (int i = 0; i < kBlockM; i += kBoxColumns) {
                        copy_box(memory.tiles_a, at.stage * kSizeA + i * kBlockK, p.a, k, m + i, memory.full,
                                 at.stage);
                    }
                } else {
                    copy_box(memory.tiles_a, at.stage * kSizeA, p.a, m, k, memory.full, at.stage);
                }
                const int to = at.stage * kSizeB + cluster_rank() * kFetchedN * kBlockK;
                if constexpr (kBDown) {
#pragma unroll
                    for (int j = 0; j < kFetchedN; j += kBoxColumns) {
                        copy_box_to_all<kCluster>(memory.tiles_b, to + j * kBlockK, p.b, k, n + j,
                                                  memory.full, at.stage);
                    }
                } else {
                    copy_box_to_all<kCluster>(memory.tiles_b, to, p.b, n, k, memory.full, at.stage);
                }
                at.next();
            }
        }
    }

    __device__ __forceinline__ static void consume(const Params& p, const Memory& memory) {
        const int group = warpgroup_index(), group_m = Form::kPingPong ? 0 : group * kGroupM;
        Position at;
        int turn = 0;
        std::uint32_t parity = group == 0;  // the first turn of the first group comes without a wait
        for (Part part = first_part(p); part; part.skip(clusters())) {
            if constexpr (Form::kPingPong) {
                if (turn++ % kGroups != group) {
                    at.skip(part.count);
                    continue;
                }
                // Then the other group has waited for all earlier steps; a parity cannot tell older phases.
                memory.turns.wait(group, parity);
                parity ^= 1;
            }
            Place place = part.place();
            place.first_m += cluster_rank() * kBlockM + group_m;
            typename Strip::Inputs first;  // on their way during the products
            if constexpr (kReadsAhead) first = Strip::read(p.epilogue, strip_place(place, 0));
            Sums sums;
            multiply(sums, at, part.count, memory, group_m, group);
            finish(p.epilogue, sums, memory.strips, place, first);
        }
    }

    __device__ __forceinline__ static void multiply(
        Sums& sums, Position& at, int steps, const Memory& memory, int group_m, int group) {
        int before = at.stage;
        for (int step = 0; step < steps; ++step) {
            memory.full.wait(at.stage, at.parity);
            const std::uint64_t a = operand_descriptor<kADown>(
                memory.tiles_a, at.stage * kSizeA + group_m * kBlockK, kBlockK);
            const std::uint64_t b =
                operand_descriptor<kBDown>(memory.tiles_b, at.stage * kSizeB, kBlockK);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kBlockK / 16; ++k) {
#pragma unroll
                for (int i = 0; i < kGroupM / 64; ++i) {
                    wgmma_async<T, kADown, kBDown>(sums.values[i],
                                                   a + i * kNext64Rows + k * kNext16Terms<kADown>,
                                                   b + k * kNext16Terms<kBDown>, step > 0 || k > 0);
                }
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(memory.empty, before);
            before = at.stage;
            at.next();
        }
        if constexpr (Form::kPingPong) {
            if (lane_index() == 0) memory.turns.arrive(kGroups - 1 - group);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < kGroupM / 64; ++i) fence_sums(sums.values[i]);
        release(memory.empty, before);
    }

    /// Tells those that fetch that this warp has read a stage.
    __device__ __forceinline__ static void release(const CopyBarriers& empty, int stage) {
        if (lane_index() < kCluster) empty.arrive_at(stage, lane_index());
    }

    // A warp's strips of its warpgroup's sums. Beside the sums, the registers hold the inputs of two strips,
    // unless the inputs are fp32.
    static constexpr int kAcross = kBlockN / Strip::kColumns, kStrips = kGroupM / 64 * kAcross;
    static constexpr bool kReadsAhead = sizeof(typename Strip::Inputs) <= 64;

    /// Of strip s; `at` is where the warpgroup's first sum goes.
    __device__ __forceinline__ static Place strip_place(const Place& at, int s) {
        return {at.first_m + s / kAcross * 64 + warp_index() % 4 * Strip::kRows,
                at.first_n + s % kAcross * Strip::kColumns, at.M, at.N};
    }

    /// `at` as above; `first` are the inputs of strip 0, if they are read ahead.
    __device__ __forceinline__ static void finish(
        const typename Epilogue::Params& params, const Sums& sums, const Shared<float>& strips,
        const Place& at, const typename Strip::Inputs& first) {
        const int warp = warp_index() % 4;
        const Shared<float> of_group = strips.slice((warp_index() - warp) * Strip::kSize, 4 * Strip::kSize);
        const Shared<float> strip = of_group.slice(warp * Strip::kSize, Strip::kSize);
        const RowsOfWarpgroup rows{of_group, Strip::kSize};
        typename Strip::Inputs inputs[kStrips];
        if constexpr (kReadsAhead) inputs[0] = first;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
            const auto fragment = [&](int, int j) -> const FragmentC& {
                return sums.values[s / kAcross][s % kAcross * (Strip::kColumns / 8) + j];
            };
            const Place place = strip_place(at, s);
            const std::int64_t n = Strip::n(place);
            Epilogue epilogue(params, n, n < at.N);
            Strip::store(strip, fragment);
            if (const int next = s + kReadsAhead; next < kStrips) {
                inputs[next] = Strip::read(params, strip_place(at, next));
            }
            Strip::apply(epilogue, strip, place, inputs[s]);
            epilogue.finish(at.first_m + s / kAcross * 64, at.M, rows);
        }
    }
};

}  // namespace gpt1
