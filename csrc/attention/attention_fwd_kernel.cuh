// Forward of causal attention: online softmax (Milakov & Gimelshein 2018) over tiles of keys, as in
// FlashAttention-2 (Dao 2023). Scores and probabilities stay in registers.
#pragma once

#include "attention/attention_common.cuh"

namespace gpt1 {

/// A block owns a head's tile of queries, and walks over the keys that they see. A warp owns one or
/// two strips of 16 queries: with two, a fragment of keys or values is loaded once for both. The second
/// strip counts from the tile's end, so that on the diagonal every warp has about the same to do.
template <class T, int kD>
struct AttentionForward {
    struct Params : AttentionProblem {
        Heads<const T> q;     // (B, Tq, H, D)
        Heads<const T> k, v;  // (B, Tk, H, D)
        Heads<T> o;           // (B, Tq, H, D)
        Global<float> lse;    // (B, H, Tq)
        float log2_scale;     // positive: of −scores if scale is negative
    };
    static constexpr const char* kName = "causal_attention_fwd";
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerProcessor = 1;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kStrips = kD <= 64 ? 2 : 1;
    static constexpr int kQueries = kWarps * kStrips * 16;
    static constexpr int kKeys = kD <= 64 ? 64 : 32;
    static constexpr int kChunk = 32;  // keys between two updates of the maximum
    static constexpr int kStages = 2;

    using QTile = Tile<T, kQueries, kD>;
    using KTile = Tile<T, kKeys, kD>;
    using Bits = KeepBits<kQueries, kThreads>;
    static constexpr int kMaxSharedBytes =
        (QTile::kSize + 2 * kStages * KTile::kSize) * static_cast<int>(sizeof(T)) + Bits::kSize * 4;

    /// What a thread holds of a strip: rows fragment_row() and + 8.
    struct Strip {
        int row;                // of the tile
        FragmentC acc[kD / 8];  // Σ keep ∘ exp(s − largest) V
        float largest[2];       // raw score
        float total[2];         // Σ exp(s − largest) of this thread's keys
    };

    __device__ static void run(const Params& p) {
        const std::int64_t tiles = (p.Tq + kQueries - 1) / kQueries;
        const AttentionHead head(p, block_index() / tiles);
        const int start_m = static_cast<int>(tiles - 1 - block_index() % tiles) * kQueries;  // longest first
        const int start = head.first_key / kKeys * kKeys;
        const int end = min(start_m + kQueries + head.past, p.Tk);

        SharedArena arena;
        const QTile q{arena.take<T>(QTile::kSize)};
        const Shared<T> k_stages = arena.take<T>(kStages * KTile::kSize);
        const Shared<T> v_stages = arena.take<T>(kStages * KTile::kSize);
        const Bits bits{arena.take<std::uint32_t>(Bits::kSize)};
        const auto stage = [](const Shared<T>& stages, int start_n) {
            return KTile{stages.slice(start_n / kKeys % kStages * KTile::kSize, KTile::kSize)};
        };
        const auto fetch = [&](int start_n) {
            fetch_rows<kThreads>(stage(k_stages, start_n), p.k, head, start_n, p.Tk, head.first_key, p.D);
            fetch_rows<kThreads>(stage(v_stages, start_n), p.v, head, start_n, p.Tk, head.first_key, p.D);
            bits.fetch(p, head, start_m, start_n, start_n == start);
        };

        Strip strips[kStrips];
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
            strips[i] = {};
            strips[i].row = (i == 0 ? warp_index() : 2 * kWarps - 1 - warp_index()) * 16;
            strips[i].largest[0] = strips[i].largest[1] = -kInfinity;
        }
        fetch_rows<kThreads>(q, p.q, head, start_m, p.Tq, head.first_query, p.D);
        if (start < end) fetch(start);
        copy_async_commit();
        for (int start_n = start; start_n < end; start_n += kKeys) {
            copy_async_wait<0>();
            barrier();  // the tile is there for all, and all are done with the one before
            if (start_n + kKeys < end) fetch(start_n + kKeys);
            copy_async_commit();
            const KTile k = stage(k_stages, start_n), v = stage(v_stages, start_n);
#pragma unroll 1
            for (int chunk = 0; chunk < kKeys; chunk += kChunk) {
                const int key = start_n + chunk;
                const auto sees = [&](const Strip& strip) {
                    return key <= start_m + strip.row + 15 + head.past;
                };
                if (sees(strips[0])) {
                    attend<0>(p, head, strips, q, k, v, bits, start_m, key, chunk);
                } else if (kStrips == 2 && sees(strips[kStrips - 1])) {
                    attend<kStrips - 1>(p, head, strips, q, k, v, bits, start_m, key, chunk);
                }
            }
        }

