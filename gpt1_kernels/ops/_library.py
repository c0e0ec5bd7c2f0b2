"""What all ops share: the torch.library namespace, argument checks, autocast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from gpt1_kernels.backends import count_launch, kernel
from gpt1_kernels.errors import raise_recorded
from gpt1_kernels.numerics import ACTIVATION_DTYPES
from gpt1_kernels.rng import MAX_ROWS

LIBRARY = torch.library.Library("gpt1_kernels", "DEF")


def define(op: str, schema: str, fake: Callable) -> Callable:
    """Defines a low-level op and returns it.

    Args:
        op: the public op that it belongs to, as in `backends.OPS`.
        schema: name, arguments (the last is `str backend`) and returns; the name is also that of
            the backends' function, which takes the same arguments but for the backend.
        fake: shapes and dtypes of the returns, from the same arguments.
    """
    name = schema.partition("(")[0]

    def implementation(*args):
        *args, backend = args
        raise_recorded()
        count_launch(backend, name)
        run = kernel(backend, op, name)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return _ForwardOnly.apply(name, run, *args)
        return run(*args)

    LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"gpt1_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.gpt1_kernels, name).default


class _ForwardOnly(torch.autograd.Function):
    """An op outside its own Function, as in an exported program: it has no backward there."""

    @staticmethod
    def forward(ctx, name, run, *args):
        ctx.name = name
        return run(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name}: an exported program has no backward; train the module")


def apply(function: type[torch.autograd.Function], *args):
    """`function.apply`; under `no_grad`, on detached tensors.

    For a Function whose forward does more where a gradient is needed.
    `ctx.needs_input_grad` looks at the tensors alone: it is True of parameters under `no_grad`
    too, and forward would compute or save what no backward will read.
    """
    if not torch.is_grad_enabled():
        args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    return function.apply(*args)


def apart(*tensors: Tensor | None) -> list[Tensor | None]:
    """Makes repeated tensors views: `torch.compile` refuses repeats in an `autograd.Function`."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [
        t.view_as(t) if t is not None and any(t is other for other in tensors[:i]) else t
        for i, t in enumerate(tensors)
    ]


def refuse_double_backward(op: str) -> None:
    """Called first in a backward: the ops have no double backward, and raise.

    Raises:
        RuntimeError: backward runs under `create_graph=True`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op} has no double backward: its backward ran under create_graph=True")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The autocast dtype of the tensor's device, or None if autocast is off there."""
    device = tensor.device.type
    # There is none for the meta device, and PyTorch raises where it is asked.
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts tensors to the autocast dtype of the first one's device, if autocast is on there."""
    dtype = None if tensors[0] is None else autocast_dtype(tensors[0])
    if dtype is None:
        return list(tensors)
    return [t.to(dtype) if t is not None and t.dtype in ACTIVATION_DTYPES else t for t in tensors]


def where_needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients, None for those that nobody needs."""
    return [g if need else None for g, need in zip(grads, needs, strict=True)]


def last_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself if its last axis is contiguous, else a contiguous copy."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def matrix(tensor: Tensor) -> Tensor:
    """A 2-D weight itself if either axis is contiguous, else a contiguous copy."""
    return tensor if 1 in tensor.stride() else tensor.contiguous()


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor | None,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int | str] | None = None,
    like: Tensor | None = None,
) -> None:
    """Checks an argument of an op.

    Args:
        dtypes: the allowed ones.
        shape: the expected one, if not any; a string stands for any size and names the axis.
        like: the activation, on whose device the tensor must be.

    Raises:
        TypeError: it is not dense, or of another dtype.
        ValueError: it is None, has another shape, or is on another device.
    """
    if tensor is None:
        expected = "a tensor" if shape is None else f"shape {_text(shape)}"
        raise ValueError(f"{op}: {name} is None, expected {expected}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} has layout {tensor.layout}, expected a dense tensor")
    if tensor.dtype not in dtypes:
        expected = ", ".join(dict.fromkeys(map(str, dtypes)))
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {expected}")
    if shape is not None and tensor.shape != shape and not _fits(tensor.shape, shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {_text(shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the activation is on {like.device}")


def _fits(shape: Sequence[int], expected: Sequence[int | str]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(e, str) or n == e for n, e in zip(shape, expected, strict=True)
    )


def _text(shape: Sequence[int | str]) -> str:
    return str(tuple(shape)).replace("'", "")


def check_probability(op: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {p}, expected a probability in [0, 1]")


def check_dropout(
    op: str, p: float, seed: Tensor | None, row_offset: int, rows: int, like: Tensor
) -> None:
    """Checks the dropout arguments of a call with `rows` rows, from `row_offset` on."""
    check_probability(op, p)
    if p == 0.0:
        return
    if not isinstance(seed, Tensor):
        raise ValueError(f"{op}: seed is {seed}, expected an int64 tensor of 2 elements at p > 0")
    check_tensor(op, "seed", seed, (torch.int64,), (2,), like)
    if row_offset < 0:
        raise ValueError(f"{op}: row_offset is negative, expected at least 0")
    if row_offset + rows > MAX_ROWS:
        raise ValueError(
            f"{op}: row_offset + rows is {row_offset + rows}, expected at most {MAX_ROWS}"
        )
