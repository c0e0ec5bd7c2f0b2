#include <algorithm>

#include "embedding/embedding.h"
#include "embedding/embedding_kernel.cuh"

namespace gpt1 {

namespace {

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Whether eight columns are whole accesses of 16 bytes.
bool aligned_octets(std::int64_t C, Array array) { return C % kOctet == 0 && array.address % 16 == 0; }

/// Of a row of partial sums, so that it is aligned whatever C.
std::int64_t partial_stride(std::int64_t C) { return divide_up(C, kOctet) * kOctet; }

template <class T>
EmbeddingGradient<T> gradient(Array dout, TypedArray dw, std::int64_t C, Dropout dropout) {
    return {Global<const T>(dout), dropout, C, aligned_octets(C, dout) && aligned_octets(C, dw.array)};
}

void add_runs(Array sorted_ids, TypedArray dw, Array partials, std::int64_t M, std::int64_t C, std::int64_t V,
              Stream stream) {
    const std::int64_t boundaries = divide_up(M, kChunk) - 1;
    if (boundaries == 0) return;
    EmbeddingBwdRuns::Params p{};
    p.dw = FloatArray<false>(dw);
    p.sorted_ids = Global<const std::int64_t>(sorted_ids);
    p.partials = Global<const float>(partials);
    p.M = M;
    p.V = V;
    p.C = C;
    p.stride = partial_stride(C);
    p.column_blocks = divide_up(C, EmbeddingBwdRuns::kColumns);
    p.aligned = aligned_octets(C, dw.array);
    launch<EmbeddingBwdRuns>(boundaries * p.column_blocks, EmbeddingBwdRuns::kMaxSharedBytes, stream, p);
}

}  // namespace

void embedding_fwd(DType dtype, TypedArray out, Array ids, Array w_token, Array w_position,
                   Array position_ids, Array token_type_ids, Array seed, Array token_error,
                   Array position_error, std::int64_t B, std::int64_t T, std::int64_t C, std::int64_t V,
                   std::int64_t P, std::uint32_t threshold, float keep_scale, std::int64_t row_offset,
                   Stream stream) {
    dispatch(dtype, [&](auto element) {
        using Table = decltype(element);
        using Kernel = EmbeddingFwd<Table>;
        typename Kernel::Params p{};
        p.out = FloatArray<false>(out);
        p.ids = Global<const std::int64_t>(ids);
        p.w_token = Global<const Table>(w_token);
        p.w_position = Global<const Table>(w_position);
        p.position_ids = Global<const std::int64_t>(position_ids);
        p.token_type_ids = Global<const std::int64_t>(token_type_ids);
        p.token_error = Global<std::int64_t>(token_error);
        p.position_error = Global<std::int64_t>(position_error);
        p.dropout = {Global<const std::int64_t>(seed), threshold, keep_scale, row_offset};
        p.B = B;
        p.T = T;
        p.C = C;
        p.V = V;
        p.P = P;
        p.octets = divide_up(C, kOctet);
        p.position_blocks = divide_up(T * p.octets, Kernel::kThreads);
        // As many sequences at a time as make a wave of blocks.
        const std::int64_t resident = std::int64_t{processors(stream.first)} * Kernel::kBlocksPerProcessor;
        p.sequences = std::clamp<std::int64_t>(resident / p.position_blocks, 1, B);
        p.aligned = aligned_octets(C, out.array) && aligned_octets(C, w_token) &&
                    aligned_octets(C, w_position);
        launch<Kernel>(p.position_blocks * p.sequences, 0, stream, p);
    });
}

void embedding_bwd(DType dtype, Array dout, Array sorted_ids, Array order, TypedArray dw, Array partials,
                   Array seed, std::int64_t M, std::int64_t N, std::int64_t C, std::int64_t V,
                   std::uint32_t threshold, float keep_scale, std::int64_t row_offset, Stream stream) {
    const Dropout dropout{Global<const std::int64_t>(seed), threshold, keep_scale, row_offset};
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using Kernel = EmbeddingBwd<T>;
        typename Kernel::Params p{};
        p.gradient = gradient<T>(dout, dw, C, dropout);
        p.sorted_ids = Global<const std::int64_t>(sorted_ids);
        p.order = Global<const std::int64_t>(order);
        p.dw = FloatArray<false>(dw);
        p.partials = Global<float>(partials);
        p.M = M;
        p.N = N;
        p.V = V;
        p.stride = partial_stride(C);
        p.column_warps = divide_up(C, 32 * kOctet);
        const std::int64_t warps = divide_up(M, kChunk) * p.column_warps;
        launch<Kernel>(divide_up(warps, Kernel::kThreads / 32), 0, stream, p);
    });
    add_runs(sorted_ids, dw, partials, M, C, V, stream);
}

void embedding_bwd_positions(DType dtype, Array dout, TypedArray dw, Array seed, std::int64_t B,
                             std::int64_t T, std::int64_t C, std::uint32_t threshold, float keep_scale,
                             std::int64_t row_offset, Stream stream) {
    const Dropout dropout{Global<const std::int64_t>(seed), threshold, keep_scale, row_offset};
    dispatch(dtype, [&](auto element) {
        using Element = decltype(element);
        using Kernel = EmbeddingBwdPositions<Element>;
        typename Kernel::Params p{};
        p.gradient = gradient<Element>(dout, dw, C, dropout);
        p.dw = FloatArray<false>(dw);
        p.sequences = B;
        p.positions = T;
        p.octets = divide_up(C, kOctet);
        launch<Kernel>(divide_up(T * p.octets, Kernel::kThreads), 0, stream, p);
    });
}

}  // namespace gpt1
