"""GPT-1's input: dropout(w_token[ids] + w_position[positions] (+ w_token[token_type_ids])).

Backward adds the masked gradient of every position to the rows that it was read from, in fp32 and
in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.backends import resolve
from gpt1_kernels.numerics import ACTIVATION_DTYPES
from gpt1_kernels.ops._library import (
    apart,
    autocast_dtype,
    check_dropout,
    check_tensor,
    define,
    last_contiguous,
    refuse_double_backward,
    where_needed,
)

_INDEX_DTYPES = (torch.int64, torch.int32)


def _fake_fwd(
    ids, w_token, w_position, position_ids, token_type_ids, seed, dropout_p, row_offset, dtype,
    backend,
):  # fmt: skip
    return w_token.new_empty([*ids.shape, w_token.shape[1]], dtype=dtype)


def _fake_bwd(
    dout, ids, position_ids, token_type_ids, seed, dropout_p, row_offset, n_token, n_position,
    table_dtype, needs, backend,
):  # fmt: skip
    width = dout.shape[-1]
    return tuple(
        dout.new_empty([rows, width] if need else [0], dtype=table_dtype)
        for rows, need in zip((n_token, n_position), needs, strict=True)
    )


_embedding_fwd = define(
    "embedding",
    "embedding_fwd(Tensor ids, Tensor w_token, Tensor w_position, Tensor? position_ids, "
    "Tensor? token_type_ids, Tensor? seed, float dropout_p, SymInt row_offset, ScalarType dtype, "
    "str backend) -> Tensor",
    _fake_fwd,
)
_embedding_bwd = define(
    "embedding",
    "embedding_bwd(Tensor dout, Tensor ids, Tensor? position_ids, Tensor? token_type_ids, "
    "Tensor? seed, float dropout_p, SymInt row_offset, SymInt n_token, SymInt n_position, "
    "ScalarType table_dtype, bool[2] needs, str backend) -> (Tensor, Tensor)",
    _fake_bwd,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, ids, w_token, w_position, position_ids, token_type_ids, seed, dropout_p, row_offset,
        dtype, backend,
    ):  # fmt: skip
        ctx.save_for_backward(ids, position_ids, token_type_ids, seed)
        ctx.config = (
            dropout_p, row_offset, w_token.shape[0], w_position.shape[0], w_token.dtype,
        )  # fmt: skip
        ctx.backend = backend
        return _embedding_fwd(
            ids, w_token, w_position, position_ids, token_type_ids, seed, dropout_p, row_offset,
            dtype, backend,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("embedding")
        needs = ctx.needs_input_grad[1:3]
        grads = _embedding_bwd(
            dout.contiguous(), *ctx.saved_tensors, *ctx.config, needs, ctx.backend
        )
        return None, *where_needed(grads, needs), *[None] * 7


def embedding(
    ids: Tensor,
    w_token: Tensor,
    w_position: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """Looks tokens and positions up, adds them, and applies dropout, in one pass.

    Args:
        ids: (B, T), int64 or int32, in [0, V).
        w_token: (V, C), fp32, bf16 or fp16.
        w_position: (P, C), the dtype of w_token.
        position_ids: (T,), (1, T) or (B, T) in [0, P), by default 0 … T − 1.
        token_type_ids: (B, T) in [0, V); adds further rows of the token table.
        dropout_p, seed, row_offset: as in `dropout_add_layer_norm`.

    Returns:
        (B, T, C), the dtype of the tables; under autocast, the autocast dtype.

    Raises:
        IndexError: on a CPU, an id out of range.
        TypeError: an unsupported or mixed dtype.
        ValueError: shapes that do not fit, T > P, tensors on two devices, dropout arguments out of
            range.
    """
    op = "embedding"
    check_tensor(op, "w_token", w_token, ACTIVATION_DTYPES, ("V", "C"))
    of_position = "P", w_token.shape[1]
    check_tensor(op, "w_position", w_position, (w_token.dtype,), of_position, w_token)
    check_tensor(op, "ids", ids, _INDEX_DTYPES, ("B", "T"), w_token)
    if position_ids is None and ids.shape[1] > w_position.shape[0]:
        raise ValueError(
            f"{op}: ids has {ids.shape[1]} positions, expected at most {w_position.shape[0]}"
        )
    if position_ids is not None:
        check_tensor(op, "position_ids", position_ids, _INDEX_DTYPES, like=w_token)
        if position_ids.shape not in (ids.shape, (1, ids.shape[1]), ids.shape[1:]):
            raise ValueError(
                f"{op}: position_ids has shape {tuple(position_ids.shape)}, expected (T,), (1, T) "
                f"or (B, T) with ids of {tuple(ids.shape)}"
            )
        position_ids = position_ids.expand(ids.shape)
    if token_type_ids is not None:
        check_tensor(op, "token_type_ids", token_type_ids, _INDEX_DTYPES, ids.shape, w_token)
    check_dropout(op, dropout_p, seed, row_offset, ids.shape[0] * ids.shape[1], w_token)
    return _Embedding.apply(
        ids, *apart(w_token.contiguous(), w_position.contiguous()), position_ids, token_type_ids,
        last_contiguous(seed) if dropout_p > 0.0 else None, dropout_p, row_offset,
        autocast_dtype(w_token) or w_token.dtype,
        resolve(op, w_token, width=w_token.shape[1]),
    )  # fmt: skip
