#pragma once

#include "ffn/ffn.h"

namespace gpt1 {

/// The products of one type, each in a source file of its own; as in ffn.h.
template <class T>
struct FfnLaunch {
    static void gelu_product(const Matrix& a, const Matrix& b, bool b_transposed, TypedArray bias,
                             const Matrix& hidden, Array pre, Stream stream);
    static void dgelu_product(const Matrix& a, const Matrix& b, bool b_transposed, const Matrix& pre,
                              Array dpre, Array partial_db, Stream stream);
};

}  // namespace gpt1
