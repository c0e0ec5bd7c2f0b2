// Backward of causal attention with respect to the keys and values.
#pragma once

#include "attention/attention_common.cuh"

namespace gpt1 {

/// What a warp does for the 16 keys that it owns of a tile. All is transposed, so that P and dS are left
/// operands, straight from registers: a thread's rows are keys, its columns queries.
template <class T, int kD, int kKeys, int kQueries, int kThreads>
struct AttentionKeySide {
    using KTile = Tile<T, kKeys, kD>;
    using QTile = Tile<T, kQueries, kD>;

    static constexpr int kWords = kKeys / 32;
    static constexpr int kBitsStride = kQueries + 32 / kWords;  // of a word, so that no two share a bank
    static constexpr int kBits = kWords * kBitsStride;

    /// s (16, columns) += x yᵀ, of the warp's rows of x and those from `first` on of y.
    template <int kColumns>
    __device__ __forceinline__ static void multiply(const KTile& x, const QTile& y, int first,
                                                    FragmentC (&s)[kColumns]) {
#pragma unroll
        for (int d = 0; d < kD; d += 16) {
            const FragmentA left = x.a(warp_index() * 16, d);
#pragma unroll
            for (int m = 0; m < kColumns / 2; ++m) {
                const FragmentPairB right = y.b_transposed(d, first + m * 16);
                mma<T>(s[2 * m], left, right.left);
                mma<T>(s[2 * m + 1], left, right.right);
            }
        }
    }

    /// sum (16, kD) += x y, of the rows from `first` on of y.
    template <int kColumns>
    __device__ __forceinline__ static void add_product(const FragmentC (&x)[kColumns], const QTile& y,
                                                       int first, FragmentC (&sum)[kD / 8]) {
#pragma unroll
        for (int m = 0; m < kColumns / 2; ++m) {
            const FragmentA left = as_left<T>(x[2 * m], x[2 * m + 1]);
#pragma unroll
            for (int d = 0; d < kD; d += 16) {
                const FragmentPairB right = y.b(first + m * 16, d);
                mma<T>(sum[d / 8], left, right.left);
                mma<T>(sum[d / 8 + 1], left, right.right);
            }
        }
    }

    /// Starts to copy the dropout bits of queries for a tile of keys, where a key may be visible.
    __device__ __forceinline__ static void fetch_bits(const AttentionProblem& p, const AttentionHead& head,
                                                      const Shared<std::uint32_t>& bits, int start_m,
                                                      int start_n) {
        if (!p.keep_bits) return;
#pragma unroll
        for (int start = 0; start < kQueries * kWords; start += kThreads) {
            const int index = start + thread_index();
            if (kQueries * kWords % kThreads != 0 && index >= kQueries * kWords) break;
            const int row = index / kWords, query = start_m + row, word = index % kWords;
            copy_async_word(bits, word * kBitsStride + row, p.keep_bits,
                            (head.first_row + query) * p.words + start_n / 32 + word,
                            query < p.Tq && start_n + word * 32 <= query + head.past);
        }
    }

    /// Turns scores of the queries from `first` on, `query` in the head, into P.
    template <int kColumns>
    __device__ __forceinline__ static void probabilities(const AttentionProblem& p, const AttentionHead& head,
                                                         const Shared<float>& lse, int first, int query,
                                                         int start_n, FragmentC (&s)[kColumns]) {
        const float log2_scale = p.scale * kLog2E;
        const int first_key = start_n + warp_index() * 16, first_position = query + head.past;
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
            const auto l = lse.template load_vector<2>(first + m * 8 + fragment_column());
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[m].values[i] = fast_exp2(s[m].values[i] * log2_scale - l[i % 2] * kLog2E);
            }
        }
        if (first_key + 15 <= first_position && first_key >= head.first_key) return;
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = first_key + fragment_row() + i / 2 * 8;
                const int position = first_position + m * 8 + fragment_column() + i % 2;
                if (key > position || key < head.first_key) s[m].values[i] = 0.0f;
            }
        }
    }

    /// x, or 0 where dropped.
    template <int kColumns>
    __device__ __forceinline__ static void drop(const AttentionProblem& p, const Shared<std::uint32_t>& bits,
                                                int first, FragmentC (&x)[kColumns]) {
        if (!p.keep_bits) return;
        const int word = warp_index() / 2, bit = warp_index() % 2 * 16 + fragment_row();
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
            const int column = first + m * 8 + fragment_column();
            const auto words = bits.template load_vector<2>(word * kBitsStride + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (!(words[i % 2] >> bit >> i / 2 * 8 & 1)) x[m].values[i] = 0.0f;
            }
        }
    }

    /// Turns P and the dropped dP into dS.
    template <int kColumns>
    __device__ __forceinline__ static void gradient(const AttentionProblem& p, const Shared<float>& delta,
                                                    int first, FragmentC (&s)[kColumns],
                                                    const FragmentC (&dp)[kColumns]) {
#pragma unroll
        for (int m = 0; m < kColumns; ++m) {
            const auto row_delta = delta.template load_vector<2>(first + m * 8 + fragment_column());
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[m].values[i] *= dp[m].values[i] * p.keep_scale - row_delta[i % 2];
            }
        }
    }
};

