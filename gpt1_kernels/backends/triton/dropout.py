"""Dropout bits, 32 to a word."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.triton.launch import BIT_TILES, cdiv, launch
from gpt1_kernels.backends.triton.philox import philox_block
from gpt1_kernels.rng import threshold


@triton.jit(do_not_specialize=["row_offset", "rows", "columns", "last_column", "threshold"])
def dropout_mask_kernel(
    bits_ptr,  # (matrices, rows, words)
    seed_ptr,  # (2,)
    row_offset: tl.int64,
    rows: tl.int64,
    words,
    columns,
    last_column,  # row i needs the columns up to i + last_column
    threshold,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0).to(tl.int64)
    first_row = program % tiles * BLOCK_R
    row_of_matrix = first_row + tl.arange(0, BLOCK_R)
    row = program // tiles * rows + row_of_matrix
    needed_words = tl.minimum((first_row + BLOCK_R - 1 + last_column) // 32 + 1, words)

    for first_word in range(0, needed_words, BLOCK_W):
        word = first_word + tl.arange(0, BLOCK_W)
        bits = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.uint32)
        for octet in tl.static_range(4):
            block = word * 4 + octet
            drawn = philox_block(seed_ptr, (row_offset + row)[:, None], block[None, :])
            for k in tl.static_range(4):
                low, high = drawn[k] & 0xFFFF, drawn[k] >> 16
                bits |= (low >= threshold).to(tl.uint32) << (8 * octet + 2 * k)
                bits |= (high >= threshold).to(tl.uint32) << (8 * octet + 2 * k + 1)
        unused = tl.maximum((word + 1) * 32 - columns, 0).to(tl.uint32)
        bits &= (tl.full((BLOCK_W,), 0xFFFFFFFF, dtype=tl.uint32) >> unused)[None, :]
        mask = (row_of_matrix < rows)[:, None] & (word < words)[None, :]
        tl.store(bits_ptr + row[:, None] * words + word[None, :], bits.to(tl.int32), mask=mask)


def dropout_mask(
    seed: Tensor,  # (2,)
    shape: Sequence[int],
    p: float,
    row_offset: int,
    causal: bool,
) -> Tensor:
    """int32 (*shape[:-1], ceil(shape[-1] / 32)), bit 1 keeps."""
    *leading, columns = shape
    words = cdiv(columns, 32)
    bits = torch.empty(*leading, words, dtype=torch.int32, device=seed.device)
    if bits.numel() == 0:
        return bits
    if causal:
        rows = leading[-1]
        last_column = columns - rows
    else:
        rows = math.prod(leading)
        last_column = columns - 1
    tiles = math.prod(leading) // rows * cdiv(rows, BIT_TILES.BLOCK_R)
    launch(
        dropout_mask_kernel, (tiles,), BIT_TILES,
        bits, seed, row_offset, rows, words, columns, last_column, threshold(p),
    )  # fmt: skip
    return bits
