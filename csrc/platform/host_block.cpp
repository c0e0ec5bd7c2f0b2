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

std::vector<Block> cluster(1);
Block* block = cluster.data();
Thread* thread = nullptr;

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

Order order = Order::kForward;
std::mt19937_64 random_order;
std::uint32_t blocks_so_far = 0;
const std::function<void()>* body_of_launch = nullptr;
std::exception_ptr failure;
void* scheduler_stack = nullptr;
bool woken = false;  // some thread, since the last pass over all warps

struct Event {
    Block* block;
    Thread* thread;
    Site site;
    std::function<void()> run;
};

std::vector<Event> events;  // that come at last

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
        finish_products();
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

/// Runs the lanes of a warp of the cluster until each has exited or waits for other warps.
void run_warp(int warp) {
    static std::vector<int> visited;
    const int warps = cluster.front().warps.size();
    block = &cluster[warp / warps];
    const auto first = block->threads.begin() + warp % warps * kLanes;
    const int lanes = std::min<int>(kLanes, block->threads.end() - first);
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
        if (first[lane].state == State::kWaiting) return;  // it may still come
    }
    if (present != 0) {
        thread = &first[std::countr_zero(present)];
        std::ostringstream what;
        what << thread->name << " reached by the lanes " << std::hex << "0x" << present
             << " only, expected 0xffffffff";
        fault(what.str(), thread->site);
    }
}

/// Whether all threads of the block wait at one barrier, or some for others; else all have exited.
bool all_at_barrier() {
    Thread* waiting = nullptr;
    const Thread* exited = nullptr;
    for (const Thread& t : block->threads) {
        if (t.state == State::kWaiting) return false;  // it may still come, and with it a collective
    }
    for (Thread& t : block->threads) {
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

/// Lets the blocks go on whose threads all wait at one barrier.
bool pass_barriers() {
    bool passed = false;
    for (Block& b : cluster) {
        block = &b;
        if (!all_at_barrier()) continue;
        for (Thread& t : b.threads) {
            if (t.state == State::kAtBarrier) t.state = State::kReady;
        }
        ++b.epoch;
        passed = true;
    }
    return passed;
}

/// Lets an event come, now that no thread can go on.
bool pass_event() {
    static std::vector<int> visited;
    if (events.empty()) return false;
    const auto chosen = events.begin() + visiting_order(events.size(), visited).front();
    const Event event = std::move(*chosen);
    events.erase(chosen);
    block = event.block;
    thread = event.thread;
    if (thread->state == State::kExited) fault("exits before its asynchronous copy has arrived", event.site);
    event.run();
    return true;
}

void run_cluster() {
    static std::vector<int> visited;
    const int warps = cluster.size() * cluster.front().warps.size();
    do {
        woken = false;
        for (const int warp : visiting_order(warps, visited)) run_warp(warp);
    } while (woken || pass_barriers() || pass_event());
    for (Block& b : cluster) {
        block = &b;
        for (Thread& t : b.threads) {
            thread = &t;
            if (t.state == State::kExited) continue;
            const char* name = t.state == State::kAtBarrier ? "a barrier" : t.name;
            fault(std::string("waits for ") + name + ", and no thread of the cluster can go on", t.site);
        }
    }
}

}  // namespace

void set_order(Order new_order, std::uint64_t seed) {
    order = new_order;
    random_order.seed(seed);
}

void run_grid(const char* kernel, std::int64_t grid, int blocks, int threads, int shared_bytes,
              const std::function<void()>& body) {
    if (grid % blocks != 0) {
        throw std::invalid_argument(std::string(kernel) + ": " + std::to_string(grid) +
                                    " blocks, expected clusters of " + std::to_string(blocks));
    }
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    static std::vector<unsigned char> memory;
    while (static_cast<int>(stacks.size()) < blocks * threads) {
        stacks.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
    }
    const int stride = (shared_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    memory.resize(blocks * stride + kSharedAlignment);
    const auto start = reinterpret_cast<std::uintptr_t>(memory.data());
    unsigned char* const shared = memory.data() + (kSharedAlignment - start % kSharedAlignment);
    cluster.resize(blocks);
    for (int rank = 0; rank < blocks; ++rank) {
        Block& b = cluster[rank];
        b.kernel = kernel;
        b.grid = grid;
        b.rank = rank;
        b.cluster_arrived = 0;
        b.threads.resize(threads);
        b.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
        b.warpgroups.assign((b.warps.size() + kWarpsOfGroup - 1) / kWarpsOfGroup, Warpgroup{});
        b.shared = shared + rank * stride;
        b.shared_bytes = shared_bytes;
    }
    body_of_launch = &body;
    block = cluster.data();
    events.clear();
    begin_launch(blocks_so_far + 1);
    for (std::int64_t first = 0; first < grid; first += blocks) {
        for (Block& b : cluster) {
            b.index = first + b.rank;
            b.serial = ++blocks_so_far;
            b.epoch = 0;
            for (Warp& warp : b.warps) warp.arrived = 0, warp.epoch = 0, warp.started = 0;
            for (Warpgroup& group : b.warpgroups) group.descriptors.clear();
            for (int t = 0; t < threads; ++t) {
                unsigned char* stack = stacks[b.rank * threads + t].get();
                void* pointer = new_fiber(stack, kStackBytes, run_thread);
                b.threads[t] = Thread{t, State::kReady, pointer, {}, "", nullptr};
            }
        }
        std::memset(shared, 0xff, blocks * stride);
        run_cluster();
        end_cluster();
    }
    end_launch();
}

void wait_at_barrier(const Site& site) {
    thread->site = site;
    thread->state = State::kAtBarrier;
    yield();
}

void wait_for(const void* what, const char* name, const Site& site) {
    thread->site = site;
    thread->name = name;
    thread->waits_for = what;
    thread->state = State::kWaiting;
    yield();
}

void wake(const void* what) {
    for (Block& b : cluster) {
        for (Thread& t : b.threads) {
            if (t.state != State::kWaiting || t.waits_for != what) continue;
            t.state = State::kReady;
            woken = true;
        }
    }
}

void meet(int& arrived, int count, const char* name, const Site& site, void (*all_here)()) {
    if (++arrived < count) return wait_for(&arrived, name, site);
    arrived = 0;
    all_here();
    wake(&arrived);
}

void at_last(const Site& site, std::function<void()> event) {
    events.push_back({block, thread, site, std::move(event)});
}

void collective(const char* name, const Site& site, void (*combine)(Slot*)) {
    Warp& warp = host::warp();
    Thread* const first = &block->threads[thread->index / kLanes * kLanes];
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
    throw Fault(std::string(block->kernel) + ", block " + std::to_string(block->index) + ", thread " +
                std::to_string(thread == nullptr ? 0 : thread->index) + ", " + place(site) + ": " + what);
}

}  // namespace gpt1::host
