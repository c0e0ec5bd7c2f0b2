"""Deterministic sums over rows: those of a matrix, and those of the partials a grid left behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.triton.launch import PARTIAL_TILES, SUM_TILES, cdiv, launch


@triton.jit(do_not_specialize=["N"])
def sum_rows_kernel(
    x_ptr,  # (N, C)
    partials_ptr,  # (N / CHUNK, C)
    N: tl.int64,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Programs that run together read whole rows.
    program, column_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C)
    chunk = program // column_blocks
    column = program % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = column < C
    sums = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for first in range(0, CHUNK, BLOCK_N):
        row = chunk * CHUNK + first + tl.arange(0, BLOCK_N)
        mask = (row < N)[:, None] & column_mask[None, :]
        offset = row[:, None] * C + column[None, :]
        sums += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(partials_ptr + chunk * C + column, tl.sum(sums, axis=0), mask=column_mask)


@triton.jit(do_not_specialize=["P"])
def sum_partials_kernel(
    partials_ptr,  # (S, P, C)
    total_ptrs,  # S of (C,)
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = column < C
    for index in tl.static_range(len(total_ptrs)):
        if tl.program_id(1) == index:
            sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
            for first in range(0, P, BLOCK_P):
                partial = first + tl.arange(0, BLOCK_P)
                mask = (partial < P)[:, None] & column_mask[None, :]
                row = index * P + partial.to(tl.int64)
                offset = row[:, None] * C + column[None, :]
                sums += tl.load(partials_ptr + offset, mask=mask, other=0.0)
            tl.store(total_ptrs[index] + column, tl.sum(sums, axis=0), mask=column_mask)


def sum_partials(partials: Tensor, totals: Sequence[Tensor]) -> None:
    """Adds partials (S, P, C) in fp32 over their axis 1, in a fixed order, into S totals of (C,).

    A sum is rounded once, to the dtype of its total.
    """
    _, P, C = partials.shape
    grid = (cdiv(C, PARTIAL_TILES.BLOCK_C), len(totals))
    launch(sum_partials_kernel, grid, PARTIAL_TILES, partials, tuple(totals), P, C=C)


def sum_rows(x: Tensor, total: Tensor) -> None:
    """Adds the rows of x (N, C), contiguous, in a fixed order, into a total of (C,)."""
    N, C = x.shape
    chunks = cdiv(N, SUM_TILES.CHUNK)
    partials = x.new_empty(1, chunks, C, dtype=torch.float32)
    if chunks > 0:
        programs = chunks * cdiv(C, SUM_TILES.BLOCK_C)
        launch(sum_rows_kernel, (programs,), SUM_TILES, x, partials, N, C=C)
    sum_partials(partials, [total])
