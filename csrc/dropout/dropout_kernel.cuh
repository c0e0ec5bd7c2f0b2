// Dropout bits, 32 to a word.
#pragma once

#include "common/philox.cuh"

namespace gpt1 {

/// A warp owns 32 rows and 128 columns, a thread four words of a row: 16 bytes where rows are aligned
/// to them. So all lanes, or nearly, are on one side of the diagonal of a causal mask, wholly above which
/// no word is drawn.
struct DropoutMask {
    struct Params {
        Global<std::uint32_t> bits;  // (all_rows, words)
        Global<const std::int64_t> seed;
        std::int64_t all_rows, rows;  // of all matrices, of one
        std::int64_t columns, last_column, row_offset;
        std::int64_t words, quads;  // of a row; quads = ceil(words / 4)
        std::uint32_t threshold;
        std::string shape() const { return shape_text("rows", all_rows, "columns", columns); }
    };
    static constexpr const char* kName = "dropout_mask";
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerProcessor = 7;  // with 8, registers spill on 10.0
    static constexpr int kMaxSharedBytes = 0;

    __device__ static void run(const Params& p) {
        const std::int64_t warp = block_index() * (kThreads / 32) + warp_index();
        const std::int64_t row = warp / p.quads * 32 + lane_index(), first_word = warp % p.quads * 4;
        if (row >= p.all_rows) return;
        const std::int64_t last_column = row % p.rows + p.last_column;  // that is needed
        if (first_word * 32 > last_column) return;
        const DropoutStream stream(p.seed);
        Vector<std::uint32_t, 4> words;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = draw_word(p, stream, first_word + i, row, last_column);
        const std::int64_t offset = row * p.words + first_word;
        if (p.words % 4 == 0) {
            p.bits.store_vector(offset, words);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) p.bits.store(offset + i, words[i], first_word + i < p.words);
        }
    }

    __device__ static std::uint32_t draw_word(
        const Params& p, const DropoutStream& stream, std::int64_t word, std::int64_t row,
        std::int64_t last_column) {
        if (word * 32 > last_column) return 0;
        std::uint32_t bits = 0;
#pragma unroll
        for (int octet = 0; octet < 4; ++octet) {
            const Vector<bool, 8> keep =
                stream.keep<8>(word * 32 + octet * 8, p.row_offset + row, p.threshold);
#pragma unroll
            for (int j = 0; j < 8; ++j) bits |= static_cast<std::uint32_t>(keep[j]) << (octet * 8 + j);
        }
        const std::int64_t used = p.columns - word * 32;
        return used >= 32 ? bits : used <= 0 ? 0 : bits & ((1u << used) - 1);
    }
};

}  // namespace gpt1
