// Backward of causal attention in one kernel, for heads whose dQ fits on the chip.
#pragma once

#include "attention/attention_dkdv_kernel.cuh"
#include "common/reduce.cuh"

namespace gpt1 {

/// A block owns a head with up to 512 queries. It walks over tiles of keys and, for each, over the tiles
/// of queries that see them: five products for each pair of tiles, where two kernels need seven. dQ is
/// summed in shared memory, where one thread owns each of its elements.
template <class T>
struct AttentionBackward {
    struct Params : AttentionProblem {
        Heads<const T> dout, q, k, v, o;  // (B, Tq, H, D), (B, Tk, H, D) of k and v
        Global<const float> lse;          // (B, H, Tq)
        Heads<T> dq, dk, dv;
    };
    static constexpr const char* kName = "causal_attention_bwd";
    static constexpr int kD = 64;
    static constexpr int kWarps = 8;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kBlocksPerProcessor = 1;  // its shared memory is nearly all of a large chip's
    static constexpr int kKeys = kWarps * 16;
    static constexpr int kQueries = 64;
    static constexpr int kMostQueries = 512;
    static constexpr int kStages = 2;

    using Side = AttentionKeySide<T, kD, kKeys, kQueries, kThreads>;
    using KTile = typename Side::KTile;
    using QTile = typename Side::QTile;
    using DsTile = Tile<T, kKeys, kQueries>;
    static constexpr int kMaxSharedBytes =
        (2 * (KTile::kSize + kStages * QTile::kSize) + DsTile::kSize) * static_cast<int>(sizeof(T)) +
        (kStages * Side::kBits + 2 * kMostQueries + 2 * kWarps * kQueries + kMostQueries * kD) * 4;

    /// A warp's part of a tile of dQ, (16, 32).
    static constexpr int kPart = 4;
    using DqPart = FragmentC[kPart];

    struct Stage {
        QTile q, dout;
        Shared<std::uint32_t> bits;
    };

    __device__ static void run(const Params& p) {
        const AttentionHead head(p, block_index());

        SharedArena arena;
        const KTile k{arena.take<T>(KTile::kSize)}, v{arena.take<T>(KTile::kSize)};
        const Shared<T> tiles_of_stages = arena.take<T>(kStages * 2 * QTile::kSize);
        const DsTile ds{arena.take<T>(DsTile::kSize)};  // transposed: a row is a key
        const Shared<std::uint32_t> bits_of_stages = arena.take<std::uint32_t>(kStages * Side::kBits);
        const Shared<float> lse = arena.take<float>(kMostQueries), delta = arena.take<float>(kMostQueries);
        const Shared<float> sums = arena.take<float>(2 * kWarps * kQueries);
        const Shared<float> dq = arena.take<float>(kMostQueries * kD);
        const auto stage = [&](int start_m) {
            const int i = start_m / kQueries % kStages;
            return Stage{{tiles_of_stages.slice(2 * i * QTile::kSize, QTile::kSize)},
                         {tiles_of_stages.slice((2 * i + 1) * QTile::kSize, QTile::kSize)},
                         bits_of_stages.slice(i * Side::kBits, Side::kBits)};
        };

        // Rows that do not exist or are padding have q = dO = delta = 0: any finite lse does.
        for (int row = thread_index(); row < kMostQueries; row += kThreads) {
            copy_async_word(lse, row, p.lse, head.first_row + row, row >= head.first_query && row < p.Tq);
        }
        const int first_tile = head.first_key / kKeys * kKeys;
        Vector<T, 8> o[2];  // of the tile of queries to come, while delta is not known
        for (int start_n = 0; start_n < p.Tk; start_n += kKeys) {
            // Nothing sees padding.
            const int start = start_n < first_tile
                                  ? p.Tq
                                  : max(head.first_query, start_n - head.past) / kQueries * kQueries;
            const auto fetch = [&](int start_m) {
                const Stage to = stage(start_m);
                fetch_rows<kThreads>(to.q, p.q, head, start_m, p.Tq, head.first_query, p.D);
                fetch_rows<kThreads>(to.dout, p.dout, head, start_m, p.Tq, head.first_query, p.D);
                Side::fetch_bits(p, head, to.bits, start_m, start_n);
                if (start_n == first_tile) load_o(p, head, start_m, o);
            };
            fetch_rows<kThreads>(k, p.k, head, start_n, p.Tk, head.first_key, p.D);
            fetch_rows<kThreads>(v, p.v, head, start_n, p.Tk, head.first_key, p.D);
            if (start < p.Tq) fetch(start);
            copy_async_commit();
            FragmentC dk[kD / 8] = {}, dv[kD / 8] = {};
            for (int start_m = start; start_m < p.Tq; start_m += kQueries) {
                copy_async_wait<0>();
                barrier();  // the tile is there for all, and all are done with the one before
                const Stage from = stage(start_m);
                if (start_n == first_tile) add_up_rows(from.dout, delta, start_m, o);
                if (start_m + kQueries < p.Tq) fetch(start_m + kQueries);
                copy_async_commit();

                const int last_position = start_m + kQueries - 1 + head.past;
                const int warp_key = start_n + warp_index() * 16;
                const bool seen = warp_key <= last_position && warp_key + 15 >= head.first_key;
                FragmentC s[kQueries / 8] = {}, x[kQueries / 8] = {};
                if (seen) {
                    Side::multiply(k, from.q, 0, s);
                    Side::probabilities(p, head, lse, start_m, start_m, start_n, s);
#pragma unroll
                    for (int m = 0; m < kQueries / 8; ++m) x[m] = s[m];
                    Side::drop(p, from.bits, 0, x);
                    Side::add_product(x, from.dout, 0, dv);
#pragma unroll
                    for (int m = 0; m < kQueries / 8; ++m) x[m] = {};
                    Side::multiply(v, from.dout, 0, x);
                    Side::drop(p, from.bits, 0, x);
                }
                if (start_n == first_tile) {
                    settle_few_keys(p, head, sums, delta, start_m, start_n + kKeys, s, x);
                }
                if (seen) {
                    Side::gradient(p, delta, start_m, s, x);
                    Side::add_product(s, from.q, 0, dk);
                    put_transposed(s, ds);
                }
                barrier();  // dS is there for all
                add_to_dq(head, ds, k, dq, start_m, start_n, start_n == first_tile);
            }
            copy_async_wait<0>();
            barrier();  // all are done with k; with no query to see them, k and v have not been waited for
            const int row = warp_index() * 16;
            store_strip(k, row, dk, p.scale, p.scale, p.dk, head, start_n, p.Tk, p.D);
            store_strip(v, row, dv, p.keep_scale, p.keep_scale, p.dv, head, start_n, p.Tk, p.D);
            barrier();  // before k and v are overwritten
        }
        store_dq(p, head, dq, tiles_of_stages);
    }

private:
    /// The row and column of a thread's i-th vector of a (kQueries, kD) tile.
    __device__ __forceinline__ static int vector_row(int i) { return (i * kThreads + thread_index()) / 8; }
    __device__ __forceinline__ static int vector_column() { return thread_index() % 8 * 8; }

