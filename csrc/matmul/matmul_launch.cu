#include "matmul/matmul_launch.cuh"

#include "matmul/product_launch.cuh"

namespace gpt1 {

namespace {

constexpr std::int64_t kLongSum = 4096;  // writing and adding the parts of shorter ones costs too much
constexpr std::int64_t kMostChunks = 16;
constexpr std::int64_t kMostElements = 11'800'000;  // 47 MB: with them, GPT-1's loss needs less than 400 MB
constexpr std::int64_t kPartTerms = 1024;  // the cost of writing and adding a part, in terms

}  // namespace

std::pair<std::int64_t, std::int64_t> split_of_matmul(
    std::int64_t M, std::int64_t N, std::int64_t K, int device) {
    if (K < kLongSum) return {0, 1};
    const ProductGrid whole = product_grid(M, N, K, 1, device);
    const std::int64_t slots = product_slots(whole, device);
    const auto terms_in_turn = [&](std::int64_t chunks) {
        const ProductGrid grid = product_grid(M, N, K, chunks, device);
        const std::int64_t waves = (grid.parts() + slots - 1) / slots;
        return waves * (std::int64_t{grid.chunk} * grid.tile.k + (grid.split() ? kPartTerms : 0));
    };
    const auto elements = [&](std::int64_t chunks) {
        const ProductGrid grid = product_grid(M, N, K, chunks, device);
        return grid.split() ? grid.parts() * grid.tile_size() : 0;
    };
    std::int64_t best = 1;
    for (std::int64_t chunks = 2; chunks <= kMostChunks; ++chunks) {
        if (elements(chunks) <= kMostElements && terms_in_turn(chunks) < terms_in_turn(best)) best = chunks;
    }
    return {elements(best), best};
}

void matmul(DType dtype, Matrix a, bool a_transposed, Matrix b, bool b_transposed, Matrix out,
            DType out_dtype, TypedArray bias, Array scale, bool accumulate, Array parts, std::int64_t chunks,
            Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using Launch = MatmulLaunch<decltype(element)>;
        Launch::start(a, a_transposed, b, b_transposed, out, out_dtype, bias, scale, accumulate,
                      parts, chunks, stream);
    });
}

}  // namespace gpt1
