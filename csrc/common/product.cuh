// Products of matrices on the tensor cores, and what is done with a tile of one while it is on chip.
//
// A block has a part of a tile of 128 x 128, and multiplies 32 terms at a time, from operands that
// asynchronous copies bring into shared memory, four stages deep. The sums are handed to an epilogue, a few
// neighbouring elements at a time: a struct that adds a bias, applies a GELU or takes sums, and that stores.
//
// A sum over many terms with few tiles to fill the chip (a weight's gradient) is cut into chunks (split-K).
// Each part of a tile is left in a workspace, and SumParts adds them in order, so two runs are bit-identical.
#pragma once

#include "common/epilogue_strip.cuh"
#include "common/product_grid.cuh"
#include "common/tile.cuh"

namespace gpt1 {

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
    static_assert(kRowStep % 8 == 0);  // so that all rows of a thread have the same swizzle

    __device__ __forceinline__ static int first_row() { return thread_index() / AnyTile::kChunks; }
    __device__ __forceinline__ static int first_column() { return thread_index() % AnyTile::kChunks * 8; }

    const Operand<T>& from_;
    std::int64_t offset_;
    int rows_, columns_;  // left from the next tile's chunk on
};

/// A block owns a part of a tile, a warp 64 x 64 of its sums, and walks along K.
///
/// An operand is stored as itself or as its transpose.
template <class T, bool kATransposed, bool kBTransposed, class Epilogue>
struct Product {
    struct Params {
        Operand<T> a;  // (M, K), or (K, M) if transposed
        Operand<T> b;  // (K, N), or (N, K) if transposed
        ProductGrid grid;
        typename Epilogue::Params epilogue;
        std::string shape() const { return grid.shape(); }
    };
    static constexpr int kBlockM = kTile.m, kBlockN = kTile.n, kBlockK = kTile.k, kStages = 4;
    static constexpr int kWarpM = 64, kWarpN = 64;

    using TileA = Tile<T, kATransposed ? kBlockK : kBlockM, kATransposed ? kBlockM : kBlockK>;
    using TileB = Tile<T, kBTransposed ? kBlockN : kBlockK, kBTransposed ? kBlockK : kBlockN>;

    static constexpr const char* kName = Epilogue::kName;
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerProcessor = kTileBlocksPerProcessor;
    static constexpr int kMaxSharedBytes = kStages * (TileA::kSize + TileB::kSize) * sizeof(T);

    struct Accumulators {
        FragmentC values[kWarpM / 16][kWarpN / 8];
    };
    struct Fragments {
        FragmentA a[kWarpM / 16];
        FragmentPairB b[kWarpN / 16];
    };

    __device__ static void run(const Params& p) {
        const Part part(p.grid, block_index());
        std::int64_t first_m, first_n;
        p.grid.origin(part.tile, first_m, first_n);
        Accumulators acc{};
        multiply(p, acc, first_m, first_n, part.first, part.count);
        finish(p.epilogue, acc, part.place());
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
            load(fragments[0], stage, 0);  // while the tensor cores work; not used after the last step
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

    using Strip = EpilogueStrip<Epilogue, 4 * Epilogue::kWidth>;
    static_assert(kWarpN == Strip::kColumns && 4 * Strip::kSize * sizeof(float) <= kMaxSharedBytes);

    __device__ __forceinline__ static void finish(
        const typename Epilogue::Params& params, const Accumulators& acc, Place at) {
        SharedArena arena;
        const Shared<float> strip =
            arena.take<float>(4 * Strip::kSize).slice(warp_index() * Strip::kSize, Strip::kSize);
        at.first_m += warp_m();
        at.first_n += warp_n();
        const std::int64_t first_m = at.first_m, n = Strip::n(at);
        Epilogue epilogue(params, n, n < at.N);
#pragma unroll
        for (int s = 0; s < kWarpM / Strip::kRows; ++s) {
            const auto fragment = [&](int i, int j) -> const FragmentC& {
                return acc.values[s * (Strip::kRows / 16) + i][j];
            };
            const typename Strip::Inputs inputs = Strip::read(params, at);
            Strip::store(strip, fragment);
            Strip::apply(epilogue, strip, at, inputs);
            at.first_m += Strip::kRows;
        }
        epilogue.finish(first_m, at.M, RowsOfWarp{});
    }
};

/// Adds a tile's parts in order and hands the sums to an epilogue; a block owns 8 rows and 128 columns of a
/// tile, a thread four neighbouring columns.
template <class Epilogue>
struct SumParts {
    struct Params {
        Global<const float> parts;  // (parts, tile.m, tile.n)
        ProductGrid grid;
        typename Epilogue::Params epilogue;
        std::string shape() const { return grid.shape(); }
    };
    static constexpr int kRows = 8, kColumns = 128;
    static constexpr const char* kName = "sum_parts";
    static constexpr int kThreads = kRows * kColumns / 4;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = 0;

    __host__ __device__ static int slices(const ProductGrid& grid) {
        return grid.tile.m / kRows * (grid.tile.n / kColumns);
    }

    __device__ static void run(const Params& p) {
        const ProductGrid& grid = p.grid;
        const int tile = static_cast<int>(block_index() / slices(grid));
        const int slice = static_cast<int>(block_index() % slices(grid)), across = grid.tile.n / kColumns;
        const int row = slice / across * kRows + warp_index();
        const int column = slice % across * kColumns + lane_index() * 4;
        const std::int64_t tiles = grid.tiles(), parts = grid.parts();
        Vector<float, 4> sum{};
#pragma unroll 4
        for (std::int64_t i = tile; i < parts; i += tiles) {
            const auto part =
                p.parts.template load_vector<4>(i * grid.tile_size() + row * grid.tile.n + column);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[j] += part[j];
        }
        std::int64_t first_m, first_n;
        grid.origin(tile, first_m, first_n);
        const std::int64_t m = first_m + row, n = first_n + column;
        const bool inside = m < grid.M && n < grid.N;
        const auto input = Epilogue::read(p.epilogue, m, n, inside);
        Epilogue epilogue(p.epilogue, n, n < grid.N);
        if (inside) epilogue.apply(m, sum, input);
    }
};

}  // namespace gpt1
