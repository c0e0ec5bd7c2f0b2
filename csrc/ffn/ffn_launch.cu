#include "ffn/ffn_launch.cuh"

#include "platform/platform.cuh"

namespace gpt1 {

void gelu_product(DType dtype, Matrix a, Matrix b, bool b_transposed, TypedArray bias, Matrix hidden,
                  Array pre, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using Launch = FfnLaunch<decltype(element)>;
        Launch::gelu_product(a, b, b_transposed, bias, hidden, pre, stream);
    });
}

void dgelu_product(DType dtype, Matrix a, Matrix b, bool b_transposed, Matrix pre, Array dpre,
                   Array partial_db, Stream stream) {
    dispatch_narrow(dtype, [&](auto element) {
        using Launch = FfnLaunch<decltype(element)>;
        Launch::dgelu_product(a, b, b_transposed, pre, dpre, partial_db, stream);
    });
}

}  // namespace gpt1
