"""LayerNorm, alone and behind GPT-1's residual branches: rows stay in registers, fp32 throughout.

The same kernels serve both ops: a plain LayerNorm is the residual site without its optional
tensors. An absent tensor is passed as None, which removes its branch when the kernel is compiled.
Programs walk over tiles of rows in a fixed order, so that the parameters are read once per program
and the sums over rows are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.rows import by_rows
from gpt1_kernels.backends.triton.launch import (
    cdiv,
    launch,
    layer_norm_fwd_tiles,
    resident_programs,
    row_tiles,
)
from gpt1_kernels.backends.triton.partials import sum_partials
from gpt1_kernels.backends.triton.philox import keep_mask
from gpt1_kernels.rng import keep_scale, threshold

MAX_SIZES = {"width": 2**16}  # 64 elements of a row to each of 1024 threads


@triton.jit
def _load_columns(ptr, column, column_mask):
    """fp32 (1, BLOCK_C) of a vector (C,), 0 beyond it."""
    return tl.load(ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _mean(x, C: tl.constexpr):
    """(BLOCK_N, 1), the mean of each row whose elements beyond C are 0.

    The quotient is rounded correctly, so the mean of equal elements is that element wherever their
    sum is exact, as it is for 16-bit ones.
    """
    total = tl.sum(x, axis=1, keep_dims=True)
    return tl.div_rn(total, tl.full(total.shape, C, tl.float32))


@triton.jit(do_not_specialize=["N", "row_offset", "threshold"])
def layer_norm_fwd_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C) or None
    w_ptr,  # (C,)
    b_ptr,  # (C,)
    x_bias_ptr,  # (C,) or None
    seed_ptr,  # (2,), None without dropout
    y_ptr,  # (N, C)
    total_ptr,  # (N, C) or None
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    N: tl.int64,
    stride_xn,
    stride_rn,
    eps,
    threshold,
    keep_scale,
    row_offset: tl.int64,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.arange(0, BLOCK_C)
    column_mask = column < C
    w = _load_columns(w_ptr, column, column_mask)
    b = _load_columns(b_ptr, column, column_mask)
    if x_bias_ptr is not None:
        x_bias = _load_columns(x_bias_ptr, column, column_mask)

    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for first_row in range(program * BLOCK_N, N, programs * BLOCK_N):
        row = first_row + tl.arange(0, BLOCK_N)
        row_mask = row < N
        mask = row_mask[:, None] & column_mask[None, :]

        x_offset = row[:, None] * stride_xn + column[None, :]
        total = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
        if x_bias_ptr is not None:
            total += x_bias
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, row_offset + row, threshold, BLOCK_C)
            total = tl.where(keep, total * keep_scale, 0.0)
        if residual_ptr is not None:
            residual_offset = row[:, None] * stride_rn + column[None, :]
            total += tl.load(residual_ptr + residual_offset, mask=mask, other=0.0).to(tl.float32)
            # Backward sees the rounded sum, so the statistics are those of the rounded sum.
            total = total.to(y_ptr.dtype.element_ty).to(tl.float32)

        mean = _mean(total, C)
        centred = tl.where(column_mask[None, :], total - mean, 0.0)
        if y_ptr.dtype.element_ty == tl.float32:  # the sum's rounding may exceed the deviations
            left = _mean(centred, C)
            mean += left
            centred = tl.where(column_mask[None, :], centred - left, 0.0)
        rstd = 1.0 / tl.sqrt_rn(_mean(centred * centred, C) + eps)
        y = centred * rstd * w + b

        offset = row[:, None] * C + column[None, :]
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)
        if total_ptr is not None:
            tl.store(total_ptr + offset, total.to(total_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + row[:, None], mean, mask=row_mask[:, None])
        tl.store(rstd_ptr + row[:, None], rstd, mask=row_mask[:, None])


@triton.jit(do_not_specialize=["N", "row_offset", "threshold"])
def layer_norm_bwd_kernel(
    dy_ptr,  # (N, C)
    dy_residual_ptr,  # (N, C) or None
    total_ptr,  # (N, C)
    w_ptr,  # (C,)
    mean_ptr,  # (N,)
    rstd_ptr,  # (N,)
    seed_ptr,  # (2,), None without dropout
    dtotal_ptr,  # (N, C) or None
    dx_ptr,  # (N, C) or None
    partial_dw_ptr,  # (programs, C) or None
    partial_db_ptr,  # (programs, C) or None
    partial_dx_bias_ptr,  # (programs, C) or None
    N: tl.int64,
    stride_tn,
    threshold,
    keep_scale,
    row_offset: tl.int64,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.arange(0, BLOCK_C)
    column_mask = column < C
    w = _load_columns(w_ptr, column, column_mask)
    dw = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    db = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    dx_bias = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)

    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for first_row in range(program * BLOCK_N, N, programs * BLOCK_N):
        row = first_row + tl.arange(0, BLOCK_N)
        row_mask = row < N
        mask = row_mask[:, None] & column_mask[None, :]
        offset = row[:, None] * C + column[None, :]

        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if dy_residual_ptr is not None:
            dy += tl.load(dy_residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            dy = dy.to(dy_ptr.dtype.element_ty).to(tl.float32)  # as autograd would add them
        total_offset = row[:, None] * stride_tn + column[None, :]
        total = tl.load(total_ptr + total_offset, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)[:, None]
        x_hat = tl.where(mask, (total - mean) * rstd, 0.0)
        if partial_dw_ptr is not None:
            dw += dy * x_hat
        if partial_db_ptr is not None:
            db += dy

        if dtotal_ptr is not None or dx_ptr is not None or partial_dx_bias_ptr is not None:
            g = dy * w
            dtotal = rstd * (g - _mean(g, C) - x_hat * _mean(g * x_hat, C))
            if dtotal_ptr is not None:
                tl.store(dtotal_ptr + offset, dtotal.to(dtotal_ptr.dtype.element_ty), mask=mask)
            if dx_ptr is not None or partial_dx_bias_ptr is not None:
                if seed_ptr is not None:
                    keep = keep_mask(seed_ptr, row_offset + row, threshold, BLOCK_C)
                    dtotal = tl.where(keep, dtotal * keep_scale, 0.0)
                if dx_ptr is not None:
                    tl.store(dx_ptr + offset, dtotal.to(dx_ptr.dtype.element_ty), mask=mask)
                if partial_dx_bias_ptr is not None:
                    dx_bias += tl.where(mask, dtotal, 0.0)

    partial = program * C + column
    if partial_dw_ptr is not None:
        tl.store(partial_dw_ptr + partial, tl.sum(dw, axis=0), mask=column_mask)
    if partial_db_ptr is not None:
        tl.store(partial_db_ptr + partial, tl.sum(db, axis=0), mask=column_mask)
    if partial_dx_bias_ptr is not None:
        tl.store(partial_dx_bias_ptr + partial, tl.sum(dx_bias, axis=0), mask=column_mask)


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
    if N > 0:
        tiles = layer_norm_fwd_tiles(C)
        programs = resident_programs(cdiv(N, tiles.BLOCK_N), 8, x.device)
        x, stride_xn = by_rows(x)
        residual, stride_rn = (None, 0) if residual is None else by_rows(residual)
        launch(
            layer_norm_fwd_kernel, (programs,), tiles,
            x, residual, w, b, x_bias, seed, y, total if save_total else None, mean, rstd,
            N, stride_xn, stride_rn, eps, threshold(dropout_p), keep_scale(dropout_p), row_offset,
            C=C,
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
    tiles = row_tiles(C, elements_per_thread=16, fewest_warps=2)
    programs = resident_programs(cdiv(N, tiles.BLOCK_N), 8, dy.device)
    needed = [s for s, need in zip(sums, needs[2:], strict=True) if need]
    partials = dy.new_empty(len(needed), programs, C, dtype=torch.float32)
    of_sum = iter(partials.unbind())
    total, stride_tn = by_rows(total)
    launch(
        layer_norm_bwd_kernel, (programs,), tiles,
        dy, dy_residual, total, w, mean, rstd, seed,
        dtotal if need_total else None, dx if need_x else None,
        *[next(of_sum) if need else None for need in needs[2:]],
        N, stride_tn, threshold(dropout_p), keep_scale(dropout_p), row_offset, C=C,
    )  # fmt: skip
    if needed:
        sum_partials(partials, needed)
    return dx, dtotal, *sums
