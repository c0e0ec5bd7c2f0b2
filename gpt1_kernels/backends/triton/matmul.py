"""Products of matrices, and what is done to a tile of one while it is in registers.

`product` multiplies and hands each finished tile to an epilogue, a function under `triton.jit` that
may add a bias, apply a GELU or take sums, and that stores. It is given the tile as strips of
columns, which spares registers. The kernel is persistent: its programs walk over the tiles, in
groups of rows so that neighbours share their operands in the L2 cache.

An operand is stored row-major, (rows, columns), as itself or as its transpose: TRANSPOSED says
which. It is passed as a tensor descriptor, by which TMA (compute capability 9.0 and later) copies
tiles, or else as (pointer, columns, stride between rows): BULK says which.

A sum over many terms with few tiles to fill the chip (a weight's gradient) is cut into chunks of
terms (split-K). Programs work on all tiles of a chunk before the next chunk, so that its operands
are read from memory once and then found in the L2 cache, and leave each part in a workspace; a
second kernel adds a tile's parts in order, which makes two runs bit-identical. (Stream-K (Osama et
al. 2023), whose shares cross the borders of tiles, makes fewer parts, but every program is then at
another place along K: on an H100 that took 1.6 times as long.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt1_kernels.backends.triton.launch import (
    cdiv,
    launch,
    product_tiles,
    reads_in_bulk,
    resident_programs,
    split_terms,
)

STRIP = tl.constexpr(64)
"""Columns of a strip."""


@triton.jit
def store_product(strips, first_m, first_n, M, N, stride, tensors):
    """out = acc + bias; `tensors` is (out, bias (N,) or None)."""
    out_ptr, bias_ptr = tensors
    for index in tl.static_range(len(strips)):
        acc = strips[index]
        m, n = strip_indices(acc, index, first_m, first_n)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m * stride + n, out, mask=(m < M) & (n < N))


@triton.jit
def add_product(strips, first_m, first_n, M, N, stride, tensors):
    """out += acc; `tensors` is (out,), in fp32."""
    for index in tl.static_range(len(strips)):
        m, n = strip_indices(strips[index], index, first_m, first_n)
        mask = (m < M) & (n < N)
        out_ptr = tensors[0] + m * stride + n
        tl.store(out_ptr, tl.load(out_ptr, mask=mask, other=0.0) + strips[index], mask=mask)


@triton.jit
def strip_indices(strip, index, first_m, first_n):
    """The rows (…, 1) and columns (1, …) of a strip of the tile that begins there."""
    m = (tl.arange(0, strip.shape[0]) + first_m)[:, None]
    n = (tl.arange(0, strip.shape[1]) + index * STRIP + first_n)[None, :]
    return m, n


@triton.jit
def _tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile; tiles go down GROUP_M rows before they go right."""
    group_tiles = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_tile_m = tile // group_tiles * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first_tile_m, GROUP_M)
    within = tile % group_tiles
    return (first_tile_m + within % rows) * BLOCK_M, within // rows * BLOCK_N


