// Products of matrices on the matrix units, and what is done with a tile of one while it is on chip.
//
// A block multiplies tiles of 128 x 128, 32 terms at a time, from operands that copies bring into
// shared memory four steps ahead. The finished tile is handed to an epilogue, a few neighbouring
// elements at a time: a struct that adds a bias, applies a GELU or takes sums, and that stores.
//
// A sum over many terms with few tiles to fill the chip (a weight's gradient) is cut elsewhere: each
// block takes an equal share of all steps, across the borders of tiles, and leaves its part of each
// tile in a workspace; SumParts adds a tile's parts in order, as in Stream-K (Osama et al. 2023) but
// for the order, which makes two runs bit-equal.
#pragma once

#include "common/tile.cuh"

namespace gpt1 {

/// A matrix as it lies in memory: its rows start at multiples of 16 bytes, its columns are a multiple
/// of 8. Elements beyond it count as zeros.
template <class T>
struct Operand {
    Global<const T> data;
    std::int64_t rows, columns, stride;
};

/// How a result is cut into tiles, and the sums of the tiles into shares of blocks.
struct ProductGrid {
    static constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 32;
    static constexpr int kGroupM = 8;  // rows of tiles that are worked on together, to share L2

    std::int64_t M, N;
    int tiles_m, tiles_n;
    int steps;           // of kBlockK terms, of one tile
    std::int64_t share;  // steps of one block where sums are split, else 0

    ProductGrid() = default;
    ProductGrid(std::int64_t M, std::int64_t N, std::int64_t K, std::int64_t blocks)
        : M(M), N(N), tiles_m(ceil_div(M, kBlockM)), tiles_n(ceil_div(N, kBlockN)),
          steps(K > 0 ? ceil_div(K, kBlockK) : 1),
          share(blocks > 0 ? (all_steps() + blocks - 1) / blocks : 0) {}

    __host__ __device__ std::int64_t tiles() const { return std::int64_t{tiles_m} * tiles_n; }
    __host__ __device__ std::int64_t all_steps() const { return tiles() * steps; }
    __host__ __device__ bool split() const { return share > 0; }
    std::int64_t blocks() const { return split() ? (all_steps() + share - 1) / share : tiles(); }

    /// First row and column of a tile; tiles go down kGroupM rows before they go right.
    __device__ __forceinline__ void origin(int tile, std::int64_t& first_m, std::int64_t& first_n) const {
        const int group = tile / (kGroupM * tiles_n), within = tile % (kGroupM * tiles_n);
        const int left = tiles_m - group * kGroupM, rows = left < kGroupM ? left : kGroupM;
        first_m = std::int64_t{group * kGroupM + within % rows} * kBlockM;
        first_n = std::int64_t{within / rows} * kBlockN;
    }

private:
    static int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }
};

/// What a thread copies of an operand's tiles: a chunk of 16 bytes in every kRowStep-th row.
template <class T, class AnyTile, bool kDown, int kThreads>
class Fetch {
public:
    /// Successive tiles lie below each other if kDown, else side by side; the first is at (row, column).
    __device__ __forceinline__ Fetch(const Operand<T>& from, std::int64_t row, std::int64_t column)
        : from_(from) {
        row += first_row();
        column += first_column();
        offset_ = row * from.stride + column;
        rows_ = static_cast<int>(from.rows - row);
        columns_ = static_cast<int>(from.columns - column);
    }

    /// Starts the copies of the next tile.
    __device__ __forceinline__ void next(const AnyTile& tile) {
        const int place = AnyTile::offset(first_row(), first_column());
        std::int64_t offset = offset_;
#pragma unroll
        for (int row = 0; row < AnyTile::kRows; row += kRowStep) {
            copy_async(tile.memory, place + row * AnyTile::kColumns, from_.data, offset,
                       row < rows_ && columns_ > 0);
            offset += kRowStep * from_.stride;
        }
        offset_ += kDown ? AnyTile::kRows * from_.stride : AnyTile::kColumns;
        if (kDown) rows_ -= AnyTile::kRows;
        else columns_ -= AnyTile::kColumns;
    }

private:
    static constexpr int kRowStep = kThreads / AnyTile::kChunks;
    static_assert(kRowStep % 8 == 0);  // so that the rows of a thread are permuted alike

