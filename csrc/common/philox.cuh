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

    /// If the seed is absent, the stream is not to be used.
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
            const std::uint64_t even = multiply_wide(c0, 0xD2511F53u), odd = multiply_wide(c2, 0xCD9E8D57u);
            c0 = static_cast<std::uint32_t>(odd >> 32) ^ c1 ^ k0;
            c1 = static_cast<std::uint32_t>(odd);
            c2 = static_cast<std::uint32_t>(even >> 32) ^ c3 ^ k1;
            c3 = static_cast<std::uint32_t>(even);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return {c0, c1, c2, c3};
    }

    /// Which of N = 4 or 8 columns from `column` on, a multiple of N, are kept.
    template <int N>
    __device__ __forceinline__ Vector<bool, N> keep(
        std::int64_t column, std::int64_t row, std::uint32_t threshold) const {
        static_assert(N == 4 || N == 8);
        const Vector<std::uint32_t, 4> words =
            draw(static_cast<std::uint32_t>(column / 8), static_cast<std::uint32_t>(row));
        Vector<bool, N> keep;
#pragma unroll
        for (int k = 0; k < N / 2; ++k) {
            const std::uint32_t word = N == 4 && column & 4 ? words[k + 2] : words[k];
            keep[2 * k] = (word & 0xffffu) >= threshold;
            keep[2 * k + 1] = (word >> 16) >= threshold;
        }
        return keep;
    }
};

/// Drops elements or scales the survivors.
template <int N>
__device__ __forceinline__ void apply_dropout(Vector<float, N>& x, const Vector<bool, N>& keep, float scale) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = keep[j] ? x[j] * scale : 0.0f;
}

}  // namespace gpt1
