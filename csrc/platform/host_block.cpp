#include "platform/host_block.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string_view>
#include <utility>

#include "platform/host_fiber.h"
#include "platform/host_memory.h"

namespace gpt1::host {

Block block;
Thread* thread = nullptr;

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

Order order = Order::kForward;
std::mt19937_64 random_order;
std::uint32_t blocks_so_far = 0;
const std::function<void()>* body_of_launch = nullptr;
std::exception_ptr failure;
void* scheduler_stack = nullptr;

std::string place(const Site& site) {
    const std::string_view path = site.file_name();
    const auto slash = path.rfind('/');
    return std::string(path.substr(slash == path.npos ? 0 : slash + 1)) + ":" + std::to_string(site.line());
}

void yield() { gpt1_switch_stack(&thread->stack_pointer, scheduler_stack); }

void run_thread() {
    try {
        (*body_of_launch)();
        finish_copies();
    } catch (...) {
        failure = std::current_exception();
    }
    thread->state = State::kExited;
    yield();
    std::abort();  // an exited thread is never resumed
}

void resume(Thread& next) {
    thread = &next;
    gpt1_switch_stack(&scheduler_stack, next.stack_pointer);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

/// 0 … count − 1, as this pass visits them.
const std::vector<int>& visiting_order(int count, std::vector<int>& visited) {
    visited.resize(count);
    std::iota(visited.begin(), visited.end(), 0);
    if (order == Order::kReversed) std::reverse(visited.begin(), visited.end());
    if (order == Order::kShuffled) std::shuffle(visited.begin(), visited.end(), random_order);
    return visited;
}

/// Runs the lanes of a warp until each has exited or waits for other warps.
void run_warp(int warp) {
    static std::vector<int> visited;
    const auto first = block.threads.begin() + warp * kLanes;
    const int lanes = std::min<int>(kLanes, block.threads.end() - first);
    for (bool progress = true; progress;) {
        progress = false;
        for (const int lane : visiting_order(lanes, visited)) {
            if (first[lane].state == State::kReady) {
                resume(first[lane]);
                progress = true;
            }
        }
    }
    std::uint32_t present = 0;
    for (int lane = 0; lane < lanes; ++lane) {
        if (first[lane].state == State::kInCollective) present |= 1u << lane;
    }
    if (present != 0) {
        thread = &first[std::countr_zero(present)];
        std::ostringstream what;
        what << thread->name << " reached by the lanes " << std::hex << "0x" << present
             << " only, expected 0xffffffff";
        fault(what.str(), thread->site);
    }
}

/// Whether all threads wait at one barrier (else all have exited).
bool all_at_barrier() {
    Thread* waiting = nullptr;
    const Thread* exited = nullptr;
    for (Thread& t : block.threads) {
        if (t.state == State::kExited) {
            exited = &t;
        } else if (waiting == nullptr) {
            waiting = &t;
        } else if (t.site.line() != waiting->site.line() ||
                   std::strcmp(t.site.file_name(), waiting->site.file_name()) != 0) {
            thread = &t;
            fault("barrier, while thread " + std::to_string(waiting->index) + " waits at the one of " +
                      place(waiting->site), t.site);
        }
    }
    if (waiting != nullptr && exited != nullptr) {
        thread = waiting;
        fault("barrier after thread " + std::to_string(exited->index) + " has exited", waiting->site);
    }
    return waiting != nullptr;
}

void run_block() {
    static std::vector<int> visited;
    const int warps = block.warps.size();
    do {
        for (Thread& t : block.threads) {
            if (t.state == State::kAtBarrier) t.state = State::kReady;
        }
        for (const int warp : visiting_order(warps, visited)) run_warp(warp);
        ++block.epoch;
    } while (all_at_barrier());
}

}  // namespace

void set_order(Order new_order, std::uint64_t seed) {
    order = new_order;
    random_order.seed(seed);
}

void run_grid(const char* kernel, std::int64_t grid, int threads, int shared_bytes,
              const std::function<void()>& body) {
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (static_cast<int>(stacks.size()) < threads) {
        stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
    }
    block.kernel = kernel;
    block.grid = grid;
    block.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
    block.threads.resize(threads);
    block.shared_bytes = shared_bytes;
    block.shared.resize(shared_bytes + 128);
    body_of_launch = &body;
    begin_launch();
    for (std::int64_t index = 0; index < grid; ++index) {
        block.index = index;
        block.serial = ++blocks_so_far;
        block.epoch = 0;
        for (Warp& warp : block.warps) warp.arrived = 0, warp.epoch = 0;
        for (int t = 0; t < threads; ++t) {
            void* stack = new_fiber(stacks[t].get(), kStackBytes, run_thread);
            block.threads[t] = Thread{t, State::kReady, stack, {}, ""};
        }
        begin_block();
        run_block();
        end_block();
    }
    end_launch();
}

void wait_at_barrier(const Site& site) {
    thread->site = site;
    thread->state = State::kAtBarrier;
    yield();
}

void collective(const char* name, const Site& site, void (*combine)(Slot*)) {
    Warp& warp = host::warp();
    Thread* const first = &block.threads[thread->index / kLanes * kLanes];
    for (int lane = 0; lane < kLanes && warp.arrived > 0; ++lane) {
        const Thread& other = first[lane];
        if (other.state != State::kInCollective) continue;
        if (other.name != name || other.site.line() != site.line()) {
            fault(std::string(name) + ", while lane " + std::to_string(lane) + " waits in " + other.name +
                      " of " + place(other.site), site);
        }
        break;
    }
    thread->site = site;
    thread->name = name;
    if (++warp.arrived < kLanes) {
        thread->state = State::kInCollective;
        yield();
        return;
    }
    combine(warp.slots);
    warp.arrived = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (first[lane].state == State::kInCollective) first[lane].state = State::kReady;
    }
}

void fault(const std::string& what, const Site& site) {
    throw Fault(std::string(block.kernel) + ", block " + std::to_string(block.index) + ", thread " +
                std::to_string(thread == nullptr ? 0 : thread->index) + ", " + place(site) + ": " + what);
}

}  // namespace gpt1::host
