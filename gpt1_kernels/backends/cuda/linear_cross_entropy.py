"""Linear + cross-entropy by chunks of rows: our products, and one kernel that works in place.

A chunk's logits are written once, by the product h Wᵀ. The kernel turns a row of them into its loss
and, where a gradient is asked for, overwrites it with that gradient, from which two more products
give dh and add to dW. A row of GPT-1's vocabulary fits in shared memory, so it is read once.

At GPT-1's shape (N=32768, C=768, V=40478, bf16) a chunk has 2816 rows. Its logits take 228 MB, the
fp32 sum of dW 124 MB and the partial sums of a split-K product at most 47 MB, as many as the chip
has use for: a workspace below 400 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.backends.cuda.extension import NARROW_DTYPES, VECTOR, launch
from gpt1_kernels.backends.cuda.matmul import aligned, matmul, padded
from gpt1_kernels.backends.ids import check_ids
from gpt1_kernels.backends.logits import CHUNK_BYTES, fp16_gain, padded_vocabulary
from gpt1_kernels.errors import error_record

DTYPES = NARROW_DTYPES

TILE_ROWS = 256
"""Of the tallest tile, a Hopper cluster's; the other kernel's has half as many."""


def linear_cross_entropy_fwd(
    h: Tensor,  # (N, C)
    w: Tensor,  # (V, C)
    targets: Tensor,  # (N,)
    token_weight: Tensor | None,  # (N,)
    ignore_index: int,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if not targets.is_cuda:
        check_ids("linear_cross_entropy", targets, w.shape[0], ignore_index)
    losses = h.new_empty(h.shape[0], dtype=torch.float32)
    dh, dw = _by_chunks(h, w, targets, token_weight, ignore_index, gradients, losses)
    return losses, dh, dw


def linear_cross_entropy_bwd(
    dloss: Tensor,  # (N,)
    h: Tensor,  # (N, C)
    w: Tensor,  # (V, C)
    targets: Tensor,  # (N,)
    token_weight: Tensor | None,  # (N,)
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    weight = dloss
    if token_weight is not None:
        weight = torch.where(token_weight == 0, 0, token_weight * dloss)
    # Softmax anew, and not from a saved lse: with logits of 10⁴, exp(logit − lse) has 11 bits.
    return _by_chunks(h, w, targets, weight, ignore_index, needs, None)


def scale_gradients(
    dh: Tensor,  # (N, C) or (0,)
    dw: Tensor,  # (V, C) or (0,)
    scale: Tensor,  # ()
    dtype: torch.dtype,  # of the scaled dw
) -> tuple[Tensor, Tensor]:
    return _scaled(dh, scale, dh.dtype), _scaled(dw, scale, dtype)


def _by_chunks(
    h: Tensor,  # (N, C)
    w: Tensor,  # (V, C)
    targets: Tensor,  # (N,)
    weight: Tensor | None,  # (N,)
    ignore_index: int,
    needs: list[bool],
    losses: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:
    """Fills losses if given, and returns dh and fp32 dw, of 0 elements if not needed."""
    (N, C), V = h.shape, w.shape[0]
    if C % VECTOR != 0:
        wide_h, wide_w = padded(h)[:N], padded(w)[:V]
        grads = _by_chunks(wide_h, wide_w, targets, weight, ignore_index, needs, losses)
        return tuple(
            g[:, :C].contiguous() if need else g for g, need in zip(grads, needs, strict=True)
        )

    h, w = aligned(h), aligned(w)
    need_h, need_w = needs
    targets = targets.contiguous()
    weight = None if weight is None else weight.contiguous()
    dh = h.new_empty(h.shape if need_h else 0)
    dw = h.new_empty(w.shape if need_w else 0, dtype=torch.float32)
    if N == 0:
        return dh, dw.zero_()

    error = error_record("linear_cross_entropy", V, h.device).host
    logits = h.new_empty(min(N, chunk_rows(V, h.dtype)), padded_vocabulary(V))
    gain = unscale = None
    if h.dtype == torch.float16 and any(needs):
        gain = fp16_gain(targets, weight, ignore_index)
        unscale = 1 / gain
    for first in range(0, N, len(logits)):
        chunk = slice(first, min(first + len(logits), N))
        chunk_logits = logits[: chunk.stop - first]
        matmul(h[chunk], w.t(), chunk_logits)
        launch(
            "cross_entropy", h, h.dtype,
            chunk_logits, *chunk_logits.shape, V, targets[chunk],
            None if weight is None else weight[chunk], gain,
            None if losses is None else losses[chunk], error,
            ignore_index, any(needs),
        )  # fmt: skip
        if need_h:
            matmul(chunk_logits, w, dh[chunk], scale=unscale)
        if need_w:
            matmul(chunk_logits.t(), h[chunk], dw, scale=unscale, accumulate=first > 0)
    return dh, dw


def chunk_rows(V: int, dtype: torch.dtype) -> int:
    """How many rows of logits exist at a time: whole tiles of a product."""
    tile_bytes = TILE_ROWS * padded_vocabulary(V) * dtype.itemsize
    return max(1, CHUNK_BYTES // tile_bytes) * TILE_ROWS


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale · x in fp32, rounded once; x is contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        launch("scale_gradient", x, x.dtype, x, scale, dtype, y, x.numel())
    return y
