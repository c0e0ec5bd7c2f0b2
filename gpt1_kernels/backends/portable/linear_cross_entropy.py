"""Linear + cross-entropy by chunks of rows: logits, loss and gradients share one buffer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt1_kernels.backends.portable.ids import check_ids, nan_where_invalid

CHUNK_BYTES = 96 * 2**20  # of fp32 logits


def linear_cross_entropy_fwd(
    h: Tensor,  # (N, C)
    w: Tensor,  # (V, C)
    targets: Tensor,  # (N,)
    token_weight: Tensor | None,  # (N,)
    ignore_index: int,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    valid = check_ids("linear_cross_entropy", targets, w.shape[0], ignore_index)
    safe, weight = _targets_and_weights(targets, valid, token_weight, ignore_index)
    losses, lse = torch.empty_like(weight), torch.empty_like(weight)
    dtype, (h, w) = h.dtype, _for_products(h, w)
    dh = torch.empty_like(h) if gradients[0] else h.new_empty(0)
    dw = w.new_zeros(w.shape if gradients[1] else 0, dtype=torch.float32)
    for rows in _chunks(h, w):
        target = safe[rows, None]
        logits = (h[rows] @ w.t()).float()  # (rows, V)
        target_logit, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
        p = torch.softmax(logits, 1, out=logits)
        log_largest_p = p.amax(1, keepdim=True).log_()
        others = _without_target(p, target)
        loss = largest - target_logit - log_largest_p
        # Of a confident token, −log p has no digits left, but the others' probability has.
        loss = torch.where(others < 0.5, -torch.log1p(-others), loss)
        losses[rows] = loss.squeeze(1) * weight[rows]
        lse[rows] = (largest - log_largest_p).squeeze(1)
        _gradients(p, others, target, weight[rows], h, w, rows, dh, dw, gradients)
    return nan_where_invalid(losses, valid), lse, dh.to(dtype), dw


def linear_cross_entropy_bwd(
    dloss: Tensor,  # (N,)
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    lse: Tensor,  # (N,)
    token_weight: Tensor | None,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    valid = check_ids("linear_cross_entropy", targets, w.shape[0], ignore_index)
    safe, weight = _targets_and_weights(targets, valid, token_weight, ignore_index)
    weight = torch.where(weight == 0, 0, weight * dloss)
    dtype, (h, w) = h.dtype, _for_products(h, w)
    dh = torch.empty_like(h) if needs[0] else h.new_empty(0)
    dw = w.new_zeros(w.shape if needs[1] else 0, dtype=torch.float32)
    for rows in _chunks(h, w):
        logits = (h[rows] @ w.t()).float()
        p = torch.softmax(logits, 1, out=logits)
        target = safe[rows, None]
        others = _without_target(p, target)
        _gradients(p, others, target, weight[rows], h, w, rows, dh, dw, needs)
    return dh.to(dtype), dw.to(dtype)


def scale_gradients(
    dh: Tensor, dw: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (dh.float() * scale).to(dh.dtype), (dw * scale).to(dtype)


def _for_products(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Without fp16, whose range is too small for unscaled gradients."""
    return (h.float(), w.float()) if h.dtype == torch.float16 else (h, w)


def _without_target(p: Tensor, target: Tensor) -> Tensor:
    """Clears the target's probability in p (rows, V) and returns the others' sum, (rows, 1)."""
    return p.scatter_(1, target, 0).sum(1, keepdim=True)


def _gradients(p, others, target, weight, h, w, rows, dh, dw, needs) -> None:
    """Turns probabilities (rows, V) into dlogits in place, and adds what they give to dh and dw."""
    if not any(needs):
        return
    dlogits = p.scatter_(1, target, -others).mul_(weight[:, None]).to(h.dtype)
    if needs[0]:
        torch.mm(dlogits, w, out=dh[rows])
    if needs[1]:
        if h.dtype == torch.float32:
            dw.addmm_(dlogits.t(), h[rows])
        else:
            dw += dlogits.t() @ h[rows]


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


def _chunks(h: Tensor, w: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // (4 * w.shape[0]))
    return (slice(start, start + rows) for start in range(0, h.shape[0], rows))
