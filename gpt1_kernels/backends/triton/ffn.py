"""The feed-forward network: six products, with GELU, biases and dGELU in their epilogues.

Backward needs the pre-activation u, for gelu'(u), and gelu(u), for dW₂ = gelu(u)ᵀ dy. Forward
writes both and keeps them. At N = 32768, C = 768, F = 3072 in a 2-byte type that is 201 MB more
memory a layer than u alone; it spares the epilogue of dy W₂ᵀ writing gelu(u) once more, which took
an H100 a quarter of that product's time.

The tanh is a sigmoid: gelu_tanh(u) = ½ u (1 + tanh z) = u σ(2z), which loses no digits for small u.
Except for fp32 tensors, each step of the sigmoid is one instruction: `tl.exp2` is, while `tl.exp`
takes care of subnormal results, and the square of `tl.rsqrt` is a reciprocal to 22 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.rows import as_matrix
from gpt1_kernels.backends.triton.launch import cdiv, product_tiles
from gpt1_kernels.backends.triton.matmul import matmul, product, store_product, strip_indices
from gpt1_kernels.backends.triton.partials import sum_partials, sum_rows

LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))  # of 2z = √(8/π) (u + 0.044715 u³)
CUBIC = tl.constexpr(LINEAR.value * 0.044715)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _gelu_gate(u, EXACT: tl.constexpr):
    """σ(2z)."""
    if EXACT:
        return 1.0 / (1.0 + tl.exp(-u * (LINEAR + CUBIC * (u * u))))
    else:
        root = tl.rsqrt(1.0 + tl.exp2(u * (-LINEAR * LOG2_E - CUBIC * LOG2_E * (u * u))))
        return root * root


@triton.jit
def gelu_product(strips, first_m, first_n, M, N, stride, tensors):
    """u = acc + bias; `tensors` is (gelu(u), bias (N,), u or None)."""
    hidden_ptr, bias_ptr, pre_ptr = tensors
    for index in tl.static_range(len(strips)):
        m, n = strip_indices(strips[index], index, first_m, first_n)
        mask = (m < M) & (n < N)
        offset = m * stride + n
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        # Backward sees the rounded u, so the GELU is that of the rounded u.
        pre = (strips[index] + bias).to(hidden_ptr.dtype.element_ty)
        if pre_ptr is not None:
            tl.store(pre_ptr + offset, pre, mask=mask)
        u = pre.to(tl.float32)
        hidden = u * _gelu_gate(u, hidden_ptr.dtype.element_ty == tl.float32)
        tl.store(hidden_ptr + offset, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dgelu_product(strips, first_m, first_n, M, N, stride, tensors):
    """du = acc ∘ gelu'(u); `tensors` is (u, du or None, sums or None).

    The sums of du over the rows of each tile are (M / BLOCK_M, N) in fp32.
    """
    pre_ptr, dpre_ptr, partial_db_ptr = tensors
    for index in tl.static_range(len(strips)):
        m, n = strip_indices(strips[index], index, first_m, first_n)
        mask = (m < M) & (n < N)
        u = tl.load(pre_ptr + m * stride + n, mask=mask, other=0.0).to(tl.float32)
        gate = _gelu_gate(u, pre_ptr.dtype.element_ty == tl.float32)
        slope = LINEAR + 3 * CUBIC * (u * u)
        dpre = strips[index] * (gate + u * (slope * (gate * (1.0 - gate))))
        if dpre_ptr is not None:
            tl.store(dpre_ptr + m * stride + n, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if partial_db_ptr is not None:
            partial = first_m // dpre.shape[0] * N + n
            tl.store(partial_db_ptr + partial, tl.sum(dpre, axis=0, keep_dims=True), mask=n < N)


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
    N, F = x.shape[0], w_fc.shape[1]
    hidden = x.new_empty(N, F)
    pre = torch.empty_like(hidden) if save_pre else x.new_empty(0)
    y = x.new_empty(*shape, w_proj.shape[1])
    product(x, w_fc, gelu_product, (hidden, b_fc, pre if save_pre else None))
    product(hidden, w_proj, store_product, (as_matrix(y), b_proj))
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
    need_dpre = need_x or need_w_fc
    shape, dy = (*dy.shape[:-1], w_fc.shape[0]), as_matrix(dy)
    N, F = dy.shape[0], w_fc.shape[1]
    dx = x.new_empty(shape if need_x else 0)
    dw_fc = x.new_empty(w_fc.shape if need_w_fc else 0)
    db_fc = pre.new_empty(F if need_b_fc else 0, dtype=torch.float32)
    dw_proj = x.new_empty(w_proj.shape if need_w_proj else 0)
    db_proj = dy.new_empty(dy.shape[1] if need_b_proj else 0, dtype=torch.float32)
    dpre = torch.empty_like(pre) if need_dpre else None
    partial_db = None
    if need_b_fc:
        row_tiles = cdiv(N, product_tiles(pre.dtype, pre.device, long_epilogue=True).BLOCK_M)
        partial_db = pre.new_empty(1, row_tiles, F, dtype=torch.float32)

    if need_dpre or need_b_fc:
        product(dy, w_proj.t(), dgelu_product, (pre, dpre, partial_db), long_epilogue=True)
    if need_b_fc:
        sum_partials(partial_db, [db_fc])
    if need_w_proj:
        matmul(hidden.t(), dy, dw_proj)
    if need_w_fc:
        matmul(as_matrix(x).t(), dpre, dw_fc)
    if need_x:
        matmul(dpre, w_fc.t(), as_matrix(dx))
    if need_b_proj:
        sum_rows(dy, db_proj)
    return dx, dw_fc, db_fc, dw_proj, db_proj
