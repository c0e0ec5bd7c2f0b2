// Backward of causal attention with respect to the queries.
#pragma once

#include "attention/attention_common.cuh"
#include "common/reduce.cuh"

namespace gpt1 {

/// A block owns a head's tile of queries, and walks over the keys that they see; a warp owns 16 of the
/// queries. It stores delta, which the kernel over keys reads, and dQ.
template <class T, int kD>
struct AttentionBackwardDq {
    struct Params : AttentionProblem {
        Heads<const T> dout, q;    // (B, Tq, H, D)
        Heads<const T> k, v;       // (B, Tk, H, D)
        Heads<const T> o;          // (B, Tq, H, D)
        Global<const float> lse;   // (B, H, Tq)
        Global<float> delta;       // (B, H, Tq)
        Heads<T> dq;               // (B, Tq, H, D), or absent
    };
    static constexpr const char* kName = "causal_attention_bwd_dq";
    static constexpr int kWarps = kD <= 64 ? 8 : 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kBlocksPerProcessor = kD <= 64 ? 1 : 2;  // 8 warps, which may have all registers
    static constexpr int kQueries = kWarps * 16;
    static constexpr int kKeys = kD <= 64 ? 64 : 32;
    static constexpr int kChunk = kD <= 64 ? 32 : 16;
    static constexpr int kStages = 2;

    using QTile = Tile<T, kQueries, kD>;
    using KTile = Tile<T, kKeys, kD>;
    using Bits = KeepBits<kQueries, kThreads>;
    static constexpr int kMaxSharedBytes =
        2 * (QTile::kSize + kStages * KTile::kSize) * static_cast<int>(sizeof(T)) + Bits::kSize * 4 +
        kQueries * 4;

    __device__ static void run(const Params& p) {
        const std::int64_t tiles = (p.Tq + kQueries - 1) / kQueries;
        const AttentionHead head(p, block_index() / tiles);
        const int start_m = static_cast<int>(tiles - 1 - block_index() % tiles) * kQueries;  // longest first
        const int start = head.first_key / kKeys * kKeys;
        const int end = min(start_m + kQueries + head.past, p.Tk);

        SharedArena arena;
        const QTile q{arena.take<T>(QTile::kSize)}, dout{arena.take<T>(QTile::kSize)};
        const Shared<T> k_stages = arena.take<T>(kStages * KTile::kSize);
        const Shared<T> v_stages = arena.take<T>(kStages * KTile::kSize);
        const Bits bits{arena.take<std::uint32_t>(Bits::kSize)};
        const Shared<float> row_sums = arena.take<float>(kQueries);
        const auto stage = [](const Shared<T>& stages, int start_n) {
            return KTile{stages.slice(start_n / kKeys % kStages * KTile::kSize, KTile::kSize)};
        };
        const auto fetch = [&](int start_n) {
            fetch_rows<kThreads>(stage(k_stages, start_n), p.k, head, start_n, p.Tk, head.first_key, p.D);
            fetch_rows<kThreads>(stage(v_stages, start_n), p.v, head, start_n, p.Tk, head.first_key, p.D);
            bits.fetch(p, head, start_m, start_n, start_n == start);
        };

        fetch_rows<kThreads>(q, p.q, head, start_m, p.Tq, head.first_query, p.D);
        fetch_rows<kThreads>(dout, p.dout, head, start_m, p.Tq, head.first_query, p.D);
        copy_async_commit();
        if (start < end) fetch(start);
        copy_async_commit();
        Vector<T, 8> o[kVectors];
        load_o(p, head, start_m, o);
        copy_async_wait<1>();
        barrier();  // q and dO are there for all
        add_up_rows(dout, row_sums, o);

        const int row = warp_index() * 16 + fragment_row();
        float lse[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = start_m + row + half * 8;
            // Rows that do not exist or are padding have q = dO = delta = 0: any finite lse does.
            const bool mask = query >= head.first_query && query < p.Tq;
            lse[half] = p.lse.load(head.first_row + query, mask) * kLog2E;
            delta[half] = row_sums.load(row + half * 8);
        }

        // In a row that sees next to nothing the rounding of O would be most of dS: there delta is the mean
        // of dP under P, exact where there is but one key, and the keys are walked over once more.
        const bool few_keys = end - head.first_key <= kQueries;
        float sum[2] = {}, total[2] = {};
        FragmentC dq[kD / 8] = {};
#pragma unroll 1
        for (int pass = few_keys ? 0 : 1; pass < (p.dq ? 2 : 1); ++pass) {
            for (int start_n = start; start_n < end; start_n += kKeys) {
                copy_async_wait<0>();
                barrier();  // the tile is there for all, and all are done with the one before
                if (start_n + kKeys < end) fetch(start_n + kKeys);
                copy_async_commit();
                const KTile k = stage(k_stages, start_n), v = stage(v_stages, start_n);
#pragma unroll 1
                for (int chunk = 0; chunk < kKeys; chunk += kChunk) {
                    const int key = start_n + chunk;
                    if (key > start_m + warp_index() * 16 + 15 + head.past) continue;
                    FragmentC ds[kChunk / 8] = {}, dp[kChunk / 8] = {};
                    multiply(q, k, chunk, ds);
                    multiply(dout, v, chunk, dp);
                    probabilities(p, head, bits, start_m, key, lse, ds, dp);
#pragma unroll
                    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float prob = ds[n].values[i];
                            ds[n].values[i] *= dp[n].values[i] - delta[i / 2];
                            if (pass == 0) sum[i / 2] += ds[n].values[i], total[i / 2] += prob;
                        }
                    }
                    if (pass == 0) continue;
#pragma unroll
                    for (int n = 0; n < kChunk / 16; ++n) {
                        const FragmentA left = as_left<T>(ds[2 * n], ds[2 * n + 1]);
#pragma unroll
                        for (int d = 0; d < kD; d += 16) {
                            const FragmentPairB right = k.b(chunk + n * 16, d);
                            mma<T>(dq[d / 8], left, right.left);
                            mma<T>(dq[d / 8 + 1], left, right.right);
                        }
                    }
                }
            }
            if (pass == 0) {
                barrier();  // all are done with the last tile
                if (start < end) fetch(start);
                copy_async_commit();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    sum[half] = quad_sum(sum[half]);
                    total[half] = quad_sum(total[half]);
                    if (total[half] > 0.0f) delta[half] += sum[half] / total[half];
                }
            }
        }
        copy_async_wait<0>();  // with few keys and no dQ to compute, nobody has waited
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = start_m + row + half * 8;
            p.delta.store(head.first_row + query, delta[half], lane_index() % 4 == 0 && query < p.Tq);
        }
        if (p.dq) {  // by way of q's rows, of which none is another warp's
            store_strip(q, warp_index() * 16, dq, p.scale, p.scale, p.dq, head, start_m, p.Tq, p.D);
        }
    }

