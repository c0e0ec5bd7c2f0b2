// What Hopper's GPUs have besides, on them. See hopper.cuh.
#pragma once

#include <cuda.h>

#include "platform/platform.cuh"

namespace gpt1 {

// --- warpgroups ------------------------------------------------------------------------------------

/// The same in all lanes, and known to be to the compiler.
__device__ __forceinline__ int warpgroup_index() { return shuffle(thread_index() / kWarpgroup, 0); }

/// All threads of the warpgroup, and their memory.
__device__ __forceinline__ void warpgroup_barrier() {
    asm volatile("bar.sync %0, %1;\n" ::"r"(1 + thread_index() / kWarpgroup), "n"(kWarpgroup) : "memory");
}

/// Changes how many registers each thread of the warpgroup has, a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// --- clusters --------------------------------------------------------------------------------------

/// Of the block in its cluster.
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}

/// All threads of the cluster's blocks, and their memory.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// --- barriers in shared memory ---------------------------------------------------------------------

/// Each goes through phases: a phase ends when all its arrivals and all the bytes it expects have come.
class CopyBarriers {
public:
    __device__ __forceinline__ explicit CopyBarriers(const Shared<std::uint64_t>& memory) : memory_(memory) {}

    __device__ __forceinline__ void init(int i, int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(address(i)), "r"(arrivals) : "memory");
    }

    /// Arrives, and expects the bytes of copies in this phase.
    __device__ __forceinline__ void expect(int i, int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(address(i)), "r"(bytes)
                     : "memory");
    }

    __device__ __forceinline__ void arrive(int i) const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(address(i)) : "memory");
    }

    /// At the same barrier of a block of the cluster.
    __device__ __forceinline__ void arrive_at(int i, int rank) const {
        asm volatile(
            "{\n"
            ".reg .b32 there;\n"
            "mapa.shared::cluster.u32 there, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
            "}\n" ::"r"(address(i)), "r"(rank)
            : "memory");
    }

    /// Waits until the phase of this parity has ended: 0 is the first phase, 1 the second, and before the
    /// first has ended, 1 does not wait.
    __device__ __forceinline__ void wait(int i, std::uint32_t parity) const {
        std::uint32_t ended = 0;
        while (!ended) {
            asm volatile(
                "{\n"
                ".reg .pred ended;\n"
                "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
                "selp.b32 %0, 1, 0, ended;\n"
                "}\n"
                : "=r"(ended)
                : "r"(address(i)), "r"(parity)
                : "memory");
        }
    }

    __device__ __forceinline__ unsigned address(int i) const { return memory_.address(i); }

private:
    Shared<std::uint64_t> memory_;
};

/// Makes barriers just initialised visible to TMA and to the cluster.
__device__ __forceinline__ void fence_copy_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}

// --- copies of tiles -------------------------------------------------------------------------------

struct TensorMap {
    CUtensorMap map;
};

/// Starts the copy of the box at (row, column) to `to[i]`, a multiple of 1024 bytes; its bytes are counted at
/// a barrier. Its rows of 128 bytes are swizzled: their 16-byte chunks are permuted by the row modulo 8.
template <class T>
__device__ __forceinline__ void copy_box(
    const Shared<T>& to, int i, const TensorMap& from, int row, int column, const CopyBarriers& barriers,
    int barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(to.address(i)),
        "l"(&from.map), "r"(column), "r"(row), "r"(barriers.address(barrier))
        : "memory");
}

/// The same to all kBlocks blocks of the cluster, and to the barrier of each.
template <int kBlocks, class T>
__device__ __forceinline__ void copy_box_to_all(
    const Shared<T>& to, int i, const TensorMap& from, int row, int column, const CopyBarriers& barriers,
    int barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(to.address(i)),
        "l"(&from.map), "r"(column), "r"(row), "r"(barriers.address(barrier)),
        "h"(static_cast<std::uint16_t>((1 << kBlocks) - 1))
        : "memory");
}

