// LayerNorm, alone and behind GPT-1's residual branches: rows stay in registers, fp32 throughout.
//
// The same kernels serve both ops: a plain LayerNorm is the residual site without its optional
// tensors. Blocks walk over the rows in a fixed order, so that the parameters are read once a block
// and the sums over rows are the same in every run.
#pragma once

#include "common/philox.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"

namespace gpt1 {

/// How a block's warps share rows: kRowWarps to a row, each lane with kElements of its columns, of
/// which it has 16 bytes at a time.
template <class T, int kBlockWarps, int kRowWarps, int kElements>
struct RowLayout {
    static constexpr int kThreads = 32 * kBlockWarps;
    static constexpr int kWarpsOfRow = kRowWarps, kElementsOfLane = kElements;
    static constexpr int kRows = kBlockWarps / kRowWarps;  // of a block at a time
    static constexpr int kLanes = 32 * kRowWarps;     // of a row
    static constexpr int kWidth = kVector<T>;
    static constexpr int kVectors = kElements / kWidth;
    static constexpr int kColumns = kLanes * kElements;

    using Wide = Vector<float, kWidth>;

    __device__ __forceinline__ static int row() { return warp_index() / kRowWarps; }
    __device__ __forceinline__ static int lane() { return thread_index() % kLanes; }
    __device__ __forceinline__ static int column(int i) { return (i * kLanes + lane()) * kWidth; }

    /// Where fp32 values of columns lie in shared memory: four of each lane next to each other, so
    /// that no two lanes meet in a bank; the second four of 8 lie 4 lanes on, so that neighbouring
    /// columns do not meet either.
    __device__ __forceinline__ static int place(int i, int part, int lane) {
        return ((i * (kWidth / 4) + part) * kLanes + (lane ^ part * 4)) * 4;
    }
    __device__ __forceinline__ static int place(int column) {
        const int vector = column / kWidth, rest = column % kWidth;
        return place(vector / kLanes, rest / 4, vector % kLanes) + rest % 4;
    }

    __device__ __forceinline__ static Wide load(const Shared<float>& values, int i) {
        Wide x;
#pragma unroll
        for (int part = 0; part < kWidth / 4; ++part) {
            const Vector<float, 4> four = values.load_vector<4>(place(i, part, lane()));
#pragma unroll
            for (int j = 0; j < 4; ++j) x[part * 4 + j] = four[j];
        }
        return x;
    }

    __device__ __forceinline__ static void store(const Shared<float>& values, int i, const Wide& x) {
#pragma unroll
        for (int part = 0; part < kWidth / 4; ++part) {
            Vector<float, 4> four;
#pragma unroll
            for (int j = 0; j < 4; ++j) four[j] = x[part * 4 + j];
            values.store_vector<4>(place(i, part, lane()), four);
        }
    }

    /// A parameter (C,), zeros beyond it or if it is absent.
    __device__ __forceinline__ static Shared<float> fetch(
        SharedArena& arena, const FloatArray<true>& parameter, std::int64_t C) {
        const Shared<float> values = arena.take<float>(kColumns);
        for (int column = thread_index(); column < kColumns; column += kThreads) {
            values.store(place(column), parameter.load(column, column < C && parameter));
        }
        return values;
    }
};

/// kRowWarps warps own a row; w, b and x_bias lie in shared memory.
template <class T, class Layout>
struct LayerNormFwd {
    struct Params {
        Global<const T> x;          // (N, C)
        Global<const T> residual;   // (N, C) or absent
        FloatArray<true> w, b;      // (C,)
        FloatArray<true> x_bias;    // (C,) or absent
        Global<T> y;                // (N, C)
        Global<T> total;            // (N, C) or absent
        Global<float> mean, rstd;   // (N,)
        Dropout dropout;
        std::int64_t N, stride_xn, stride_rn;
        int C;
        float eps;
        bool aligned;
        std::string shape() const { return shape_text("N", N, "C", C); }
    };
    static constexpr const char* kName = "layer_norm_fwd";
    static constexpr int kThreads = Layout::kThreads;
    static constexpr int kRegisters = Layout::kElementsOfLane <= 8 ? 64 : sizeof(T) == 2 ? 80 : 128;
    static constexpr int kBlocksPerProcessor = 65536 / kRegisters / kThreads;
    static constexpr int kMaxSharedBytes = (3 * Layout::kColumns + 32) * 4;

