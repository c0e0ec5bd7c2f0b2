"""How kernels are launched: configurations, the heuristics that choose them, and `launch`.

A configuration is a frozen dataclass whose fields are the constants of its kernel and Triton's own
options (`num_warps`, …), under the same names. A heuristic is a named function that chooses one
from sizes that stay the same from step to step, so that it can be cached and nothing recompiles.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor

from gpt1_kernels.backends import count_launch
from gpt1_kernels.backends.logits import CHUNK_BYTES, padded_vocabulary

_AS_IT_IS = nullcontext()
_thread = threading.local()

INTERPRETED_PROCESSORS = 2
SMALLEST_SHARED_MEMORY = 99 * 1024  # of compute capabilities 8.6, 8.9 and 12.0


@dataclass(frozen=True)
class RowTiles:
    """Tiles of BLOCK_N whole rows, each row in BLOCK_C ≥ C columns.

    `maxnreg` is how many registers a thread may take; None leaves it to ptxas.
    """

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    maxnreg: int | None = None


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


@dataclass(frozen=True)
class VocabularyTiles:
    """One row of V columns, read BLOCK_V at a time."""

    BLOCK_V: int
    num_warps: int


@dataclass(frozen=True)
class ProductTiles:
    """Tiles of BLOCK_M by BLOCK_N of a product, summed BLOCK_K terms at a time.

    GROUP_M rows of tiles are worked on together, so that their operands stay in the L2 cache.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ChunkTiles:
    """Chunks of CHUNK rows, read in tiles of BLOCK_N rows by BLOCK_C columns."""

    CHUNK: int
    BLOCK_N: int
    BLOCK_C: int
    num_warps: int


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` takes 2 µs on the host.)"""
    return -(-a // b)


@cache
def row_tiles(C: int, elements_per_thread: int, fewest_warps: int = 4) -> RowTiles:
    """Whole rows in registers: few warps, and more once a single row exceeds their share."""
    BLOCK_C = max(16, triton.next_power_of_2(C))
    BLOCK_N = max(1, min(64, 32 * fewest_warps * elements_per_thread // BLOCK_C))
    num_warps = max(fewest_warps, min(32, BLOCK_C // (32 * elements_per_thread)))
    return RowTiles(BLOCK_N, BLOCK_C, num_warps)


@cache
def layer_norm_fwd_tiles(C: int) -> RowTiles:
    """A warp with two rows of 768 columns needs over 128 registers, which ptxas must be allowed."""
    tiles = row_tiles(C, elements_per_thread=64, fewest_warps=1)
    return replace(tiles, maxnreg=min(255, 65536 // (32 * tiles.num_warps)))


def attention_fwd_tiles(D: int, itemsize: int, device: torch.device) -> AttentionTiles:
    """Small tiles, so that many programs share a multiprocessor and hide each other's latency."""
    if itemsize == 4:
        return _fp32_attention_tiles(D)
    if D <= 64:
        BLOCK_N = 64 if is_hopper(device) else 32
        return AttentionTiles(64, BLOCK_N, _head_columns(D), num_warps=4, num_stages=3)
    return AttentionTiles(128, 32, _head_columns(D), num_warps=8, num_stages=2)


def attention_dq_tiles(D: int, itemsize: int) -> AttentionTiles:
    """Fewer scores at a time than in forward: twice as many are in registers."""
    if itemsize == 4:
        return _fp32_attention_tiles(D)
    if D <= 64:
        return AttentionTiles(64, 32, _head_columns(D), num_warps=4, num_stages=3)
    return AttentionTiles(64, 32, _head_columns(D), num_warps=8, num_stages=2)


def attention_dkdv_tiles(D: int, itemsize: int, device: torch.device) -> AttentionTiles:
    """More queries than 32 would spill registers, but on 9.0 they do not."""
    if itemsize == 4:
        return _fp32_attention_tiles(D)
    if D <= 64:
        BLOCK_M = 64 if is_hopper(device) else 32
        return AttentionTiles(BLOCK_M, 64, _head_columns(D), num_warps=4, num_stages=3)
    return AttentionTiles(32, 64, _head_columns(D), num_warps=8, num_stages=2)


def _fp32_attention_tiles(D: int) -> AttentionTiles:
    """Small, because exact products hold their operands in registers."""
    return AttentionTiles(32, 32, _head_columns(D), num_warps=8 if D <= 64 else 16, num_stages=2)


def _head_columns(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


@cache
def chunk_tiles(C: int) -> ChunkTiles:
    """Chunks of 64 whole rows, read with 32 elements a thread in flight."""
    rows = row_tiles(C, elements_per_thread=32)
    return ChunkTiles(64, rows.BLOCK_N, rows.BLOCK_C, rows.num_warps)


@cache
def vocabulary_tiles(V: int) -> VocabularyTiles:
    """32 elements a thread, and programs so large that the rows in flight fit L2."""
    BLOCK_V = max(128, min(8192, triton.next_power_of_2(V)))
    return VocabularyTiles(BLOCK_V, num_warps=max(1, BLOCK_V // (32 * 32)))


BIT_TILES = BitTiles(BLOCK_R=128, BLOCK_W=4, num_warps=4)
"""A thread stores four words, 16 bytes. At T = 512, of 64 words 40 are drawn and 34 are read."""

PARTIAL_TILES = PartialTiles(BLOCK_P=256, BLOCK_C=16, num_warps=4)
"""Narrow, so that 768 columns of up to three gradients occupy every processor."""

SUM_TILES = ChunkTiles(CHUNK=256, BLOCK_N=64, BLOCK_C=64, num_warps=4)
"""32768 rows of 768 columns occupy 1536 programs, whose partial sums add 1.6 % of their bytes."""

RUN_TILES = PartialTiles(BLOCK_P=64, BLOCK_C=64, num_warps=4)
"""Wide, since most programs find no run to add up; narrow enough to share out the longest run."""


EXACT_TILES = ProductTiles(64, 128, 16, GROUP_M=8, num_warps=8, num_stages=3)
"""For fp32, whose products do not run on the tensor cores."""

SMALL_TILES = ProductTiles(128, 128, 32, GROUP_M=8, num_warps=8, num_stages=4)
"""Fit every chip."""

LARGE_TILES = ProductTiles(128, 256, 64, GROUP_M=8, num_warps=8, num_stages=3)
"""For data-centre chips from compute capability 9.0, fewer bytes read for each product."""

HALF_TILES = ProductTiles(128, 128, 64, GROUP_M=8, num_warps=4, num_stages=3)
"""For the same chips, two programs to a multiprocessor: one multiplies in the other's epilogue."""

LARGE_TILES_SHARED_MEMORY = 210 * 1024

LONG_SUM = 4096
"""Sums of fewer terms are not split (split-K): writing and adding the parts would cost too much."""

MOST_CHUNKS = 16
"""The most into which a sum is split."""

MOST_PARTS = 11_800_000
"""Elements of all parts, 47 MB: with them, GPT-1's loss needs less than 400 MB of workspace."""

PART_STEPS = 16
"""The cost of writing a part and reading it to add the parts, in steps along K."""


@cache
def product_tiles(
    dtype: torch.dtype, device: torch.device, long_epilogue: bool = False
) -> ProductTiles:
    """The tiles of all products of a dtype, whatever their sizes."""
    if dtype == torch.float32:
        return EXACT_TILES
    if shared_memory(device) < LARGE_TILES_SHARED_MEMORY:
        return SMALL_TILES
    return HALF_TILES if long_epilogue else LARGE_TILES


@lru_cache(maxsize=1024)  # inputs may have ever new lengths
def split_terms(tiles: int, K: int, config: ProductTiles, device: torch.device) -> int:
    """Split-K: how many of a sum's K terms make a chunk; all of them unless it pays to split.

    It pays where a long sum has too few tiles to fill whole waves of programs.
    """
    steps = cdiv(K, config.BLOCK_K)
    if K < LONG_SUM:
        return K

    def steps_in_turn(chunks: int) -> int:
        waves = cdiv(tiles * chunks, processors(device))
        return waves * (cdiv(steps, chunks) + PART_STEPS * (chunks > 1))

    most = min(MOST_CHUNKS, steps, MOST_PARTS // (tiles * config.BLOCK_M * config.BLOCK_N))
    chunks = min(range(1, max(1, most) + 1), key=steps_in_turn)
    return cdiv(steps, chunks) * config.BLOCK_K


def chunk_rows(C: int, V: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of logits exist at a time.

    As many as fit CHUNK_BYTES, in whole waves of tiles of the narrowest product,
    (rows, V) @ (V, C); where not even one wave fits, in whole tiles, and that product is split-K.
    """
    tiles = product_tiles(dtype, device)
    row_bytes = padded_vocabulary(V) * dtype.itemsize
    wave = cdiv(processors(device), cdiv(C, tiles.BLOCK_N)) * tiles.BLOCK_M
    unit = wave if wave * row_bytes <= CHUNK_BYTES else tiles.BLOCK_M
    return max(1, CHUNK_BYTES // (unit * row_bytes)) * unit


def reads_in_bulk(x: Tensor, columns: int, stride_r: int, stride_c: int) -> bool:
    """Whether the matrix that x stores row-major is read by tensor descriptors, not by pointers.

    They need TMA, and rows that start at multiples of 16 bytes and do not overlap. The fp32
    products, bound by arithmetic, do without.
    """
    return (
        has_bulk_copies(x.device)
        and x.dtype != torch.float32
        and x.numel() > 0
        and x.data_ptr() % 16 == 0
        and stride_c == 1
        and stride_r >= columns
        and stride_r * x.element_size() % 16 == 0
    )


def resident_programs(tiles: int, per_processor: int, device: torch.device) -> int:
    """The grid of a persistent kernel: at most `per_processor` programs on each multiprocessor."""
    return min(tiles, per_processor * processors(device))


@cache
def processors(device: torch.device) -> int:
    """The number of streaming multiprocessors; a small constant under the interpreter."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may ask for; those of the smallest chips on a CPU."""
    if device.type != "cuda":
        return SMALLEST_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the chip is of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def has_bulk_copies(device: torch.device) -> bool:
    """Whether the chip has TMA, the engine that copies tiles by tensor descriptors."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel, grid: tuple[int, ...], config, *args, **constants) -> None:
    """Starts a kernel, and counts it.

    It runs on the device and the current stream of `args[0]`, a tensor or a tuple that starts with
    one.

    Args:
        kernel: a function under `triton.jit`.
        grid: up to three numbers of programs, none of them zero.
        config: a configuration from this file.
        args: the kernel's arguments; None for an absent tensor.
        constants: the kernel's constants that are not in `config`.
    """
    count_launch("triton", kernel.__name__)
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    with _current(first.get_device()):
        kernel[grid](*args, **constants, **vars(config))


def _current(index: int) -> AbstractContextManager:
    """Makes a GPU the current one, unless it is; −1 is a CPU."""
    if index < 0:
        return _AS_IT_IS
    if index != torch.cuda.current_device():
        return torch.cuda.device(index)
    if not hasattr(_thread, "has_context"):
        # A thread gets its CUDA context with its first launch, but Triton needs one before that,
        # to make tensor maps.
        torch.cuda.set_device(index)
        _thread.has_context = True
    return _AS_IT_IS
