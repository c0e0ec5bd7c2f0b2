"""Launchers of the embedding; csrc/embedding/ has the kernels, and how backward sums by id."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt1_kernels.backends.cuda.extension import launch
from gpt1_kernels.backends.ids import check_ids
from gpt1_kernels.errors import error_record
from gpt1_kernels.rng import keep_scale, threshold

CHUNK = 64
"""Sorted ids that leave at most two partial sums; kChunk in csrc/embedding/."""


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
        of_tokens, of_positions, of_types = (
            None if i is None else i.to(torch.int64).contiguous()
            for i in (ids, position_ids, token_type_ids)
        )
        launch(
            "embedding_fwd", out, w_token.dtype,
            out, of_tokens, w_token, w_position, of_positions, of_types, seed, token_error,
            position_error,
            B, T, C, V, P, threshold(dropout_p), keep_scale(dropout_p), row_offset,
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
                "embedding_bwd_positions", dout, dout.dtype,
                dout, dw_position, seed, B, T, C, *dropout,
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
    sorted_ids, order = ids.to(torch.int64).sort(stable=True)
    M = len(order)
    partials = dout.new_empty(-(-M // CHUNK), 2, -(-C // 8) * 8, dtype=torch.float32)
    launch(
        "embedding_bwd", dout, dout.dtype,
        dout, sorted_ids, order, dw, partials, seed,
        M, N, C, V, *dropout,
    )  # fmt: skip


def _errors(bound: int, *read: Tensor | None) -> Tensor | None:
    """Where a kernel records an id that is not in [0, bound); a CPU raises IndexError at once."""
    present = [ids for ids in read if ids is not None]
    for ids in present:
        if not ids.is_cuda:
            check_ids("embedding", ids, bound)
    return error_record("embedding", bound, present[0].device).host if present else None
