"""Causal attention: O = (keep ∘ softmax(scale · Q Kᵀ + causal)) V · s.

Vaswani et al. 2017, eq. 1, with the mask of a left-to-right language model. Queries are aligned
with the end of the keys: query i sees keys j ≤ i + Tk − Tq. `first_key` hides left padding; a row
that sees no key has O = 0, lse = −∞ and no gradient. With P the probabilities, Z = keep ∘ P · s
and delta = Σ dO ∘ O (one number a row):

    dV = Zᵀ dO,   dP = keep ∘ (dO Vᵀ) · s,   dS = P ∘ (dP − delta),   dQ = scale · dS K,
    dK = scale · dSᵀ Q

P is rebuilt in backward from lse, the natural-log log-sum-exp of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.backends import resolve
from gpt1_kernels.numerics import ACTIVATION_DTYPES
from gpt1_kernels.ops._library import (
    apart,
    autocast,
    check_dropout,
    check_probability,
    check_tensor,
    define,
    last_contiguous,
    refuse_double_backward,
    where_needed,
)
from gpt1_kernels.ops.dropout import draw_mask


def _fake_fwd(q, k, v, keep_bits, first_key, scale, dropout_p, backend):
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty([batch, heads, queries], dtype=torch.float32)


def _fake_bwd(dout, q, k, v, out, lse, keep_bits, first_key, scale, dropout_p, needs, backend):
    return tuple(
        t.new_empty(t.shape if need else [0]) for t, need in zip((q, k, v), needs, strict=True)
    )


def _fake_packed_fwd(qkv, n_head, keep_bits, first_key, scale, dropout_p, backend):
    batch, length, width = qkv.shape
    out = qkv.new_empty([batch, length, width // 3])
    return out, qkv.new_empty([batch, n_head, length], dtype=torch.float32)


def _fake_packed_bwd(dout, qkv, n_head, out, lse, keep_bits, first_key, scale, dropout_p, backend):
    return qkv.new_empty(qkv.shape)


_fwd = define(
    "causal_attention",
    "causal_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? keep_bits, Tensor? first_key, "
    "float scale, float dropout_p, str backend) -> (Tensor, Tensor)",
    _fake_fwd,
)
_bwd = define(
    "causal_attention",
    "causal_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? keep_bits, Tensor? first_key, float scale, float dropout_p, bool[3] needs, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)
_packed_fwd = define(
    "causal_attention",
    "causal_attention_qkvpacked_fwd(Tensor qkv, int n_head, Tensor? keep_bits, "
    "Tensor? first_key, float scale, float dropout_p, str backend) -> (Tensor, Tensor)",
    _fake_packed_fwd,
)
_packed_bwd = define(
    "causal_attention",
    "causal_attention_qkvpacked_bwd(Tensor dout, Tensor qkv, int n_head, Tensor out, Tensor lse, "
    "Tensor? keep_bits, Tensor? first_key, float scale, float dropout_p, str backend) -> Tensor",
    _fake_packed_bwd,
)


class _CausalAttention(torch.autograd.Function):
    """The bits are drawn before it, and kept for backward, as `lse` is."""

    @staticmethod
    def forward(ctx, q, k, v, keep_bits, first_key, scale, dropout_p, backend):
        q, k, v, first_key = map(last_contiguous, (q, k, v, first_key))
        out, lse = _fwd(q, k, v, keep_bits, first_key, scale, dropout_p, backend)
        ctx.save_for_backward(q, k, v, out, lse, keep_bits, first_key)
        ctx.config = scale, dropout_p, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("causal_attention")
        scale, dropout_p, backend = ctx.config
        needs = ctx.needs_input_grad[:3]
        grads = _bwd(dout.contiguous(), *ctx.saved_tensors, scale, dropout_p, needs, backend)
        return *where_needed(grads, needs), *[None] * 5


class _CausalAttentionQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, keep_bits, first_key, scale, dropout_p, backend):
        qkv, first_key = last_contiguous(qkv), last_contiguous(first_key)
        out, lse = _packed_fwd(qkv, n_head, keep_bits, first_key, scale, dropout_p, backend)
        ctx.save_for_backward(qkv, out, lse, keep_bits, first_key)
        ctx.config = n_head, scale, dropout_p, backend
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("causal_attention_qkvpacked")
        qkv, *saved = ctx.saved_tensors
        n_head, *config = ctx.config
        return _packed_bwd(dout.contiguous(), qkv, n_head, *saved, *config), *[None] * 6


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    row_offset: int = 0,
    first_key: Tensor | None = None,
    keep_bits: Tensor | None = None,
) -> Tensor:
    """Causal attention with dropout on the probabilities.

    Args:
        q: (B, Tq, H, D), fp32, bf16 or fp16.
        k, v: (B, Tk, H, D) with Tk ≥ Tq, the dtype of q. Finite except in left padding: elsewhere a
            NaN may reach even queries before it, for 0 times NaN is NaN.
        scale: of the scores, by default D^−½.
        dropout_p: probability of dropping, in [0, 1].
        seed: int64 (2,) on the device; needed when dropout_p > 0.
        row_offset: tokens of the global batch that come before these.
        first_key: int32 (B,), the first key that is not padding.
        keep_bits: int32 (B, H, Tq, ceil(Tk / 32)), instead of a seed: what `dropout_mask` drew
            before, for (B, H, Tq, Tk) with causal=True and row_offset · H.

    Returns:
        (B, Tq, H, D), the dtype of q; under autocast, the autocast dtype.

    Raises:
        TypeError: an unsupported or mixed dtype.
        ValueError: shapes that do not fit, tensors on two devices, dropout arguments out of range.
    """
    op = "causal_attention"
    q, k, v = apart(*autocast(q, k, v))
    check_tensor(op, "q", q, ACTIVATION_DTYPES, ("B", "Tq", "H", "D"))
    if q.shape[-1] < 1:
        raise ValueError(f"{op}: q has heads of size 0, expected at least 1")
    check_tensor(op, "k", k, (q.dtype,), (q.shape[0], "Tk", *q.shape[2:]), q)
    check_tensor(op, "v", v, (q.dtype,), k.shape, q)
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"{op}: q has {q.shape[1]} positions, expected at most k's {k.shape[1]}")
    shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    keep_bits = _checked_bits(op, q, shape, dropout_p, seed, row_offset, first_key, keep_bits)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = resolve(op, q, head_size=q.shape[-1])
    return _CausalAttention.apply(q, k, v, keep_bits, first_key, scale, dropout_p, backend)


def causal_attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    row_offset: int = 0,
    first_key: Tensor | None = None,
    keep_bits: Tensor | None = None,
) -> Tensor:
    """`causal_attention` on the output of GPT-1's `c_attn`: no transpose, no copy, one gradient.

    Args:
        qkv: (B, T, 3C): queries, keys and values, each of n_head heads side by side.
        n_head: number of heads; divides C.

    Returns:
        (B, T, C). The other arguments and the errors are those of `causal_attention`.
    """
    op = "causal_attention_qkvpacked"
    (qkv,) = autocast(qkv)
    check_tensor(op, "qkv", qkv, ACTIVATION_DTYPES, ("B", "T", "3C"))
    batch, length, width = qkv.shape
    if n_head < 1:
        raise ValueError(f"{op}: n_head is {n_head}, expected at least 1")
    if width == 0 or width % (3 * n_head):
        raise ValueError(f"{op}: qkv has width {width}, expected a multiple of 3 · {n_head} heads")
    shape = batch, n_head, length, length
    keep_bits = _checked_bits(op, qkv, shape, dropout_p, seed, row_offset, first_key, keep_bits)
    head_size = width // (3 * n_head)
    scale = head_size**-0.5 if scale is None else scale
    backend = resolve("causal_attention", qkv, head_size=head_size)
    return _CausalAttentionQKVPacked.apply(
        qkv, n_head, keep_bits, first_key, scale, dropout_p, backend
    )


def _checked_bits(
    op, activation, shape, dropout_p, seed, row_offset, first_key, keep_bits
) -> Tensor | None:
    """The dropout bits of `shape`, (B, H, Tq, Tk): those given, or drawn here; None without."""
    batch, heads, queries, keys = shape
    if first_key is not None:
        check_tensor(op, "first_key", first_key, (torch.int32,), (batch,), activation)
    if keep_bits is not None and dropout_p > 0.0:
        check_probability(op, dropout_p)
        packed = batch, heads, queries, (keys + 31) // 32
        check_tensor(op, "keep_bits", keep_bits, (torch.int32,), packed, activation)
        return keep_bits.contiguous()
    rows = batch * heads * queries
    check_dropout(op, dropout_p, seed, row_offset * heads, rows, activation)
    if dropout_p == 0.0:
        return None
    return draw_mask(seed, shape, dropout_p, row_offset * heads, causal=True)
