"""Token and position rows added; their gradients accumulated in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding as rows_of

from gpt1_kernels.backends.ids import check_ids, nan_where_invalid
from gpt1_kernels.backends.portable.dropout import row_multiplier


def embedding_fwd(
    ids: Tensor,  # (B, T)
    w_token: Tensor,  # (V, C)
    w_position: Tensor,  # (P, C)
    position_ids: Tensor | None,  # (B, T)
    token_type_ids: Tensor | None,  # (B, T)
    seed: Tensor | None,
    dropout_p: float,
    row_offset: int,
    dtype: torch.dtype,
) -> Tensor:  # (B, T, C)
    valid = [check_ids("embedding", ids, w_token.shape[0])]
    out = rows_of(_safe(ids, valid[0]), w_token).float()
    if position_ids is None:
        out = out + w_position[: ids.shape[1]]
    else:
        valid.append(check_ids("embedding", position_ids, w_position.shape[0]))
        out = out + rows_of(_safe(position_ids, valid[-1]), w_position)
    if token_type_ids is not None:
        valid.append(check_ids("embedding", token_type_ids, w_token.shape[0]))
        out = out + rows_of(_safe(token_type_ids, valid[-1]), w_token)
    if dropout_p > 0.0:
        out = out * row_multiplier(seed, out.shape, dropout_p, row_offset)
    return nan_where_invalid(out, *valid).to(dtype)


def embedding_bwd(
    dout: Tensor,  # (B, T, C)
    ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    row_offset: int,
    n_token: int,
    n_position: int,
    table_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    grad = dout.float()
    if dropout_p > 0.0:
        grad = grad * row_multiplier(seed, dout.shape, dropout_p, row_offset)
    dw_token = dw_position = dout.new_empty(0, dtype=table_dtype)
    if needs[0]:
        total = _scatter(grad, ids, n_token)
        if token_type_ids is not None:
            total += _scatter(grad, token_type_ids, n_token)
        dw_token = total.to(table_dtype)
    if needs[1]:
        if position_ids is None:
            total = grad.new_zeros(n_position, grad.shape[-1])
            total[: ids.shape[1]] = grad.sum(0)
        else:
            total = _scatter(grad, position_ids, n_position)
        dw_position = total.to(table_dtype)
    return dw_token, dw_position


def _scatter(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    valid = check_ids("embedding", ids, rows)
    if valid is not None:
        grad = grad * valid.unsqueeze(-1)
    return torch.ops.aten.embedding_dense_backward(grad, _safe(ids, valid), rows, -1, False)


def _safe(ids: Tensor, valid: Tensor | None) -> Tensor:
    return ids if valid is None else torch.where(valid, ids, 0)
