"""One cast of all weights, where under autocast each product would cast its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt1_kernels.layers import Conv1D, is_affine


class _CastTogether(torch.autograd.Function):
    """Casts tensors in one multi-tensor call, and in backward their gradients in another."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)  # None, not zeros, for what no product has used
        needs = ctx.needs_input_grad[1:]
        cast = _cast(tensors, [dtype] * len(tensors))
        ctx.mark_non_differentiable(*(t for t, need in zip(cast, needs, strict=True) if not need))
        return tuple(cast)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [(g, t) for g, t in zip(gradients, ctx.dtypes, strict=True) if g is not None]
        cast = iter(_cast(*zip(*pairs, strict=True)) if pairs else ())
        return None, *(None if g is None else next(cast) for g in gradients)


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    cast = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(cast, tensors)
    return cast


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the products of every `Conv1D` read weights that were cast once, in one call.

    Not of one with hooks, which may prepare its weight when it is called, as pruning does.

    The results are those of autocast, bit for bit: gradients are cast back at each backward, and
    summed in the parameters' dtype. Leave the context before the parameters change. Not for
    `DistributedDataParallel`: all gradients come at the end, and no transfer overlaps the backward.

    Args:
        model: whatever contains the modules.
        dtype: that of the autocast region in which the model runs.
    """
    modules = [
        m for m in model.modules()
        if isinstance(m, Conv1D) and is_affine(m) and m.weight.dtype != dtype
    ]  # fmt: skip
    parameters = [p for m in modules for p in (m.weight, m.bias)]
    cast = iter(_CastTogether.apply(dtype, *parameters) if modules else ())
    for module in modules:
        module.cast = next(cast), next(cast)
    try:
        yield
    finally:
        for module in modules:
            module.cast = None