    __device__ __forceinline__ static int first_row() { return thread_index() / AnyTile::kChunks; }
    __device__ __forceinline__ static int first_column() { return thread_index() % AnyTile::kChunks * 8; }

    const Operand<T>& from_;
    std::int64_t offset_;
    int rows_, columns_;  // left from the next tile's chunk on
};

/// A block owns a tile, a warp 64 x 64 of it, and walks along K; or a share of the steps of several.
///
/// An operand is stored as itself or as its transpose. An `Epilogue` of a thread has kWidth neighbouring
/// columns. For each row, `read` gets what it needs of memory, early, and `apply` the elements; `finish`
/// ends the warp's 64 rows.
///
/// On 9.0: at most 254 registers and 64 KB, so two blocks to a processor. Of 165 to 191 instructions of a
/// step, 64 are products.
template <class T, bool kATransposed, bool kBTransposed, class Epilogue>
struct Product {
    struct Params {
        Operand<T> a;  // (M, K), or (K, M) if transposed
        Operand<T> b;  // (K, N), or (N, K) if transposed
        ProductGrid grid;
        typename Epilogue::Params epilogue;
        std::string shape() const { return shape_text("M", grid.M, "N", grid.N, "steps", grid.steps); }
    };
    static constexpr int kBlockM = ProductGrid::kBlockM, kBlockN = ProductGrid::kBlockN;
    static constexpr int kBlockK = ProductGrid::kBlockK, kStages = 4;
    static constexpr int kWarpM = 64, kWarpN = 64;

    using TileA = Tile<T, kATransposed ? kBlockK : kBlockM, kATransposed ? kBlockM : kBlockK>;
    using TileB = Tile<T, kBTransposed ? kBlockN : kBlockK, kBTransposed ? kBlockK : kBlockN>;

    static constexpr const char* kName = Epilogue::kName;
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerProcessor = 2;
    static constexpr int kMaxSharedBytes = kStages * (TileA::kSize + TileB::kSize) * sizeof(T);

    struct Accumulators {
        FragmentC values[kWarpM / 16][kWarpN / 8];
    };
    struct Fragments {
        FragmentA a[kWarpM / 16];
        FragmentPairB b[kWarpN / 16];
    };

    __device__ static void run(const Params& p) {
        const ProductGrid& grid = p.grid;
        int tile = static_cast<int>(block_index()), first = 0;
        std::int64_t left = grid.steps;
        if (grid.split()) {
            const std::int64_t start = block_index() * grid.share, end = grid.all_steps();
            tile = static_cast<int>(start / grid.steps);
            first = static_cast<int>(start % grid.steps);
            left = start + grid.share < end ? grid.share : end - start;
        }
        while (left > 0) {
            const int count = left < grid.steps - first ? static_cast<int>(left) : grid.steps - first;
            std::int64_t first_m, first_n, M = grid.M, N = grid.N;
            grid.origin(tile, first_m, first_n);
            Accumulators acc{};
            multiply(p, acc, first_m, first_n, first, count);
            if (grid.split()) {
                // From one part to the next either the tile or the block is the next one.
                first_m = (block_index() + tile) * kBlockM;
                first_n = 0;
                M = first_m + kBlockM;
                N = kBlockN;
            }
            finish(p.epilogue, acc, first_m, first_n, M, N);
            barrier();  // the tile's elements have left the shared memory that the next one's operands enter
            left -= count;
            first = 0;
            ++tile;
        }
    }

private:
    __device__ __forceinline__ static int warp_m() { return warp_index() % (kBlockM / kWarpM) * kWarpM; }
    __device__ __forceinline__ static int warp_n() { return warp_index() / (kBlockM / kWarpM) * kWarpN; }

