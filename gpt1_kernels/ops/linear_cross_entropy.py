"""The language model's head and loss in one: loss = −log softmax(h Wᵀ)[target].

The logits exist one chunk of rows at a time, never N × V. With e the one-hot target and m the
weight of a token (0 where its target is ignored):

    dlogits = m · (softmax(h Wᵀ) − e),   dh = dlogits W,   dW = dlogitsᵀ h

For "mean" and "sum" the gradients are computed in forward, while a chunk is at hand, and scaled in
backward by the upstream gradient (and 1 / Σ m); for "none", backward recomputes the logits.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from gpt1_kernels.backends import resolve
from gpt1_kernels.numerics import ACTIVATION_DTYPES
from gpt1_kernels.ops._library import (
    apply,
    autocast,
    autocast_dtype,
    check_tensor,
    define,
    last_contiguous,
    matrix,
    refuse_double_backward,
    where_needed,
)

REDUCTIONS = ("mean", "sum", "none")


def _fake_fwd(h, w, targets, token_weight, ignore_index, gradients, backend):
    losses = h.new_empty([h.shape[0]], dtype=torch.float32)
    dh = h.new_empty(h.shape if gradients[0] else [0])
    dw = w.new_empty(w.shape if gradients[1] else [0], dtype=torch.float32)
    return losses, dh, dw


def _fake_bwd(dloss, h, w, targets, token_weight, ignore_index, needs, backend):
    dw = w.new_empty(w.shape if needs[1] else [0], dtype=torch.float32)
    return h.new_empty(h.shape if needs[0] else [0]), dw


def _fake_scale(dh, dw, scale, dtype, backend):
    return dh.new_empty(dh.shape), dw.new_empty(dw.shape, dtype=dtype)


_fwd = define(
    "linear_cross_entropy",
    "linear_cross_entropy_fwd(Tensor h, Tensor w, Tensor targets, Tensor? token_weight, "
    "int ignore_index, bool[2] gradients, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
)
_bwd = define(
    "linear_cross_entropy",
    "linear_cross_entropy_bwd(Tensor dloss, Tensor h, Tensor w, Tensor targets, "
    "Tensor? token_weight, int ignore_index, bool[2] needs, str backend) -> (Tensor, Tensor)",
    _fake_bwd,
)
_scale_gradients = define(
    "linear_cross_entropy",
    "scale_gradients(Tensor dh, Tensor dw, Tensor scale, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor)",
    _fake_scale,
)


# Both cast w themselves, where autograd records no cast: the fp32 sum of dw is rounded once.
class _ReducedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, token_weight, ignore_index, mean, backend):
        product_w = matrix(w.to(h.dtype))
        unit = None
        if h.dtype == torch.float16 and token_weight is not None:
            # In units of the largest weight, dh fits fp16 until backward scales it. One weight more
            # keeps the unit from 0, and gives it a value where there is no token.
            counted = token_weight.masked_fill(targets == ignore_index, 0)
            unit = pad(counted.abs(), (0, 1), value=1e-30).amax()
            token_weight = token_weight / unit
        losses, dh, dw = _fwd(
            _rows(h), product_w, targets, token_weight, ignore_index, ctx.needs_input_grad[:2],
            backend,
        )  # fmt: skip
        loss = losses.sum()
        # All ignored: 0 / 1 leaves loss and gradients at 0.
        if not mean:
            scale = torch.ones_like(loss) if unit is None else unit
        elif token_weight is None:
            scale = (targets != ignore_index).sum(dtype=torch.float32).clamp(min=1).reciprocal()
        else:
            total = torch.where(targets != ignore_index, token_weight, 0).sum()
            scale = torch.where(total == 0, 1, total).reciprocal()
        ctx.save_for_backward(dh, dw, scale)
        ctx.config = h.shape, w.dtype, backend
        return loss * scale

    @staticmethod
    def backward(ctx, dloss):
        refuse_double_backward("linear_cross_entropy")
        dh, dw, scale = ctx.saved_tensors
        shape, *config = ctx.config
        needs = ctx.needs_input_grad[:2]
        dh, dw = where_needed(_scale_gradients(dh, dw, dloss * scale, *config), needs)
        return None if dh is None else dh.view(shape), dw, *[None] * 5


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, token_weight, ignore_index, backend):
        saved = _rows(h), matrix(w.to(h.dtype)), targets, token_weight
        losses, *_ = _fwd(*saved, ignore_index, [False] * 2, backend)
        ctx.save_for_backward(*saved)
        ctx.config = h.shape, w.dtype, ignore_index, backend
        return losses

    @staticmethod
    def backward(ctx, dloss):
        refuse_double_backward("linear_cross_entropy")
        shape, w_dtype, ignore_index, backend = ctx.config
        needs = ctx.needs_input_grad[:2]
        dh, dw = _bwd(dloss.contiguous(), *ctx.saved_tensors, ignore_index, needs, backend)
        dh, dw = where_needed((dh, dw.to(w_dtype)), needs)
        return None if dh is None else dh.view(shape), dw, *[None] * 4


def _rows(h: Tensor) -> Tensor:
    """(..., C) as (N, C); called in a Function, where autograd records no node for it."""
    return last_contiguous(h.reshape(prod(h.shape[:-1]), h.shape[-1]))


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of a linear layer's output, without keeping the logits.

    Args:
        h: (..., C), fp32, bf16 or fp16.
        w: (V, C), the dtype of h; under autocast any of the three.
        targets: (...), int64 in [0, V) or ignore_index.
        reduction: "mean" (over tokens not ignored, or by their weights), "sum" or "none".
        token_weight: (...), fp32; multiplies each token's loss; has no gradient itself.

    Returns:
        fp32: a scalar, or the shape of targets for "none". With all targets ignored, 0.

    Raises:
        IndexError: on a CPU, a target out of range.
        TypeError: an unsupported or mixed dtype.
        ValueError: shapes that do not fit, tensors on two devices, an unknown reduction.
    """
    op = "linear_cross_entropy"
    (h,) = autocast(h)
    check_tensor(op, "h", h, ACTIVATION_DTYPES)
    if h.dim() == 0:
        raise ValueError(f"{op}: h has shape (), expected (..., C)")
    w_dtypes = (h.dtype,) if autocast_dtype(h) is None else ACTIVATION_DTYPES
    check_tensor(op, "w", w, w_dtypes, ("V", h.shape[-1]), h)
    check_tensor(op, "targets", targets, (torch.int64,), h.shape[:-1], h)
    if token_weight is not None:
        check_tensor(op, "token_weight", token_weight, (torch.float32,), h.shape[:-1], h)
        if token_weight.requires_grad:
            raise ValueError(f"{op}: token_weight requires a gradient, which it does not have")
        token_weight = token_weight.reshape(-1)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, expected one of {REDUCTIONS}")
    backend = resolve(op, h)
    arguments = targets.reshape(-1), token_weight, ignore_index
    if reduction == "none":
        return _TokenLosses.apply(h, w, *arguments, backend).view(targets.shape)
    return apply(_ReducedLoss, h, w, *arguments, reduction == "mean", backend)
