// Tiles of 2-byte elements in shared memory, and the fragments of them that the tensor cores take.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

/// Two neighbouring fragments of columns, 0 to 7 and 8 to 15.
struct FragmentPairB {
    FragmentB left, right;
};

/// A row-major tile, swizzled: the 16-byte chunks of a row are permuted by the row's number, so that
/// neither a row nor eight chunks below each other have bank conflicts.
template <class T, int kTileRows, int kTileColumns>
struct Tile {
    static constexpr int kRows = kTileRows, kColumns = kTileColumns;
    static constexpr int kSize = kRows * kColumns;
    static constexpr int kChunks = kColumns / 8;
    static constexpr int kPermuted = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
    static_assert(kColumns % 16 == 0 && kRows % 16 == 0 && sizeof(T) == 2);

    Shared<T> memory;  // (kSize,)

    /// Of an element whose column is a multiple of 8.
    __device__ __forceinline__ static int offset(int row, int column) {
        return row * kColumns + (column / 8 ^ row / (8 / kPermuted) % kPermuted) * 8;
    }

    /// Starts to copy a matrix's (rows, columns), zeros beyond and in rows before `first_row`; all
    /// kThreads threads take part. Rows start at multiples of 16 bytes, and columns is a multiple of 8.
    template <int kThreads>
    __device__ __forceinline__ void fetch(
        const Global<const T>& from, std::int64_t first, std::int64_t stride, int rows, int columns,
        int first_row = 0) const {
#pragma unroll
        for (int start = 0; start < kRows * kChunks; start += kThreads) {
            const int chunk = start + thread_index();
            const int row = chunk / kChunks, column = chunk % kChunks * 8;
            if (kRows * kChunks % kThreads != 0 && chunk >= kRows * kChunks) break;
            copy_async(memory, offset(row, column), from, first + row * stride + column,
                       row >= first_row && row < rows && column < columns);
        }
    }

    /// (16, 16) of the tile from (row, column) on.
    __device__ __forceinline__ FragmentA a(int row, int column) const {
        const int lane = lane_index();
        return words_a(load_matrices(memory, offset(row + lane % 16, column + lane / 16 * 8)));
    }

    /// (16, 16) of the tile's transpose: its rows are the tile's columns.
    __device__ __forceinline__ FragmentA a_transposed(int row, int column) const {
        const int lane = lane_index();
        return words_a(load_matrices_transposed(
            memory, offset(column + lane % 8 + lane / 16 * 8, row + lane / 8 % 2 * 8)));
    }

    /// (16, 16) of the tile from (row, column) on.
    __device__ __forceinline__ FragmentPairB b(int row, int column) const {
        const int lane = lane_index();
        return words_b(load_matrices_transposed(memory, offset(row + lane % 16, column + lane / 16 * 8)));
    }

    /// (16, 16) of the tile's transpose: its rows are the tile's columns.
    __device__ __forceinline__ FragmentPairB b_transposed(int row, int column) const {
        const int lane = lane_index();
        return words_b(load_matrices(
            memory, offset(column + lane % 8 + lane / 16 * 8, row + lane / 8 % 2 * 8)));
    }

private:
    __device__ __forceinline__ static FragmentA words_a(const Vector<std::uint32_t, 4>& m) {
        return {{m[0], m[1], m[2], m[3]}};
    }
    __device__ __forceinline__ static FragmentPairB words_b(const Vector<std::uint32_t, 4>& m) {
        return {{{m[0], m[1]}}, {{m[2], m[3]}}};
    }
};

}  // namespace gpt1
