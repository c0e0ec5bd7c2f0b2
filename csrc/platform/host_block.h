// A launch on the CPU: clusters of blocks one after another, the threads of each as fibers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpt1 {
using Site = std::source_location;
}

namespace gpt1::host {

constexpr int kLanes = 32;
constexpr int kSlotBytes = 64;

/// A bug at which a GPU might crash, or which it might let pass; Python sees it as KernelFault.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// What a lane gives to a collective, and what it gets.
struct Slot {
    alignas(16) unsigned char in[kSlotBytes];
    alignas(16) unsigned char out[kSlotBytes];
};

enum class State { kReady, kAtBarrier, kInCollective, kWaiting, kExited };

struct Thread {
    int index;
    State state;
    void* stack_pointer;
    Site site;         // of what it waits in
    const char* name;  // of the collective, or of what it waits for
    const void* waits_for;
};

struct Product;          // a warp's part of one, see host_hopper.cpp
void finish_products();  // a Fault if the thread's warp has some at work

struct Warp {
    int arrived = 0;          // lanes in the collective
    std::uint32_t epoch = 0;  // barriers of the warpgroup passed, and of the warp since, in the lower bits
    Slot slots[kLanes];
    std::vector<std::shared_ptr<Product>> products;  // at work
    int groups = 0;                                  // of products, committed
    int started = 0;                                 // products
};
constexpr int kWarpEpochBits = 20, kWarpsOfGroup = 4;

/// What the four warps of a warpgroup share.
struct Warpgroup {
    int arrived = 0;                         // threads at its barrier
    std::vector<std::uint64_t> descriptors;  // of all products, A and B
};

/// The order in which threads run between two barriers: each is one that a GPU might choose.
enum class Order { kForward, kReversed, kShuffled };

struct Block {
    const char* kernel = "";
    std::int64_t index = 0;
    std::int64_t grid = 0;
    int rank = 0;              // in its cluster
    int cluster_arrived = 0;   // threads at the barrier of the cluster, of its first block
    std::uint32_t serial = 0;  // over all launches, so that no two blocks share one
    std::uint32_t epoch = 0;   // barriers passed
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    unsigned char* shared = nullptr;  // at a multiple of kSharedAlignment, as are all of a cluster, in turn
    int shared_bytes = 0;
};
constexpr int kSharedAlignment = 1024;

extern std::vector<Block> cluster;  // that runs, of which there is one at a time
extern Block* block;                // of the thread that runs
extern Thread* thread;              // that runs

inline int lane() { return thread->index % kLanes; }
inline Warp& warp() { return block->warps[thread->index / kLanes]; }

/// Runs `body` in `grid` blocks of `threads` threads, in clusters of `blocks`. Throws the first Fault.
void run_grid(const char* kernel, std::int64_t grid, int blocks, int threads, int shared_bytes,
              const std::function<void()>& body);

void set_order(Order order, std::uint64_t seed);

void wait_at_barrier(const Site& site);

/// Waits for all lanes of the warp; the last to come runs `combine` on their slots.
void collective(const char* name, const Site& site, void (*combine)(Slot* slots));

/// Waits until another thread wakes those that wait for `what`, which `name` describes.
void wait_for(const void* what, const char* name, const Site& site);
void wake(const void* what);

/// A barrier of `count` threads; the last to come calls `all_here`.
void meet(int& arrived, int count, const char* name, const Site& site, void (*all_here)());

/// Does something for this thread as late as possible: when no thread of the cluster can go on.
void at_last(const Site& site, std::function<void()> event);

/// Throws a Fault that names the kernel, the block, the thread and the line.
[[noreturn]] void fault(const std::string& what, const Site& site);

}  // namespace gpt1::host
