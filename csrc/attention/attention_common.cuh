// What the kernels of causal attention share: where a block works, and how it takes dropout bits.
#pragma once

#include <limits>

#include "attention/attention.h"
#include "common/tile.cuh"

namespace gpt1 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// (B, T, H, D), or absent.
template <class T>
struct Heads {
    Global<T> x;
    std::int64_t stride_b, stride_t, stride_h;

    Heads() = default;
    explicit Heads(const HeadsArray& heads)
        : x(heads.array), stride_b(heads.stride_b), stride_t(heads.stride_t), stride_h(heads.stride_h) {}

    __host__ __device__ __forceinline__ explicit operator bool() const { return static_cast<bool>(x); }
};

/// What a call of attention is about, beside its tensors of heads.
struct AttentionProblem {
    Global<const std::uint32_t> keep_bits;  // (B, H, Tq, words), absent without dropout
    Global<const std::int32_t> first_key;   // (B,), absent without padding
    int B, H, Tq, Tk, D, words;
    float scale, keep_scale;

    AttentionProblem(Array bits, Array first, const AttentionSizes& sizes, float scale, float keep_scale)
        : keep_bits(bits), first_key(first), scale(scale), keep_scale(keep_scale) {
        std::tie(B, H, Tq, Tk, D) = sizes;
        words = (Tk + 31) / 32;
    }

    std::string shape() const { return shape_text("B", B, "H", H, "Tq", Tq, "Tk", Tk, "D", D); }
};

/// The head that a block works on.
struct AttentionHead {
    std::int64_t batch, head;
    std::int64_t first_row;  // in (B, H, Tq)
    int past;                // query i is at position i + past, and sees the keys up to there
    int first_key;
    int first_query;  // the first that is not padding

    __device__ __forceinline__ AttentionHead(const AttentionProblem& p, std::int64_t index)
        : batch(index / p.H), head(index % p.H), first_row(index * p.Tq), past(p.Tk - p.Tq) {
        first_key = p.first_key ? max(0, p.first_key.load(batch)) : 0;
        first_query = max(0, first_key - past);
    }

    /// The offset of the head's (T, D).
    template <class T>
    __device__ __forceinline__ std::int64_t offset(const Heads<T>& x) const {
        return batch * x.stride_b + head * x.stride_h;
    }
};

/// Starts to copy the rows from `start` on of a head's (T, D), zeros from `end` on and before `first_row`.
template <int kThreads, class T, int kRows, int kD>
__device__ __forceinline__ void fetch_rows(const Tile<T, kRows, kD>& to, const Heads<const T>& from,
                                           const AttentionHead& head, int start, int end, int first_row,
                                           int columns) {
    to.template fetch<kThreads>(from.x, head.offset(from) + start * from.stride_t, from.stride_t, end - start,
                                columns, first_row - start);
}

/// The place of a thread's numbers in a (16, 8) fragment: rows row and row + 8, columns column and + 1.
__device__ __forceinline__ int fragment_row() { return lane_index() / 4; }
__device__ __forceinline__ int fragment_column() { return lane_index() % 4 * 2; }

/// The sum over the four lanes that share a fragment's rows.
__device__ __forceinline__ float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

/// The words of dropout bits of kRows queries, for tiles of keys that come in order.
///
/// They are fetched for 128 keys at a time, since a sector of memory holds those of 256, and only
/// where a key may be visible: words above the diagonal are undefined.
template <int kRows, int kThreads>
struct KeepBits {
    static constexpr int kWords = 4;
    static constexpr int kSize = 2 * kRows * kWords;

    Shared<std::uint32_t> memory;  // (2, kRows, kWords)

    /// Starts to copy what a tile of keys needs, unless a tile before had it.
    __device__ __forceinline__ void fetch(const AttentionProblem& p, const AttentionHead& head, int start_m,
                                          int start_n, bool first_tile) const {
        if (!p.keep_bits || !(first_tile || start_n % (32 * kWords) == 0)) return;
        const int first_word = start_n / 32 / kWords * kWords;
#pragma unroll
        for (int start = 0; start < kRows * kWords; start += kThreads) {
            const int row = (start + thread_index()) / kWords, word = first_word + thread_index() % kWords;
            const int query = start_m + row;
            copy_async_word(memory, place(row, word * 32), p.keep_bits,
                            (head.first_row + query) * p.words + word,
                            query < p.Tq && word * 32 <= query + head.past);
        }
    }

    /// The bits from this thread's column of a fragment at `key` on, to the end of a word.
    __device__ __forceinline__ std::uint32_t bits(int row, int key) const {
        return memory.load(place(row, key)) >> (key % 32 + fragment_column());
    }

private:
    __device__ __forceinline__ static int place(int row, int key) {
        return (key / 128 % 2 * kRows + row) * kWords + key / 32 % kWords;
    }
};

/// Stores a warp's 16 rows of a (T, D) matrix, by way of the rows from `row` on of a tile that no
/// other warp uses.
template <class T, int kRows, int kD>
__device__ __forceinline__ void store_strip(const Tile<T, kRows, kD>& tile, int row,
                                            const FragmentC (&x)[kD / 8], float factor, float factor_8,
                                            const Heads<T>& to, const AttentionHead& head, int start,
                                            int length, int D) {
    warp_barrier();  // lanes may have read these rows
    const auto put = [&](int r, int column, float low, float high) {
        tile.memory.store_vector(tile.offset(row + r, column) + fragment_column(),
                                 narrow<T>(Vector<float, 2>{low, high}));
    };
#pragma unroll
    for (int d = 0; d < kD / 8; ++d) {
        put(fragment_row(), d * 8, x[d].values[0] * factor, x[d].values[1] * factor);
        put(fragment_row() + 8, d * 8, x[d].values[2] * factor_8, x[d].values[3] * factor_8);
    }
    warp_barrier();
    const std::int64_t first = head.offset(to) + (start + row) * to.stride_t;
#pragma unroll
    for (int i = 0; i < 16 * kD / 8; i += 32) {
        const int chunk = i + lane_index(), r = chunk / (kD / 8), column = chunk % (kD / 8) * 8;
        to.x.store_vector(first + r * to.stride_t + column,
                          tile.memory.template load_vector<8>(tile.offset(row + r, column)),
                          start + row + r < length && column < D);
    }
}

/// Probabilities or their gradients, (16, 16), as a left operand.
template <class T>
__device__ __forceinline__ FragmentA as_left(const FragmentC& left, const FragmentC& right) {
    return {{pack<T>(left.values[0], left.values[1]), pack<T>(left.values[2], left.values[3]),
             pack<T>(right.values[0], right.values[1]), pack<T>(right.values[2], right.values[3])}};
}

/// Calls `function` with the least number of columns in which a kernel takes heads of D.
template <class Function>
void dispatch_head_size(int D, Function function) {
    if (D <= 0 || D > 128 || D % 8 != 0) {
        throw std::invalid_argument(shape_text("D", D) + ", expected a multiple of 8 up to 128");
    }
    if (D <= 32) return function(std::integral_constant<int, 32>{});
    if (D <= 64) return function(std::integral_constant<int, 64>{});
    if (D <= 96) return function(std::integral_constant<int, 96>{});
    return function(std::integral_constant<int, 128>{});
}

}  // namespace gpt1
