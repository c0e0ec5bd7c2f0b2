#include "dropout/dropout.h"
#include "dropout/dropout_kernel.cuh"

namespace gpt1 {

void dropout_mask(Array bits, Array seed, std::int64_t matrices, std::int64_t rows, std::int64_t columns,
                  std::int64_t last_column, std::uint32_t threshold, std::int64_t row_offset, Stream stream) {
    DropoutMask::Params p{};
    p.bits = Global<std::uint32_t>(bits);
    p.seed = Global<const std::int64_t>(seed);
    p.all_rows = matrices * rows;
    p.rows = rows;
    p.columns = columns;
    p.last_column = last_column;
    p.row_offset = row_offset;
    p.words = (columns + 31) / 32;
    p.quads = (p.words + 3) / 4;
    p.threshold = threshold;
    const std::int64_t threads = (p.all_rows + 31) / 32 * 32 * p.quads;
    launch<DropoutMask>((threads + DropoutMask::kThreads - 1) / DropoutMask::kThreads, 0, stream, p);
}

}  // namespace gpt1