    __device__ static void run(const Params& p) {
        constexpr int kVectors = Layout::kVectors, kWidth = Layout::kWidth;
        SharedArena arena;
        const Shared<float> w = Layout::fetch(arena, p.w, p.C);
        const Shared<float> b = Layout::fetch(arena, p.b, p.C);
        const Shared<float> x_bias = Layout::fetch(arena, p.x_bias, p.C);
        RowSum<Layout::kWarpsOfRow> row_sum(arena);
        barrier();

        for (std::int64_t row = block_index() * Layout::kRows + Layout::row(); row < p.N;
             row += grid_size() * Layout::kRows) {
            // Made anew for each row: else the keys of seven rounds would stay in registers.
            const DropoutStream stream(p.dropout.seed);
            Vector<T, kWidth> x[kVectors], residual[kVectors];
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int column = Layout::column(i);
                x[i] = load_columns<kWidth>(p.x, row * p.stride_xn + column, p.C - column, p.aligned);
            }
            if (p.residual) {
#pragma unroll
                for (int i = 0; i < kVectors; ++i) {
                    const int column = Layout::column(i);
                    residual[i] = load_columns<kWidth>(
                        p.residual, row * p.stride_rn + column, p.C - column, p.aligned);
                }
            }

            // Beyond C all is 0, and stays so.
            Vector<float, kWidth> total[kVectors];
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int column = Layout::column(i), count = p.C - column;
                total[i] = widen(x[i]);
                if (p.x_bias) add(total[i], Layout::load(x_bias, i));
                if (p.dropout.seed) {
                    const Vector<bool, kWidth> keep =
                        stream.keep<kWidth>(column, p.dropout.row_offset + row, p.dropout.threshold);
                    apply_dropout(total[i], keep, p.dropout.scale);
                }
                if (p.residual) {
                    add(total[i], widen(residual[i]));
                    // Backward sees the rounded sum, so the statistics are those of the rounded sum.
                    const Vector<T, kWidth> rounded = narrow<T>(total[i]);
                    total[i] = widen(rounded);
                    if (p.total) store_columns(p.total, row * p.C + column, rounded, count, p.aligned);
                }
#pragma unroll
                for (int j = 0; j < kWidth; ++j) sum += total[i][j];
            }
            float mean = row_sum(sum) / p.C;
            sum = subtract(p, total, mean);
            if constexpr (std::is_same_v<T, float>) {  // the sum's rounding may exceed the deviations
                const float left = row_sum(sum) / p.C;
                subtract(p, total, left);
                mean += left;
            }
            sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
#pragma unroll
                for (int j = 0; j < kWidth; ++j) sum += total[i][j] * total[i][j];
            }
            const float rstd = 1.0f / sqrtf(row_sum(sum) / p.C + p.eps);

#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int column = Layout::column(i);
                const Vector<float, kWidth> gain = Layout::load(w, i), bias = Layout::load(b, i);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) total[i][j] = total[i][j] * rstd * gain[j] + bias[j];
                store_columns(p.y, row * p.C + column, narrow<T>(total[i]), p.C - column, p.aligned);
            }
            p.mean.store(row, mean, Layout::lane() == 0);
            p.rstd.store(row, rstd, Layout::lane() == 0);
        }
    }

private:
    /// Subtracts a number from a row and returns the sum of what is left.
    __device__ __forceinline__ static float subtract(
        const Params& p, Vector<float, Layout::kWidth>* x, float number) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Layout::kVectors; ++i) {
            const int count = p.C - Layout::column(i);
#pragma unroll
            for (int j = 0; j < Layout::kWidth; ++j) {
                x[i][j] = j < count ? x[i][j] - number : 0.0f;
                sum += x[i][j];
            }
        }
        return sum;
    }
};

/// kRowWarps warps own a row; a thread sums its columns of dw, db and dx_bias over its rows in
/// registers, and the block adds the sums of its warps at the end.
template <class T, class Layout>
struct LayerNormBwd {
    struct Params {
        Global<const T> dy;         // (N, C)
        Global<const T> dy_residual;  // (N, C), added to it, or absent
        Global<const T> total;      // (N, C)
        FloatArray<true> w;         // (C,)
        Global<const float> mean, rstd;  // (N,)
        Global<T> dtotal;           // (N, C) or absent
        Global<T> dx;               // (N, C) or absent
        Global<float> partials;     // (sums, grid, stride_p)
        int dw, db, dx_bias;        // which of the sums, -1 if not wanted
        Dropout dropout;
        std::int64_t N, stride_tn, stride_p;
        int C;
        bool aligned;
        std::string shape() const { return shape_text("N", N, "C", C); }
    };
    static constexpr const char* kName = "layer_norm_bwd";
    static constexpr int kThreads = Layout::kThreads;
    static constexpr int kRegisters = Layout::kElementsOfLane == 24 ? (std::is_same_v<T, bf16> ? 168 : 255)
                                      : Layout::kElementsOfLane == 16 ? 128 : 80;
    static constexpr int kBlocksPerProcessor = 65536 / kRegisters / kThreads;
    static constexpr int kMaxSharedBytes =
        (Layout::kColumns + Layout::kRows * Layout::kColumns + 32) * 4;