// --- products of a warpgroup -----------------------------------------------------------------------

/// Before the first product on registers that something else has written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/// Until at most kOpenGroups of the committed groups are at work.
template <int kOpenGroups>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kOpenGroups) : "memory");
}

/// Keeps the compiler from moving uses of sums to before the wait.
template <int kCount>
__device__ __forceinline__ void fence_sums(FragmentC (&c)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        float* values = c[j].values;
        asm volatile("" : "+f"(values[0]), "+f"(values[1]), "+f"(values[2]), "+f"(values[3])::"memory");
    }
}

// The operands of the instruction by fours, and their numbers.
#define GPT1_SUMS(j) \
    "+f"(c[j].values[0]), "+f"(c[j].values[1]), "+f"(c[j].values[2]), "+f"(c[j].values[3])
#define GPT1_SUMS_8(j)                                                                              \
    GPT1_SUMS(j), GPT1_SUMS(j + 1), GPT1_SUMS(j + 2), GPT1_SUMS(j + 3), GPT1_SUMS(j + 4),           \
        GPT1_SUMS(j + 5), GPT1_SUMS(j + 6), GPT1_SUMS(j + 7)
#define GPT1_REGISTERS_64                                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "    \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "    \
    "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "    \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define GPT1_REGISTERS_128                                                                          \
    GPT1_REGISTERS_64                                                                               \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "  \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "    \
    "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "    \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define GPT1_MULTIPLY(shape, type, registers, a_, b_, more_, a_down_, b_down_, ...)                 \
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" more_ ", 0;\n"                          \
                 "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" registers "}, %"  \
                 a_ ", %" b_ ", more, 1, 1, %" a_down_ ", %" b_down_ ";\n}\n"                       \
                 : __VA_ARGS__                                                                      \
                 : "l"(a), "l"(b), "r"(static_cast<int>(more)), "n"(static_cast<int>(kADown)),      \
                   "n"(static_cast<int>(kBDown)))

/// Starts c (64, 8 kCount) += a (64, 16) b (16, 8 kCount), or =, if not `more`; all threads of the
/// warpgroup. A warp has 16 of the rows, in fragments side by side.
template <class T, bool kADown, bool kBDown, int kCount>
__device__ __forceinline__ void wgmma_async(
    FragmentC (&c)[kCount], std::uint64_t a, std::uint64_t b, bool more) {
    static_assert(kCount == 16 || kCount == 32);
    constexpr bool kBFloat = std::is_same_v<T, bf16>;
    if constexpr (kCount == 16 && kBFloat) {
        GPT1_MULTIPLY("m64n128k16", "bf16", GPT1_REGISTERS_64, "64", "65", "66", "67", "68",
                      GPT1_SUMS_8(0), GPT1_SUMS_8(8));
    } else if constexpr (kCount == 16) {
        GPT1_MULTIPLY("m64n128k16", "f16", GPT1_REGISTERS_64, "64", "65", "66", "67", "68",
                      GPT1_SUMS_8(0), GPT1_SUMS_8(8));
    } else if constexpr (kBFloat) {
        GPT1_MULTIPLY("m64n256k16", "bf16", GPT1_REGISTERS_128, "128", "129", "130", "131", "132",
                      GPT1_SUMS_8(0), GPT1_SUMS_8(8), GPT1_SUMS_8(16), GPT1_SUMS_8(24));
    } else {
        GPT1_MULTIPLY("m64n256k16", "f16", GPT1_REGISTERS_128, "128", "129", "130", "131", "132",
                      GPT1_SUMS_8(0), GPT1_SUMS_8(8), GPT1_SUMS_8(16), GPT1_SUMS_8(24));
    }
}

#undef GPT1_MULTIPLY
#undef GPT1_REGISTERS_128
#undef GPT1_REGISTERS_64
#undef GPT1_SUMS_8
#undef GPT1_SUMS

}  // namespace gpt1
