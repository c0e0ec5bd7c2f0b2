"""Makes bf16 in Triton's interpreter what it is on a GPU, and nested calls quick.

Imported only where the interpreter is on.

Upstream (up to 3.9 at least) truncates fp32 to bf16, which loses twice as much as rounding, and
multiplies the bit patterns of bf16 operands in `tl.dot` as if they were integers.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)

_upstream_convert = interpreter._convert_float
_upstream_dot = InterpreterBuilder.create_dot
_upstream_launch = GridExecutor.__call__
_prepared: set = set()
"""The functions for which this launch has patched Triton's language."""


def _convert_float(data, input_dtype, output_dtype, rounding_mode):
    if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
        return _upstream_convert(data, input_dtype, output_dtype, rounding_mode)
    bits = data.view(np.uint32)
    to_nearest_even = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(data), 0x7FFF, to_nearest_even).astype(np.uint16)


def _create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = _widened(a), _widened(b)
    return _upstream_dot(builder, a, b, d, input_precision, max_num_imprecise_acc)


def _widened(operand: TensorHandle) -> TensorHandle:
    """The operand in fp32, which holds every bf16 value and every product of two."""
    if operand.get_element_ty() != tl.bfloat16:
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _launch(executor, *args, **kwargs):
    _prepared.clear()
    _upstream_launch(executor, *args, **kwargs)


def _call(function, *args, **kwargs):
    """Calls a function from a kernel; upstream patches the language anew for each such call."""
    if function.fn not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(function.fn)
    return function.rewrite()(*args, **kwargs)


interpreter._convert_float = _convert_float
InterpreterBuilder.create_dot = _create_dot
GridExecutor.__call__ = _launch
InterpretedFunction.__call__ = _call