    __device__ __forceinline__ static void multiply(
        const Params& p, Accumulators& acc, std::int64_t first_m, std::int64_t first_n, int first_step,
        int steps) {
        SharedArena arena;
        const Shared<T> tiles_a = arena.take<T>(kStages * TileA::kSize);
        const Shared<T> tiles_b = arena.take<T>(kStages * TileB::kSize);
        const auto tile_a = [&](int stage) {
            return TileA{tiles_a.slice(stage * TileA::kSize, TileA::kSize)};
        };
        const auto tile_b = [&](int stage) {
            return TileB{tiles_b.slice(stage * TileB::kSize, TileB::kSize)};
        };

        const std::int64_t k = std::int64_t{first_step} * kBlockK;
        Fetch<T, TileA, kATransposed, kThreads> next_a(
            p.a, kATransposed ? k : first_m, kATransposed ? first_m : k);
        Fetch<T, TileB, !kBTransposed, kThreads> next_b(
            p.b, kBTransposed ? first_n : k, kBTransposed ? k : first_n);
        const auto fetch = [&](int stage, bool any) {
            if (any) {
                next_a.next(tile_a(stage));
                next_b.next(tile_b(stage));
            }
            copy_async_commit();  // empty beyond the end, so that the groups stay countable
        };
        const auto load = [&](Fragments& to, int stage, int k) {
            const TileA a = tile_a(stage);
            const TileB b = tile_b(stage);
#pragma unroll
            for (int i = 0; i < kWarpM / 16; ++i) {
                if constexpr (kATransposed) to.a[i] = a.a_transposed(warp_m() + i * 16, k);
                else to.a[i] = a.a(warp_m() + i * 16, k);
            }
#pragma unroll
            for (int j = 0; j < kWarpN / 16; ++j) {
                if constexpr (kBTransposed) to.b[j] = b.b_transposed(k, warp_n() + j * 16);
                else to.b[j] = b.b(k, warp_n() + j * 16);
            }
        };

#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) fetch(stage, stage < steps);
        copy_async_wait<kStages - 1>();
        barrier();
        Fragments fragments[2];
        load(fragments[0], 0, 0);
        int stage = 0;
        for (int step = 0; step < steps; ++step) {
            load(fragments[1], stage, 16);
            multiply(acc, fragments[0]);
            copy_async_wait<kStages - 2>();
            barrier();  // the next stage has arrived, and all warps have read this one
            fetch(stage, step + kStages < steps);
            stage = stage + 1 == kStages ? 0 : stage + 1;
            load(fragments[0], stage, 0);  // while the units work; after the last step, of no use
            multiply(acc, fragments[1]);
        }
        barrier();  // all warps have read their operands, whose shared memory the epilogue takes
    }

