#pragma once

#include "matmul/matmul.h"

namespace gpt1 {

/// `matmul` of one type, each in a source file of its own.
template <class T>
struct MatmulLaunch {
    static void start(const Matrix& a, bool a_transposed, const Matrix& b, bool b_transposed,
                      const Matrix& out, DType out_dtype, TypedArray bias, Array scale, bool accumulate,
                      Array parts, std::int64_t chunks, Stream stream);
};

}  // namespace gpt1
