"""What the backends with kernels share of rows: how one finds those of a (..., C)."""

from __future__ import annotations

from torch import Tensor


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """x with its rows at one distance, in memory of its own only if need be; and the distance.

    Args:
        x: (..., C), its last axis contiguous.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    x = as_matrix(x)
    return x, x.stride(0)


def as_matrix(x: Tensor) -> Tensor:
    """(..., C) as (N, C), in memory of its own only if need be."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
