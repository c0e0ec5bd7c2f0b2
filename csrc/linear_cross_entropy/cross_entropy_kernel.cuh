// Softmax, loss and gradient of rows of logits, in place.
#pragma once

#include <cmath>

#include "common/reduce.cuh"

namespace gpt1 {

/// A block owns a row and reads it once, into shared memory; a thread owns every 512th vector of 8 logits
/// in all passes. What a row has beyond kHeldColumns is read again in each of the three passes.
template <class T>
struct CrossEntropy {
    struct Params {
        Global<T> logits;  // (rows, columns); their gradient afterwards, if that is asked for
        Global<const std::int64_t> targets;  // (rows,)
        Global<const float> weight;          // (rows,), may be absent
        Global<const float> gain;            // (), may be absent
        Global<float> losses;                // (rows,), may be absent
        Global<std::int64_t> error;          // (2,)
        std::int64_t ignore_index;
        int columns, V;
        bool gradient;
        std::string shape() const { return shape_text("columns", columns, "V", V); }
    };
    static constexpr int kWidth = kVector<T>, kWarps = 16;
    static constexpr const char* kName = "cross_entropy";
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kBlocksPerProcessor = 2;  // one loads while the other computes
    static constexpr int kHeldColumns = 48 * 1024, kPartialBytes = 2 * 128;
    static constexpr int kMaxSharedBytes = kPartialBytes + kHeldColumns * sizeof(T);

    using Logits = Vector<T, kWidth>;

    __device__ static void run(const Params& p) {
        const std::int64_t row = block_index(), first = row * p.columns;
        const std::int64_t target = p.targets.load(row);
        const bool counted = target != p.ignore_index, in_range = target >= 0 && target < p.V;
        const bool used = counted && in_range;
        const int label = used ? static_cast<int>(target) : -1;
        // Read before the gradient overwrites it; the reductions in between are barriers.
        const float target_logit = used ? to_float(p.logits.load(first + target)) : -INFINITY;

        SharedArena arena;
        const Shared<float> maxima = arena.take<float>(kWarps), sums = arena.take<float>(kWarps);
        const int held_columns = p.columns < kHeldColumns ? p.columns : kHeldColumns;
        const Shared<T> held = arena.take<T>(held_columns);
        const int first_column = thread_index() * kWidth;
        for (int column = first_column; column < held_columns; column += kStep) {
            copy_async(held, column, p.logits, first + column);
        }
        copy_async_commit();
        copy_async_wait<0>();
        for (int column = first_column; column < held_columns; column += kStep) {
            if (!needs_mask(p, column, label)) continue;
            held.store_vector(column, masked(p, held.template load_vector<kWidth>(column), column, label));
        }
        const auto for_each = [&](auto visit) {
            int column = first_column;
#pragma unroll 2
            for (; column < held_columns; column += kStep) {
                visit(column, held.template load_vector<kWidth>(column));
            }
            for (; column < p.columns; column += kStep) {
                const Logits x = p.logits.template load_vector<kWidth>(first + column);
                visit(column, masked(p, x, column, label));
            }
        };

        float largest = -INFINITY;
        for_each([&](int, const Logits& logits) {
            const auto x = widen(logits);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) largest = fmaxf(largest, x[i]);
        });
        maxima.store(warp_index(), warp_max(largest), lane_index() == 0);
        barrier();
        largest = fmaxf(warp_max<kWarps>(maxima.load(lane_index() % kWarps)), target_logit);

        // Without the target: where it has almost all probability, 1 − p loses the others' digits.
        float others = 0.0f;
        for_each([&](int, const Logits& logits) {
            const auto x = widen(logits);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) others += exponential(x[i] - largest);
        });
        sums.store(warp_index(), warp_sum(others), lane_index() == 0);
        barrier();
        others = warp_sum<kWarps>(sums.load(lane_index() % kWarps));
        const float behind = target_logit - largest, total = others + exponential(behind);

        float weight = p.weight ? p.weight.load(row) : 1.0f;
        if (thread_index() == 0 && p.losses) {
            const float loss = behind == 0.0f ? log1pf(others) : logf(total) - behind;
            p.losses.store(row, used ? loss * weight : counted ? NAN : 0.0f);
            if (counted && !in_range && compare_exchange(p.error, 0, 0, 1) == 0) p.error.store(1, target);
        }
        if (!p.gradient) return;

        if (p.gain) weight *= p.gain.load(0);
        const float scale = (used ? weight : 0.0f) / total;
        for_each([&](int column, const Logits& logits) {
            auto x = widen(logits);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) x[i] = scale * exponential(x[i] - largest);
            p.logits.store_vector(first + column, narrow<T>(x));
        });
        // By the thread that has just stored the vector around it, so after that store.
        const bool mine = used && label / kWidth % kThreads == thread_index();
        p.logits.store(first + (used ? label : 0), from_float<T>(-scale * others), mine);
    }

private:
    static constexpr int kStep = kThreads * kWidth;

    /// exp(x) of x ≤ 0. The difference of two logits, which loses no digit, is scaled to base 2, not each.
    __device__ __forceinline__ static float exponential(float x) {
        constexpr float kLog2E = 1.4426950408889634f;
        return fast_exp2(x * kLog2E);
    }

    __device__ __forceinline__ static bool needs_mask(const Params& p, int column, int label) {
        return label / kWidth == column / kWidth || column + kWidth > p.V;
    }

    /// −∞ for the target and beyond the vocabulary.
    __device__ __forceinline__ static Logits masked(const Params& p, Logits x, int column, int label) {
        if (needs_mask(p, column, label)) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                if (column + i == label || column + i >= p.V) x[i] = from_float<T>(-INFINITY);
            }
        }
        return x;
    }
};

/// y = scale · x; a thread owns kVectors vectors, as wide as the wider type allows.
template <class Out, class In>
struct ScaleGradient {
    struct Params {
        Global<const In> x;         // (count,)
        Global<const float> scale;  // ()
        Global<Out> y;              // (count,)
        std::int64_t count;
        std::string shape() const { return shape_text("count", count); }
    };
    static constexpr int kWidth = kVector<In> < kVector<Out> ? kVector<In> : kVector<Out>, kVectors = 4;
    static constexpr const char* kName = "scale_gradient";
    static constexpr int kThreads = 256, kBlock = kThreads * kWidth * kVectors;
    static constexpr int kBlocksPerProcessor = 4;
    static constexpr int kMaxSharedBytes = 0;

    __device__ static void run(const Params& p) {
        const float scale = p.scale.load(0);
        const std::int64_t first = block_index() * kBlock + thread_index() * kWidth;
        const auto at = [&](int i) { return first + i * kThreads * kWidth; };
        Vector<float, kWidth> x[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            x[i] = widen(p.x.template load_vector<kWidth>(at(i), at(i) + kWidth <= p.count));
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) x[i][j] *= scale;
            p.y.store_vector(at(i), narrow<Out>(x[i]), at(i) + kWidth <= p.count);
        }
        const std::int64_t rest = p.count / kWidth * kWidth + block_index() * kThreads + thread_index();
        if (rest < p.count) p.y.store(rest, from_float<Out>(to_float(p.x.load(rest)) * scale));
    }
};

}  // namespace gpt1
