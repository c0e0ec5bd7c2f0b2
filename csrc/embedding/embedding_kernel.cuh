// Token and position rows gathered, added and dropped in one pass; their gradients without atomics.
//
// Backward takes the rows in the order of their ids, so that all rows of one id form a run. Chunks of
// that order, equal in size however often an id repeats, add up their part of each run. The sum of a run
// inside one chunk goes straight to its table row; of a run that crosses chunks, each chunk leaves a
// partial sum, and a second kernel adds these in order. Every grid follows from shapes alone.
#pragma once

#include "common/philox.cuh"
#include "common/rows.cuh"

namespace gpt1 {

/// Columns of a thread: the bits of one draw.
constexpr int kOctet = 8;

/// A thread owns eight columns of one position and walks over the sequences, so that the position's
/// row is read once.
template <class Table>
struct EmbeddingFwd {
    struct Params {
        FloatArray<false> out;                      // (B, T, C)
        Global<const std::int64_t> ids;             // (B, T)
        Global<const Table> w_token;                // (V, C)
        Global<const Table> w_position;             // (P, C)
        Global<const std::int64_t> position_ids;    // (B, T) or absent
        Global<const std::int64_t> token_type_ids;  // (B, T) or absent
        Global<std::int64_t> token_error;           // (2,)
        Global<std::int64_t> position_error;        // (2,) or absent
        Dropout dropout;
        std::int64_t B, T, C, V, P;
        std::int64_t octets;           // of a row
        std::int64_t position_blocks;  // which own a sequence together
        std::int64_t sequences;        // at a time
        bool aligned;
        std::string shape() const { return shape_text("B", B, "T", T, "C", C); }
    };
    static constexpr const char* kName = "embedding_fwd";
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = 0;
    static constexpr int kAtOnce = 4;  // sequences, whose reads are under way together

    using Columns = Vector<float, kOctet>;

    __device__ static void run(const Params& p) {
        const std::int64_t index = block_index() % p.position_blocks * kThreads + thread_index();
        const std::int64_t position = index / p.octets;
        if (position >= p.T) return;
        const std::int64_t column = index % p.octets * kOctet;
        const int count = static_cast<int>(p.C - column < kOctet ? p.C - column : kOctet);
        Columns by_order{};
        if (!p.position_ids) {
            by_order = widen(load_columns<kOctet>(p.w_position, position * p.C + column, count, p.aligned));
        }

        for (std::int64_t sequence = block_index() / p.position_blocks; sequence < p.B;
             sequence += kAtOnce * p.sequences) {
            const std::int64_t row = sequence * p.T + position;
            Columns out[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) out[i] = by_order;
            add_rows(p, p.w_token, p.ids, p.V, p.token_error, row, column, count, out);
            if (p.position_ids) {
                add_rows(p, p.w_position, p.position_ids, p.P, p.position_error, row, column, count, out);
            }
            if (p.token_type_ids) {
                add_rows(p, p.w_token, p.token_type_ids, p.V, p.token_error, row, column, count, out);
            }
            const DropoutStream stream(p.dropout.seed);  // late, for it takes registers
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const std::int64_t row_i = row + i * p.sequences * p.T;
                if (row_i >= p.B * p.T) break;
                if (p.dropout.seed) {
                    const Vector<bool, kOctet> keep =
                        stream.keep<kOctet>(column, p.dropout.row_offset + row_i, p.dropout.threshold);
#pragma unroll
                    for (int j = 0; j < kOctet; ++j) {
                        out[i][j] *= keep[j] ? p.dropout.scale : 0.0f;  // a product leaves NaN NaN
                    }
                }
                p.out.store_columns(row_i * p.C + column, out[i], count, p.aligned);
            }
        }
    }

    /// Adds a table's rows of the ids of `row` and the sequences after; NaN where an id is out of range,
    /// which is recorded.
    __device__ __forceinline__ static void add_rows(
        const Params& p, const Global<const Table>& table, const Global<const std::int64_t>& ids,
        std::int64_t bound, const Global<std::int64_t>& error, std::int64_t row, std::int64_t column,
        int count, Columns* out) {
        std::int64_t id[kAtOnce];
        Vector<Table, kOctet> x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const std::int64_t row_i = row + i * p.sequences * p.T;
            id[i] = ids.load(row_i, row_i < p.B * p.T);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const bool here = row + i * p.sequences * p.T < p.B * p.T && valid(id[i], bound);
            x[i] = load_columns<kOctet>(table, id[i] * p.C + column, here ? count : 0, p.aligned);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            add(out[i], widen(x[i]));
            if (valid(id[i], bound)) continue;
#pragma unroll
            for (int j = 0; j < kOctet; ++j) out[i][j] = NAN;
            if (column == 0 && compare_exchange(error, 0, 0, 1) == 0) error.store(1, id[i]);
        }
    }

    __device__ __forceinline__ static bool valid(std::int64_t id, std::int64_t bound) {
        return id >= 0 && id < bound;
    }
};