    __device__ __forceinline__ static void multiply(Accumulators& acc, const Fragments& fragments) {
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
            for (int j = 0; j < kWarpN / 16; ++j) {
                mma<T>(acc.values[i][2 * j], fragments.a[i], fragments.b[j].left);
                mma<T>(acc.values[i][2 * j + 1], fragments.a[i], fragments.b[j].right);
            }
        }
    }

    // A fragment has two neighbouring elements to a thread. In shared memory a warp turns them, a strip
    // of rows at a time, into kWidth; a thread has 8 times as many of a strip.
    static constexpr int kStripRows = 4 * Epilogue::kWidth, kStripStride = kWarpN + 8;
    static constexpr int kStripSize = kStripRows * kStripStride;
    static_assert(4 * kStripSize * sizeof(float) <= kMaxSharedBytes);

    /// Of an element whose column is a multiple of 2; no bank conflicts for 2, 4 or 8 neighbours to a thread.
    __device__ __forceinline__ static int strip_offset(int row, int column) {
        return row * kStripStride + (column / 4 ^ column / 32) * 4 + column % 4;
    }

    __device__ __forceinline__ static void finish(
        const typename Epilogue::Params& params, const Accumulators& acc, std::int64_t first_m,
        std::int64_t first_n, std::int64_t M, std::int64_t N) {
        constexpr int kWidth = Epilogue::kWidth, kLanes = kWarpN / kWidth, kRows = 32 / kLanes;
        SharedArena arena;
        const Shared<float> strip =
            arena.take<float>(4 * kStripSize).slice(warp_index() * kStripSize, kStripSize);
        const int lane = lane_index(), column = lane % kLanes * kWidth;
        const std::int64_t warp_first_m = first_m + warp_m(), n = first_n + warp_n() + column;
        Epilogue epilogue(params, n, n < N);
#pragma unroll
        for (int s = 0; s < kWarpM / kStripRows; ++s) {
            const std::int64_t strip_m = warp_first_m + s * kStripRows + lane / kLanes;
            const auto inside = [&](int i) { return strip_m + i * kRows < M && n < N; };
            typename Epilogue::Input inputs[kStripRows / kRows];
#pragma unroll
            for (int i = 0; i < kStripRows / kRows; ++i) {
                inputs[i] = epilogue.read(strip_m + i * kRows, inside(i));
            }
#pragma unroll
            for (int i = 0; i < kStripRows / 16; ++i) {
#pragma unroll
                for (int j = 0; j < kWarpN / 8; ++j) {
                    const float* values = acc.values[s * (kStripRows / 16) + i][j].values;
                    const int row = i * 16 + lane / 4, pair = j * 8 + lane % 4 * 2;
                    strip.store_vector(strip_offset(row, pair), Vector<float, 2>{values[0], values[1]});
                    strip.store_vector(strip_offset(row + 8, pair), Vector<float, 2>{values[2], values[3]});
                }
            }
            warp_barrier();
#pragma unroll
            for (int i = 0; i < kStripRows / kRows; ++i) {
                Vector<float, kWidth> x;
#pragma unroll
                for (int j = 0; j < kWidth; j += 4) {
                    const int row = i * kRows + lane / kLanes;
                    const auto four = strip.template load_vector<4>(strip_offset(row, column + j));
#pragma unroll
                    for (int k = 0; k < 4; ++k) x[j + k] = four[k];
                }
                if (inside(i)) epilogue.apply(strip_m + i * kRows, x, inputs[i]);
            }
            warp_barrier();
        }
        epilogue.finish(warp_first_m, M);
    }
};

/// Adds a tile's parts in order and hands the sums to an epilogue; a block owns 8 rows of a tile, a
/// thread four neighbouring columns. On 9.0: 36 registers.
template <class Epilogue>
struct SumParts {
    struct Params {
        Global<const float> parts;  // (blocks + tiles, kBlockM, kBlockN)
        ProductGrid grid;
        typename Epilogue::Params epilogue;
        std::string shape() const { return shape_text("M", grid.M, "N", grid.N, "steps", grid.steps); }
    };
    static constexpr int kRows = 8, kSlices = ProductGrid::kBlockM / kRows;
    static constexpr const char* kName = "sum_parts";
    static constexpr int kThreads = kRows * ProductGrid::kBlockN / 4;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = 0;

    __device__ static void run(const Params& p) {
        const int tile = static_cast<int>(block_index() / kSlices);
        const int row = static_cast<int>(block_index() % kSlices) * kRows + warp_index();
        const int column = lane_index() * 4;
        const std::int64_t first = std::int64_t{tile} * p.grid.steps / p.grid.share;
        const std::int64_t last = (std::int64_t{tile + 1} * p.grid.steps - 1) / p.grid.share;
        Vector<float, 4> sum{};
#pragma unroll 4
        for (std::int64_t block = first; block <= last; ++block) {
            const std::int64_t offset = ((block + tile) * ProductGrid::kBlockM + row) * ProductGrid::kBlockN;
            const auto part = p.parts.template load_vector<4>(offset + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += part[i];
        }
        std::int64_t first_m, first_n;
        p.grid.origin(tile, first_m, first_n);
        const std::int64_t m = first_m + row, n = first_n + column;
        Epilogue epilogue(p.epilogue, n, n < p.grid.N);
        const bool inside = m < p.grid.M && n < p.grid.N;
        const auto input = epilogue.read(m, inside);
        if (inside) epilogue.apply(m, sum, input);
    }
};

}  // namespace gpt1
