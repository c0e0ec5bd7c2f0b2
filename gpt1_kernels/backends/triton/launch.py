"""How kernels are launched: configurations, the heuristics that choose them, and `launch`.

A configuration is a frozen dataclass whose fields are the constants of its kernel and Triton's own
options (`num_warps`, …), under the same names. A heuristic is a named function that chooses one
from sizes that stay the same from step to step, so that it can be cached and nothing recompiles.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton

from gpt1_kernels.backends import count_launch

INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True)
class RowTiles:
    """Tiles of BLOCK_N whole rows, each row in BLOCK_C ≥ C columns."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


@dataclass(frozen=True)
class BitTiles:
    """Tiles of BLOCK_R rows by BLOCK_W words of 32 dropout bits."""

    BLOCK_R: int
    BLOCK_W: int
    num_warps: int


@dataclass(frozen=True)
class PartialTiles:
    """Tiles of BLOCK_P partial sums by BLOCK_C columns."""

    BLOCK_P: int
    BLOCK_C: int
    num_warps: int


@dataclass(frozen=True)
class AttentionTiles:
    """Tiles of BLOCK_M queries by BLOCK_N keys, with heads of D ≤ BLOCK_D."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@cache
def row_tiles(C: int, elements_per_thread: int) -> RowTiles:
    """Whole rows in registers: 4 warps, and more once a single row exceeds their share."""
    BLOCK_C = max(16, triton.next_power_of_2(C))
    BLOCK_N = max(1, min(64, 128 * elements_per_thread // BLOCK_C))
    num_warps = max(4, min(32, BLOCK_C // (32 * elements_per_thread)))
    return RowTiles(BLOCK_N, BLOCK_C, num_warps)


@cache
def attention_fwd_tiles(D: int, itemsize: int) -> AttentionTiles:
    """Many queries to a tile, so that keys, values and dropout bits are read few times."""
    if itemsize == 4:
        return _fp32_attention_tiles(D)
    if D <= 64:
        return AttentionTiles(256, 64, _head_columns(D), num_warps=8, num_stages=3)
    return AttentionTiles(128, 32, _head_columns(D), num_warps=8, num_stages=2)


@cache
def attention_dq_tiles(D: int, itemsize: int) -> AttentionTiles:
    """Half of forward's queries to a tile: there are twice as many scores in registers."""
    if itemsize == 4:
        return _fp32_attention_tiles(D)
    if D <= 64:
        return AttentionTiles(128, 64, _head_columns(D), num_warps=8, num_stages=3)
    return AttentionTiles(64, 32, _head_columns(D), num_warps=8, num_stages=2)


@cache
def attention_dkdv_tiles(D: int, itemsize: int) -> AttentionTiles:
    """Many keys to a tile, so that queries and their gradients are read few times."""
    if itemsize == 4:
        return _fp32_attention_tiles(D)
    if D <= 64:
        return AttentionTiles(64, 128, _head_columns(D), num_warps=8, num_stages=2)
    return AttentionTiles(32, 64, _head_columns(D), num_warps=8, num_stages=2)


def _fp32_attention_tiles(D: int) -> AttentionTiles:
    """Small, because exact products hold their operands in registers."""
    return AttentionTiles(32, 32, _head_columns(D), num_warps=8 if D <= 64 else 16, num_stages=2)


def _head_columns(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


BIT_TILES = BitTiles(BLOCK_R=128, BLOCK_W=4, num_warps=4)
"""A thread stores four words, 16 bytes; tiles of 128 rows leave little to waste at the diagonal."""

PARTIAL_TILES = PartialTiles(BLOCK_P=256, BLOCK_C=16, num_warps=4)
"""Narrow, so that 768 columns of up to three gradients occupy every processor."""


def resident_programs(tiles: int, per_processor: int, device: torch.device) -> int:
    """The size of a grid whose programs walk over `tiles`, in one wave of `per_processor` each."""
    return min(tiles, per_processor * processors(device))


@cache
def processors(device: torch.device) -> int:
    """The number of streaming multiprocessors; a small constant under the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel, grid: tuple[int, ...], config, *args, **constants) -> None:
    """Starts a kernel, and counts it.

    It runs on the device and the current stream of `args[0]`, a tensor.

    Args:
        kernel: a function under `triton.jit`.
        grid: up to three numbers of programs, none of them zero.
        config: a configuration from this file.
        args: the kernel's arguments; None for an absent tensor.
        constants: the kernel's constants that are not in `config`.
    """
    count_launch("triton", kernel.__name__)
    with _current(args[0].device):
        kernel[grid](*args, **constants, **vars(config))


def _current(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
