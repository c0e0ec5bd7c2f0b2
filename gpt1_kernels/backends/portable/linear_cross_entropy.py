"""Linear + cross-entropy by chunks of rows: logits and their gradient share one buffer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt1_kernels.backends.ids import check_ids, nan_where_invalid

CACHE_BYTES = 8 * 2**20  # a chunk of logits that stays in a CPU's cache
CHUNK_BYTES = 96 * 2**20  # the largest chunk of logits
BLOCK_ELEMENTS = 2**20  # of logits or dw at a time, whose fp32 copy stays in a CPU's cache


def linear_cross_entropy_fwd(
    h: Tensor,  # (N, C)
    w: Tensor,  # (V, C)
    targets: Tensor,  # (N,)
    token_weight: Tensor | None,  # (N,)
    ignore_index: int,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    valid = check_ids("linear_cross_entropy", targets, w.shape[0], ignore_index)
    target, weight = _targets_and_weights(targets, valid, token_weight, ignore_index)
    losses, dh, dw = _by_chunks(h, w, target, weight, gradients)
    return nan_where_invalid(losses, valid), dh, dw


def linear_cross_entropy_bwd(
    dloss: Tensor,  # (N,)
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    valid = check_ids("linear_cross_entropy", targets, w.shape[0], ignore_index)
    target, weight = _targets_and_weights(targets, valid, token_weight, ignore_index)
    weight = torch.where(weight == 0, 0, weight * dloss)
    _, dh, dw = _by_chunks(h, w, target, weight, needs)
    return dh, dw


def scale_gradients(
    dh: Tensor, dw: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (dh.float() * scale).to(dh.dtype), (dw * scale).to(dtype)


def _by_chunks(
    h: Tensor,  # (N, C)
    w: Tensor,  # (V, C)
    target: Tensor,  # (N,)
    weight: Tensor,  # (N,)
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses, dh and fp32 dw, these of 0 elements if not needed."""
    losses = torch.empty_like(weight)
    dtype, (h, w) = h.dtype, _for_products(h, w)
    dh, dw = _empty_gradients(h, w, needs)
    for rows, logits in _chunks(h, w):
        for block in _blocks(logits):
            index = slice(rows.start + block.start, rows.start + block.stop)
            losses[index] = _losses(
                logits[block], target[index, None], weight[index, None], any(needs)
            )
        _products(logits, h, w, rows, dh, dw, needs)
    return losses, dh.to(dtype), dw


def _losses(
    logits: Tensor,  # (rows, V)
    target: Tensor,  # (rows, 1)
    weight: Tensor,  # (rows, 1)
    gradient: bool,
) -> Tensor:
    """Weighted losses, (rows,); leaves the gradient in place of the logits."""
    x = logits.float()
    target_logit, largest = x.gather(1, target), x.amax(1, keepdim=True)
    p = torch.softmax(x, 1, out=x)
    log_largest_p = p.amax(1, keepdim=True).log_()
    others = p.scatter_(1, target, 0).sum(1, keepdim=True)
    loss = largest - target_logit - log_largest_p
    # For a confident token −log p has no digits left, but log1p of the others' probability has.
    loss = torch.where(others < 0.5, -torch.log1p(-others), loss)
    if gradient:
        torch.mul(p.scatter_(1, target, -others), weight, out=p)
        logits.copy_(p)
    return (loss * weight).squeeze(1)


def _products(logits, h, w, rows, dh, dw, needs) -> None:
    """Adds what a chunk's gradient, in place of its logits, gives to dh and dw."""
    if needs[0]:
        torch.mm(logits, w, out=dh[rows])
    if not needs[1]:
        return
    if h.dtype == torch.float32:
        dw.addmm_(logits.t(), h[rows], beta=float(rows.start > 0))
        return
    for block in _blocks(dw):  # so that neither the product nor its fp32 copy is as large as dw
        product = logits[:, block].t() @ h[rows]
        dw[block] = product if rows.start == 0 else dw[block] + product


def _empty_gradients(h: Tensor, w: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    new_dw = w.new_empty if h.shape[0] > 0 else w.new_zeros  # without rows no chunk fills it
    return (
        torch.empty_like(h) if needs[0] else h.new_empty(0),
        new_dw(w.shape if needs[1] else [0], dtype=torch.float32),
    )


def _for_products(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Without fp16, whose range is too small for unscaled gradients."""
    return (h.float(), w.float()) if h.dtype == torch.float16 else (h, w)


def _targets_and_weights(
    targets: Tensor, valid: Tensor | None, token_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Targets with 0 where they cannot be read, and each token's fp32 weight, 0 where ignored."""
    counted = targets != ignore_index
    if valid is not None:
        counted = counted & valid
    weight = counted.float()
    if token_weight is not None:
        weight = torch.where(counted, token_weight, 0)
    return torch.where(counted, targets, 0), weight


def _chunks(h: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their logits, each in the memory of the one before.

    Chunks fit the cache, but have at least C rows where CHUNK_BYTES allow: each adds to all of dW.
    """
    row_bytes = h.element_size() * w.shape[0]
    count = max(1, min(CHUNK_BYTES, max(CACHE_BYTES, h.shape[1] * row_bytes)) // row_bytes)
    buffer = h.new_empty(min(count, h.shape[0]), w.shape[0])
    for start in range(0, h.shape[0], count):
        rows = slice(start, min(start + count, h.shape[0]))
        logits = buffer[: rows.stop - rows.start]
        yield rows, torch.mm(h[rows], w.t(), out=logits)


def _blocks(matrix: Tensor) -> Iterator[slice]:
    rows, count = matrix.shape[0], max(1, BLOCK_ELEMENTS // matrix.shape[1])
    return (slice(start, min(start + count, rows)) for start in range(0, rows, count))
