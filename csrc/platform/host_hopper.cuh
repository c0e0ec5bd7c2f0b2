// What Hopper's GPUs have besides, on a CPU; see hopper.cuh. Copies arrive, and products that are waited for
// are done, as late as they may: when no thread of the cluster can go on. Until then what they write is NaN,
// and an access in conflict with them a Fault.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

static_assert(kWarpgroup == host::kWarpsOfGroup * host::kLanes);

// --- warpgroups and clusters -----------------------------------------------------------------------

inline int warpgroup_index() { return thread_index() / kWarpgroup; }

inline void warpgroup_barrier(Site site = Site::current()) {
    int& arrived = host::block->warpgroups[warpgroup_index()].arrived;
    host::meet(arrived, kWarpgroup, "a warpgroup_barrier", site, [] {
        host::Warp* const first = &host::block->warps[warpgroup_index() * host::kWarpsOfGroup];
        const std::uint32_t epoch = (first->epoch >> host::kWarpEpochBits) + 1;
        for (int i = 0; i < host::kWarpsOfGroup; ++i) first[i].epoch = epoch << host::kWarpEpochBits;
    });
}

template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void claim_registers() {}

inline int cluster_rank() { return host::block->rank; }

inline void cluster_barrier(Site site = Site::current()) {
    const int threads = host::cluster.size() * host::block->threads.size();
    host::meet(host::cluster.front().cluster_arrived, threads, "a cluster_barrier", site, [] {
        for (host::Block& block : host::cluster) ++block.epoch;
    });
}

// --- copies ----------------------------------------------------------------------------------------

struct TensorMap {
    const std::uint16_t* data;
    std::int64_t rows, columns, stride;
    int box_rows;
};

namespace host {

/// In a row of 128 bytes the chunks of 16 are permuted by the row modulo 8.
constexpr std::int64_t swizzled(std::int64_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Of the barrier at `address` in the shared memory of the block `rank`, or of the thread's own.
void init_copy_barrier(unsigned address, int arrivals);
void arrive_at_copy_barrier(int rank, unsigned address, int arrivals, int bytes, const Site& site);
void wait_for_copy_barrier(unsigned address, std::uint32_t parity, const Site& site);

/// Starts the copy of a box to `to` in the blocks first_rank … end_rank − 1.
void start_box(const TensorMap& from, int row, int column, int first_rank, int end_rank, unsigned to,
               unsigned barrier, const Site& site);

}  // namespace host

class CopyBarriers {
public:
    explicit CopyBarriers(const Shared<std::uint64_t>& memory) : memory_(memory) {}

