#include "column_sums/column_sums.h"

#include "column_sums/column_sums_kernel.cuh"

namespace gpt1 {

void column_sums(DType dtype, Matrix x, const std::vector<TypedArray>& totals, std::int64_t run,
                 Stream stream) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using Kernel = ColumnSums<T>;
        const auto& [array, rows, columns, stride] = x;
        const auto sums = static_cast<std::int64_t>(totals.size());
        if (sums > Kernel::kMostSums) {
            throw std::invalid_argument("column_sums: " + shape_text("totals", sums) + ", expected at most " +
                                        std::to_string(Kernel::kMostSums));
        }
        typename Kernel::Params p{};
        p.x = Global<const T>(array);
        for (std::size_t i = 0; i < totals.size(); ++i) p.totals[i] = FloatArray<false>(totals[i]);
        p.rows = rows;
        p.columns = columns;
        p.stride = stride;
        p.run = run;
        p.runs = (rows + run - 1) / run;
        const std::int64_t strips = (columns + Kernel::kColumns - 1) / Kernel::kColumns;
        launch<Kernel>(sums * p.runs * strips, Kernel::kMaxSharedBytes, stream, p);
    });
}

}  // namespace gpt1
