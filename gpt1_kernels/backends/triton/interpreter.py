"""Makes Triton's interpreter compute bf16 as a GPU does, and run faster.

Imported only where the interpreter is on.

Upstream (up to 3.9 at least) truncates fp32 to bf16, which loses twice as much as rounding, and
multiplies the bit patterns of bf16 operands in `tl.dot` as if they were integers.

Most of the interpreter's time goes to making the types of what a kernel computes, which are the
same in every program, and to an overflow check of 32-bit integers whose outcome it drops.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    interpreter_builder,
)

_upstream_convert = interpreter._convert_float
_upstream_np_dtype = interpreter._get_np_dtype
_upstream_dot = InterpreterBuilder.create_dot
_upstream_launch = GridExecutor.__call__
_upstream_block_type = tl.block_type.__init__
_upstream_tensor = tl.tensor.__init__
_prepared: set = set()
"""The functions for which this launch has patched Triton's language."""

_np_dtypes: dict[str, np.dtype] = {}
_block_types: dict[tuple, dict] = {}
_tensors: dict[str, dict] = {}
"""By the name of a type: the attributes that all its instances share."""


def _convert_float(data, input_dtype, output_dtype, rounding_mode):
    if (input_dtype, output_dtype) == (tl.bfloat16, tl.float32):
        return _widened(data)
    if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
        return _upstream_convert(data, input_dtype, output_dtype, rounding_mode)
    bits = data.view(np.uint32)
    to_nearest_even = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(data), 0x7FFF, to_nearest_even).astype(np.uint16)


def _create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = _multiplied(a), _multiplied(b)
    return _upstream_dot(builder, a, b, d, input_precision, max_num_imprecise_acc)


def _multiplied(operand: TensorHandle) -> TensorHandle:
    """The operand, in fp32 if it is bf16: fp32 holds every bf16 value and product exactly."""
    if operand.get_element_ty() != tl.bfloat16:
        return operand
    return TensorHandle(_widened(operand.data), tl.float32)


def _widened(bits: np.ndarray) -> np.ndarray:
    """bf16 as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _launch(executor, *args, **kwargs):
    _prepared.clear()
    _upstream_launch(executor, *args, **kwargs)


def _call(function, *args, **kwargs):
    """Calls a function from a kernel; upstream patches the language anew for each such call."""
    if function.fn not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(function.fn)
    return function.rewrite()(*args, **kwargs)


def _np_dtype(type: tl.dtype) -> np.dtype:
    if type.name not in _np_dtypes:
        _np_dtypes[type.name] = _upstream_np_dtype(type)
    return _np_dtypes[type.name]


def _init_block_type(self, element_ty, shape):
    key = (element_ty.name, *shape)
    if key not in _block_types:
        _upstream_block_type(self, element_ty, shape)
        _block_types[key] = vars(self).copy()
    vars(self).update(_block_types[key])


def _init_tensor(self, handle, type):
    if type.name not in _tensors:
        _upstream_tensor(self, None, type)
        _tensors[type.name] = vars(self).copy()
    vars(self).update(_tensors[type.name], handle=handle)


interpreter._convert_float = _convert_float
InterpreterBuilder.create_dot = _create_dot
GridExecutor.__call__ = _launch
InterpretedFunction.__call__ = _call
interpreter._get_np_dtype = _np_dtype
tl.block_type.__init__ = _init_block_type
tl.tensor.__init__ = _init_tensor
interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