@triton.jit
def _load(
    x, rows, first_row, first_column,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TRANSPOSED: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """(BLOCK_R, BLOCK_C) of an operand as it is stored, or its transpose; 0 beyond it."""
    if BULK:
        tile = x.load([tl.cast(first_row, tl.int32), tl.cast(first_column, tl.int32)])
        return tile.T if TRANSPOSED else tile
    else:
        x_ptr, columns, stride = x
        row = tl.expand_dims(first_row + tl.arange(0, BLOCK_R), 0 if TRANSPOSED else 1)
        column = tl.expand_dims(first_column + tl.arange(0, BLOCK_C), 1 if TRANSPOSED else 0)
        mask = (row < rows) & (column < columns)
        return tl.load(x_ptr + row * stride + column, mask=mask, other=0.0)


@triton.jit
def _multiply(
    a, b, M, N, K, first_m, first_n, first_k, terms,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    A_BULK: tl.constexpr, B_BULK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 (BLOCK_M, BLOCK_N) of a tile over `terms` terms from first_k on; 0 beyond K."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, terms, BLOCK_K):
        k = first_k + step
        if A_TRANSPOSED:
            x = _load(a, K, k, first_m, BLOCK_K, BLOCK_M, True, A_BULK)
        else:
            x = _load(a, M, first_m, k, BLOCK_M, BLOCK_K, False, A_BULK)
        if B_TRANSPOSED:
            y = _load(b, N, first_n, k, BLOCK_N, BLOCK_K, True, B_BULK)
        else:
            y = _load(b, K, k, first_n, BLOCK_K, BLOCK_N, False, B_BULK)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    return acc


@triton.jit
def _strips(acc):
    """The tile cut, in registers, into STRIP columns each."""
    if acc.shape[1] == STRIP:
        return (acc,)
    else:
        halves = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1)
        left, right = halves.split()
        return _strips(left) + _strips(right)


@triton.jit(do_not_specialize=["M", "K"])
def matmul_kernel(
    tensors,  # of the epilogue, those of (M, N) with stride_om
    a,  # (M, K)
    b,  # (K, N)
    M: tl.int64,
    N,
    K: tl.int64,
    stride_om,
    EPILOGUE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    A_BULK: tl.constexpr,
    B_BULK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    # Flattened into one loop, so that a tile's first operands load while the last tile is stored.
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(program, tiles, programs, flatten=True):
        first_m, first_n = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = _multiply(
            a, b, M, N, K, first_m, first_n, 0, K,
            A_TRANSPOSED, B_TRANSPOSED, A_BULK, B_BULK, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        EPILOGUE(_strips(acc), first_m, first_n, M, N, stride_om, tensors)


@triton.jit(do_not_specialize=["M", "K"])
def split_matmul_kernel(
    parts_ptr,  # (chunks · tiles, BLOCK_M, BLOCK_N)
    a,  # (M, K)
    b,  # (K, N)
    M: tl.int64,
    N,
    K: tl.int64,
    chunk: tl.int64,  # terms, a multiple of BLOCK_K
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    A_BULK: tl.constexpr,
    B_BULK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for part in tl.range(program, tl.cdiv(K, chunk) * tiles, programs, flatten=True):
        first_m, first_n = _tile_origin(part % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_k = part // tiles * chunk
        acc = _multiply(
            a, b, M, N, K, first_m, first_n, first_k, chunk,
            A_TRANSPOSED, B_TRANSPOSED, A_BULK, B_BULK, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        strips = _strips(acc)
        for index in tl.static_range(len(strips)):
            m, n = strip_indices(strips[index], index, part * BLOCK_M, 0)
            tl.store(parts_ptr + m * BLOCK_N + n, strips[index])


@triton.jit(do_not_specialize=["M", "parts"])
def sum_parts_kernel(
    parts_ptr,  # (parts, BLOCK_M, BLOCK_N)
    tensors,  # of the epilogue
    M: tl.int64,
    N,
    stride_om,
    parts: tl.int64,
    EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    index = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, STRIP), dtype=tl.float32)
    for part in range(tile, parts, tiles):
        m, n = strip_indices(acc, index, part * BLOCK_M, 0)
        acc += tl.load(parts_ptr + m * BLOCK_N + n)
    first_m, first_n = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    EPILOGUE((acc,), first_m, first_n + index * STRIP, M, N, stride_om, tensors)


def matmul(
    a: Tensor,  # (≥ M, ≥ K)
    b: Tensor,  # (K, N)
    out: Tensor,  # (M, N)
    *,
    accumulate: bool = False,
) -> None:
    """out = a b, or out += a b.

    Args:
        a: bf16, fp16 or fp32, either axis contiguous. What it has beyond (M, K), a padding that
            aligns its rows, is finite and without effect.
        b: the dtype of a, either axis contiguous.
        out: row-major, the dtype of a or fp32; fp32 if it accumulates.
    """
    if accumulate:
        product(a, b, add_product, (out,))
    else:
        product(a, b, store_product, (out, None))


def product(
    a: Tensor,  # (≥ M, ≥ K)
    b: Tensor,  # (K, N)
    epilogue,
    tensors: tuple[Tensor | None, ...],
    *,
    long_epilogue: bool = False,
) -> None:
    """Multiplies a and b and gives each tile in fp32 to an epilogue.

    Args:
        a: bf16, fp16 or fp32, either axis contiguous, finite beyond (M, K).
        b: the dtype of a, either axis contiguous.
        epilogue: a function under `triton.jit` like `store_product`. It is given one or more strips
            of STRIP columns, side by side; columns beyond N are 0.
        tensors: what it reads and writes. The first is (M, N) and row-major; all others of this
            shape have its strides.
        long_epilogue: whether the epilogue takes about as long as the product.
    """
    (M, N), K = tensors[0].shape, b.shape[0]
    if M == 0 or N == 0:
        return
    tiles = product_tiles(a.dtype, a.device, long_epilogue)
    a, A_TRANSPOSED, A_BULK = _operand(a, tiles.BLOCK_M, tiles.BLOCK_K)
    b, B_TRANSPOSED, B_BULK = _operand(b, tiles.BLOCK_K, tiles.BLOCK_N)
    layouts = {
        "A_TRANSPOSED": A_TRANSPOSED, "B_TRANSPOSED": B_TRANSPOSED,
        "A_BULK": A_BULK, "B_BULK": B_BULK,
    }  # fmt: skip
    device, stride_om = tensors[0].device, tensors[0].stride(0)
    tile_count = cdiv(M, tiles.BLOCK_M) * cdiv(N, tiles.BLOCK_N)
    chunk = split_terms(tile_count, K, tiles, device)
    if chunk >= K:
        per_processor = 8 // tiles.num_warps  # its registers hold the tiles of eight warps
        programs = resident_programs(tile_count, per_processor, device)
        launch(
            matmul_kernel, (programs,), tiles,
            tensors, a, b, M, N, K, stride_om, EPILOGUE=epilogue, **layouts,
        )  # fmt: skip
        return
    count = tile_count * cdiv(K, chunk)
    programs = resident_programs(count, 1, device)
    parts = tensors[0].new_empty(count, tiles.BLOCK_M, tiles.BLOCK_N, dtype=torch.float32)
    launch(split_matmul_kernel, (programs,), tiles, parts, a, b, M, N, K, chunk, **layouts)
    launch(
        sum_parts_kernel, (tile_count, tiles.BLOCK_N // STRIP.value), tiles,
        parts, tensors, M, N, stride_om, count, EPILOGUE=epilogue,
    )  # fmt: skip


def _operand(
    x: Tensor, BLOCK_R: int, BLOCK_C: int
) -> tuple[TensorDescriptor | tuple[Tensor, int, int], bool, bool]:
    """An operand, read in blocks, as a kernel is given it: itself, TRANSPOSED and BULK."""
    (rows, columns), (stride_r, stride_c) = x.shape, x.stride()
    transposed = stride_c != 1 and (stride_r == 1 or rows == 1)
    if transposed:
        rows, columns, stride_r, stride_c = columns, rows, stride_c, stride_r
    if not reads_in_bulk(x, columns, stride_r, stride_c):
        return (x, columns, stride_r), transposed, False
    block = [BLOCK_C, BLOCK_R] if transposed else [BLOCK_R, BLOCK_C]
    return TensorDescriptor(x, [rows, columns], [stride_r, 1], block), transposed, True
