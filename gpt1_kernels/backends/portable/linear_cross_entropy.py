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
    dh = torch.empty_like(h) if gradients[0] else h.new_empty(0)
    dw = w.new_zeros(w.shape if gradients[1] else 0, dtype=torch.float32)
    for rows in _chunks(h, w):
        target = safe[rows, None]
        logits = (h[rows] @ w.t()).float()  # (rows, V)
        target_logit = logits.gather(1, target)
        log_p = torch._log_softmax(logits, 1, False, out=logits)
        target_log_p = log_p.gather(1, target)
        losses[rows] = (-target_log_p).squeeze(1) * weight[rows]
        lse[rows] = (target_logit - target_log_p).squeeze(1)
        if any(gradients):
            _gradients(log_p.exp_(), target, weight[rows], h, w, rows, dh, dw, gradients)
    return nan_where_invalid(losses, valid), lse, dh, dw


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
    dh = torch.empty_like(h) if needs[0] else h.new_empty(0)
    dw = w.new_zeros(w.shape if needs[1] else 0, dtype=torch.float32)
    for rows in _chunks(h, w):
        p = (h[rows] @ w.t()).float().sub_(lse[rows, None]).exp_()
        _gradients(p, safe[rows, None], weight[rows], h, w, rows, dh, dw, needs)
    return dh, dw.to(w.dtype)


def scale_gradients(
    dh: Tensor, dw: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (dh.float() * scale).to(dh.dtype), (dw * scale).to(dtype)


def _gradients(p, target, weight, h, w, rows, dh, dw, needs) -> None:
    """Turns probabilities (rows, V) into dlogits in place, and adds what they give to dh and dw."""
    dlogits = p.scatter_add_(1, target, torch.full_like(p[:, :1], -1)).mul_(weight[:, None])
    dlogits = dlogits.to(h.dtype)
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
