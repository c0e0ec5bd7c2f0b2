// Every access to memory passes here: it is checked against its view, its alignment and the other
// threads, and counted where wanted.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <string>

#include "platform/host_block.h"

namespace gpt1::host {

enum class Space { kGlobal, kShared };
enum class Kind { kRead, kWrite, kAtomic };

/// An access to `count` elements from `index` on, in a view of `extent` elements at `data`.
struct Access {
    Space space;
    Kind kind;
    const void* data;
    std::int64_t index;
    std::int64_t extent;
    int count;
    int element_bytes;
    bool masked_out;

    std::uintptr_t address() const {
        return reinterpret_cast<std::uintptr_t>(data) + index * element_bytes;
    }
    int bytes() const { return count * element_bytes; }
};

/// Throws a Fault if the access is out of bounds, unaligned, or in conflict with another thread's.
void check(const Access& access, const Site& site);

/// Starts the copy of 4 or 16 bytes, or of zeros if `from` is null, to shared memory: until it has been
/// waited for, the destination is NaN and every access to it a Fault.
void start_copy(const Access& to, const void* from, const Site& site);
void commit_copies();
void wait_for_copies(int open_groups, const Site& site);
void finish_copies();

/// Shared memory that something writes or reads while threads go on, until `end_use`: meanwhile a conflicting
/// access is a Fault.
struct Use {
    Kind kind;
    std::uintptr_t first, end;
    int thread;
    Site site;  // where it was started
};
using UseId = std::list<Use>::iterator;
UseId begin_use(Kind kind, const Block& of, std::int64_t offset, std::int64_t bytes, const Site& site);
void end_use(UseId use);

/// `first` is the serial of its first block.
void begin_launch(std::uint32_t first);
void end_launch();
void end_cluster();

/// What the launches of a kernel moved since `count_traffic(true)`; sectors are of 32 bytes.
struct Traffic {
    std::int64_t launches = 0;
    std::int64_t compulsory = 0;  // bytes of distinct sectors of a launch, reads and writes apart
    std::int64_t issued = 0;      // bytes of distinct sectors of a warp's access, summed
    std::int64_t shared_accesses = 0;
    std::int64_t bank_conflicts = 0;  // passes that a warp's access takes beyond the fewest
    std::map<std::string, std::int64_t> conflicts_at;  // by file and line
};

void count_traffic(bool on);
const std::map<std::string, Traffic>& traffic();

}  // namespace gpt1::host