    __device__ __forceinline__ static void load_o(const Params& p, const AttentionHead& head, int start_m,
                                                  Vector<T, 8> (&o)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int query = start_m + vector_row(i);
            o[i] = p.o.x.template load_vector<8>(
                head.offset(p.o) + query * p.o.stride_t + vector_column(),
                query >= head.first_query && query < p.Tq && vector_column() < p.D);
        }
    }

    /// delta of a tile of queries: the sums of dO ∘ O over its rows.
    __device__ __forceinline__ static void add_up_rows(const QTile& dout, const Shared<float>& delta,
                                                       int start_m, const Vector<T, 8> (&o)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Vector<float, 8> left = widen<T>(o[i]);
            const Vector<float, 8> right =
                widen<T>(dout.memory.template load_vector<8>(dout.offset(vector_row(i), vector_column())));
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += left[j] * right[j];
            delta.store(start_m + vector_row(i), warp_sum<8>(sum), vector_column() == 0);
        }
    }

    /// In a row that sees next to nothing the rounding of O would be most of dS. Where all its keys lie
    /// before `end`, and so here, delta is the mean of dP under P, exact where there is but one key.
    __device__ __forceinline__ static void settle_few_keys(
        const Params& p, const AttentionHead& head, const Shared<float>& sums, const Shared<float>& delta,
        int start_m, int end, const FragmentC (&prob)[8], const FragmentC (&dp)[8]) {
        if (start_m + head.past < end) {
#pragma unroll
            for (int m = 0; m < kQueries / 8; ++m) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float p0 = prob[m].values[i], p8 = prob[m].values[i + 2];
                    float total = p0 + p8;
                    float sum = p0 * dp[m].values[i] + p8 * dp[m].values[i + 2];
#pragma unroll
                    for (int mask = 4; mask < 32; mask *= 2) {
                        total += shuffle_xor(total, mask);
                        sum += shuffle_xor(sum, mask);
                    }
                    const int place = warp_index() * kQueries + m * 8 + fragment_column() + i;
                    sums.store(place, total, lane_index() < 4);
                    sums.store(kWarps * kQueries + place, sum, lane_index() < 4);
                }
            }
            barrier();  // the sums of all warps are there
            const int query = start_m + thread_index();
            if (thread_index() < kQueries && query + head.past < end) {
                float total = 0.0f, sum = 0.0f;
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp) {
                    total += sums.load(warp * kQueries + thread_index());
                    sum += sums.load((kWarps + warp) * kQueries + thread_index());
                }
                delta.store(query, total == 0.0f ? 0.0f : sum * p.keep_scale / total);
            }
        }
        barrier();  // delta is there for all
    }

    __device__ __forceinline__ static void put_transposed(const FragmentC (&x)[kQueries / 8],
                                                          const DsTile& ds) {
        const int row = warp_index() * 16 + fragment_row();
#pragma unroll
        for (int m = 0; m < kQueries / 8; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                ds.memory.store_vector(
                    ds.offset(row + half * 8, m * 8) + fragment_column(),
                    narrow<T>(Vector<float, 2>{x[m].values[2 * half], x[m].values[2 * half + 1]}));
            }
        }
    }

    /// Where a thread keeps its fragment of a tile of dQ, which no other thread touches.
    __device__ __forceinline__ static int place_of_dq(int start_m, int fragment) {
        return ((start_m / kQueries * kPart + fragment) * kThreads + thread_index()) * 4;
    }

    __device__ __forceinline__ static void load_dq(const Shared<float>& dq, int start_m, DqPart& part) {
#pragma unroll
        for (int d = 0; d < kPart; ++d) {
            const auto values = dq.template load_vector<4>(place_of_dq(start_m, d));
#pragma unroll
            for (int i = 0; i < 4; ++i) part[d].values[i] = values[i];
        }
    }

    /// dQ += dS K: warps w and w + 4 share 16 queries, each with half of the columns.
    __device__ __forceinline__ static void add_to_dq(const AttentionHead& head, const DsTile& ds,
                                                     const KTile& k, const Shared<float>& dq, int start_m,
                                                     int start_n, bool first_tile) {
        const int strip = warp_index() % 4 * 16, column = warp_index() / 4 * 32;
        // Other keys are not seen, and not all of dS is written.
        const int first = max(0, head.first_key - start_n) / 16 * 16;
        const int last = min(kKeys - 1, max(0, start_m + strip + 15 + head.past - start_n));
        DqPart part = {};
        if (!first_tile) load_dq(dq, start_m, part);
        for (int key = first; key <= last; key += 16) {
            const FragmentA left = ds.a_transposed(strip, key);
#pragma unroll
            for (int d = 0; d < kPart / 2; ++d) {
                const FragmentPairB right = k.b(key, column + d * 16);
                mma<T>(part[2 * d], left, right.left);
                mma<T>(part[2 * d + 1], left, right.right);
            }
        }
#pragma unroll
        for (int d = 0; d < kPart; ++d) {
            Vector<float, 4> values;
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] = part[d].values[i];
            dq.store_vector(place_of_dq(start_m, d), values);
        }
    }

    /// A warp stores its parts by way of shared memory that no other warp uses.
    __device__ __forceinline__ static void store_dq(const Params& p, const AttentionHead& head,
                                                    const Shared<float>& dq, const Shared<T>& memory) {
        const int strip = warp_index() % 4 * 16, first_column = warp_index() / 4 * 32;
        const Tile<T, 16, 32> tile{memory.slice(warp_index() * 16 * 32, 16 * 32)};
        for (int start_m = 0; start_m < p.Tq; start_m += kQueries) {
            DqPart part = {};
            // Nothing was summed where all keys or all queries are padding.
            if (head.first_key < p.Tk && start_m + kQueries > head.first_query) load_dq(dq, start_m, part);
            warp_barrier();  // lanes may have read the tile
#pragma unroll
            for (int d = 0; d < kPart; ++d) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    tile.memory.store_vector(
                        tile.offset(fragment_row() + half * 8, d * 8) + fragment_column(),
                        narrow<T>(Vector<float, 2>{part[d].values[2 * half] * p.scale,
                                                   part[d].values[2 * half + 1] * p.scale}));
                }
            }
            warp_barrier();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = i * 8 + lane_index() / 4, column = lane_index() % 4 * 8;
                const int query = start_m + strip + row;
                p.dq.x.store_vector(head.offset(p.dq) + query * p.dq.stride_t + first_column + column,
                                    tile.memory.template load_vector<8>(tile.offset(row, column)),
                                    query < p.Tq && first_column + column < p.D);
            }
        }
    }
};

}  // namespace gpt1
