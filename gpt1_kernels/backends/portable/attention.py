"""Causal attention by blocks of queries, each against the keys that it can see."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt1_kernels.backends.portable.dropout import multiplier, unpack
from gpt1_kernels.backends.rows import unpacked

QUERIES_PER_BLOCK = 128
WORKSPACE_ELEMENTS = 2**24  # of one block of scores


def causal_attention_fwd(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, H, D)
    v: Tensor,
    keep_bits: Tensor | None,  # (B, H, Tq, words)
    first_key: Tensor | None,  # (B,)
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(*_hide_padding(first_key, q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for rows, keys in _blocks(q, k):
        scores = _scores(q, k, rows, keys, first_key, scale)
        largest = scores.amax(-1)
        p = torch.softmax(scores, -1, out=scores)
        # The likeliest key has p = exp(largest score − lse), at least 1 / keys.
        lse[:, :, rows] = largest - p.amax(-1).log_()
        if first_key is not None:
            unseeing = _unseeing(rows, keys, first_key)
            p.masked_fill_(unseeing[..., None], 0)
            lse[:, :, rows].masked_fill_(unseeing, -torch.inf)
        if keep_bits is not None:
            p *= multiplier(unpack(keep_bits[:, :, rows], keys), dropout_p)
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
    grads = _gradients(dout, q, k, v, keep_bits, first_key, scale, dropout_p)
    return tuple(
        g.contiguous() if need else q.new_empty(0) for g, need in zip(grads, needs, strict=True)
    )


def causal_attention_qkvpacked_fwd(
    qkv: Tensor,  # (B, T, 3C)
    n_head: int,
    keep_bits: Tensor | None,
    first_key: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = unpacked(qkv, n_head)
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
    q, k, v = unpacked(qkv, n_head)
    grads = _gradients(dout.view(q.shape), q, k, v, keep_bits, first_key, scale, dropout_p)
    return torch.stack(grads, 2).flatten(2)


def _gradients(
    dout: Tensor,  # (B, Tq, H, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_bits: Tensor | None,
    first_key: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v: views (B, T, H, D) of memory in which heads come first."""
    q, k, v, dout = _heads_first(*_hide_padding(first_key, q, k, v, dout))
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for rows, keys in _blocks(q, k):
        scores = _scores(q, k, rows, keys, first_key, scale)
        p = torch.softmax(scores, -1, out=scores)
        if first_key is not None:
            p.masked_fill_(_unseeing(rows, keys, first_key)[..., None], 0)
        dp, z = (dout[:, :, rows] @ v[:, :, :keys].mT).float(), p
        if keep_bits is not None:
            kept = multiplier(unpack(keep_bits[:, :, rows], keys), dropout_p)
            dp *= kept
            z = kept.mul_(p)
        dv[:, :, :keys] += z.to(v.dtype).mT @ dout[:, :, rows]
        # delta is Σ P ∘ dP here, not Σ dO ∘ O, so dS of a row that sees one key is exactly 0.
        ds = torch._softmax_backward_data(dp, p, -1, torch.float32).mul_(scale).to(q.dtype)
        dq[:, :, rows] = ds @ k[:, :, :keys]
        dk[:, :, :keys] += ds.mT @ q[:, :, rows]
    return tuple(g.to(q.dtype).transpose(1, 2) for g in (dq, dk, dv))


def _scores(q, k, rows: slice, keys: int, first_key: Tensor | None, scale: float) -> Tensor:
    """fp32 (B, H, rows, keys), −∞ where a key is not visible."""
    scores = (q[:, :, rows] @ k[:, :, :keys].mT).float().mul_(scale)
    count = rows.stop - rows.start
    # On a CPU five times as fast as masked_fill_. tril_ zeroes first, since NaN − ∞ is NaN.
    future = scores.new_full((count, count), -torch.inf).triu_(1)
    scores.tril_(keys - count)[..., keys - count :].add_(future)
    if first_key is not None:
        hidden = torch.arange(keys, device=q.device) < first_key[:, None, None, None]
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def _unseeing(rows: slice, keys: int, first_key: Tensor) -> Tensor:
    """bool (B, 1, rows), True for the queries that see no key: all of theirs are padding."""
    last_key = torch.arange(keys - (rows.stop - rows.start), keys, device=first_key.device)
    return last_key < first_key[:, None, None]


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


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, T, H, D) → (B, H, T, D), contiguous."""
    return [t.transpose(1, 2).contiguous() for t in tensors]
