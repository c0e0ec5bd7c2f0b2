// The primitives that kernels use, and their only way to memory. They exist twice: for a GPU, where
// each is an instruction or two, and for a CPU, where they check what a GPU would let pass.
//
//   thread_index() lane_index() warp_index() block_index() grid_size()
//   barrier()                            all threads of the block, and their memory
//   warp_barrier()                       all lanes of the warp, and their memory
//   shuffle(value, lane)  shuffle_xor(value, mask)       all lanes of the warp
//
//   Global<T>, Shared<T>                 views with extents: load, store, and vectors of 16 bytes;
//                                        a masked-out access touches nothing, a load then gives 0
//   SharedArena                          hands out the block's shared memory
//   copy_async(shared, i, global, j)     16 bytes on their way while the thread goes on; zeros if masked
//   copy_async_word(shared, i, global, j)       the same for 4 bytes
//   copy_async_commit()  copy_async_wait<N>()     a group; until at most N of the thread's groups are open
//   compare_exchange(global, i, expected, desired)   the only atomic: integers
//
//   load_matrices(shared, i)  load_matrices_transposed     four 8x8 matrices of 2-byte elements
//   mma(c, a, b)                                           c (16, 8) += a (16, 16) b (16, 8)
//
//   to_float  from_float<T>  pack<T>  unpack<T>  widen  narrow<T>
//   fast_exp2  fast_reciprocal  multiply_wide
//   launch<Kernel>(grid, shared_bytes, stream, params)
//
// A kernel is a class:
//
//   template <class T>
//   struct Scale {
//       struct Params { Global<const T> x; Global<T> y; int N; std::string shape() const; };
//       static constexpr const char* kName = "scale";
//       static constexpr int kThreads = 128;            // of a block
//       static constexpr int kBlocksPerProcessor = 4;   // at the least, which limits the registers
//       static constexpr int kMaxSharedBytes = 0;       // that a launch may ask for
//       static constexpr int kCluster = 2;              // blocks to a cluster, and
//       static constexpr bool kForHopper = true;        // compute capability 9.0 alone: both may be left out
//       __device__ static void run(const Params& p);
//   };
//
// hopper.cuh has more for Hopper's GPUs.
#pragma once

#ifdef __CUDACC__
#include "platform/device.cuh"
#else
#include "platform/host.cuh"
#endif

#include "platform/vectors.cuh"
