"""Token and position rows gathered, added and dropped in one pass; their gradients without atomics.

Backward sorts the ids, so that all rows of one id form a run. Chunks of the sorted order, equal in
size however often an id repeats, add up their part of each run. The sum of a run inside one chunk
goes straight to its table row; of a run that crosses chunks, each chunk leaves a partial sum, and a
second kernel adds these in order. Every grid follows from shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.ids import check_ids
from gpt1_kernels.backends.triton.launch import (
    RUN_TILES,
    cdiv,
    chunk_tiles,
    launch,
    resident_programs,
    row_tiles,
)
from gpt1_kernels.backends.triton.philox import keep_mask
from gpt1_kernels.errors import error_record
from gpt1_kernels.rng import keep_scale, threshold

MAX_SIZES = {"width": 2**16}  # 64 elements of a row to each of 1024 threads


@triton.jit
def _read_table(table_ptr, ids_ptr, row, row_mask, bound, error_ptr, column, C: tl.constexpr):
    """fp32 (BLOCK_N, BLOCK_C), the table rows of `row`'s ids; NaN where an id is out of range.

    An id out of range is written to `error_ptr`, [1 once there is an error, the id].
    """
    id = tl.load(ids_ptr + row, mask=row_mask, other=0).to(tl.int64)
    valid = (id >= 0) & (id < bound)
    errors = error_ptr + tl.zeros_like(id)
    first = ~valid & (tl.load(errors, mask=~valid, other=1) == 0)
    tl.store(errors + 1, id, mask=first)
    tl.store(errors, 1, mask=first)
    mask = (row_mask & valid)[:, None] & (column < C)[None, :]
    offset = id[:, None] * C + column[None, :]
    return tl.load(table_ptr + offset, mask=mask, other=float("nan")).to(tl.float32)


@triton.jit(do_not_specialize=["B", "T", "V", "P", "threshold", "row_offset"])
def embedding_fwd_kernel(
    out_ptr,  # (B, T, C)
    ids_ptr,  # (B, T)
    w_token_ptr,  # (V, C)
    w_position_ptr,  # (P, C)
    position_ids_ptr,  # (B, T) or None
    token_type_ids_ptr,  # (B, T) or None
    seed_ptr,  # (2,), None without dropout
    token_error_ptr,  # (2,)
    position_error_ptr,  # (2,) or None
    B: tl.int64,
    T: tl.int64,
    V: tl.int64,
    P: tl.int64,
    threshold,
    keep_scale,
    row_offset: tl.int64,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.arange(0, BLOCK_C)
    position = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = position < T
    mask = row_mask[:, None] & (column < C)[None, :]
    if position_ids_ptr is None:
        # Read once, and kept in registers for every sequence of the batch.
        offset = position[:, None] * C + column[None, :]
        w_position = tl.load(w_position_ptr + offset, mask=mask, other=0.0).to(tl.float32)

    for sequence in range(tl.program_id(1).to(tl.int64), B, tl.num_programs(1).to(tl.int64)):
        row = sequence * T + position
        out = _read_table(w_token_ptr, ids_ptr, row, row_mask, V, token_error_ptr, column, C)
        if position_ids_ptr is None:
            out += w_position
        else:
            out += _read_table(
                w_position_ptr, position_ids_ptr, row, row_mask, P, position_error_ptr, column, C
            )
        if token_type_ids_ptr is not None:
            out += _read_table(
                w_token_ptr, token_type_ids_ptr, row, row_mask, V, token_error_ptr, column, C
            )
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, row_offset + row, threshold, BLOCK_C)
            out *= tl.where(keep, keep_scale, 0.0)  # a product, which leaves NaN rows NaN
        offset = row[:, None] * C + column[None, :]
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _undropped(
    dout_ptr, seed_ptr, row, row_mask, column, threshold, keep_scale, row_offset,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """fp32 (BLOCK_N, BLOCK_C), the gradient with respect to dropout's input; 0 where masked."""
    mask = row_mask[:, None] & (column < C)[None, :]
    offset = row[:, None] * C + column[None, :]
    gradient = tl.load(dout_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, row_offset + row, threshold, BLOCK_C)
        gradient = tl.where(keep, gradient * keep_scale, 0.0)
    return gradient


