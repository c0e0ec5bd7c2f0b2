"""The feed-forward network: six products, with GELU, biases and dGELU in their epilogues.

As in backends/triton/ffn.py, forward keeps the pre-activation u and gelu(u). csrc/ffn/ has the
epilogues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.backends.cuda.extension import NARROW_DTYPES, VECTOR, launch
from gpt1_kernels.backends.cuda.matmul import aligned, column_sums, matmul, operand, padded
from gpt1_kernels.backends.rows import as_matrix

DTYPES = NARROW_DTYPES

SUMMED_ROWS = 64
"""How many rows of du each partial sum of the epilogue adds up, for the gradient of the bias."""


def gelu_ffn_fwd(
    x: Tensor,  # (..., C)
    w_fc: Tensor,  # (C, F)
    b_fc: Tensor,  # (F,)
    w_proj: Tensor,  # (F, C')
    b_proj: Tensor | None,  # (C',)
    save: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    save_pre, save_hidden = save
    shape, x = x.shape[:-1], as_matrix(x)
    N, (F, C_out) = len(x), w_proj.shape
    if _needs_padding(w_fc, w_proj):
        weights = map(padded, (w_fc, b_fc, w_proj, b_proj))
        wide, *saved = gelu_ffn_fwd(padded(x)[:N], *weights, save)
        y = x.new_empty(*shape, C_out)  # autograd lets no view be changed in place
        y.view(N, C_out).copy_(wide[:, :C_out])
        return y, *(_first(t, N, F) for t in saved)

    x = aligned(x)
    hidden = x.new_empty(N, F)
    pre = torch.empty_like(hidden) if save_pre else x.new_empty(0)
    y = x.new_empty(*shape, C_out)
    if N > 0:
        b, b_transposed = operand(w_fc)
        bias = aligned(b_fc[None])[0]
        launch("gelu_product", x, x.dtype, x, b, b_transposed, bias, hidden, pre)
        matmul(
            hidden, w_proj, as_matrix(y), bias=None if b_proj is None else aligned(b_proj[None])[0]
        )
    return y, pre, hidden if save_hidden else x.new_empty(0)


def gelu_ffn_bwd(
    dy: Tensor,  # (..., C')
    x: Tensor,  # (..., C), read for dw_fc alone
    pre: Tensor,  # (N, F)
    hidden: Tensor,  # (N, F), its GELU
    w_fc: Tensor,  # (C, F)
    w_proj: Tensor,  # (F, C')
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_w_fc, need_b_fc, need_w_proj, need_b_proj = needs
    shape, dy = (*dy.shape[:-1], w_fc.shape[0]), as_matrix(dy)
    x = as_matrix(x) if need_w_fc else x
    N, (C, F), C_out = len(dy), w_fc.shape, w_proj.shape[1]
    if _needs_padding(w_fc, w_proj):
        rows = (padded(t)[:N] if t.dim() > 1 else t for t in (dy, x, pre, hidden))
        grads = gelu_ffn_bwd(*rows, padded(w_fc), padded(w_proj), needs)
        sizes = (N, C), (C, F), (F,), (F, C_out), (C_out,)
        dx, *rest = (_first(g, *size) for g, size in zip(grads, sizes, strict=True))
        return dx.view(shape) if need_x else dx, *rest

    dy, pre = aligned(dy), pre.contiguous()
    need_dpre = need_x or need_w_fc
    dx = x.new_empty(shape if need_x else 0)
    dw_fc = w_fc.new_empty(w_fc.shape if need_w_fc else 0)
    db_fc = pre.new_empty(F if need_b_fc else 0, dtype=torch.float32)
    dw_proj = w_proj.new_empty(w_proj.shape if need_w_proj else 0)
    db_proj = dy.new_empty(C_out if need_b_proj else 0, dtype=torch.float32)
    if N == 0:
        return dx, dw_fc.zero_(), db_fc.zero_(), dw_proj.zero_(), db_proj.zero_()

    dpre = torch.empty_like(pre) if need_dpre else None
    partial_db = None
    if need_b_fc:
        partial_db = pre.new_empty(-(-N // SUMMED_ROWS), F, dtype=torch.float32)
    if need_dpre or need_b_fc:
        b, b_transposed = operand(w_proj.t())
        launch("dgelu_product", dy, dy.dtype, dy, b, b_transposed, pre, dpre, partial_db)
    if need_b_fc:
        db_fc = column_sums(partial_db)
    if need_w_proj:
        matmul(hidden.t(), dy, dw_proj)
    if need_w_fc:
        matmul(x.t(), dpre, dw_fc)
    if need_x:
        matmul(dpre, w_fc.t(), as_matrix(dx))
    if need_b_proj:
        db_proj = column_sums(dy)
    return dx, dw_fc, db_fc, dw_proj, db_proj


def _needs_padding(w_fc: Tensor, w_proj: Tensor) -> bool:
    return any(size % VECTOR != 0 for size in (*w_fc.shape, w_proj.shape[1]))


def _first(x: Tensor, *sizes: int) -> Tensor:
    """The first of x along each axis, contiguous; x itself if it stands for what is not needed."""
    return x[tuple(map(slice, sizes))].contiguous() if x.dim() == len(sizes) else x
