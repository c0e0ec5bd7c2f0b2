"""The feed-forward network: y = gelu_tanh(x W₁ + b₁) W₂ + b₂.

gelu_tanh(u) = ½ u (1 + tanh(√(2/π) (u + 0.044715 u³))), Hendrycks & Gimpel 2016. Weights are
(in, out) as OpenAI stores them. Backward gets from forward the pre-activation u = x W₁ + b₁, and
g = gelu_tanh(u), which the second product reads in any case:

    dg = dy W₂ᵀ,   du = dg ∘ gelu'(u),   dx = du W₁ᵀ
    dW₁ = xᵀ du,   db₁ = Σ du,   dW₂ = gᵀ dy,   db₂ = Σ dy
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gpt1_kernels.backends import resolve
from gpt1_kernels.numerics import ACTIVATION_DTYPES
from gpt1_kernels.ops._library import (
    apply,
    autocast,
    check_tensor,
    define,
    last_contiguous,
    matrix,
    refuse_double_backward,
    where_needed,
)


def _fake_fwd(x, w_fc, b_fc, w_proj, b_proj, save, backend):
    shape = prod(x.shape[:-1]), w_fc.shape[1]
    pre, hidden = (x.new_empty(shape if saved else [0]) for saved in save)
    return x.new_empty([*x.shape[:-1], w_proj.shape[1]]), pre, hidden


def _fake_bwd(dy, x, pre, hidden, w_fc, w_proj, needs, backend):
    need_x, need_w_fc, need_b_fc, need_w_proj, need_b_proj = needs
    return (
        x.new_empty([*dy.shape[:-1], w_fc.shape[0]] if need_x else [0]),
        x.new_empty(w_fc.shape if need_w_fc else [0]),
        x.new_empty([w_fc.shape[1]] if need_b_fc else [0], dtype=torch.float32),
        x.new_empty(w_proj.shape if need_w_proj else [0]),
        x.new_empty([w_proj.shape[1]] if need_b_proj else [0], dtype=torch.float32),
    )


_gelu_ffn_fwd = define(
    "gelu_ffn",
    "gelu_ffn_fwd(Tensor x, Tensor w_fc, Tensor b_fc, Tensor w_proj, Tensor? b_proj, "
    "bool[2] save, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_fwd,
)
_gelu_ffn_bwd = define(
    "gelu_ffn",
    "gelu_ffn_bwd(Tensor dy, Tensor x, Tensor pre, Tensor hidden, Tensor w_fc, Tensor w_proj, "
    "bool[5] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


class _GeluFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_fc, b_fc, w_proj, b_proj, backend):
        need_x, need_w_fc, need_b_fc, need_w_proj, *_ = ctx.needs_input_grad
        save = need_x or need_w_fc or need_b_fc, need_w_proj
        x, b_fc, b_proj = map(last_contiguous, (x, b_fc, b_proj))
        w_fc, w_proj = matrix(w_fc), matrix(w_proj)
        y, *saved = _gelu_ffn_fwd(x, w_fc, b_fc, w_proj, b_proj, save, backend)
        ctx.save_for_backward(x if need_w_fc else x.new_empty(0), *saved, w_fc, w_proj)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("gelu_ffn")
        needs = ctx.needs_input_grad[:5]
        grads = _gelu_ffn_bwd(dy.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
        return *where_needed(grads, needs), None


def gelu_ffn(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor | None = None
) -> Tensor:
    """GPT-1's feed-forward network with its GELU and biases fused into the products.

    Args:
        x: (..., C), fp32, bf16 or fp16.
        w_fc: (C, F), the dtype of x; an `nn.Linear` weight passes as `weight.t()`, read in place.
        b_fc: (F,), the dtype of x or fp32.
        w_proj: (F, C'), the dtype of x.
        b_proj: (C',), or None to leave it to the LayerNorm that follows (its `x_bias`).

    Returns:
        (..., C'), the dtype of x; under autocast, the autocast dtype.

    Raises:
        TypeError: an unsupported or mixed dtype.
        ValueError: shapes that do not fit, tensors on two devices.
    """
    op = "gelu_ffn"
    x, w_fc, w_proj = autocast(x, w_fc, w_proj)
    check_tensor(op, "x", x, ACTIVATION_DTYPES)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has shape (), expected (..., C)")
    bias_dtypes = x.dtype, torch.float32
    check_tensor(op, "w_fc", w_fc, (x.dtype,), (x.shape[-1], "F"), x)
    check_tensor(op, "b_fc", b_fc, bias_dtypes, w_fc.shape[1:], x)
    check_tensor(op, "w_proj", w_proj, (x.dtype,), (w_fc.shape[1], "C"), x)
    if b_proj is not None:
        check_tensor(op, "b_proj", b_proj, bias_dtypes, w_proj.shape[1:], x)
    return apply(_GeluFFN, x, w_fc, b_fc, w_proj, b_proj, resolve(op, x))