        copy_async_wait<0>();
        barrier();  // before q is overwritten, which with no key to see has not been waited for
#pragma unroll
        for (int i = 0; i < kStrips; ++i) finish(p, head, strips[i], q, start_m);
    }

private:
    /// The strips from kFirst on see the keys from `key` on.
    template <int kFirst>
    __device__ __forceinline__ static void attend(const Params& p, const AttentionHead& head,
                                                  Strip (&strips)[kStrips], const QTile& q, const KTile& k,
                                                  const KTile& v, const Bits& bits, int start_m, int key,
                                                  int chunk) {
        FragmentC s[kStrips][kChunk / 8] = {};
#pragma unroll
        for (int d = 0; d < kD; d += 16) {
            FragmentA left[kStrips];
#pragma unroll
            for (int i = kFirst; i < kStrips; ++i) left[i] = q.a(strips[i].row, d);
#pragma unroll
            for (int n = 0; n < kChunk / 16; ++n) {
                const FragmentPairB right = k.b_transposed(d, chunk + n * 16);
#pragma unroll
                for (int i = kFirst; i < kStrips; ++i) {
                    mma<T>(s[i][2 * n], left[i], right.left);
                    mma<T>(s[i][2 * n + 1], left[i], right.right);
                }
            }
        }
#pragma unroll
        for (int i = kFirst; i < kStrips; ++i) softmax(p, head, strips[i], s[i], bits, start_m, key);
#pragma unroll
        for (int n = 0; n < kChunk / 16; ++n) {
            FragmentA left[kStrips];
#pragma unroll
            for (int i = kFirst; i < kStrips; ++i) left[i] = as_left<T>(s[i][2 * n], s[i][2 * n + 1]);
#pragma unroll
            for (int d = 0; d < kD; d += 16) {
                const FragmentPairB right = v.b(chunk + n * 16, d);
#pragma unroll
                for (int i = kFirst; i < kStrips; ++i) {
                    mma<T>(strips[i].acc[d / 8], left[i], right.left);
                    mma<T>(strips[i].acc[d / 8 + 1], left[i], right.right);
                }
            }
        }
    }

    /// Turns scores into what multiplies V, and rescales what the strip has summed so far.
    __device__ __forceinline__ static void softmax(const Params& p, const AttentionHead& head, Strip& strip,
                                                   FragmentC (&s)[kChunk / 8], const Bits& bits, int start_m,
                                                   int key) {
        const int first_position = start_m + strip.row + head.past;
        if (p.scale < 0.0f) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[n].values[i] = -s[n].values[i];
            }
        }
        if (key + kChunk - 1 > first_position || key < head.first_key) {
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int position = first_position + fragment_row() + i / 2 * 8;
                    const int this_key = key + n * 8 + fragment_column() + i % 2;
                    if (this_key > position || this_key < head.first_key) s[n].values[i] = -kInfinity;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = strip.largest[half];
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n) {
                largest = fmaxf(largest, fmaxf(s[n].values[2 * half], s[n].values[2 * half + 1]));
            }
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            // A row that has seen no key yet must not compute −∞ − (−∞).
            const float shift = largest == -kInfinity ? 0.0f : largest * p.log2_scale;
            const float alpha = fast_exp2(strip.largest[half] * p.log2_scale - shift);
            strip.largest[half] = largest;
            strip.total[half] *= alpha;
#pragma unroll
            for (int d = 0; d < kD / 8; ++d) {
                strip.acc[d].values[2 * half] *= alpha;
                strip.acc[d].values[2 * half + 1] *= alpha;
            }
#pragma unroll
            for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    s[n].values[i] = fast_exp2(s[n].values[i] * p.log2_scale - shift);
                    strip.total[half] += s[n].values[i];
                }
            }
            if (p.keep_bits) {
                const std::uint32_t word = bits.bits(strip.row + fragment_row() + half * 8, key);
#pragma unroll
                for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (!(word >> (n * 8 + i) & 1)) s[n].values[2 * half + i] = 0.0f;
                    }
                }
            }
        }
    }

    __device__ __forceinline__ static void finish(const Params& p, const AttentionHead& head, Strip& strip,
                                                  const QTile& q, int start_m) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // A row that sees no key has acc = total = 0 and largest = −∞, so O = 0 and lse = −∞.
            float total = quad_sum(strip.total[half]);
            total = total == 0.0f ? 1.0f : total;
            factor[half] = p.keep_scale / total;
            const int query = start_m + strip.row + fragment_row() + half * 8;
            p.lse.store(head.first_row + query, strip.largest[half] * p.log2_scale * kLn2 + logf(total),
                        lane_index() % 4 == 0 && query < p.Tq);
        }
        store_strip(q, strip.row, strip.acc, factor[0], factor[1], p.o, head, start_m, p.Tq, p.D);
    }
};

}  // namespace gpt1
