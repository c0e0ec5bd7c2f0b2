// How a product of matrices is cut into tiles, and what of them each block works on.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

/// A matrix as it lies in memory: its rows start at multiples of 16 bytes, its columns are a multiple
/// of 8. Elements beyond it count as zeros.
template <class T>
struct Operand {
    Global<const T> data;
    std::int64_t rows, columns, stride;
};

/// Rows and columns of a tile, and the terms of a step.
struct TileShape {
    int m, n, k;
    bool operator==(const TileShape&) const = default;
};

/// Of the kernel that runs on every chip.
inline constexpr TileShape kTile{128, 128, 32};
inline constexpr int kTileBlocksPerProcessor = 2;  // a thread may then have all registers that it can name

/// The blocks of a cluster of the kernels for Hopper.
inline constexpr int kHopperCluster = 2;

/// The two kernels for Hopper, in CUTLASS's terms. Ping-pong: each of two warpgroups multiplies a tile of its
/// own while the other is in its epilogue. Cooperative: both share one larger tile, so that fewer bytes are
/// read. The tiles of a cluster's two blocks lie below each other and share the columns of B, of which each
/// block fetches half for both (multicast).
template <bool kTakesTurns>
struct HopperForm {
    static constexpr bool kPingPong = kTakesTurns;
    static constexpr int kBlockM = 128, kBlockN = kPingPong ? 128 : 256, kBlockK = 64;
    static constexpr int kStages = kPingPong ? 6 : 4;
    static constexpr TileShape kTile{kBlockM * kHopperCluster, kBlockN, kBlockK};
};
using HopperPingPong = HopperForm<true>;
using HopperCooperative = HopperForm<false>;

/// How a result is cut into tiles, and the sums of the tiles into chunks of steps: a part is a chunk of a
/// tile. Where blocks work in clusters, a tile is that of a cluster, and so is all that is said of blocks.
struct ProductGrid {
    static constexpr int kGroupM = 8;  // rows of tiles that are worked on together, to share L2

    std::int64_t M, N;
    TileShape tile;
    int tiles_m, tiles_n;
    int steps;  // of tile.k terms, of one tile
    int chunk;  // steps of a part: all of them where sums are not split

    ProductGrid() = default;
    ProductGrid(std::int64_t M, std::int64_t N, std::int64_t K, TileShape tile, std::int64_t chunks)
        : M(M), N(N), tile(tile), tiles_m(ceil_div(M, tile.m)), tiles_n(ceil_div(N, tile.n)),
          steps(K > 0 ? ceil_div(K, tile.k) : 1), chunk(ceil_div(steps, chunks)) {}

    __host__ __device__ std::int64_t tiles() const { return std::int64_t{tiles_m} * tiles_n; }
    __host__ __device__ std::int64_t parts() const { return tiles() * ceil_div(steps, chunk); }
    __host__ __device__ bool split() const { return chunk < steps; }
    __host__ __device__ std::int64_t tile_size() const { return std::int64_t{tile.m} * tile.n; }
    std::string shape() const { return shape_text("M", M, "N", N, "steps", steps); }

    /// First row and column of a tile; tiles go down kGroupM rows before they go right.
    __device__ __forceinline__ void origin(int index, std::int64_t& first_m, std::int64_t& first_n) const {
        const int group = index / (kGroupM * tiles_n), within = index % (kGroupM * tiles_n);
        const int left = tiles_m - group * kGroupM, rows = left < kGroupM ? left : kGroupM;
        first_m = std::int64_t{group * kGroupM + within % rows} * tile.m;
        first_n = std::int64_t{within / rows} * tile.n;
    }

private:
    __host__ __device__ static int ceil_div(std::int64_t a, std::int64_t b) {
        return static_cast<int>((a + b - 1) / b);
    }
};

/// Where sums go: rows and columns from the first on, of a matrix (M, N).
struct Place {
    std::int64_t first_m, first_n, M, N;
};

/// A part of a tile: `count` of its steps, from step `first` on. All tiles of a chunk come before the next
/// chunk, so that blocks at work together share their operands in L2.
class Part {
public:
    int tile, first, count;

    __device__ __forceinline__ Part(const ProductGrid& grid, std::int64_t index)
        : grid_(grid), index_(index) {
        find();
    }

    /// Whether there is one of this index.
    __device__ __forceinline__ explicit operator bool() const { return count > 0; }

    /// Becomes the one `parts` further on.
    __device__ __forceinline__ void skip(std::int64_t parts) {
        index_ += parts;
        find();
    }

    /// In the result or, for split-K, in the workspace (parts, tile.m, tile.n).
    __device__ __forceinline__ Place place() const {
        const std::int64_t row = index_ * grid_.tile.m;
        if (grid_.split()) return {row, 0, row + grid_.tile.m, grid_.tile.n};
        Place place{0, 0, grid_.M, grid_.N};
        grid_.origin(tile, place.first_m, place.first_n);
        return place;
    }

private:
    __device__ __forceinline__ void find() {
        const std::int64_t tiles = grid_.tiles();
        tile = static_cast<int>(index_ % tiles);
        first = static_cast<int>(index_ / tiles) * grid_.chunk;
        const int left = grid_.steps - first;
        count = left < 0 ? 0 : left < grid_.chunk ? left : grid_.chunk;
    }

    const ProductGrid& grid_;
    std::int64_t index_;
};

}  // namespace gpt1