/// What the kernels of backward share.
template <class T>
struct EmbeddingGradient {
    Global<const T> dout;  // (N, C)
    Dropout dropout;
    std::int64_t C;
    bool aligned;  // dout, and the table's gradient

    __device__ __forceinline__ Vector<T, kOctet> load(
        std::int64_t row, std::int64_t column, int count) const {
        return load_columns<kOctet>(dout, row * C + column, count, aligned);
    }

    /// Adds a row's gradient before the dropout.
    __device__ __forceinline__ void add_to(
        Vector<float, kOctet>& sums, const Vector<T, kOctet>& x, const DropoutStream& stream,
        std::int64_t row, std::int64_t column) const {
        Vector<float, kOctet> gradient = widen(x);
        if (dropout.seed) {
            const Vector<bool, kOctet> keep =
                stream.keep<kOctet>(column, dropout.row_offset + row, dropout.threshold);
            apply_dropout(gradient, keep, dropout.scale);
        }
        add(sums, gradient);
    }
};

/// Sorted ids of a chunk, which leaves at most one partial sum at each end.
constexpr int kChunk = 64;

/// A warp owns a chunk of the sorted ids and 256 columns, a lane eight of them.
template <class T>
struct EmbeddingBwd {
    struct Params {
        EmbeddingGradient<T> gradient;
        Global<const std::int64_t> sorted_ids;  // (M,)
        Global<const std::int64_t> order;       // (M,)
        FloatArray<false> dw;                   // (V, C)
        Global<float> partials;  // (chunks, 2, stride): of the run that enters a chunk, the one that leaves
        std::int64_t M, N, V, stride;
        std::int64_t column_warps;  // that own a chunk
        std::string shape() const { return shape_text("M", M, "V", V, "C", gradient.C); }
    };
    static constexpr const char* kName = "embedding_bwd";
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = 0;
    static constexpr int kAtOnce = 4;  // rows, whose reads are under way together

    __device__ static void run(const Params& p) {
        const std::int64_t warp = block_index() * (kThreads / 32) + warp_index();
        const std::int64_t chunk = warp / p.column_warps, first = chunk * kChunk;
        if (first >= p.M) return;
        const int rows = static_cast<int>(p.M - first < kChunk ? p.M - first : kChunk);
        const std::int64_t column = (warp % p.column_warps * 32 + lane_index()) * kOctet;
        const std::int64_t rest = p.gradient.C - column;
        const int count = static_cast<int>(rest < 0 ? 0 : rest < kOctet ? rest : kOctet);

        std::int64_t own_id[kChunk / 32], own_row[kChunk / 32];
#pragma unroll
        for (int i = 0; i < kChunk / 32; ++i) {
            const std::int64_t index = first + i * 32 + lane_index();
            own_id[i] = p.sorted_ids.load(index, index < p.M);
            const std::int64_t row = p.order.load(index, index < p.M);
            own_row[i] = row < p.N ? row : row - p.N;
        }
        const std::int64_t entering = first > 0 ? p.sorted_ids.load(first - 1) : -1;
        const std::int64_t leaving = first + kChunk < p.M ? p.sorted_ids.load(first + kChunk) : -1;

        Vector<float, kOctet> sums{};
        std::int64_t token = shuffle(own_id[0], 0);
#pragma unroll 1
        for (int start = 0; start < rows; start += kAtOnce) {
            std::int64_t row[kAtOnce], id[kAtOnce];
            Vector<T, kOctet> x[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                row[i] = shuffle(start < 32 ? own_row[0] : own_row[1], (start + i) % 32);
                id[i] = shuffle(start < 32 ? own_id[0] : own_id[1], (start + i) % 32);
                x[i] = p.gradient.load(row[i], column, start + i < rows ? count : 0);
            }
            const DropoutStream stream(p.gradient.dropout.seed);  // late, for it takes registers
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (start + i >= rows) break;
                if (id[i] != token) {
                    store(p, sums, token, entering, leaving, chunk, column, count);
                    sums = {};
                    token = id[i];
                }
                p.gradient.add_to(sums, x[i], stream, row[i], column);
            }
        }
        store(p, sums, token, entering, leaving, chunk, column, count);
    }

    __device__ __forceinline__ static void store(
        const Params& p, const Vector<float, kOctet>& sums, std::int64_t token, std::int64_t entering,
        std::int64_t leaving, std::int64_t chunk, std::int64_t column, int count) {
        if (token == entering || token == leaving) {
            const std::int64_t partial = 2 * chunk + (token != entering);
            store_columns(p.partials, partial * p.stride + column, sums, count > 0 ? kOctet : 0, true);
        } else if (token >= 0 && token < p.V) {  // ids out of range have no table row
            p.dw.store_columns(token * p.gradient.C + column, sums, count, p.gradient.aligned);
        }
    }
};

