#pragma once

#include "platform/types.h"

namespace gpt1 {

/// The losses of a chunk of logits, and its gradient in their place.
void cross_entropy(DType dtype,
                   Array logits, std::int64_t rows, std::int64_t columns,  // a multiple of 8
                   std::int64_t V,             // columns that count; the gradient of the others is 0
                   Array targets,              // (rows,), int64
                   Array weight,               // (rows,), fp32; may be absent
                   Array gain,                 // (), fp32, a factor of the gradient; may be absent
                   Array losses,               // (rows,), fp32; may be absent
                   Array error,                // (2,), int64: [1 once there is an error, the target]
                   std::int64_t ignore_index, bool gradient, Stream stream);

/// y = scale · x, of `count` elements.
void scale_gradient(DType x_dtype, Array x, Array scale, DType y_dtype, Array y, std::int64_t count,
                    Stream stream);

}  // namespace gpt1