private:
    /// How lanes share the vectors of a warp's 16 rows; of 96 columns some have none.
    static constexpr int kLanesOfRow = kD <= 32 ? 4 : kD <= 64 ? 8 : 16;
    static constexpr int kVectors = 16 * kLanesOfRow / 32;
    __device__ __forceinline__ static int vector_row(int i) {
        return warp_index() * 16 + i * (32 / kLanesOfRow) + lane_index() / kLanesOfRow;
    }
    __device__ __forceinline__ static int vector_column() { return lane_index() % kLanesOfRow * 8; }

    __device__ __forceinline__ static void load_o(const Params& p, const AttentionHead& head, int start_m,
                                                  Vector<T, 8> (&o)[kVectors]) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int query = start_m + vector_row(i);
            o[i] = p.o.x.template load_vector<8>(
                head.offset(p.o) + query * p.o.stride_t + vector_column(),
                vector_column() < p.D && query >= head.first_query && query < p.Tq);
        }
    }

    /// The sums of dO ∘ O over the rows of the warp.
    __device__ __forceinline__ static void add_up_rows(const QTile& dout, const Shared<float>& row_sums,
                                                       const Vector<T, 8> (&o)[kVectors]) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const bool mask = vector_column() < kD;
            const Vector<float, 8> left = widen<T>(o[i]);
            const Vector<float, 8> right = widen<T>(dout.memory.template load_vector<8>(
                mask ? dout.offset(vector_row(i), vector_column()) : 0, mask));
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += left[j] * right[j];
            row_sums.store(vector_row(i), warp_sum<kLanesOfRow>(sum), vector_column() == 0);
        }
        warp_barrier();
    }

    /// s (16, kChunk) += x yᵀ, of the warp's rows of x and those from `chunk` on of y.
    __device__ __forceinline__ static void multiply(const QTile& x, const KTile& y, int chunk,
                                                    FragmentC (&s)[kChunk / 8]) {
#pragma unroll
        for (int d = 0; d < kD; d += 16) {
            const FragmentA left = x.a(warp_index() * 16, d);
#pragma unroll
            for (int n = 0; n < kChunk / 16; ++n) {
                const FragmentPairB right = y.b_transposed(d, chunk + n * 16);
                mma<T>(s[2 * n], left, right.left);
                mma<T>(s[2 * n + 1], left, right.right);
            }
        }
    }

    /// Turns scores into P, and dO Vᵀ into dP.
    __device__ __forceinline__ static void probabilities(const Params& p, const AttentionHead& head,
                                                         const Bits& bits, int start_m, int key,
                                                         const float (&lse)[2], FragmentC (&s)[kChunk / 8],
                                                         FragmentC (&dp)[kChunk / 8]) {
        const float log2_scale = p.scale * kLog2E;
        const int first_position = start_m + warp_index() * 16 + head.past;
        const bool masked = key + kChunk - 1 > first_position || key < head.first_key;
        std::uint32_t words[2] = {~0u, ~0u};
        if (p.keep_bits) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                words[half] = bits.bits(warp_index() * 16 + fragment_row() + half * 8, key);
            }
        }
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n].values[i] = fast_exp2(s[n].values[i] * log2_scale - lse[i / 2]);
                const bool keep = words[i / 2] >> (n * 8 + i % 2) & 1;
                dp[n].values[i] = keep ? dp[n].values[i] * p.keep_scale : 0.0f;
            }
        }
        if (!masked) return;
#pragma unroll
        for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int position = first_position + fragment_row() + i / 2 * 8;
                const int this_key = key + n * 8 + fragment_column() + i % 2;
                if (this_key > position || this_key < head.first_key) s[n].values[i] = 0.0f;
            }
        }
    }
};

}  // namespace gpt1
