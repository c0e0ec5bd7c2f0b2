"""Dropout bits: keep[r, j] = value(seed, r, j) ≥ threshold(p), packed 32 to a word (see `rng`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from gpt1_kernels.backends import resolve
from gpt1_kernels.ops._library import check_dropout, check_tensor, define, last_contiguous


def _fake(seed, shape, p, row_offset, causal, backend):
    return seed.new_empty([*shape[:-1], (shape[-1] + 31) // 32], dtype=torch.int32)


_dropout_mask = define(
    "dropout_mask",
    "dropout_mask(Tensor seed, SymInt[] shape, float p, SymInt row_offset, bool causal, "
    "str backend) -> Tensor",
    _fake,
)


def dropout_mask(
    seed: Tensor, shape: Sequence[int], p: float, *, row_offset: int = 0, causal: bool = False
) -> Tensor:
    """The keep bits of an array, drawn once and read by attention's forward and backward.

    Args:
        seed: int64 (2,), on the device where the bits are wanted (see `gpt1_kernels.rng`).
        shape: (..., columns); the leading axes count rows.
        p: probability of dropping, in [0, 1].
        row_offset: the number of the first row.
        causal: shape is (B, H, Tq, Tk), Tk ≥ Tq, and bits above the diagonal are not to be read:
            their words may stay unwritten.

    Returns:
        int32 (..., ceil(columns / 32)): column j is bit j mod 32 of word j // 32; 1 keeps; unused
        bits are 0.

    Raises:
        ValueError: p outside [0, 1], a seed or a causal shape that does not fit, more than 2³²
            rows.
        TypeError: a seed that is not int64.
    """
    if len(shape) < 1:
        raise ValueError("dropout_mask: shape is (), expected (..., columns)")
    if causal and (len(shape) != 4 or shape[2] > shape[3]):
        raise ValueError(
            f"dropout_mask: shape is {tuple(shape)}, expected (B, H, Tq, Tk) with Tk ≥ Tq if causal"
        )
    check_dropout("dropout_mask", p, seed, row_offset, prod(shape[:-1]), seed)
    if p == 0.0:  # where an op needs no seed, but a mask is drawn on the seed's device
        check_tensor("dropout_mask", "seed", seed, (torch.int64,), (2,))
    return draw_mask(seed, shape, p, row_offset, causal)


def draw_mask(
    seed: Tensor, shape: Sequence[int], p: float, row_offset: int, causal: bool
) -> Tensor:
    """`dropout_mask` for an op that has checked its arguments."""
    backend = resolve("dropout_mask", seed)
    return _dropout_mask(last_contiguous(seed), shape, p, row_offset, causal, backend)
