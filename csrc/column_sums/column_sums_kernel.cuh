// Sums over rows, for the gradients of parameters that all rows share.
#pragma once

#include "common/rows.cuh"

namespace gpt1 {

/// A block adds a run of rows, in eight accesses of 16 bytes to a row; a thread every 32nd row. The
/// threads' shares are then added in order.
template <class T>
struct ColumnSums {
    static constexpr int kMostSums = 3;

    struct Params {
        Global<const T> x;                    // (sums, rows, columns)
        FloatArray<false> totals[kMostSums];  // of (runs, columns)
        std::int64_t rows, columns, stride, run, runs;
        std::string shape() const { return shape_text("rows", rows, "columns", columns, "run", run); }
    };
    static constexpr int kWidth = kVector<T>, kLanes = 8, kColumns = kLanes * kWidth;
    static constexpr const char* kName = "column_sums";
    static constexpr int kThreads = 256, kRows = kThreads / kLanes;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kPlane = kThreads + 32 / kWidth;  // of an element of each thread; no bank conflicts
    static constexpr int kMaxSharedBytes = kWidth * kPlane * sizeof(float);

    __device__ static void run(const Params& p) {
        const std::int64_t strips = (p.columns + kColumns - 1) / kColumns, index = block_index() / strips;
        const std::int64_t first_column = block_index() % strips * kColumns;
        const std::int64_t sum = index / p.runs, number = index % p.runs, first = number * p.run;
        const std::int64_t end = first + p.run < p.rows ? first + p.run : p.rows;
        const int row = thread_index() / kLanes, column = thread_index() % kLanes * kWidth;
        const bool inside = first_column + column < p.columns;
        const std::int64_t origin = sum * p.rows * p.stride + first_column + column;
        Vector<float, kWidth> share{};
#pragma unroll 8
        for (std::int64_t r = first + row; r < end; r += kRows) {
            add(share, widen(p.x.template load_vector<kWidth>(origin + r * p.stride, inside)));
        }

        SharedArena arena;
        const Shared<float> shares = arena.take<float>(kWidth * kPlane);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) shares.store(i * kPlane + thread_index(), share[i]);
        barrier();
        if (thread_index() >= kColumns) return;
        const int place = thread_index() % kWidth * kPlane + thread_index() / kWidth;
        float total = 0.0f;
#pragma unroll 8
        for (int i = 0; i < kRows; ++i) total += shares.load(place + i * kLanes);
        const std::int64_t n = first_column + thread_index();
#pragma unroll
        for (int i = 0; i < kMostSums; ++i) {
            if (i == sum) p.totals[i].store(number * p.columns + n, total, n < p.columns);
        }
    }
};

}  // namespace gpt1
