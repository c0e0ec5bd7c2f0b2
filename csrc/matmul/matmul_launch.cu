#include "matmul/matmul_launch.cuh"

#include "matmul/product_launch.cuh"

namespace gpt1 {

namespace {

constexpr std::int64_t kLongSum = 4096;       // the parts of shorter ones would weigh too much
constexpr std::int64_t kShortestShare = 512;  // terms of a block, at the least

}  // namespace

std::pair<std::int64_t, std::int64_t> split_of_matmul(
    std::int64_t M, std::int64_t N, std::int64_t K, int device) {
    const ProductGrid whole = product_grid(M, N, K, 0, device);
    const std::int64_t slots = product_slots(whole, device), tiles = whole.tiles();
    const std::int64_t waves = (tiles + slots - 1) / slots;
    // Splitting pays where a tenth of the chip would stand idle.
    if (K < kLongSum || 10 * tiles >= 9 * waves * slots) return {0, 0};
    const std::int64_t most = whole.all_steps() * whole.tile.k / kShortestShare;
    const std::int64_t blocks = slots < most ? slots : most;
    return {(blocks + tiles) * whole.tile_size(), blocks};
}

void matmul(int dtype, Matrix a, bool a_transposed, Matrix b, bool b_transposed, Matrix out, int out_dtype,
            TypedArray bias, Array scale, bool accumulate, Array parts, std::int64_t blocks,
            Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using Launch = MatmulLaunch<decltype(element)>;
        Launch::start(a, a_transposed, b, b_transposed, out, out_dtype, bias, scale, accumulate,
                      parts, blocks, stream);
    });
}

}  // namespace gpt1