/// A block owns the run that leaves a chunk, if it begins there, and 128 columns: a lane four of them,
/// a warp every eighth partial sum.
struct EmbeddingBwdRuns {
    struct Params {
        FloatArray<false> dw;                   // (V, C)
        Global<const std::int64_t> sorted_ids;  // (M,)
        Global<const float> partials;           // (chunks, 2, stride)
        std::int64_t M, V, C, stride;
        std::int64_t column_blocks;  // that own a run
        bool aligned;
        std::string shape() const { return shape_text("M", M, "V", V, "C", C); }
    };
    static constexpr const char* kName = "embedding_bwd_runs";
    static constexpr int kWarps = 8, kThreads = 32 * kWarps, kColumns = 128;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = kWarps * kColumns * 4;
    static constexpr int kAtOnce = 4;  // partial sums, whose reads are under way together

    __device__ static void run(const Params& p) {
        const std::int64_t chunk = block_index() / p.column_blocks;
        const std::int64_t token = p.sorted_ids.load((chunk + 1) * kChunk);
        const bool leaves = p.sorted_ids.load((chunk + 1) * kChunk - 1) == token;
        const bool enters = chunk > 0 && p.sorted_ids.load(chunk * kChunk - 1) == token;
        if (!leaves || enters || token < 0 || token >= p.V) return;
        const std::int64_t column = block_index() % p.column_blocks * kColumns + lane_index() * 4;
        const bool inside = column < p.stride;

        Vector<float, 4> sums = p.partials.load_vector<4>(
            (2 * chunk + 1) * p.stride + column, warp_index() == 0 && inside);
        std::int64_t later = chunk + 1 + warp_index();
        for (bool all = true; all; later += kAtOnce * kWarps) {
            bool same[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const std::int64_t first = (later + i * kWarps) * kChunk;
                same[i] = first < p.M && p.sorted_ids.load(first) == token;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                add(sums, p.partials.load_vector<4>(
                              2 * (later + i * kWarps) * p.stride + column, same[i] && inside));
            }
            all = same[kAtOnce - 1];
        }

        SharedArena arena;
        const Shared<float> shares = arena.take<float>(kWarps * kColumns);
        shares.store_vector<4>(warp_index() * kColumns + lane_index() * 4, sums);
        barrier();
        if (warp_index() > 0) return;
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) {
            add(sums, shares.load_vector<4>(warp * kColumns + lane_index() * 4));
        }
        const std::int64_t rest = p.C - column;
        const int count = static_cast<int>(rest < 0 ? 0 : rest < 4 ? rest : 4);
        p.dw.store_columns(token * p.C + column, sums, count, p.aligned);
    }
};

/// A thread adds eight columns of one position over the batch.
template <class T>
struct EmbeddingBwdPositions {
    struct Params {
        EmbeddingGradient<T> gradient;  // of (B, T, C)
        FloatArray<false> dw;           // (P, C)
        std::int64_t sequences, positions;
        std::int64_t octets;  // of a row
        std::string shape() const { return shape_text("B", sequences, "T", positions, "C", gradient.C); }
    };
    static constexpr const char* kName = "embedding_bwd_positions";
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = 0;
    static constexpr int kAtOnce = 8;  // sequences, whose reads are under way together

    __device__ static void run(const Params& p) {
        const std::int64_t index = block_index() * kThreads + thread_index();
        const std::int64_t position = index / p.octets, column = index % p.octets * kOctet;
        if (position >= p.positions) return;
        const std::int64_t rest = p.gradient.C - column;
        const int count = static_cast<int>(rest < kOctet ? rest : kOctet);
        Vector<float, kOctet> sums{};
        for (std::int64_t start = 0; start < p.sequences; start += kAtOnce) {
            Vector<T, kOctet> x[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                x[i] = p.gradient.load((start + i) * p.positions + position, column,
                                       start + i < p.sequences ? count : 0);
            }
            const DropoutStream stream(p.gradient.dropout.seed);  // late, for it takes registers
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                p.gradient.add_to(sums, x[i], stream, (start + i) * p.positions + position, column);
            }
        }
        p.dw.store_columns(position * p.gradient.C + column, sums, count, p.gradient.aligned);
    }
};

}  // namespace gpt1
