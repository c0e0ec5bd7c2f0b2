"""Launcher of the dropout bits; csrc/dropout/ has the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt1_kernels.backends.cuda.extension import launch
from gpt1_kernels.rng import threshold


def dropout_mask(
    seed: Tensor,  # (2,)
    shape: Sequence[int],
    p: float,
    row_offset: int,
    causal: bool,
) -> Tensor:
    """int32 (*shape[:-1], ceil(shape[-1] / 32)), bit 1 keeps."""
    *leading, columns = shape
    bits = torch.empty(*leading, -(-columns // 32), dtype=torch.int32, device=seed.device)
    if bits.numel() > 0:
        rows = leading[-1] if causal else math.prod(leading)
        last_column = columns - rows if causal else columns - 1
        launch(
            "dropout_mask", seed,
            bits, seed, math.prod(leading) // rows, rows, columns, last_column,
            threshold(p), row_offset,
        )  # fmt: skip
    return bits
