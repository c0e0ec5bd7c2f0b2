#include "platform/host_memory.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

namespace gpt1::host {

namespace {

// --- who touched what ------------------------------------------------------------------------------

constexpr int kCellBytes = 4;
constexpr int kPageBytes = 4096;

/// The last write of four bytes.
struct LastWrite {
    std::uint32_t block = 0, epoch = 0, warp_epoch = 0;
    std::int16_t thread = 0;
    std::uint8_t bytes = 0;     // of the four, a mask
    std::uint8_t pending = 0;   // an asynchronous copy that has not been waited for
};

/// The reads of four bytes in the last epoch in which there were any; if by one warpgroup alone, since its
/// last barrier.
struct LastReads {
    std::uint32_t block = 0, epoch = 0, warp_epoch = 0;
    std::int16_t thread = 0;
    std::uint8_t bytes = 0;
    std::uint8_t others = 0;
};
constexpr std::uint8_t kOtherLanes = 1, kOtherWarps = 2, kOtherWarpgroups = 4;

struct Cell {
    LastWrite write;
    LastReads reads;
};

using Page = std::array<Cell, kPageBytes / kCellBytes>;

std::vector<Cell> shared_cells;
std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> global_pages;
std::uint32_t first_block_of_launch = 0;

Cell* cells_at(Space space, std::uintptr_t address) {
    if (space == Space::kShared) {
        const auto first = reinterpret_cast<std::uintptr_t>(cluster.front().shared);
        return &shared_cells[(address - first) / kCellBytes];
    }
    static std::uintptr_t last_number = 0;
    static Page* last_page = nullptr;
    const std::uintptr_t number = address / kPageBytes;
    if (last_page == nullptr || number != last_number || global_pages.empty()) {
        auto& page = global_pages[number];
        if (!page) page = std::make_unique<Page>();
        last_number = number;
        last_page = page.get();
    }
    return &(*last_page)[address % kPageBytes / kCellBytes];
}

std::string who(int thread, std::uint32_t block_serial) {
    const std::int64_t behind = std::int64_t{block->serial} - block_serial;
    std::string text = "thread " + std::to_string(thread);
    if (behind != 0) text += " of block " + std::to_string(block->index - behind);
    return text;
}

bool of_my_warpgroup(int thread_of) {
    return thread_of / kLanes / kWarpsOfGroup == thread->index / kLanes / kWarpsOfGroup;
}

/// Whether a barrier of the running thread's warpgroup came since.
bool passed_warpgroup_barrier(int thread_of, std::uint32_t warp_epoch) {
    return warp_epoch >> kWarpEpochBits != warp().epoch >> kWarpEpochBits && of_my_warpgroup(thread_of);
}

/// Whether no barrier orders what a thread did before what the running thread does.
bool unordered(std::uint32_t block_of, std::uint32_t epoch, std::uint32_t warp_epoch, int thread_of) {
    if (block_of != block->serial) return true;
    if (thread_of == thread->index || epoch != block->epoch) return false;
    if (thread_of / kLanes == thread->index / kLanes) return warp_epoch == warp().epoch;
    return !passed_warpgroup_barrier(thread_of, warp_epoch);
}

bool unordered(const LastReads& reads) {
    if (unordered(reads.block, reads.epoch, reads.warp_epoch, reads.thread)) return true;
    if (reads.epoch != block->epoch) return false;
    if (reads.others & kOtherWarpgroups) return true;
    if (reads.others & kOtherWarps) return !passed_warpgroup_barrier(reads.thread, reads.warp_epoch);
    return reads.others & kOtherLanes && reads.warp_epoch == warp().epoch;
}

/// `oldest` is the first block whose accesses to this memory still matter.
void check_cell(Cell& cell, Kind kind, std::uint8_t bytes, std::uint32_t oldest, const Site& site) {
    LastWrite& write = cell.write;
    LastReads& reads = cell.reads;
    const char* verb = kind == Kind::kRead ? "reads" : "writes";
    if (write.block >= oldest && write.bytes & bytes && kind != Kind::kAtomic) {
        if (write.pending) {
            fault(std::string(verb) + " where an asynchronous copy of " + who(write.thread, write.block) +
                      " has not been waited for", site);
        }
        if (unordered(write.block, write.epoch, write.warp_epoch, write.thread)) {
            fault(std::string(verb) + " what " + who(write.thread, write.block) +
                      " wrote, with no barrier between", site);
        }
    }
    if (kind == Kind::kAtomic) return;
    if (kind == Kind::kRead) {
        const bool same = reads.block == block->serial && reads.epoch == block->epoch;
        if (!same || (passed_warpgroup_barrier(reads.thread, reads.warp_epoch) &&
                      !(reads.others & kOtherWarpgroups))) {
            const auto index = static_cast<std::int16_t>(thread->index);
            reads = {block->serial, block->epoch, warp().epoch, index, bytes, 0};
            return;
        }
        if (reads.thread != thread->index) {
            if (!of_my_warpgroup(reads.thread)) reads.others |= kOtherWarpgroups;
            else if (reads.thread / kLanes != thread->index / kLanes) reads.others |= kOtherWarps;
            else if (reads.warp_epoch == warp().epoch) reads.others |= kOtherLanes;
            else reads.others &= ~kOtherLanes;
        }
        reads.thread = thread->index;
        reads.warp_epoch = warp().epoch;
        reads.bytes |= bytes;
        return;
    }
    if (reads.block >= oldest && reads.bytes & bytes && unordered(reads)) {
        fault("writes what " + who(reads.thread, reads.block) + " read, with no barrier between", site);
    }
    write = {block->serial, block->epoch, warp().epoch, static_cast<std::int16_t>(thread->index), bytes, 0};
}

void check_conflicts(const Access& access, const Site& site) {
    const std::uint32_t oldest = access.space == Space::kShared ? block->serial : first_block_of_launch;
    const std::uintptr_t first = access.address(), end = first + access.bytes();
    for (std::uintptr_t cell = first / kCellBytes * kCellBytes; cell < end; cell += kCellBytes) {
        const int from = std::max(first, cell) - cell, to = std::min(end, cell + kCellBytes) - cell;
        const std::uint8_t bytes = ((1 << to) - 1) & ~((1 << from) - 1);
        check_cell(*cells_at(access.space, cell), access.kind, bytes, oldest, site);
    }
}

// --- asynchronous copies ---------------------------------------------------------------------------

struct Copy {
    Access to;
    std::array<unsigned char, 16> bytes;
    int group;
    Site site;  // where it was started
};

struct Copies {
    std::deque<Copy> open;
    int groups = 0;  // committed, so also the number of the group that collects
};

std::vector<Copies> copies_of_threads;
std::list<Use> uses;

void check_uses(Kind kind, std::uintptr_t first, std::uintptr_t end, const Site& site) {
    for (const Use& use : uses) {
        if (first >= use.end || end <= use.first) continue;
        if (kind == Kind::kRead && use.kind == Kind::kRead) continue;
        fault(std::string(kind == Kind::kRead ? "reads what " : "writes what ") +
                  (use.kind == Kind::kRead ? "a product" : "a copy") + " of thread " +
                  std::to_string(use.thread) + ", started in line " + std::to_string(use.site.line()) +
                  ", may still " + (use.kind == Kind::kRead ? "read" : "write"), site);
    }
}

// --- counting --------------------------------------------------------------------------------------

constexpr std::uintptr_t kSector = 32;
constexpr int kBanks = 32, kBankBytes = 4, kPhaseBytes = 128;

bool counting = false;
std::map<std::string, Traffic> traffic_of_kernels;
std::unordered_set<std::uintptr_t> sectors_read, sectors_written;

/// One access of a warp: what its lanes do at a call site for the n-th time.
struct WarpAccess {
    Space space;
    int lane_bytes = 0;
    std::vector<std::pair<int, std::uintptr_t>> addresses;  // with their lanes, in the order they ran
};

using Place = std::pair<const char*, std::uint64_t>;  // file; line and column

struct PlaceHash {
    std::size_t operator()(const Place& place) const {
        return reinterpret_cast<std::uintptr_t>(place.first) * 31 + place.second;
    }
};

struct WarpPlace {
    Place place;
    int warp;
    std::uint32_t execution;
    bool operator==(const WarpPlace&) const = default;
};

struct WarpPlaceHash {
    std::size_t operator()(const WarpPlace& key) const {
        return PlaceHash{}(key.place) * 1000003 + key.execution * 64 + key.warp;
    }
};

std::vector<std::unordered_map<Place, std::uint32_t, PlaceHash>> executions_of_threads;
std::unordered_map<WarpPlace, WarpAccess, WarpPlaceHash> warp_accesses;

/// How often the banks must be read beyond the fewest passes that so many bytes need.
int conflicts(const WarpAccess& access) {
    const int lanes = kPhaseBytes / std::max(access.lane_bytes, kBankBytes);
    int extra = 0;
    for (int first = 0; first < kLanes; first += lanes) {
        std::array<std::vector<std::uintptr_t>, kBanks> words;
        std::size_t passes = 1;
        for (const auto& [lane, address] : access.addresses) {
            if (lane < first || lane >= first + lanes) continue;
            for (int byte = 0; byte < access.lane_bytes; byte += kBankBytes) {
                const std::uintptr_t word = (address + byte) / kBankBytes;
                auto& bank = words[word % kBanks];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                passes = std::max(passes, bank.size());
            }
        }
        extra += passes - 1;
    }
    return extra;
}

void count(const Access& access, const Site& site) {
    const Place place{site.file_name(), (std::uint64_t{site.line()} << 32 | site.column()) * 2 +
                                            (access.kind == Kind::kWrite)};
    const std::uint32_t execution = executions_of_threads[thread->index][place]++;
    if (access.masked_out) return;
    WarpAccess& together = warp_accesses[{place, thread->index / kLanes, execution}];
    together.space = access.space;
    together.lane_bytes = access.bytes();
    together.addresses.emplace_back(lane(), access.address());
    if (access.space == Space::kGlobal) {
        auto& sectors = access.kind == Kind::kRead ? sectors_read : sectors_written;
        const auto last = (access.address() + access.bytes() - 1) / kSector;
        for (auto s = access.address() / kSector; s <= last; ++s) {
            sectors.insert(s);
        }
    }
}

void sum_up_block() {
    Traffic& total = traffic_of_kernels[block->kernel];
    std::vector<std::uintptr_t> sectors;
    for (const auto& [key, access] : warp_accesses) {
        if (access.space == Space::kShared) {
            const int extra = conflicts(access);
            ++total.shared_accesses;
            total.bank_conflicts += extra;
            if (extra > 0) {
                const std::string_view path = key.place.first;
                total.conflicts_at[std::string(path.substr(path.rfind('/') + 1)) + ":" +
                                   std::to_string(key.place.second >> 33)] += extra;
            }
            continue;
        }
        sectors.clear();
        for (const auto& [lane, address] : access.addresses) {
            for (auto s = address / kSector; s <= (address + access.lane_bytes - 1) / kSector; ++s) {
                sectors.push_back(s);
            }
        }
        std::sort(sectors.begin(), sectors.end());
        total.issued += kSector * (std::unique(sectors.begin(), sectors.end()) - sectors.begin());
    }
    warp_accesses.clear();
    for (auto& executions : executions_of_threads) executions.clear();
}

}  // namespace

void check(const Access& access, const Site& site) {
    if (counting) count(access, site);
    if (access.masked_out) return;
    const char* space = access.space == Space::kGlobal ? "global" : "shared";
    if (access.index < 0 || access.index + access.count > access.extent) {
        fault(std::string(access.kind == Kind::kRead ? "reads " : "writes ") + std::to_string(access.count) +
                  " from element " + std::to_string(access.index) + " of a view of " + space +
                  " memory with " + std::to_string(access.extent), site);
    }
    if (access.address() % access.bytes() != 0) {
        fault("accesses " + std::to_string(access.bytes()) + " bytes of " + space + " memory at element " +
                  std::to_string(access.index) + ", an address that is no multiple of it", site);
    }
    if (access.space == Space::kShared && !uses.empty()) {
        check_uses(access.kind, access.address(), access.address() + access.bytes(), site);
    }
    check_conflicts(access, site);
}

UseId begin_use(Kind kind, const Block& of, std::int64_t offset, std::int64_t bytes, const Site& site) {
    if (offset < 0 || offset + bytes > of.shared_bytes) {
        fault("uses " + std::to_string(bytes) + " bytes from " + std::to_string(offset) + " on, of " +
                  std::to_string(of.shared_bytes) + " of shared memory", site);
    }
    const auto first = reinterpret_cast<std::uintptr_t>(of.shared) + offset;
    check_uses(kind, first, first + bytes, site);
    return uses.insert(uses.end(), {kind, first, first + bytes, thread->index, site});
}

void end_use(UseId use) { uses.erase(use); }

void start_copy(const Access& to, const void* from, const Site& site) {
    check(to, site);
    Copies& copies = copies_of_threads[thread->index];
    Copy copy{to, {}, copies.groups, site};
    if (from != nullptr) std::memcpy(copy.bytes.data(), from, to.bytes());
    copies.open.push_back(copy);
    std::memset(reinterpret_cast<void*>(to.address()), 0xff, to.bytes());
    for (int byte = 0; byte < to.bytes(); byte += kCellBytes) {
        cells_at(Space::kShared, to.address() + byte)->write.pending = 1;
    }
}

void commit_copies() { ++copies_of_threads[thread->index].groups; }

void wait_for_copies(int open_groups, const Site& site) {
    Copies& copies = copies_of_threads[thread->index];
    while (!copies.open.empty() && copies.open.front().group < copies.groups - open_groups) {
        const Copy& copy = copies.open.front();
        for (int byte = 0; byte < copy.to.bytes(); byte += kCellBytes) {
            cells_at(Space::kShared, copy.to.address() + byte)->write.pending = 0;
        }
        check_conflicts(copy.to, site);  // it is written now at the latest
        std::memcpy(reinterpret_cast<void*>(copy.to.address()), copy.bytes.data(), copy.to.bytes());
        copies.open.pop_front();
    }
}

void finish_copies() {
    const Copies& copies = copies_of_threads[thread->index];
    if (copies.open.empty()) return;
    const Site started = copies.open.front().site;
    fault("exits before its asynchronous copy has been waited for", started);
}

void begin_launch(std::uint32_t first) {
    first_block_of_launch = first;
    constexpr std::size_t kMostPages = 8192;
    if (global_pages.size() > kMostPages) global_pages.clear();
    const Block& last = cluster.back();
    const std::size_t shared_bytes = last.shared + last.shared_bytes - cluster.front().shared;
    shared_cells.assign((shared_bytes + 127) / 128 * 128 / kCellBytes, Cell{});
    uses.clear();
    copies_of_threads.assign(block->threads.size(), {});
    executions_of_threads.resize(std::max(executions_of_threads.size(), block->threads.size()));
    warp_accesses.clear();
    for (auto& executions : executions_of_threads) executions.clear();
    sectors_read.clear();
    sectors_written.clear();
}

void end_cluster() {
    if (counting) sum_up_block();
}

void end_launch() {
    if (!counting) return;
    Traffic& total = traffic_of_kernels[block->kernel];
    ++total.launches;
    total.compulsory += kSector * (sectors_read.size() + sectors_written.size());
}

void count_traffic(bool on) {
    counting = on;
    if (on) traffic_of_kernels.clear();
}

const std::map<std::string, Traffic>& traffic() { return traffic_of_kernels; }

}  // namespace gpt1::host
