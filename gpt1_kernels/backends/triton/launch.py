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
class ChunkTiles:
    """Chunks of CHUNK rows, read in tiles of BLOCK_N whole rows, each in BLOCK_C ≥ C columns."""

    CHUNK: int
    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


@cache
def row_tiles(C: int, elements_per_thread: int) -> RowTiles:
    """Whole rows in registers: 4 warps, and more once a single row exceeds their share."""
    BLOCK_C = max(16, triton.next_power_of_2(C))
    BLOCK_N = max(1, min(64, 128 * elements_per_thread // BLOCK_C))
    num_warps = max(4, min(32, BLOCK_C // (32 * elements_per_thread)))
    return RowTiles(BLOCK_N, BLOCK_C, num_warps)


@cache
def chunk_tiles(C: int) -> ChunkTiles:
    """Chunks that leave a partial sum every 64 rows, with 32 elements a thread in flight."""
    return ChunkTiles(CHUNK=64, **vars(row_tiles(C, elements_per_thread=32)))


BIT_TILES = BitTiles(BLOCK_R=128, BLOCK_W=4, num_warps=4)
"""A thread stores four words, 16 bytes; tiles of 128 rows leave little to waste at the diagonal."""

PARTIAL_TILES = PartialTiles(BLOCK_P=256, BLOCK_C=16, num_warps=4)
"""Narrow, so that 768 columns of up to three gradients occupy every processor."""

RUN_TILES = PartialTiles(BLOCK_P=64, BLOCK_C=64, num_warps=4)
"""Wide, since most programs find no run to add up; narrow enough to share out the longest run."""


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
