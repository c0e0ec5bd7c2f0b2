"""Dropout bits by Philox4x32-7 (see `gpt1_kernels.rng`): NumPy on a CPU, tensors elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from gpt1_kernels import rng

BLOCKS_PER_CHUNK = 16384  # its uint64 temporaries stay in a core's L2 cache
QUERIES_PER_CHUNK = 64  # of a causal mask: few enough to skip most of the upper triangle


def dropout_mask(
    seed: Tensor, shape: Sequence[int], p: float, row_offset: int, causal: bool
) -> Tensor:
    """int32 (*shape[:-1], ceil(shape[-1] / 32)), bit 1 keeps."""
    *leading, columns = shape
    rows = math.prod(leading)
    if not causal:
        packed = _pack(keep_mask(seed, rows, columns, p, row_offset))
        return packed.view(*leading, (columns + 31) // 32)
    batch, heads, queries, keys = shape
    words = (keys + 31) // 32
    bits = torch.empty(batch * heads, queries, words, dtype=torch.int32, device=seed.device)
    arange = partial(torch.arange, device=seed.device)
    for start in range(0, queries, QUERIES_PER_CHUNK):
        stop = min(start + QUERIES_PER_CHUNK, queries)
        visible = stop + keys - queries
        first_rows = row_offset + queries * arange(batch * heads).unsqueeze(1)
        numbers = (first_rows + arange(start, stop)).flatten()
        packed = _pack(_keep(seed, numbers, visible, p))
        needed = packed.shape[-1]
        bits[:, start:stop, :needed] = packed.view(batch * heads, stop - start, needed)
    return bits.view(batch, heads, queries, words)


def multiplier(keep: Tensor, p: float) -> Tensor:
    """bool → fp32, the scale where an element is kept, else 0."""
    # ATen converts bytes several times as fast as bools.
    return keep.view(torch.uint8).float().mul_(rng.keep_scale(p))


def row_multiplier(seed: Tensor, shape: torch.Size, p: float, row_offset: int) -> Tensor:
    """fp32 (..., C): the scale where an element is kept, else 0."""
    keep = keep_mask(seed, shape[:-1].numel(), shape[-1], p, row_offset)
    return multiplier(keep, p).view(shape)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, row_offset: int) -> Tensor:
    """bool (rows, columns), True keeps."""
    return _keep(seed, torch.arange(row_offset, row_offset + rows, device=seed.device), columns, p)


def _keep(seed: Tensor, row_numbers: Tensor, columns: int, p: float) -> Tensor:
    if seed.is_cuda:
        return rng.keep_mask_of_rows(seed, row_numbers, columns, p)
    words = seed.tolist()  # host: the seed of a CPU call is there, so nothing waits
    key, site_and_step = (word & 0xFFFFFFFFFFFFFFFF for word in words)
    mask = np.empty((len(row_numbers), columns), dtype=np.bool_)
    numbers = row_numbers.numpy().astype(np.uint64)
    rows_per_chunk = max(1, BLOCKS_PER_CHUNK * 8 // max(columns, 1))

    def draw(start: int) -> None:
        part = slice(start, start + rows_per_chunk)
        _draw_rows(mask[part], numbers[part], key, site_and_step, rng.threshold(p))

    _for_each(draw, range(0, len(numbers), rows_per_chunk))
    return torch.from_numpy(mask)


def _draw_rows(mask, numbers, key: int, site_and_step: int, threshold: int) -> None:
    """Fills bool (rows, columns). Broadcasting keeps the first rounds one-dimensional."""
    rows, columns = mask.shape
    blocks = (columns + 7) // 8
    word, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    m0, m1 = (np.uint64(m) for m in rng.MULTIPLIERS)
    c0, c1 = np.arange(blocks, dtype=np.uint64)[None, :], numbers[:, None]
    c2 = np.full((1, 1), site_and_step & 0xFFFFFFFF, dtype=np.uint64)
    c3 = np.full((1, 1), site_and_step >> 32, dtype=np.uint64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(rng.ROUNDS):
        even, odd = c0 * m0, c2 * m1
        c0 = (odd >> shift) ^ c1 ^ np.uint64(k0)
        c2 = (even >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = odd & word, even & word
        k0, k1 = (k + d & 0xFFFFFFFF for k, d in zip((k0, k1), rng.KEY_INCREMENTS, strict=True))
    words = np.empty((rows, blocks, 4), dtype="<u4")
    for index, c in enumerate((c0, c1, c2, c3)):
        words[..., index] = c
    values = words.view("<u2").reshape(rows, blocks * 8)[:, :columns]
    np.greater_equal(values, threshold, out=mask)


def _pack(mask: Tensor) -> Tensor:
    """bool (rows, columns) → int32 (rows, words)."""
    if mask.is_cuda:
        return rng.pack_bits(mask)
    rows, columns = mask.shape
    words = (columns + 31) // 32
    packed = np.zeros((rows, 4 * words), dtype=np.uint8)
    packed[:, : (columns + 7) // 8] = np.packbits(mask.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4"))


def unpack(bits: Tensor, columns: int) -> Tensor:
    """int32 (..., words) → bool (..., columns)."""
    if bits.is_cuda:
        return rng.unpack_bits(bits, columns)
    octets = bits.contiguous().numpy().view(np.uint8)
    return torch.from_numpy(
        np.unpackbits(octets, axis=-1, count=columns, bitorder="little").view(np.bool_)
    )


def _for_each(function: Callable[[int], None], starts: range) -> None:
    """Runs the chunks on torch's number of threads: NumPy releases the interpreter's lock.

    A single chunk runs on this thread, in whose cache its temporaries are.
    """
    threads = min(torch.get_num_threads(), len(starts))
    run = map if threads <= 1 else _pool(threads).map
    for _ in run(function, starts):
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dropout-bits")
