"""Launchers of products and of sums over rows; csrc/common/product.cuh has the kernel that runs on
every chip, hopper_product.cuh the one that the extension takes on compute capability 9.0.

A product reads and writes 16 bytes at a time: its matrices have a multiple of 8 columns, which
the ops see to, and rows aligned to 16 bytes that do not overlap, for which an operand is copied
once if need be.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from gpt1_kernels.backends.cuda.extension import VECTOR, backend_of, launch, module

RUN = 512
"""Rows that a block adds up: few enough to occupy every processor."""


def matmul(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    out: Tensor,  # (M, N)
    *,
    bias: Tensor | None = None,  # (N,)
    scale: Tensor | None = None,  # ()
    accumulate: bool = False,
) -> None:
    """out = scale · a b + bias, or out += scale · a b.

    Args:
        a: bf16 or fp16, either axis contiguous. K is its width; where b has fewer rows, the columns
            of a beyond them are zeros.
        b: the dtype of a, either axis contiguous. Columns of out that b lacks are 0.
        out: row-major, the dtype of a or fp32; fp32 if it accumulates.
        bias: the dtype of a or fp32, contiguous and aligned.
        scale: fp32.
    """
    (M, N), K = out.shape, a.shape[1]
    a_stored, a_transposed = operand(a)
    b_stored, b_transposed = operand(b)
    elements, chunks = _split(M, N, K, a.get_device())
    parts = None if elements == 0 else a.new_empty(elements, dtype=torch.float32)
    launch(
        "matmul", a, a.dtype,
        a_stored, a_transposed, b_stored, b_transposed, out, out.dtype, bias, scale, accumulate,
        parts, chunks,
    )  # fmt: skip


def column_sums(x: Tensor) -> Tensor:
    """fp32 (C,), the sums over the rows of x (R, C), which is row-major; in a fixed order."""
    x = aligned(x)
    while True:
        runs = -(-x.shape[0] // RUN)
        sums = x.new_empty(runs, x.shape[1], dtype=torch.float32)
        launch("column_sums", x, x.dtype, x, [sums], RUN)
        if runs == 1:
            return sums[0]
        x = sums


def operand(x: Tensor) -> tuple[Tensor, bool]:
    """A product's operand as rows that are aligned, and whether these are its transpose's."""
    row, column = x.stride()
    # Both are 1 in a single row or column and in sliding windows: the rows of whole vectors.
    transposed = row == 1 and (column != 1 or x.shape[1] % VECTOR > 0)
    return aligned(x.t() if transposed else x), transposed


def aligned(x: Tensor) -> Tensor:
    """The matrix if its rows are contiguous, start at multiples of 16 bytes and do not overlap.

    Else a copy. TMA reads no rows that overlap, such as those of an expanded row.
    """
    row, column = x.stride()
    starts = x.data_ptr() % 16 == 0 and row * x.itemsize % 16 == 0
    apart = column == 1 and row >= x.shape[1]
    return x if starts and apart else x.clone(memory_format=torch.contiguous_format)


def padded(x: Tensor | None) -> Tensor | None:
    """x with zeros behind it, up to a multiple of 8 along each axis."""
    return None if x is None else pad(x, [n for s in reversed(x.shape) for n in (0, -s % VECTOR)])


@lru_cache(maxsize=1024)  # inputs may have ever new lengths
def _split(M: int, N: int, K: int, index: int) -> tuple[int, int]:
    """The fp32 elements of a split-K workspace, and the number of chunks; (0, 1) unless split."""
    return module(backend_of(index)).split_of_matmul(M, N, K, index)