    void init(int i, int arrivals, Site site = Site::current()) const {
        host::init_copy_barrier(address(i, site), arrivals);
    }
    void expect(int i, int bytes, Site site = Site::current()) const {
        host::arrive_at_copy_barrier(cluster_rank(), address(i, site), 1, bytes, site);
    }
    void arrive(int i, Site site = Site::current()) const { arrive_at(i, cluster_rank(), site); }
    void arrive_at(int i, int rank, Site site = Site::current()) const {
        host::arrive_at_copy_barrier(rank, address(i, site), 1, 0, site);
    }
    void wait(int i, std::uint32_t parity, Site site = Site::current()) const {
        host::wait_for_copy_barrier(address(i, site), parity, site);
    }
    unsigned address(int i, const Site& site) const {
        host::check(memory_.access(host::Kind::kAtomic, i, 1, true), site);
        return memory_.address(i);
    }

private:
    Shared<std::uint64_t> memory_;
};

inline void fence_copy_barriers() {}

template <class T>
void copy_box(const Shared<T>& to, int i, const TensorMap& from, int row, int column,
              const CopyBarriers& barriers, int barrier, Site site = Site::current()) {
    const unsigned address = to.slice(i, from.box_rows * kBoxColumns).address(0);
    host::start_box(from, row, column, cluster_rank(), cluster_rank() + 1, address,
                    barriers.address(barrier, site), site);
}

template <int kBlocks, class T>
void copy_box_to_all(const Shared<T>& to, int i, const TensorMap& from, int row, int column,
                     const CopyBarriers& barriers, int barrier, Site site = Site::current()) {
    const unsigned address = to.slice(i, from.box_rows * kBoxColumns).address(0);
    host::start_box(from, row, column, 0, kBlocks, address, barriers.address(barrier, site), site);
}

// --- products --------------------------------------------------------------------------------------

inline void wgmma_fence(Site site = Site::current()) {
    host::collective("wgmma_fence", site, [](host::Slot*) {});
}

inline void wgmma_commit(Site site = Site::current()) {
    host::collective("wgmma_commit", site, [](host::Slot*) { ++host::warp().groups; });
}

namespace host {
void wait_for_products(int open_groups, const Site& site);
}

template <int kOpenGroups>
void wgmma_wait(Site site = Site::current()) {
    host::wait_for_products(kOpenGroups, site);
}

template <int kCount>
void fence_sums(FragmentC (&)[kCount]) {}

namespace host {

/// Adds a warp's 16 rows of a product to its sums, (16, 8 fragments).
using Multiply = void (*)(const unsigned char* shared, int first_row, std::uint64_t a, std::uint64_t b,
                          float* sums);

/// What a lane gives to a product.
struct ProductOfLane {
    FragmentC* c;
    std::uint64_t a, b;
    bool more;
    const Site* site;
};

/// Where a descriptor's operand has the term k of its row or column i, but for the swizzle.
inline std::int64_t operand_offset(std::uint64_t descriptor, bool down, int i, int k) {
    const auto field = [&](int bit) -> std::int64_t { return (descriptor >> bit & 0x3fff) * 16; };
    const std::int64_t start = field(0), next_box = field(16), eight_rows = field(32);
    if (down) return start + i / 64 * next_box + k / 8 * eight_rows + k % 8 * 128 + i % 64 * 2;
    return start + i / 8 * eight_rows + i % 8 * 128 + k * 2;
}

/// Of a warp; the slots have a ProductOfLane each.
void start_product(Slot* slots, int fragments, bool a_down, bool b_down, Multiply multiply);

/// Rows or columns of an operand, (16, kCount), from `first` on; eight neighbours in memory at a time.
template <class T, bool kDown, int kCount>
void read_operand(const unsigned char* shared, std::uint64_t descriptor, int first, float (&to)[16][kCount]) {
    for (int i = 0; i < kCount; i += kDown ? 8 : 1) {
        for (int k = 0; k < 16; k += kDown ? 1 : 8) {
            T elements[8];
            std::memcpy(elements, shared + swizzled(operand_offset(descriptor, kDown, first + i, k)), 16);
            for (int j = 0; j < 8; ++j) to[kDown ? k : k + j][kDown ? i + j : i] = to_float(elements[j]);
        }
    }
}

template <class T, bool kADown, bool kBDown, int kColumns>
void multiply_rows(const unsigned char* shared, int first_row, std::uint64_t descriptor_a,
                   std::uint64_t descriptor_b, float* sums) {
    float a[16][16], b[16][kColumns];
    read_operand<T, kADown>(shared, descriptor_a, first_row, a);
    read_operand<T, kBDown>(shared, descriptor_b, 0, b);
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < kColumns; n += 8) {
            float row[8];  // which stays in registers
            std::copy_n(sums + m * kColumns + n, 8, row);
            for (int k = 0; k < 16; ++k) {
                for (int j = 0; j < 8; ++j) row[j] += a[k][m] * b[k][n + j];
            }
            std::copy_n(row, 8, sums + m * kColumns + n);
        }
    }
}

}  // namespace host

template <class T, bool kADown, bool kBDown, int kCount>
void wgmma_async(FragmentC (&c)[kCount], std::uint64_t a, std::uint64_t b, bool more,
                 Site site = Site::current()) {
    static_assert(kCount == 16 || kCount == 32);
    const host::ProductOfLane product{c, a, b, more, &site};
    host::give("wgmma_async", site, product, [](host::Slot* slots) {
        constexpr host::Multiply multiply = host::multiply_rows<T, kADown, kBDown, 8 * kCount>;
        host::start_product(slots, kCount, kADown, kBDown, multiply);
    });
}

}  // namespace gpt1
