"""The feed-forward network: bare products, ATen's tanh-GELU between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from gpt1_kernels.backends.portable.sums import column_sums
from gpt1_kernels.backends.rows import as_matrix

gelu, gelu_backward = torch.ops.aten.gelu, torch.ops.aten.gelu_backward


def gelu_ffn_fwd(
    x: Tensor,  # (..., C)
    w_fc: Tensor,  # (C, F)
    b_fc: Tensor,  # (F,)
    w_proj: Tensor,  # (F, C)
    b_proj: Tensor | None,  # (C,)
    save: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    pre = linear(as_matrix(x), w_fc.t(), b_fc.to(x.dtype))
    hidden = gelu(pre, approximate="tanh")
    y = linear(hidden, w_proj.t(), None if b_proj is None else b_proj.to(x.dtype))
    pre, hidden = (
        t if saved else x.new_empty(0) for t, saved in zip((pre, hidden), save, strict=True)
    )
    # Not a view to autograd, which refuses to change one in place that a Function has made.
    y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], w_proj.shape[1]])
    return y, pre, hidden


def gelu_ffn_bwd(
    dy: Tensor,  # (..., C)
    x: Tensor,  # (..., C), read for dw_fc alone
    pre: Tensor,  # (N, F)
    hidden: Tensor,  # (N, F), its GELU
    w_fc: Tensor,
    w_proj: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_w_fc, need_b_fc, need_w_proj, need_b_proj = needs
    shape, dy = (*dy.shape[:-1], w_fc.shape[0]), as_matrix(dy)
    dx = dw_fc = dw_proj = x.new_empty(0)
    db_fc = db_proj = x.new_empty(0, dtype=torch.float32)
    if need_w_proj:
        dw_proj = hidden.t() @ dy
    if need_b_proj:
        db_proj = column_sums(dy)
    if need_x or need_w_fc or need_b_fc:
        dpre = gelu_backward(dy @ w_proj.t(), pre, approximate="tanh")
        if need_x:
            dx = (dpre @ w_fc.t()).view(shape)
        if need_w_fc:
            dw_fc = as_matrix(x).t() @ dpre
        if need_b_fc:
            db_fc = column_sums(dpre)
    return dx, dw_fc, db_fc, dw_proj, db_proj
