"""Launchers of LayerNorm, alone and behind a residual branch; csrc/layer_norm/ has the kernels.

A plain LayerNorm is the residual site without its optional tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.backends.cuda.extension import launch, query
from gpt1_kernels.backends.rows import by_rows
from gpt1_kernels.rng import keep_scale, threshold

MAX_SIZES = {"width": 8192}


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    w: Tensor,  # (C,)
    b: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _forward(x, None, w, b, None, None, eps, 0.0, 0, save_total=False)
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor,  # (..., C)
    x: Tensor,  # (..., C)
    w: Tensor,  # (C,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_w, need_b = needs
    _, dx, dw, db, _ = _backward(
        dy, None, x, w, mean, rstd, None, 0.0, 0, [False, need_x, need_w, need_b, False]
    )
    return dx, dw, db


def dropout_add_layer_norm_fwd(
    x: Tensor,  # (..., C)
    residual: Tensor,  # (..., C)
    w: Tensor,  # (C,)
    b: Tensor,  # (C,)
    x_bias: Tensor | None,  # (C,)
    seed: Tensor | None,  # (2,)
    eps: float,
    dropout_p: float,
    row_offset: int,
    save_total: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, residual, w, b, x_bias, seed, eps, dropout_p, row_offset, save_total)


def dropout_add_layer_norm_bwd(
    dy: Tensor,  # (..., C)
    dy_residual: Tensor | None,  # (..., C)
    total: Tensor,  # (..., C)
    w: Tensor,  # (C,)
    mean: Tensor,  # (N,)
    rstd: Tensor,  # (N,)
    seed: Tensor | None,  # (2,)
    dropout_p: float,
    row_offset: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_residual, *need_parameters = needs
    need_x = need_x and not (need_residual and dropout_p == 0.0)  # dx is dresidual then
    return _backward(
        dy, dy_residual, total, w, mean, rstd, seed, dropout_p, row_offset,
        [need_x, need_residual, *need_parameters],
    )  # fmt: skip


def _forward(x, residual, w, b, x_bias, seed, eps, dropout_p, row_offset, save_total):
    N, C = x.shape[:-1].numel(), x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y) if save_total else x.new_empty(0)
    mean = x.new_empty(N, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() > 0:
        x, stride_xn = by_rows(x)
        residual, stride_rn = (None, 0) if residual is None else by_rows(residual)
        launch(
            "layer_norm_fwd", x, x.dtype,
            x, residual, w, b, x_bias, seed, y, total, mean, rstd, N, C, stride_xn, stride_rn,
            eps, threshold(dropout_p), keep_scale(dropout_p), row_offset,
        )  # fmt: skip
    return y, total, mean, rstd


def _backward(dy, dy_residual, total, w, mean, rstd, seed, dropout_p, row_offset, needs):
    need_x, need_total, need_w, need_b, need_x_bias = needs
    N, C = mean.shape[0], w.shape[0]
    dx = torch.empty_like(dy) if need_x else dy.new_empty(0)
    dtotal = torch.empty_like(dy) if need_total else dy.new_empty(0)
    sums = (
        w.new_empty(C if need_w else 0),
        w.new_empty(C if need_b else 0),
        w.new_empty(C if need_x_bias else 0, dtype=torch.float32),
    )
    if total.numel() == 0:
        return dx, dtotal, *(s.zero_() for s in sums)
    blocks = query("layer_norm_bwd_blocks", total, total.dtype, N, C)
    partials = dy.new_empty(sum(needs[2:]), blocks, -(-C // 4) * 4, dtype=torch.float32)
    total, stride_tn = by_rows(total)
    launch(
        "layer_norm_bwd", total, total.dtype,
        dy, dy_residual, total, w, mean, rstd, seed, dtotal, dx, partials, *sums, N, C, stride_tn,
        threshold(dropout_p), keep_scale(dropout_p), row_offset,
    )  # fmt: skip
    return dx, dtotal, *sums
