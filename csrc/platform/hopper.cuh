// What Hopper's GPUs have besides the primitives of platform.cuh, for code that is compiled for them alone
// (sm_90a), and for a CPU. In the same way it exists twice.
//
//   warpgroup_index()  warpgroup_barrier()      four warps: all their threads, and their memory
//   release_registers<N>()  claim_registers<N>()
//   cluster_rank()  cluster_barrier()           all threads of the cluster's blocks, and their memory
//   CopyBarriers                                count arrivals, and the bytes of copies (mbarrier)
//   fence_copy_barriers()
//   TensorMap, tensor_map                       a matrix for copies of whole tiles (TMA)
//   copy_box  copy_box_to_all<N>                to this block, or to all of the cluster
//   wgmma_fence()  wgmma_async<T, kADown, kBDown>(c, a, b, more)  wgmma_commit()  wgmma_wait<N>()
//   fence_sums(c)                               products of a warpgroup
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

inline constexpr int kWarpgroup = 128;  // threads: four warps, which multiply together
inline constexpr int kBoxColumns = 64;  // of 2 bytes: 128 bytes, the width of the swizzle

}  // namespace gpt1

#ifdef __CUDACC__
#include "platform/device_hopper.cuh"
#else
#include "platform/host_hopper.cuh"
#endif

namespace gpt1 {

/// A matrix as TMA reads it: in boxes of `box_rows` rows of 64 elements of 2 bytes. Elements beyond the
/// matrix arrive as zeros. `stride` is the elements' between rows, a multiple of 8.
TensorMap tensor_map(std::uintptr_t data, bool is_bf16, std::int64_t rows, std::int64_t columns,
                     std::int64_t stride, int box_rows);

/// How the tensor cores find an operand that boxes hold. Either a box's rows are rows of A or columns of B,
/// and its columns are terms; or, if kTermsDown, its rows are terms, and 64 more rows of A or columns of B
/// are in the next box, of `box_rows` terms.
template <bool kTermsDown, class T>
__device__ __forceinline__ std::uint64_t operand_descriptor(const Shared<T>& memory, int i, int box_rows) {
    constexpr std::uint64_t kPermuted128 = 1, kEightRows = 8 * 128 / 16;
    const std::uint64_t start = memory.address(i) % (1 << 18) / 16;  // above are bits of the block's rank
    const std::uint64_t next_box = kTermsDown ? box_rows * 128 / 16 : 1;
    return start | next_box << 16 | kEightRows << 32 | kPermuted128 << 62;
}

/// What to add to a descriptor for the next 16 terms, and for the next 64 rows of A.
template <bool kTermsDown>
inline constexpr int kNext16Terms = kTermsDown ? 16 * 128 / 16 : 16 * 2 / 16;
inline constexpr int kNext64Rows = 64 * 128 / 16;

}  // namespace gpt1
