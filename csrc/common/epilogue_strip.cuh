// How the sums of a product, in a warp's fragments, reach the epilogue: each thread gets a few neighbouring
// elements of a row.
//
// A thread's `Epilogue` has kWidth neighbouring columns. For each row, `read` loads early what it needs from
// memory, and `apply` gets the elements; `finish` is called after 64 rows.
#pragma once

#include "common/product_grid.cuh"

namespace gpt1 {

/// Takes kStripRows x 64 sums of a warp at a time. In a fragment a thread has two neighbouring elements; by
/// way of shared memory it gets kWidth.
template <class Epilogue, int kStripRows>
struct EpilogueStrip {
    static constexpr int kRows = kStripRows, kColumns = 64, kSize = kRows * kColumns;
    static constexpr int kWidth = Epilogue::kWidth;
    static constexpr int kLanes = kColumns / kWidth, kRowsAtOnce = 32 / kLanes;
    static constexpr int kVectors = kRows / kRowsAtOnce;  // to a thread
    static_assert(kRows % 16 == 0 && kRows % kRowsAtOnce == 0);

    struct Inputs {
        typename Epilogue::Input vectors[kVectors];
    };

    __device__ __forceinline__ static int row() { return lane_index() / kLanes; }
    __device__ __forceinline__ static int column() { return lane_index() % kLanes * kWidth; }

    /// Starts to read what the epilogue needs; `at` is the strip's place.
    __device__ __forceinline__ static Inputs read(const typename Epilogue::Params& params, const Place& at) {
        Inputs inputs;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            inputs.vectors[i] = Epilogue::read(params, m(at, i), n(at), inside(at, i));
        }
        return inputs;
    }

    /// Stores the sums in the strip; `fragment(i, j)` has its rows from 16 i and columns from 8 j on.
    template <class GetFragment>
    __device__ __forceinline__ static void store(
        const Shared<float>& strip, const GetFragment& fragment) {
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j) {
                const float* values = fragment(i, j).values;
                const int row = i * 16 + lane_index() / 4, pair = j * 8 + lane_index() % 4 * 2;
                strip.store_vector(offset(row, pair), Vector<float, 2>{values[0], values[1]});
                strip.store_vector(offset(row + 8, pair), Vector<float, 2>{values[2], values[3]});
            }
        }
        warp_barrier();
    }

    /// Hands the strip's sums to the epilogue.
    __device__ __forceinline__ static void apply(
        Epilogue& epilogue, const Shared<float>& strip, const Place& at, const Inputs& inputs) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            Vector<float, kWidth> x;
#pragma unroll
            for (int j = 0; j < kWidth; j += 4) {
                const auto four =
                    strip.template load_vector<4>(offset(i * kRowsAtOnce + row(), column() + j));
#pragma unroll
                for (int k = 0; k < 4; ++k) x[j + k] = four[k];
            }
            if (inside(at, i)) epilogue.apply(m(at, i), x, inputs.vectors[i]);
        }
        warp_barrier();
    }

    __device__ __forceinline__ static std::int64_t m(const Place& at, int i) {
        return at.first_m + i * kRowsAtOnce + row();
    }
    __device__ __forceinline__ static std::int64_t n(const Place& at) { return at.first_n + column(); }
    __device__ __forceinline__ static bool inside(const Place& at, int i) {
        return m(at, i) < at.M && n(at) < at.N;
    }

private:
    /// Of an element whose column is a multiple of 2; no bank conflicts for 2, 4 or 8 neighbours to a thread.
    __device__ __forceinline__ static int offset(int row, int column) {
        return row * kColumns + (column / 4 ^ column / 32 ^ row % 4 * 2) * 4 + column % 4;
    }
};

/// Sums over 64 rows, of which a warp has all.
struct RowsOfWarp {
    __device__ __forceinline__ bool first() const { return true; }
    __device__ __forceinline__ Vector<float, 4> sum(const Vector<float, 4>& x) const { return x; }
};

}  // namespace gpt1
