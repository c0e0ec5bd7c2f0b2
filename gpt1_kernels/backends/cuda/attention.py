"""Launchers of causal attention; csrc/attention/ has the kernels.

The kernels read 16 bytes at a time. A head whose size is no multiple of 8, or whose rows are not
aligned to 16 bytes, is copied once, padded with zeros, which change no score and no other column.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gpt1_kernels.backends.cuda.extension import NARROW_DTYPES, VECTOR, launch
from gpt1_kernels.backends.rows import unpacked
from gpt1_kernels.rng import keep_scale

DTYPES = NARROW_DTYPES
MAX_SIZES = {"head_size": 128}


def causal_attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, H, D)
    v: Tensor,  # (B, Tk, H, D)
    keep_bits: Tensor | None,  # (B, H, Tq, words)
    first_key: Tensor | None,  # (B,)
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    return o, _forward(q, k, v, keep_bits, first_key, o, scale, dropout_p)


def causal_attention_bwd(
    dout: Tensor,  # (B, Tq, H, D)
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, H, D)
    v: Tensor,  # (B, Tk, H, D)
    out: Tensor,  # (B, Tq, H, D)
    lse: Tensor,  # (B, H, Tq)
    keep_bits: Tensor | None,  # (B, H, Tq, words)
    first_key: Tensor | None,  # (B,)
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    grads = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip((q, k, v), needs, strict=True)
    )
    needed = [g if need else None for g, need in zip(grads, needs, strict=True)]
    _backward(dout, q, k, v, out, lse, keep_bits, first_key, *needed, scale, dropout_p)
    return grads


def causal_attention_qkvpacked_fwd(
    qkv: Tensor,  # (B, T, 3C)
    n_head: int,
    keep_bits: Tensor | None,  # (B, H, T, words)
    first_key: Tensor | None,  # (B,)
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = unpacked(qkv, n_head)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    return o.flatten(2), _forward(q, k, v, keep_bits, first_key, o, scale, dropout_p)


def causal_attention_qkvpacked_bwd(
    dout: Tensor,  # (B, T, C)
    qkv: Tensor,  # (B, T, 3C)
    n_head: int,
    out: Tensor,  # (B, T, C)
    lse: Tensor,  # (B, H, T)
    keep_bits: Tensor | None,  # (B, H, T, words)
    first_key: Tensor | None,  # (B,)
    scale: float,
    dropout_p: float,
) -> Tensor:
    q, k, v = unpacked(qkv, n_head)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backward(
        dout.view(q.shape), q, k, v, out.view(q.shape), lse, keep_bits, first_key,
        *unpacked(dqkv, n_head), scale, dropout_p,
    )  # fmt: skip
    return dqkv


def _forward(q, k, v, keep_bits, first_key, o, scale, dropout_p):
    B, Tq, H, _ = q.shape
    lse = q.new_empty(B, H, Tq, dtype=torch.float32)
    if q.numel() > 0:
        padded = _padded(o)
        q, k, v = map(_aligned, (q, k, v))
        launch(
            "causal_attention_fwd", q,
            q, k, v, keep_bits, first_key, padded, lse, *_call(q, k, scale, dropout_p),
        )  # fmt: skip
        _copy_back(o, padded)
    return lse


def _backward(do, q, k, v, o, lse, keep_bits, first_key, dq, dk, dv, scale, dropout_p):
    if k.numel() == 0:
        return
    grads = dq, dk, dv
    padded = [None if g is None else _padded(g) for g in grads]
    do, q, k, v, o = map(_aligned, (do, q, k, v, o))
    delta = torch.empty_like(lse)
    launch(
        "causal_attention_bwd", q,
        do, q, k, v, o, lse, keep_bits, first_key, delta, *padded, *_call(q, k, scale, dropout_p),
    )  # fmt: skip
    for grad, with_zeros in zip(grads, padded, strict=True):
        _copy_back(grad, with_zeros)


def _call(q: Tensor, k: Tensor, scale: float, dropout_p: float) -> tuple:
    """What the launchers take beside tensors."""
    B, Tq, H, D = q.shape
    sizes = B, H, Tq, k.shape[1], D
    return sizes, scale, keep_scale(dropout_p), q.dtype


def _is_aligned(x: Tensor) -> bool:
    """Whether every row of D elements starts at a multiple of 16 bytes, and is whole vectors."""
    stride_b, stride_t, stride_h, _ = x.stride()
    elements = stride_b | stride_t | stride_h | x.shape[3]  # a multiple of 8 if all of them are
    return x.data_ptr() % (VECTOR * x.itemsize) == 0 and elements % VECTOR == 0


def _padded(x: Tensor) -> Tensor:
    """The tensor that a kernel writes in place of x: x itself where its rows are aligned."""
    return x if _is_aligned(x) else x.new_empty(*x.shape[:3], -(-x.shape[3] // VECTOR) * VECTOR)


def _aligned(x: Tensor) -> Tensor:
    return x if _is_aligned(x) else pad(x, (0, -x.shape[3] % VECTOR)).contiguous()


def _copy_back(x: Tensor | None, padded: Tensor | None) -> None:
    if padded is not x:
        x.copy_(padded[..., : x.shape[3]])
