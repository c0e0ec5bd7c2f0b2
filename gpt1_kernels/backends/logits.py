"""What the backends with kernels share of linear + cross-entropy: buffers of logits."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 230 * 10**6
"""Of a chunk of logits: with dW in fp32, 124 MB for GPT-1, the workspace is below 400 MB."""

LARGEST_FP16_GRADIENT = 2.0**15


def padded_vocabulary(V: int) -> int:
    """Columns of a buffer of logits, whose rows are then aligned for 16-byte accesses."""
    return -(-V // 64) * 64


def fp16_gain(
    targets: Tensor,  # (N,)
    weight: Tensor | None,  # (N,)
    ignore_index: int,
) -> Tensor:
    """fp32 (), the factor that puts the largest element of dlogits at the top of fp16's range.

    Without it, a loss scale would overflow there, and small probabilities lose digits.
    """
    if weight is None:
        return targets.new_full((), LARGEST_FP16_GRADIENT, dtype=torch.float32)
    largest = weight.masked_fill(targets == ignore_index, 0).abs().amax()
    return LARGEST_FP16_GRADIENT / largest.clamp(min=1e-30)
