"""What the backends share of layouts: the rows of a (..., C), the heads of a (B, T, 3C)."""

from __future__ import annotations

from torch import Tensor


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows at one stride, copied only if need be; and that stride.

    Args:
        x: (..., C), its last axis contiguous.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    x = as_matrix(x)
    return x, x.stride(0)


def as_matrix(x: Tensor) -> Tensor:
    """(..., C) as (N, C), copied only if need be."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def unpacked(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, views (B, T, H, D) of a packed (B, T, 3C)."""
    B, T, width = qkv.shape
    return qkv.view(B, T, 3, n_head, width // (3 * n_head)).unbind(2)