@triton.jit(do_not_specialize=["M", "N", "V", "threshold", "row_offset"])
def embedding_bwd_kernel(
    dout_ptr,  # (N, C)
    sorted_ids_ptr,  # (M,), M is N, or 2N where a token type reads a second row
    order_ptr,  # (M,), where the sorted ids came from
    seed_ptr,  # (2,), None without dropout
    dw_ptr,  # (V, C)
    partials_ptr,  # (chunks, 2, C): of the run that enters a chunk, of the one that leaves it
    M: tl.int64,
    N: tl.int64,
    V: tl.int64,
    threshold,
    keep_scale,
    row_offset: tl.int64,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.arange(0, BLOCK_C)
    column_mask = column < C
    chunk = tl.program_id(0).to(tl.int64)
    first, end = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, M)
    entering = tl.load(sorted_ids_ptr + first - 1, mask=first > 0, other=-1)
    leaving = tl.load(sorted_ids_ptr + end, mask=end < M, other=-1)

    sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(first, end, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        index_mask = index < end
        row = tl.load(order_ptr + index, mask=index_mask, other=0)
        row = tl.where(row < N, row, row - N)
        gradient = _undropped(
            dout_ptr, seed_ptr, row, index_mask, column, threshold, keep_scale, row_offset,
            C, BLOCK_C,
        )  # fmt: skip
        id = tl.load(sorted_ids_ptr + index, mask=index_mask, other=V).to(tl.int64)
        id = tl.where(id < 0, V, id)  # ids out of range have no table row
        after = start + BLOCK_N
        continues = tl.load(sorted_ids_ptr + after, mask=after < end, other=-1)
        token = tl.min(id, axis=0)
        while token < V:
            sums += tl.sum(tl.where((id == token)[:, None], gradient, 0.0), axis=0)
            if token != continues:
                if token == entering:
                    tl.store(partials_ptr + 2 * chunk * C + column, sums, mask=column_mask)
                elif token == leaving:
                    tl.store(partials_ptr + (2 * chunk + 1) * C + column, sums, mask=column_mask)
                else:
                    dw = sums.to(dw_ptr.dtype.element_ty)
                    tl.store(dw_ptr + token * C + column, dw, mask=column_mask)
                sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
            token = tl.min(tl.where(id > token, id, V), axis=0)


@triton.jit(do_not_specialize=["M", "V"])
def embedding_bwd_runs_kernel(
    dw_ptr,  # (V, C)
    sorted_ids_ptr,  # (M,)
    partials_ptr,  # (chunks, 2, C)
    M: tl.int64,
    V: tl.int64,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds up the run that leaves a chunk, if it begins there."""
    chunk = tl.program_id(0).to(tl.int64)
    first, end = chunk * CHUNK, (chunk + 1) * CHUNK
    token = tl.load(sorted_ids_ptr + end).to(tl.int64)
    leaves = tl.load(sorted_ids_ptr + end - 1) == token
    enters = tl.load(sorted_ids_ptr + first - 1, mask=first > 0, other=-1) == token
    if leaves & ~enters & (token >= 0) & (token < V):
        column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        column_mask = column < C
        sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        later = chunk + 1
        while tl.load(sorted_ids_ptr + later * CHUNK, mask=later * CHUNK < M, other=-1) == token:
            entered = later + tl.arange(0, BLOCK_P)
            first_id = entered * CHUNK
            same = tl.load(sorted_ids_ptr + first_id, mask=first_id < M, other=-1) == token
            mask = same[:, None] & column_mask[None, :]
            offset = 2 * entered[:, None] * C + column[None, :]
            sums += tl.load(partials_ptr + offset, mask=mask, other=0.0)
            later += BLOCK_P
        left = tl.load(partials_ptr + (2 * chunk + 1) * C + column, mask=column_mask, other=0.0)
        dw = (left + tl.sum(sums, axis=0)).to(dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + token * C + column, dw, mask=column_mask)


@triton.jit(do_not_specialize=["B", "T", "threshold", "row_offset"])
def embedding_bwd_positions_kernel(
    dout_ptr,  # (B, T, C)
    seed_ptr,  # (2,), None without dropout
    dw_ptr,  # (P, C)
    B: tl.int64,
    T: tl.int64,
    threshold,
    keep_scale,
    row_offset: tl.int64,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the gradient of one position over the batch."""
    column = tl.arange(0, BLOCK_C)
    position = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first_sequence in range(0, B, BLOCK_N):
        sequence = first_sequence + tl.arange(0, BLOCK_N)
        row = sequence.to(tl.int64) * T + position
        gradient = _undropped(
            dout_ptr, seed_ptr, row, sequence < B, column, threshold, keep_scale, row_offset,
            C, BLOCK_C,
        )  # fmt: skip
        sums += tl.sum(gradient, axis=0)
    dw = sums.to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + position * C + column, dw, mask=column < C)


def embedding_fwd(
    ids: Tensor,  # (B, T)
    w_token: Tensor,  # (V, C)
    w_position: Tensor,  # (P, C)
    position_ids: Tensor | None,  # (B, T)
    token_type_ids: Tensor | None,  # (B, T)
    seed: Tensor | None,  # (2,)
    dropout_p: float,
    row_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    B, T = ids.shape
    V, C = w_token.shape
    P = w_position.shape[0]
    out = w_token.new_empty(B, T, C, dtype=dtype)
    token_error = _errors(V, ids, token_type_ids)
    position_error = _errors(P, position_ids)
    if out.numel() > 0:
        tiles = row_tiles(C, elements_per_thread=16)
        of_positions = cdiv(T, tiles.BLOCK_N)
        programs = resident_programs(of_positions * B, 8, ids.device)
        launch(
            embedding_fwd_kernel, (of_positions, max(1, programs // of_positions)), tiles,
            out, ids.contiguous(), w_token, w_position,
            *(i if i is None else i.contiguous() for i in (position_ids, token_type_ids)),
            seed, token_error, position_error,
            B, T, V, P, threshold(dropout_p), keep_scale(dropout_p), row_offset, C=C,
        )  # fmt: skip
    return out


def embedding_bwd(
    dout: Tensor,  # (B, T, C)
    ids: Tensor,  # (B, T)
    position_ids: Tensor | None,  # (B, T)
    token_type_ids: Tensor | None,  # (B, T)
    seed: Tensor | None,  # (2,)
    dropout_p: float,
    row_offset: int,
    n_token: int,
    n_position: int,
    table_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    B, T, C = dout.shape
    need_token, need_position = needs
    dw_token = dout.new_zeros((n_token, C) if need_token else 0, dtype=table_dtype)
    dw_position = dout.new_zeros((n_position, C) if need_position else 0, dtype=table_dtype)
    if dout.numel() > 0:
        dropout = threshold(dropout_p), keep_scale(dropout_p), row_offset
        if need_token:
            read = [ids] if token_type_ids is None else [ids, token_type_ids]
            _add_by_id(dout, read, dw_token, seed, dropout)
        if need_position and position_ids is not None:
            _add_by_id(dout, [position_ids], dw_position, seed, dropout)
        elif need_position:
            launch(
                embedding_bwd_positions_kernel, (T,), row_tiles(C, elements_per_thread=64),
                dout, seed, dw_position, B, T, *dropout, C=C,
            )  # fmt: skip
    return dw_token, dw_position


def _add_by_id(
    dout: Tensor,  # (B, T, C)
    read: Sequence[Tensor],  # ids (B, T), each of which was read for every row of dout
    dw: Tensor,  # (V, C), zeros
    seed: Tensor | None,  # (2,)
    dropout: tuple[int, float, int],
) -> None:
    V, C = dw.shape
    N = dout.numel() // C
    ids = read[0].reshape(-1) if len(read) == 1 else torch.cat([i.reshape(-1) for i in read])
    sorted_ids, order = ids.sort(stable=True)
    M = len(order)
    tiles = chunk_tiles(C)
    chunks = cdiv(M, tiles.CHUNK)
    partials = dout.new_empty(chunks, 2, C, dtype=torch.float32)
    launch(
        embedding_bwd_kernel, (chunks,), tiles,
        dout, sorted_ids, order, seed, dw, partials, M, N, V, *dropout, C=C,
    )  # fmt: skip
    if chunks > 1:
        launch(
            embedding_bwd_runs_kernel, (chunks - 1, cdiv(C, RUN_TILES.BLOCK_C)), RUN_TILES,
            dw, sorted_ids, partials, M, V, C=C, CHUNK=tiles.CHUNK,
        )  # fmt: skip


def _errors(bound: int, *read: Tensor | None) -> Tensor | None:
    """Where a kernel records an id that is not in [0, bound); a CPU raises IndexError at once."""
    present = [ids for ids in read if ids is not None]
    for ids in present:
        if not ids.is_cuda:
            check_ids("embedding", ids, bound)
    return error_record("embedding", bound, present[0].device).host if present else None