/// A block owns a head's tile of keys, and walks over the queries that see them.
template <class T, int kD>
struct AttentionBackwardDkDv {
    struct Params : AttentionProblem {
        Heads<const T> dout, q;     // (B, Tq, H, D)
        Heads<const T> k, v;        // (B, Tk, H, D)
        Global<const float> lse;    // (B, H, Tq)
        Global<const float> delta;  // (B, H, Tq), read for dK
        Heads<T> dk, dv;            // (B, Tk, H, D), or absent
    };
    static constexpr const char* kName = "causal_attention_bwd_dkdv";
    static constexpr int kWarps = kD <= 64 ? 8 : 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kBlocksPerProcessor = 1;
    static constexpr int kKeys = kWarps * 16;
    static constexpr int kQueries = kD <= 64 ? 64 : 32;
    static constexpr int kChunk = 32;
    static constexpr int kStages = 2;

    using Side = AttentionKeySide<T, kD, kKeys, kQueries, kThreads>;
    using KTile = typename Side::KTile;
    using QTile = typename Side::QTile;
    static constexpr int kMaxSharedBytes =
        2 * (KTile::kSize + kStages * QTile::kSize) * static_cast<int>(sizeof(T)) +
        kStages * (Side::kBits + 2 * kQueries) * 4;

    struct Stage {
        QTile q, dout;
        Shared<std::uint32_t> bits;
        Shared<float> lse, delta;
    };

    __device__ static void run(const Params& p) {
        const std::int64_t tiles = (p.Tk + kKeys - 1) / kKeys;
        const AttentionHead head(p, block_index() / tiles);
        const int start_n = static_cast<int>(block_index() % tiles) * kKeys;  // the most seen keys first
        // Nothing sees padding.
        const int start = start_n + kKeys <= head.first_key
                              ? p.Tq
                              : max(head.first_query, start_n - head.past) / kQueries * kQueries;

        SharedArena arena;
        const KTile k{arena.take<T>(KTile::kSize)}, v{arena.take<T>(KTile::kSize)};
        const Shared<T> tiles_of_stages = arena.take<T>(kStages * 2 * QTile::kSize);
        const Shared<std::uint32_t> bits_of_stages = arena.take<std::uint32_t>(kStages * Side::kBits);
        const Shared<float> rows_of_stages = arena.take<float>(kStages * 2 * kQueries);
        const auto stage = [&](int start_m) {
            const int i = start_m / kQueries % kStages;
            return Stage{{tiles_of_stages.slice(2 * i * QTile::kSize, QTile::kSize)},
                         {tiles_of_stages.slice((2 * i + 1) * QTile::kSize, QTile::kSize)},
                         bits_of_stages.slice(i * Side::kBits, Side::kBits),
                         rows_of_stages.slice(2 * i * kQueries, kQueries),
                         rows_of_stages.slice((2 * i + 1) * kQueries, kQueries)};
        };
        const auto fetch = [&](int start_m) {
            const Stage to = stage(start_m);
            fetch_rows<kThreads>(to.q, p.q, head, start_m, p.Tq, head.first_query, p.D);
            fetch_rows<kThreads>(to.dout, p.dout, head, start_m, p.Tq, head.first_query, p.D);
            Side::fetch_bits(p, head, to.bits, start_m, start_n);
            // Rows that do not exist or are padding have q = dO = delta = 0: any finite lse does.
            const int row = thread_index() % kQueries;
            const int query = start_m + row;
            const bool mask = query >= head.first_query && query < p.Tq;
            if (thread_index() < kQueries) {
                copy_async_word(to.lse, row, p.lse, head.first_row + query, mask);
            } else if (thread_index() < 2 * kQueries && p.dk) {
                copy_async_word(to.delta, row, p.delta, head.first_row + query, mask);
            }
        };

        fetch_rows<kThreads>(k, p.k, head, start_n, p.Tk, head.first_key, p.D);
        fetch_rows<kThreads>(v, p.v, head, start_n, p.Tk, head.first_key, p.D);
        if (start < p.Tq) fetch(start);
        copy_async_commit();
        FragmentC dk[kD / 8] = {}, dv[kD / 8] = {};
        for (int start_m = start; start_m < p.Tq; start_m += kQueries) {
            copy_async_wait<0>();
            barrier();  // the tile is there for all, and all are done with the one before
            if (start_m + kQueries < p.Tq) fetch(start_m + kQueries);
            copy_async_commit();
            const Stage from = stage(start_m);
#pragma unroll 1
            for (int chunk = 0; chunk < kQueries; chunk += kChunk) {
                const int query = start_m + chunk;
                if (query + kChunk - 1 + head.past < start_n + warp_index() * 16) continue;
                FragmentC s[kChunk / 8] = {}, x[kChunk / 8] = {};
                Side::multiply(k, from.q, chunk, s);
                Side::probabilities(p, head, from.lse, chunk, query, start_n, s);
                if (p.dv) {
#pragma unroll
                    for (int m = 0; m < kChunk / 8; ++m) x[m] = s[m];
                    Side::drop(p, from.bits, chunk, x);
                    Side::add_product(x, from.dout, chunk, dv);
                }
                if (p.dk) {
#pragma unroll
                    for (int m = 0; m < kChunk / 8; ++m) x[m] = {};
                    Side::multiply(v, from.dout, chunk, x);
                    Side::drop(p, from.bits, chunk, x);
                    Side::gradient(p, from.delta, chunk, s, x);
                    Side::add_product(s, from.q, chunk, dk);
                }
            }
        }
        copy_async_wait<0>();
        barrier();  // with no query to see them, keys and values have not been waited for
        const int row = warp_index() * 16;
        if (p.dk) store_strip(k, row, dk, p.scale, p.scale, p.dk, head, start_n, p.Tk, p.D);
        if (p.dv) store_strip(v, row, dv, p.keep_scale, p.keep_scale, p.dv, head, start_n, p.Tk, p.D);
    }
};

}  // namespace gpt1
