"""LayerNorm and the residual site around it, in fp32 (PyTorch's bf16 backward is not)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.backends.portable.dropout import row_multiplier
from gpt1_kernels.backends.portable.sums import column_sums


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    w: Tensor,  # (C,)
    b: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x32 = x.float()
    mean = x32.mean(-1, keepdim=True)
    # Centred first: ATen multiplies x and its mean by rstd before it subtracts them.
    centred = _minus(x32, mean, x)
    y, rest, rstd = torch.native_layer_norm(centred, w.shape, w.float(), b.float(), eps)
    return y.to(x.dtype), (mean + rest).flatten(), rstd.flatten()


def layer_norm_bwd(
    dy: Tensor,  # (..., C)
    x: Tensor,  # (..., C)
    w: Tensor,
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    needs: list[bool],
) -> tuple[Tensor, ...]:
    dx, dw, db = _gradients(dy, x, w, mean, rstd, needs)
    return dx.to(x.dtype), dw, db


def dropout_add_layer_norm_fwd(
    x: Tensor,  # (..., C)
    residual: Tensor,  # (..., C)
    w: Tensor,
    b: Tensor,
    x_bias: Tensor | None,  # (C,)
    seed: Tensor | None,  # (2,)
    eps: float,
    dropout_p: float,
    row_offset: int,
    save_total: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    branch = x.float() if x_bias is None else x.float() + x_bias
    if dropout_p > 0.0:
        branch = row_multiplier(seed, x.shape, dropout_p, row_offset).mul_(branch)
    total = (residual + branch).to(x.dtype).contiguous()
    y, mean, rstd = layer_norm_fwd(total, w, b, eps)
    return y, total if save_total else x.new_empty(0), mean, rstd


def dropout_add_layer_norm_bwd(
    dy: Tensor,  # (..., C)
    dy_residual: Tensor | None,  # (..., C)
    total: Tensor,  # (..., C)
    w: Tensor,
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    seed: Tensor | None,
    dropout_p: float,
    row_offset: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_residual, need_w, need_b, need_x_bias = needs
    need_total = need_x or need_residual or need_x_bias
    if dy_residual is not None:
        dy = dy + dy_residual
    dtotal32, dw, db = _gradients(dy, total, w, mean, rstd, [need_total, need_w, need_b])
    dx = dtotal = dtotal32.to(total.dtype)
    if dropout_p > 0.0 and (need_x or need_x_bias):
        # Not of the rounded dtotal: in fp16 that may be infinite, and 0 · ∞ is NaN.
        multiplier = row_multiplier(seed, total.shape, dropout_p, row_offset)
        dx = multiplier.mul_(dtotal32).to(total.dtype)
    dx_bias = w.new_empty(0, dtype=torch.float32)
    if need_x_bias:
        dx_bias = column_sums(dx.view(mean.shape[0], w.shape[0]))
    shared = need_residual and dropout_p == 0.0
    return (
        dx if need_x and not shared else total.new_empty(0),
        dtotal if need_residual else total.new_empty(0),
        dw,
        db,
        dx_bias,
    )


def _gradients(
    dy: Tensor,  # (..., C)
    x: Tensor,  # (..., C)
    w: Tensor,
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in fp32, dw and db as w; of 0 elements if not needed."""
    of_row = *x.shape[:-1], 1
    w32, centred = w.float(), _minus(x.float(), mean.view(of_row), x)
    zero = torch.zeros_like(mean).view(of_row)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.float(), centred, w.shape, zero, rstd.view(of_row), w32, w32, needs
    )
    return (
        dx if needs[0] else mean.new_empty(0),
        dw.to(w.dtype) if needs[1] else w.new_empty(0),
        db.to(w.dtype) if needs[2] else w.new_empty(0),
    )


def _minus(x32: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    """x32 − mean, in the memory of x32 where that is not x's."""
    return torch.sub(x32, mean, out=None if x32 is x else x32)
