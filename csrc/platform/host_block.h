// A launch on the CPU: blocks one after another, the threads of each as fibers.
#pragma once

#include <cstdint>
#include <functional>
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

enum class State { kReady, kAtBarrier, kInCollective, kExited };

struct Thread {
    int index;
    State state;
    void* stack_pointer;
    Site site;         // of the barrier or collective it waits in
    const char* name;  // of the collective
};

struct Warp {
    int arrived = 0;               // lanes in the collective
    std::uint32_t epoch = 0;       // warp barriers passed
    Slot slots[kLanes];
};

/// The order in which threads run between two barriers: each is one that a GPU might choose.
enum class Order { kForward, kReversed, kShuffled };

/// The block that runs, of which there is one at a time.
struct Block {
    const char* kernel = "";
    std::int64_t index = 0;
    std::int64_t grid = 0;
    std::uint32_t serial = 0;  // over all launches, so that no two blocks share one
    std::uint32_t epoch = 0;   // barriers passed
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    int shared_bytes = 0;
};

extern Block block;
extern Thread* thread;  // the one that runs

inline int lane() { return thread->index % kLanes; }
inline Warp& warp() { return block.warps[thread->index / kLanes]; }

/// Runs `body` in `grid` blocks of `threads` threads. Throws the first Fault.
void run_grid(const char* kernel, std::int64_t grid, int threads, int shared_bytes,
              const std::function<void()>& body);

void set_order(Order order, std::uint64_t seed);

void wait_at_barrier(const Site& site);

/// Waits for all lanes of the warp; the last to come runs `combine` on their slots.
void collective(const char* name, const Site& site, void (*combine)(Slot* slots));

/// Throws a Fault that names the kernel, the block, the thread and the line.
[[noreturn]] void fault(const std::string& what, const Site& site);

}  // namespace gpt1::host
