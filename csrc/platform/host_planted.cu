#include "platform/host_planted.h"

#include <map>

#include "platform/hopper.cuh"

namespace gpt1::host {

namespace {

constexpr int kCount = 64;

struct Params {
    Global<float> x;  // (kCount,)
    Global<float> y;  // (kCount,)
    bool planted;
    std::string shape() const { return ""; }
};

template <void (*kRun)(const Params&), int kThreadCount, int kSharedBytes>
struct Planted {
    using Params = host::Params;
    static constexpr const char* kName = "planted";
    static constexpr int kThreads = kThreadCount;
    static constexpr int kBlocksPerProcessor = 1;
    static constexpr int kMaxSharedBytes = kSharedBytes;
    static void run(const Params& p) { kRun(p); }
};

void missing_barrier(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(kCount);
    memory.store(i, p.x.load(i));
    if (!p.planted) barrier();
    p.y.store(i, memory.load(kCount - 1 - i));
}

void missing_second_barrier(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(kCount);
    for (int round = 0; round < 2; ++round) {
        memory.store(i, p.x.load(i));
        barrier();
        p.y.store(i, memory.load(kCount - 1 - i));
        if (!p.planted) barrier();
    }
}

void missing_warp_barrier(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(kCount);
    memory.store(i, p.x.load(i));
    if (!p.planted) warp_barrier();
    p.y.store(i, memory.load(i ^ 1));
}

void warp_barrier_instead_of_barrier(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(kCount);
    memory.store(i, p.x.load(i));
    if (p.planted) warp_barrier();
    else barrier();
    p.y.store(i, memory.load(kCount - 1 - i));
}

void read_out_of_bounds(const Params& p) { p.y.store(thread_index(), p.x.load(thread_index() + p.planted)); }

void write_out_of_bounds(const Params& p) { p.y.store(thread_index() - p.planted, 0.0f); }

void shared_out_of_bounds(const Params& p) {
    SharedArena().take<float>(kCount).store(thread_index() + p.planted, 0.0f);
}

void more_shared_memory_than_launched(const Params& p) { SharedArena().take<float>(p.planted ? 257 : 256); }

void unaligned_access(const Params& p) {
    const int i = thread_index();
    p.y.store_vector<4>(i / 16 * 16 + i % 4 * 4, p.x.load_vector<4>(i % 8 * 4 + p.planted), i < 4);
}

void missing_lane(const Params& p) {
    const int i = thread_index();
    float value = p.x.load(i);
    if (!p.planted || i != 40) value = shuffle_xor(value, 1);
    p.y.store(i, value);
}

void lanes_in_two_places(const Params& p) {
    const int i = thread_index();
    float value = p.x.load(i);
    if (p.planted && i % 2 == 0) value = shuffle_xor(value, 2);
    else value = shuffle_xor(value, 2);
    p.y.store(i, value);
}

void barrier_not_for_all(const Params& p) {
    if (!p.planted || thread_index() < 32) barrier();
    else shuffle_xor(0, 1), barrier();
}

void barrier_after_exit(const Params& p) {
    if (p.planted && thread_index() == 5) return;
    barrier();
}

void copy_used_before_its_wait(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(kCount);
    if (i < kCount / 4) copy_async(memory, 4 * i, p.x, 4 * i);
    copy_async_commit();
    if (!p.planted) copy_async_wait<0>();
    barrier();
    p.y.store(i, memory.load(i));
}

void copy_never_waited_for(const Params& p) {
    const Shared<float> memory = SharedArena().take<float>(kCount);
    if (thread_index() < kCount / 4) copy_async(memory, 4 * thread_index(), p.x, 4 * thread_index());
    copy_async_commit();
    if (!p.planted) copy_async_wait<0>();
}

void copy_waited_for_by_its_thread_only(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(kCount);
    if (i < kCount / 4) copy_async(memory, 4 * i, p.x, 4 * i);
    copy_async_commit();
    copy_async_wait<0>();
    if (!p.planted) barrier();
    p.y.store(i, memory.load(i));
}

void one_group_too_few_waited_for(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(2 * kCount);
    for (int stage = 0; stage < 2; ++stage) {
        if (i < kCount / 4) copy_async(memory, stage * kCount + 4 * i, p.x, 4 * i);
        copy_async_commit();
    }
    if (p.planted) copy_async_wait<2>();
    else copy_async_wait<1>();
    barrier();
    p.y.store(i, memory.load(i));
    copy_async_wait<0>();
}

/// Two stages; the copy of the round after next goes where others may still be reading.
void write_onto_a_live_stage(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(2 * kCount);
    const auto fetch = [&](int stage) {
        if (i < kCount / 4) copy_async(memory, stage * kCount + 4 * i, p.x, 4 * i);
        copy_async_commit();
    };
    fetch(0);
    fetch(1);
    for (int round = 0; round < 4; ++round) {
        copy_async_wait<1>();
        barrier();
        p.y.store(i, memory.load(round % 2 * kCount + i));
        if (!p.planted) barrier();
        fetch(round % 2);
    }
    copy_async_wait<0>();
}

void two_blocks_write_one_place(const Params& p) {
    const int first = p.planted ? 0 : static_cast<int>(block_index()) * kCount / 2;
    p.y.store(first + thread_index() % (kCount / 2), 0.0f, thread_index() < kCount / 2);
}

// On Hopper.

/// Each warpgroup reverses its half.
void missing_warpgroup_barrier(const Params& p) {
    const int i = thread_index(), group = warpgroup_index() * kWarpgroup;
    const Shared<float> memory = SharedArena().take<float>(2 * kWarpgroup);
    for (int round = 0; round < 2; ++round) {
        memory.store(i, p.x.load(i % kCount));
        warpgroup_barrier();
        p.y.store(i, memory.load(2 * group + kWarpgroup - 1 - i), i < kCount);
        if (!p.planted) warpgroup_barrier();
    }
}

void warpgroup_barrier_instead_of_barrier(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(2 * kWarpgroup);
    memory.store(i, p.x.load(i % kCount));
    if (p.planted) warpgroup_barrier();
    else barrier();
    p.y.store(i, memory.load(2 * kWarpgroup - 1 - i), i < kCount);
}

enum class Bug {
    kStageNotWaitedFor, kStageReleasedEarly, kCopyNotWaitedFor, kProductNotWaitedFor, kProductNeverWaitedFor,
    kWrongParity, kWarpsDiffer
};

/// Sums over steps of 64 terms in one stage, from the row `x`: one warpgroup copies, the other multiplies.
template <Bug kBug>
void product(const Params& p) {
    constexpr int kSteps = 3, kBox = 64 * kBoxColumns, kBytes = 3 * kBox * 2;
    const auto planted = [&](Bug bug) { return p.planted && kBug == bug; };
    SharedArena arena;
    const auto a = arena.take<bf16>(kBox), b = arena.take<bf16>(2 * kBox);
    const CopyBarriers full(arena.take<std::uint64_t>(1)), empty(arena.take<std::uint64_t>(1));
    if (thread_index() == 0) {
        full.init(0, 1);
        empty.init(0, 4);
        fence_copy_barriers();
    }
    cluster_barrier();
    if (thread_index() == kWarpgroup) {
        const auto row = reinterpret_cast<std::uintptr_t>(p.x.address(0));
        const TensorMap map = tensor_map(row, true, 1, 2 * kCount, 2 * kCount, 64);
        for (int step = 0; step < kSteps; ++step) {
            if (!planted(Bug::kStageNotWaitedFor)) empty.wait(0, step % 2 ^ !planted(Bug::kWrongParity));
            full.expect(0, kBytes);
            copy_box(a, 0, map, 0, 0, full, 0);
            for (int half = 0; half < 2; ++half) copy_box(b, half * kBox, map, 0, 64 * half, full, 0);
        }
    } else if (thread_index() < kWarpgroup) {
        FragmentC sums[16];
        const bool differs = planted(Bug::kWarpsDiffer) && warp_index() == 2;
        const std::uint64_t of_a = operand_descriptor<false>(a, 0, 64) + differs;
        const std::uint64_t of_b = operand_descriptor<false>(b, 0, 64);
        for (int step = 0; step < kSteps; ++step) {
            if (!planted(Bug::kCopyNotWaitedFor)) full.wait(0, step % 2);
            wgmma_fence();
            wgmma_async<bf16, false, false>(sums, of_a, of_b, step > 0);
            wgmma_commit();
            if (planted(Bug::kStageReleasedEarly) && lane_index() == 0) empty.arrive(0);
            if (planted(Bug::kProductNotWaitedFor) && step == 0) wgmma_wait<1>();
            else if (!planted(Bug::kProductNeverWaitedFor) || step < kSteps - 1) wgmma_wait<0>();
            if (!planted(Bug::kStageReleasedEarly) && lane_index() == 0) empty.arrive(0);
        }
        p.y.store(thread_index(), sums[0].values[0], thread_index() < kCount);
    }
    cluster_barrier();
}

/// Right but for that: lanes wait in a collective for one that waits for a copy, other warps at the barrier.
void rank_beyond_the_cluster(const Params& p) {
    SharedArena arena;
    const auto box = arena.take<bf16>(64 * kBoxColumns);
    const CopyBarriers full(arena.take<std::uint64_t>(1));
    if (thread_index() == 63) {
        const auto row = reinterpret_cast<std::uintptr_t>(p.x.address(0));
        full.init(0, 1);
        if (p.planted) full.arrive_at(0, 1);
        full.expect(0, 64 * kBoxColumns * 2);
        copy_box(box, 0, tensor_map(row, true, 1, 2 * kCount, 2 * kCount, 64), 0, 0, full, 0);
        full.wait(0, 0);
    }
    warp_barrier();
    barrier();
    p.y.store(thread_index(), 0.0f, thread_index() < kCount);
}

// What is no fault, but seen: in the output or in the counts.

void sums_read_before_the_wait(const Params& p) {
    const auto tiles = SharedArena().take<bf16>(3 * 64 * kBoxColumns);
    for (int i = thread_index(); i < 3 * 64 * kBoxColumns; i += kWarpgroup) tiles.store(i, bf16(1.0f));
    barrier();
    const std::uint64_t operand = operand_descriptor<false>(tiles, 0, 64);
    FragmentC sums[16];
    wgmma_async<bf16, false, false>(sums, operand, operand, false);
    wgmma_commit();
    if (!p.planted) wgmma_wait<0>();
    p.y.store(thread_index(), sums[0].values[0], thread_index() < kCount);
    wgmma_wait<0>();
}

void unwritten_shared_memory(const Params& p) {
    const int i = thread_index();
    const Shared<float> memory = SharedArena().take<float>(kCount);
    if (!p.planted) memory.store(i, 1.0f);
    p.y.store(i, memory.load(i));
}

void second_read(const Params& p) {
    const int i = thread_index();
    float value = p.x.load(i);
    if (p.planted) value = p.x.load(i);
    p.y.store(i, value);
}

/// Eight numbers of one sector, or of eight.
void strided_access(const Params& p) {
    const int i = thread_index();
    p.y.store(i, p.x.load(p.planted ? 8 * i : i, i < 8), i < 8);
}

/// Neighbours in memory, or eight lanes to a bank.
void bank_conflict(const Params& p) {
    const int i = thread_index();
    SharedArena().take<float>(256).store(p.planted ? i % 8 * 32 + i / 8 : i, 0.0f);
}

using Run = void (*)(const Params&);

template <void (*kRun)(const Params&), int kGrid = 1, int kThreads = kCount, int kSharedBytes = 1024>
void run(const Params& params) {
    launch<Planted<kRun, kThreads, kSharedBytes>>(kGrid, kSharedBytes, Stream{}, params);
}

template <void (*kRun)(const Params&), int kWarpgroups = 2>
void run_on_hopper(const Params& params) {
    run<kRun, 1, kWarpgroups * kWarpgroup, 32 * 1024>(params);
}

const std::map<std::string, Run>& runs() {
    static const std::map<std::string, Run> all = {
        {"missing barrier", run<missing_barrier>},
        {"missing second barrier", run<missing_second_barrier>},
        {"missing warp barrier", run<missing_warp_barrier>},
        {"warp barrier instead of barrier", run<warp_barrier_instead_of_barrier>},
        {"read out of bounds", run<read_out_of_bounds>},
        {"write out of bounds", run<write_out_of_bounds>},
        {"shared memory out of bounds", run<shared_out_of_bounds>},
        {"more shared memory than launched", run<more_shared_memory_than_launched>},
        {"unaligned access", run<unaligned_access>},
        {"missing lane", run<missing_lane>},
        {"lanes in two places", run<lanes_in_two_places>},
        {"barrier not for all", run<barrier_not_for_all>},
        {"barrier after exit", run<barrier_after_exit>},
        {"copy used before its wait", run<copy_used_before_its_wait>},
        {"copy never waited for", run<copy_never_waited_for>},
        {"copy waited for by its thread only", run<copy_waited_for_by_its_thread_only>},
        {"one group too few waited for", run<one_group_too_few_waited_for>},
        {"write onto a live stage", run<write_onto_a_live_stage>},
        {"two blocks write one place", run<two_blocks_write_one_place, 2>},
        {"missing warpgroup barrier", run_on_hopper<missing_warpgroup_barrier>},
        {"warpgroup barrier instead of barrier", run_on_hopper<warpgroup_barrier_instead_of_barrier>},
        {"stage not waited for", run_on_hopper<product<Bug::kStageNotWaitedFor>>},
        {"stage released before the product", run_on_hopper<product<Bug::kStageReleasedEarly>>},
        {"product before its copy", run_on_hopper<product<Bug::kCopyNotWaitedFor>>},
        {"product not waited for", run_on_hopper<product<Bug::kProductNotWaitedFor>>},
        {"product never waited for", run_on_hopper<product<Bug::kProductNeverWaitedFor>>},
        {"wrong parity", run_on_hopper<product<Bug::kWrongParity>>},
        {"warps multiply different operands", run_on_hopper<product<Bug::kWarpsDiffer>>},
        {"rank beyond the cluster", run_on_hopper<rank_beyond_the_cluster>},
    };
    return all;
}

const std::map<std::string, Run>& seen_runs() {
    static const std::map<std::string, Run> all = {
        {"unwritten shared memory", run<unwritten_shared_memory>},
        {"second read", run<second_read>},
        {"strided access", run<strided_access>},
        {"bank conflict", run<bank_conflict>},
        {"sums read before the wait", run_on_hopper<sums_read_before_the_wait, 1>},
    };
    return all;
}

}  // namespace

std::vector<float> run_planted(const std::string& name, bool planted) {
    alignas(32) float x[kCount], y[kCount]{};  // from a sector's start
    for (int i = 0; i < kCount; ++i) x[i] = static_cast<float>(i);
    const auto view = [](float* data) { return Array{reinterpret_cast<std::uintptr_t>(data), kCount}; };
    const auto& all = runs().contains(name) ? runs() : seen_runs();
    all.at(name)({Global<float>(view(x)), Global<float>(view(y)), planted});
    return {y, y + kCount};
}

std::vector<std::string> planted_names() {
    std::vector<std::string> names;
    for (const auto& [name, run] : runs()) names.push_back(name);
    return names;
}

}  // namespace gpt1::host
