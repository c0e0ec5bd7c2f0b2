// The dropout stream on the chip: Philox4x32 with 7 rounds, as gpt1_kernels/rng.py defines it.
#pragma once

#include "platform/platform.cuh"

namespace gpt1 {

/// What drops the elements of a tensor: bit (row, column) of the stream of `seed`.
struct Dropout {
    Global<const std::int64_t> seed;  // (2,), absent without dropout
    std::uint32_t threshold;          // 16-bit values from here on keep
    float scale;                      // of the survivors
    std::int64_t row_offset;
};

/// A stream's key and the two words of its counter that do not change within a kernel.
struct DropoutStream {
    std::uint32_t key[2];
    std::uint32_t step, site;

    /// Of any bits at all if the seed is absent.
    __device__ __forceinline__ explicit DropoutStream(const Global<const std::int64_t>& seed) {
        const bool present = static_cast<bool>(seed);
        const std::int64_t key_words = seed.load(0, present), place = seed.load(1, present);
        key[0] = static_cast<std::uint32_t>(key_words);
        key[1] = static_cast<std::uint32_t>(key_words >> 32);
        step = static_cast<std::uint32_t>(place);
        site = static_cast<std::uint32_t>(place >> 32);
    }

    /// Block (row, column / 8): eight 16-bit values, the low half of each word first.
    __device__ __forceinline__ Vector<std::uint32_t, 4> draw(std::uint32_t block, std::uint32_t row) const {
        std::uint32_t c0 = block, c1 = row, c2 = step, c3 = site, k0 = key[0], k1 = key[1];
#pragma unroll
        for (int round = 0; round < 7; ++round) {
            const std::uint64_t even = std::uint64_t{c0} * 0xD2511F53u, odd = std::uint64_t{c2} * 0xCD9E8D57u;
            c0 = static_cast<std::uint32_t>(odd >> 32) ^ c1 ^ k0;
            c1 = static_cast<std::uint32_t>(odd);
            c2 = static_cast<std::uint32_t>(even >> 32) ^ c3 ^ k1;
            c3 = static_cast<std::uint32_t>(even);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return {c0, c1, c2, c3};
    }

    /// A bit for each of the block's eight elements, element j in bit j; 1 keeps.
    __device__ __forceinline__ std::uint32_t keep8(
        std::uint32_t block, std::uint32_t row, std::uint32_t threshold) const {
        const Vector<std::uint32_t, 4> words = draw(block, row);
        std::uint32_t bits = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            bits |= static_cast<std::uint32_t>((words[k] & 0xffffu) >= threshold) << 2 * k;
            bits |= static_cast<std::uint32_t>((words[k] >> 16) >= threshold) << (2 * k + 1);
        }
        return bits;
    }

    /// The bits of N = 4 or 8 columns from `column` on, a multiple of N.
    template <int N>
    __device__ __forceinline__ std::uint32_t keep(
        std::int64_t column, std::int64_t row, std::uint32_t threshold) const {
        static_assert(N == 4 || N == 8);
        return keep8(static_cast<std::uint32_t>(column / 8), static_cast<std::uint32_t>(row), threshold) >>
               (N == 4 ? column & 4 : 0);
    }
};

/// Drops elements or scales the survivors: N neighbouring columns of a row whose bits are `keep`.
template <int N>
__device__ __forceinline__ void apply_dropout(Vector<float, N>& x, std::uint32_t keep, float scale) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = keep >> j & 1 ? x[j] * scale : 0.0f;
}

}  // namespace gpt1
