"""Sums over rows, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_PER_BLOCK = 128


def column_sums(x: Tensor) -> Tensor:
    """(N, C) → fp32 (C,)."""
    if x.is_cuda or x.dtype == torch.float32:
        return x.sum(0, dtype=torch.float32)
    # On a CPU ATen makes an fp32 copy of what it sums; a block's stays in the cache.
    return torch.stack(
        [block.sum(0, dtype=torch.float32) for block in x.split(ROWS_PER_BLOCK)]
    ).sum(0)
