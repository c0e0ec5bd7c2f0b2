"""LayerNorm, alone and behind GPT-1's residual branches.

    total = residual + keep ∘ (x + x_bias) · s        (dropout_add_layer_norm; else total = x)
    x̂ = (total − mean) · rstd,   y = x̂ ∘ w + b

Ba, Kiros, Hinton 2016. GPT-1 is post-LN, so the second form is every residual site. Backward:

    g = dy ∘ w,   dtotal = rstd · (g − mean(g) − x̂ · mean(g ∘ x̂)),   dw = Σ dy ∘ x̂,   db = Σ dy
    dresidual = dtotal,   dx = keep ∘ dtotal · s,   dx_bias = Σ dx

In GPT-1 y has two readers, the next branch and the next residual. A forked y is two tensors, whose
gradients backward adds as it reads them; autograd would add them in a pass of its own.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gpt1_kernels.backends import resolve
from gpt1_kernels.numerics import ACTIVATION_DTYPES
from gpt1_kernels.ops._library import (
    apart,
    apply,
    autocast,
    check_dropout,
    check_tensor,
    define,
    last_contiguous,
    refuse_double_backward,
    where_needed,
)


def _fake_layer_norm_fwd(x, w, b, eps, backend):
    stat = x.new_empty(prod(x.shape[:-1]), dtype=torch.float32)
    return x.new_empty(x.shape), stat, torch.empty_like(stat)


def _fake_layer_norm_bwd(dy, x, w, mean, rstd, needs, backend):
    shapes = (x.shape, w.shape, w.shape)
    return tuple(
        like.new_empty(shape if need else [0])
        for like, shape, need in zip((x, w, w), shapes, needs, strict=True)
    )


def _fake_dropout_add_layer_norm_fwd(
    x, residual, w, b, x_bias, seed, eps, dropout_p, row_offset, save_total, backend
):
    stat = x.new_empty(prod(x.shape[:-1]), dtype=torch.float32)
    total = x.new_empty(x.shape if save_total else [0])
    return x.new_empty(x.shape), total, stat, torch.empty_like(stat)


def _fake_dropout_add_layer_norm_bwd(
    dy, dy_residual, total, w, mean, rstd, seed, dropout_p, row_offset, needs, backend
):
    need_x, need_residual, need_w, need_b, need_x_bias = needs
    separate = need_x and not (need_residual and dropout_p == 0.0)
    return (
        total.new_empty(total.shape if separate else [0]),
        total.new_empty(total.shape if need_residual else [0]),
        w.new_empty(w.shape if need_w else [0]),
        w.new_empty(w.shape if need_b else [0]),
        w.new_empty(w.shape if need_x_bias else [0], dtype=torch.float32),
    )


_layer_norm_fwd = define(
    "layer_norm",
    "layer_norm_fwd(Tensor x, Tensor w, Tensor b, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_layer_norm_fwd,
)
_layer_norm_bwd = define(
    "layer_norm",
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor w, Tensor mean, Tensor rstd, bool[3] needs, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _fake_layer_norm_bwd,
)
_dropout_add_layer_norm_fwd = define(
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_fwd(Tensor x, Tensor residual, Tensor w, Tensor b, Tensor? x_bias, "
    "Tensor? seed, float eps, float dropout_p, SymInt row_offset, bool save_total, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_dropout_add_layer_norm_fwd,
)
_dropout_add_layer_norm_bwd = define(
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_bwd(Tensor dy, Tensor? dy_residual, Tensor total, Tensor w, "
    "Tensor mean, Tensor rstd, Tensor? seed, float dropout_p, SymInt row_offset, bool[5] needs, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_dropout_add_layer_norm_bwd,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, eps, backend):
        x, w, b = map(last_contiguous, (x, _as_wide(w, b), b))
        y, mean, rstd = _layer_norm_fwd(x, w, b, eps, backend)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("layer_norm")
        needs = ctx.needs_input_grad[:3]
        grads = _layer_norm_bwd(dy.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
        return *where_needed(grads, needs), None, None


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, w, b, x_bias, seed, eps, dropout_p, row_offset, fork, backend):
        w = _as_wide(w, b)
        x, residual, w, b, x_bias, seed = map(last_contiguous, (x, residual, w, b, x_bias, seed))
        y, total, mean, rstd = _dropout_add_layer_norm_fwd(
            x, residual, w, b, x_bias, seed, eps, dropout_p, row_offset,
            any(ctx.needs_input_grad), backend,
        )  # fmt: skip
        ctx.save_for_backward(total, w, mean, rstd, seed)
        ctx.config = dropout_p, row_offset, backend
        ctx.set_materialize_grads(False)  # None, not zeros, for a fork that nobody has read
        return (y, y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx, *douts):
        refuse_double_backward("dropout_add_layer_norm")
        dropout_p, row_offset, backend = ctx.config
        needs = ctx.needs_input_grad[:5]
        douts = [d.contiguous() for d in douts if d is not None]
        if not douts:
            return (None,) * 11
        dy, dy_residual = douts if len(douts) == 2 else (*douts, None)
        dx, dresidual, *sums = _dropout_add_layer_norm_bwd(
            dy, dy_residual, *ctx.saved_tensors, dropout_p, row_offset, needs, backend
        )
        if needs[0] and needs[1] and dropout_p == 0.0:
            dx = dresidual
        return *where_needed((dx, dresidual, *sums), needs), *[None] * 6


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis, with fp32 statistics.

    Args:
        x: (..., C), fp32, bf16 or fp16.
        w, b: (C,), the dtype of x or fp32.

    Returns:
        (..., C), the dtype of x; under autocast, the autocast dtype.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: shapes that do not fit, tensors on two devices.
    """
    _check("layer_norm", x, w, b)
    y = _LayerNorm.apply(x, w, b, eps, resolve("layer_norm", x, width=x.shape[-1]))
    return autocast(y)[0]  # y, not x: 16 bits cannot hold small deviations from a large mean


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    w: Tensor,
    b: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    row_offset: int = 0,
    x_bias: Tensor | None = None,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of residual + dropout(x + x_bias): a whole residual site in one pass.

    Args:
        x, residual: (..., C) of one shape and dtype: fp32, bf16 or fp16; autocast rounds them.
        w, b: (C,), the dtype of x or fp32.
        dropout_p: probability of dropping, in [0, 1].
        seed: int64 (2,) on the device; needed when dropout_p > 0.
        row_offset: tokens of the global batch that come before these rows.
        x_bias: (C,) added to x before the dropout, such as a projection's bias.
        fork: returns the result twice, for the branch and the residual that follow; backward then
            adds their gradients itself. The two share memory.

    Returns:
        (..., C), the dtype of x; under autocast, the autocast dtype. Two of them if forked.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: shapes that do not fit, tensors on two devices, dropout arguments out of range.
    """
    op = "dropout_add_layer_norm"
    x, residual = apart(*autocast(x, residual))
    _check(op, x, w, b)
    check_tensor(op, "residual", residual, (x.dtype,), x.shape, x)
    if x_bias is not None:
        check_tensor(op, "x_bias", x_bias, (x.dtype, torch.float32), x.shape[-1:], x)
    check_dropout(op, dropout_p, seed, row_offset, prod(x.shape[:-1]), x)
    return apply(
        _DropoutAddLayerNorm, x, residual, w, b, x_bias,
        seed if dropout_p > 0.0 else None, eps, dropout_p, row_offset, fork,
        resolve(op, x, width=x.shape[-1]),
    )  # fmt: skip


def _as_wide(w: Tensor, b: Tensor) -> Tensor:
    """w, in fp32 where b is: backward gives db the dtype of w, and autograd casts dw back."""
    return w if w.dtype == b.dtype else w.float()


def _check(op: str, x: Tensor, w: Tensor, b: Tensor) -> None:
    check_tensor(op, "x", x, ACTIVATION_DTYPES)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has shape (), expected (..., C)")
    for name, vector in (("w", w), ("b", b)):
        check_tensor(op, name, vector, (x.dtype, torch.float32), x.shape[-1:], x)
