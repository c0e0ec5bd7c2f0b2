"""The second half of a deterministic reduction: adds the partial sums that a grid left behind."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.triton.launch import PARTIAL_TILES, launch


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
    grid = (triton.cdiv(C, PARTIAL_TILES.BLOCK_C), len(totals))
    launch(sum_partials_kernel, grid, PARTIAL_TILES, partials, tuple(totals), P, C=C)
