"""Linear + cross-entropy by chunks of rows: our products, and one kernel that works in place.

A chunk's logits are written once, by the product h Wᵀ. The kernel turns a row of them into its loss
and, where a gradient is asked for, overwrites it with that gradient, from which two more products
give dh and add to dW. A row of GPT-1's vocabulary does not fit the registers of a program, which so
reads it twice (few enough rows are in flight for the second read to hit L2) and writes it once.

At GPT-1's shape (N=32768, C=768, V=40478, bf16) a chunk has 2816 rows. Its logits take 228 MB, the
fp32 sum of dW 124 MB and the partial sums of a split-K product at most 47 MB, as many as the chip
has use for: a workspace below 400 MB, where all logits would take 2.7 GB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.ids import check_ids
from gpt1_kernels.backends.logits import fp16_gain, padded_vocabulary
from gpt1_kernels.backends.triton.launch import (
    cdiv,
    chunk_rows,
    launch,
    row_tiles,
    vocabulary_tiles,
)
from gpt1_kernels.backends.triton.matmul import STRIP, matmul, product, strip_indices
from gpt1_kernels.errors import error_record


@triton.jit
def _exp(x):
    """exp(x) of x ≤ 0. Two logits' difference loses no digit, so that is scaled, and not each."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _log1p(x):
    """log(1 + x) of x ≥ 0 with all its digits (Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    added = tl.where(u == 1.0, 1.0, u - 1.0)
    return tl.where(u == 1.0, x, tl.log(u) * (x / added))


@triton.jit
def store_logits(strips, first_m, first_n, M, N, stride, tensors):
    """Whole rows, −inf beyond N, and so with 16-byte stores; `tensors` is (logits,)."""
    for index in tl.static_range(len(strips)):
        m, n = strip_indices(strips[index], index, first_m, first_n)
        # All strips compare the same columns, which take fewer registers than n of each strip.
        column = tl.arange(0, strips[index].shape[1])[None, :]
        logits = tl.where(column < N - first_n - index * STRIP, strips[index], float("-inf"))
        logits = logits.to(tensors[0].dtype.element_ty)
        tl.store(tensors[0] + m * stride + n, logits, mask=(m < M) & (n < stride))


@triton.jit(do_not_specialize=["V", "ignore_index"])
def cross_entropy_kernel(
    logits_ptr,  # (rows, columns), −inf beyond V; their gradient afterwards if GRADIENT
    targets_ptr,  # (rows,)
    weight_ptr,  # (rows,) or None
    gain_ptr,  # (), a factor of the gradient, or None
    losses_ptr,  # (rows,) or None
    error_ptr,  # (2,), [1 once there is an error, the target]
    columns,
    V,
    ignore_index: tl.int64,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * columns
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    in_range = (target >= 0) & (target < V)
    used = counted & in_range
    # Read before the second pass overwrites it; the reductions in between are barriers.
    target_logit = tl.load(row_ptr + target, mask=used, other=float("-inf")).to(tl.float32)
    label = tl.where(used, target, -1).to(tl.int32)

    # Without the target: where it has almost all probability, 1 − p loses the others' digits.
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    others = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for first in range(0, columns, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        others *= _exp(largest - larger)
        others += tl.where(column == label, 0.0, _exp(x - larger))
        largest = larger
    other = tl.sum(others, axis=0)
    behind = target_logit - largest
    total = other + _exp(behind)

    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    if losses_ptr is not None:
        loss = tl.where(behind == 0.0, _log1p(other), tl.log(total) - behind)
        loss = tl.where(used, loss * weight, tl.where(counted, float("nan"), 0.0))
        tl.store(losses_ptr + row, loss)
        bad = counted & ~in_range
        first_bad = bad & (tl.load(error_ptr, mask=bad, other=1) == 0)
        tl.store(error_ptr + 1, target, mask=first_bad)
        tl.store(error_ptr, 1, mask=first_bad)

    if GRADIENT:
        if gain_ptr is not None:
            weight *= tl.load(gain_ptr)
        scale = tl.where(used, weight, 0.0) / total
        for first in range(0, columns, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            mask = column < columns
            x = tl.load(row_ptr + column, mask=mask, other=float("-inf")).to(tl.float32)
            dx = scale * tl.where(column == label, -other, _exp(x - largest))
            tl.store(row_ptr + column, dx.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def scale_gradients_kernel(
    y_ptr,  # (R, C)
    x_ptr,  # (R, C)
    scale_ptr,  # ()
    R: tl.int64,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    mask = (row < R)[:, None] & (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    y = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    need_h, need_w = needs
    targets = targets.contiguous()
    weight = None if weight is None else weight.contiguous()
    dh = h.new_empty(h.shape if need_h else 0)
    dw = h.new_empty(w.shape if need_w else 0, dtype=torch.float32)
    if N == 0:
        return dh, dw.zero_()

    error = error_record("linear_cross_entropy", V, h.device).host
    columns = padded_vocabulary(V)
    logits = h.new_empty(min(N, chunk_rows(C, V, h.dtype, h.device)), columns)
    gain = None
    if h.dtype == torch.float16 and any(needs):
        gain = fp16_gain(targets, weight, ignore_index)
        unscale = 1 / gain
        scaled_dh = h.new_empty(len(logits), C if need_h else 0, dtype=torch.float32)
    for first in range(0, N, len(logits)):
        chunk = slice(first, min(first + len(logits), N))
        rows = chunk.stop - first
        product(h[chunk], w.t(), store_logits, (logits[:rows, :V],))
        launch(
            cross_entropy_kernel, (rows,), vocabulary_tiles(V),
            logits, targets[chunk], None if weight is None else weight[chunk], gain,
            None if losses is None else losses[chunk], error,
            columns, V, ignore_index, GRADIENT=any(needs),
        )  # fmt: skip
        dlogits = logits[:rows]  # 0 beyond V
        if need_h and gain is None:
            matmul(dlogits, w, dh[chunk])
        elif need_h:
            matmul(dlogits, w, scaled_dh[:rows])
            _scale(scaled_dh[:rows], unscale, dh[chunk])
        if need_w:
            matmul(dlogits.t(), h[chunk], dw, accumulate=first > 0)
    if need_w and gain is not None:
        _scale(dw, unscale, dw)
    return dh, dw


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        _scale(x, scale, y)
    return y


def _scale(x: Tensor, scale: Tensor, y: Tensor) -> None:
    """y = scale · x in fp32, both (R, C) and contiguous."""
    R, C = x.shape
    tiles = row_tiles(C, elements_per_thread=16)
    grid = (cdiv(R, tiles.BLOCK_N),)
    launch(scale_gradients_kernel, grid, tiles, y, x, scale, R, C=C)
