#include "ffn/ffn_launch.cuh"

#include "ffn/column_sums_kernel.cuh"

namespace gpt1 {

void gelu_product(int dtype, Matrix a, Matrix b, bool b_transposed, Array bias, int bias_dtype, Matrix hidden,
                  Array pre, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using Launch = FfnLaunch<decltype(element)>;
        Launch::gelu_product(a, b, b_transposed, bias, bias_dtype, hidden, pre, stream);
    });
}

void dgelu_product(int dtype, Matrix a, Matrix b, bool b_transposed, Matrix pre, Array dpre, Array hidden,
                   Array partial_db, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using Launch = FfnLaunch<decltype(element)>;
        Launch::dgelu_product(a, b, b_transposed, pre, dpre, hidden, partial_db, stream);
    });
}

void column_sums(int dtype, Matrix x, Array sums, std::int64_t run, Stream stream) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using Kernel = ColumnSums<T>;
        const auto& [array, rows, columns, stride] = x;
        const typename Kernel::Params p{
            Global<const T>(array), Global<float>(sums), rows, columns, stride, run};
        const std::int64_t runs = (rows + run - 1) / run;
        const std::int64_t strips = (columns + Kernel::kColumns - 1) / Kernel::kColumns;
        launch<Kernel>(runs * strips, Kernel::kMaxSharedBytes, stream, p);
    });
}

}  // namespace gpt1
