"""Causal attention by blocks of queries, each against the keys that it can see.

Without dropout and padding a CPU has PyTorch's flash kernels; they also give the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt1_kernels.backends.portable.dropout import unpack
from gpt1_kernels.rng import keep_scale

QUERIES_PER_BLOCK = 128
WORKSPACE_ELEMENTS = 2**24  # of one block of scores

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, H, D)
    v: Tensor,
    keep_bits: Tensor | None,  # (B, H, Tq, words)
    first_key: Tensor | None,  # (B,)
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    if _serves_flash(q, k, keep_bits, first_key):
        out, lse = _flash(*_heads_first(q, k, v), 0.0, True, scale=scale)
        return out.transpose(1, 2).contiguous(), lse
    q, k, v = _hide_padding(first_key, q, k, v)
    q, k, v = (t.contiguous() for t in _heads_first(q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for rows, keys in _blocks(q, k):
        scores = _scores(q, k, rows, keys, first_key, scale)
        lse[:, :, rows] = torch.logsumexp(scores, -1)
        p = _probabilities(scores, lse[:, :, rows])
        if keep_bits is not None:
            p.mul_(unpack(keep_bits[:, :, rows], keys)).mul_(keep_scale(dropout_p))
        out[:, :, rows] = p.to(v.dtype) @ v[:, :, :keys]
    return out.transpose(1, 2).contiguous(), lse


def causal_attention_bwd(
    dout: Tensor,  # (B, Tq, H, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # (B, H, Tq)
    keep_bits: Tensor | None,
    first_key: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if _serves_flash(q, k, keep_bits, first_key):
        grads = _flash_backward(*_heads_first(dout, q, k, v, out), lse, 0.0, True, scale=scale)
    else:
        q, k, v, dout = _hide_padding(first_key, q, k, v, dout)
        grads = _backward_by_blocks(
            *(t.contiguous() for t in _heads_first(dout, q, k, v, out)),
            lse, keep_bits, first_key, scale, dropout_p,
        )  # fmt: skip
    return tuple(
        g.transpose(1, 2).contiguous() if need else q.new_empty(0)
        for g, need in zip(grads, needs, strict=True)
    )


def causal_attention_qkvpacked_fwd(
    qkv: Tensor,  # (B, T, 3C)
    n_head: int,
    keep_bits: Tensor | None,
    first_key: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = _unpacked(qkv, n_head)
    out, lse = causal_attention_fwd(q, k, v, keep_bits, first_key, scale, dropout_p)
    return out.flatten(2), lse


def causal_attention_qkvpacked_bwd(
    dout: Tensor,  # (B, T, C)
    qkv: Tensor,
    n_head: int,
    out: Tensor,
    lse: Tensor,
    keep_bits: Tensor | None,
    first_key: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    q, k, v = _unpacked(qkv, n_head)
    grads = causal_attention_bwd(
        dout.view(q.shape), q, k, v, out.view(q.shape), lse, keep_bits, first_key, scale,
        dropout_p, [True] * 3,
    )  # fmt: skip
    return torch.cat([g.flatten(2) for g in grads], dim=-1)


def _backward_by_blocks(
    dout, q, k, v, out, lse, keep_bits, first_key, scale, dropout_p
) -> tuple[Tensor, Tensor, Tensor]:
    delta = (dout.float() * out).sum(-1)  # (B, H, Tq)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for rows, keys in _blocks(q, k):
        p = _probabilities(_scores(q, k, rows, keys, first_key, scale), lse[:, :, rows])
        dp = (dout[:, :, rows] @ v[:, :, :keys].mT).float()
        z = p
        if keep_bits is not None:
            kept = unpack(keep_bits[:, :, rows], keys) * keep_scale(dropout_p)
            dp.mul_(kept)
            z = p * kept
        dv[:, :, :keys] += z.to(v.dtype).mT @ dout[:, :, rows]
        ds = dp.sub_(delta[:, :, rows, None]).mul_(p).mul_(scale).to(q.dtype)
        dq[:, :, rows] = ds @ k[:, :, :keys]
        dk[:, :, :keys] += ds.mT @ q[:, :, rows]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(q, k, rows: slice, keys: int, first_key, scale: float) -> Tensor:
    """fp32 (B, H, rows, keys), −∞ where a key is not visible."""
    scores = (q[:, :, rows] @ k[:, :, :keys].mT).float().mul_(scale)
    row = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + k.shape[2] - q.shape[2]
    key = torch.arange(keys, device=q.device)
    hidden = key > row
    if first_key is not None:
        hidden = hidden | (key < first_key[:, None, None, None])
    return scores.masked_fill_(hidden, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores − lse) in place; a row with no visible key (lse −∞) gives zeros."""
    return scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()


def _hide_padding(first_key: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeroes the padded positions, whose content (NaN, say) must not reach a product."""
    if first_key is None:
        return tensors
    keys = tensors[1].shape[1]
    real = torch.arange(keys, device=first_key.device) >= first_key[:, None]  # (B, Tk)
    return tuple(torch.where(real[:, keys - t.shape[1] :, None, None], t, 0) for t in tensors)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """Slices of queries with the number of keys that the last of them sees."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    rows = max(1, min(QUERIES_PER_BLOCK, WORKSPACE_ELEMENTS // max(1, batch * heads * keys)))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        yield slice(start, stop), stop + keys - queries


def _serves_flash(q: Tensor, k: Tensor, keep_bits, first_key) -> bool:
    plain = keep_bits is None and first_key is None and q.shape[1] == k.shape[1]
    return plain and q.device.type == "cpu" and q.numel() > 0


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _unpacked(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, T, H, D) of a packed (B, T, 3C)."""
    return qkv.view(*qkv.shape[:2], 3, n_head, -1).unbind(2)
