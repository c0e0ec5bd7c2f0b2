// What Hopper's GPUs have besides, on a CPU. Copies arrive, and products that are waited for are done, as
// late as they may: when no thread of the cluster can go on. Until then what they write is NaN, and an access
// in conflict with them a Fault.
#pragma once

#include <cstdint>

#include "platform/host_block.h"

namespace gpt1 {

/// A matrix as TMA reads it: in boxes of `box_rows` rows of 64 elements of 2 bytes. Elements beyond the
/// matrix arrive as zeros.
struct TensorMap {
    const std::uint16_t* data;
    std::int64_t rows, columns, stride;
    int box_rows;
};

struct FragmentC;

}  // namespace gpt1

namespace gpt1::host {

/// In a row of 128 bytes the chunks of 16 are permuted by the row modulo 8.
constexpr std::int64_t swizzled(std::int64_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Of the barrier at `address` in the shared memory of the block `rank`, or of the thread's own.
void init_copy_barrier(unsigned address, int arrivals, const Site& site);
void arrive_at_copy_barrier(int rank, unsigned address, int arrivals, int bytes, const Site& site);
void wait_for_copy_barrier(unsigned address, std::uint32_t parity, const Site& site);

/// Starts the copy of a box to `to` in the blocks first_rank … end_rank − 1.
void start_box(const TensorMap& from, int row, int column, int first_rank, int end_rank, unsigned to,
               unsigned barrier, const Site& site);

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
void wait_for_products(int open_groups, const Site& site);
void finish_products();

}  // namespace gpt1::host