    __device__ static void run(const Params& p) {
        constexpr int kVectors = Layout::kVectors, kWidth = Layout::kWidth;
        SharedArena arena;
        const Shared<float> w = Layout::fetch(arena, p.w, p.C);
        RowSum<Layout::kWarpsOfRow> row_sum(arena);
        barrier();

        Vector<float, kWidth> dw[kVectors]{}, db[kVectors]{}, dx_bias[kVectors]{};
        for (std::int64_t row = block_index() * Layout::kRows + Layout::row(); row < p.N;
             row += grid_size() * Layout::kRows) {
            // As they came, which takes half the registers; widened where they are used.
            Vector<T, kWidth> dy[kVectors], total[kVectors];
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int column = Layout::column(i), count = p.C - column;
                dy[i] = load_columns<kWidth>(p.dy, row * p.C + column, count, p.aligned);
                total[i] = load_columns<kWidth>(p.total, row * p.stride_tn + column, count, p.aligned);
            }
            if (p.dy_residual) {
                Vector<T, kWidth> dy_residual[kVectors];
#pragma unroll
                for (int i = 0; i < kVectors; ++i) {
                    const int column = Layout::column(i);
                    dy_residual[i] = load_columns<kWidth>(
                        p.dy_residual, row * p.C + column, p.C - column, p.aligned);
                }
#pragma unroll
                for (int i = 0; i < kVectors; ++i) {
                    Vector<float, kWidth> both = widen(dy[i]);
                    add(both, widen(dy_residual[i]));
                    dy[i] = narrow<T>(both);  // as autograd would add them
                }
            }
            const float mean = p.mean.load(row), rstd = p.rstd.load(row);

            // Beyond C dy is 0, and so is all that is added.
            float sum_g = 0.0f, sum_g_x_hat = 0.0f;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const Vector<float, kWidth> dy_i = widen(dy[i]), total_i = widen(total[i]);
                const Vector<float, kWidth> gain = Layout::load(w, i);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const float x_hat = (total_i[j] - mean) * rstd, g = dy_i[j] * gain[j];
                    dw[i][j] += dy_i[j] * x_hat;
                    db[i][j] += dy_i[j];
                    sum_g += g;
                    sum_g_x_hat += g * x_hat;
                }
            }
            if (!p.dtotal && !p.dx && p.dx_bias < 0) continue;
            const float mean_g = row_sum(sum_g) / p.C, mean_g_x_hat = row_sum(sum_g_x_hat) / p.C;

            const DropoutStream stream(p.dropout.seed);  // for each row, as in forward
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int column = Layout::column(i), count = p.C - column;
                const std::int64_t offset = row * p.C + column;
                const Vector<float, kWidth> dy_i = widen(dy[i]), total_i = widen(total[i]);
                const Vector<float, kWidth> gain = Layout::load(w, i);
                Vector<float, kWidth> dtotal;
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const float x_hat = (total_i[j] - mean) * rstd, g = dy_i[j] * gain[j];
                    dtotal[j] = rstd * (g - mean_g - x_hat * mean_g_x_hat);
                }
                if (p.dtotal) store_columns(p.dtotal, offset, narrow<T>(dtotal), count, p.aligned);
                if (p.dropout.seed) {
                    const Vector<bool, kWidth> keep =
                        stream.keep<kWidth>(column, p.dropout.row_offset + row, p.dropout.threshold);
                    apply_dropout(dtotal, keep, p.dropout.scale);
                }
                if (p.dx) store_columns(p.dx, offset, narrow<T>(dtotal), count, p.aligned);
                add(dx_bias[i], dtotal);
            }
        }

        const Shared<float> shares = arena.take<float>(Layout::kRows * Layout::kColumns);
        add_up(p, shares, dw, p.dw);
        add_up(p, shares, db, p.db);
        add_up(p, shares, dx_bias, p.dx_bias);
    }

    /// The block's partial sum number `sum`.
    __device__ __forceinline__ static void add_up(
        const Params& p, const Shared<float>& shares, const Vector<float, Layout::kWidth>* share, int sum) {
        if (sum < 0) return;
        const Shared<float> own = shares.slice(Layout::row() * Layout::kColumns, Layout::kColumns);
#pragma unroll
        for (int i = 0; i < Layout::kVectors; ++i) Layout::store(own, i, share[i]);
        barrier();
        const std::int64_t first = (sum * grid_size() + block_index()) * p.stride_p;
        for (int column = thread_index(); column < p.C; column += kThreads) {
            float total = 0.0f;
#pragma unroll
            for (int row = 0; row < Layout::kRows; ++row) {
                total += shares.load(row * Layout::kColumns + Layout::place(column));
            }
            p.partials.store(first + column, total);
        }
        barrier();  // before the next sum takes the memory
    }
};

}  // namespace gpt1
