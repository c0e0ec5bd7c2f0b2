"""Makes Triton's interpreter round fp32 to bf16 as a GPU does: to nearest, ties to even.

Upstream truncates (`_convert_float`, up to 3.9 at least), which loses twice as much. Only imported
where the interpreter is on.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_upstream = interpreter._convert_float


def _convert_float(data, input_dtype, output_dtype, rounding_mode):
    if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
        return _upstream(data, input_dtype, output_dtype, rounding_mode)
    bits = data.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(data), 0x7FFF, rounded).astype(np.uint16)


interpreter._convert_float = _convert_float
