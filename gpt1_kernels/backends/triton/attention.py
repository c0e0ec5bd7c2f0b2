"""Causal attention by tiles of queries and keys; the scores never leave the registers.

Online softmax (Milakov & Gimelshein 2018; Dao 2023, "FlashAttention-2"), in base 2 inside. A
program walks over the tiles that all its queries see, which need no mask, then over those on the
diagonal; tiles above it are never visited. Backward rebuilds the probabilities from lse and has a
kernel over queries, for delta and dQ, and one over keys, for dK and dV: every sum has one owner
and a fixed order. In both kernels delta and dP leave out dropout's scale, which multiplies the
sums once.

A tensor may have any strides but for its contiguous last axis, so that the packed ops are the same
kernels on views. Padded positions load as zeros, whatever they hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt1_kernels.backends.rows import unpacked
from gpt1_kernels.backends.triton.launch import (
    attention_dkdv_tiles,
    attention_dq_tiles,
    attention_fwd_tiles,
    cdiv,
    launch,
)
from gpt1_kernels.rng import keep_scale

MAX_SIZES = {"head_size": 128}
MAX_STRIDE = 2**22  # of positions: offsets inside a tile, of 128 rows at most, are 32-bit
SMALLEST_SCALE = 2.0**-100  # times −∞ it is not NaN
FEW_KEYS = tl.constexpr(32)  # of one word of dropout bits

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_of_head(tiles, H):
    """The tile, batch and head of a program: the tiles of a head are neighbouring programs."""
    program = tl.program_id(0)
    head = program // tiles
    return program % tiles, (head // H).to(tl.int64), (head % H).to(tl.int64)


@triton.jit
def _head(ptr, strides, batch, head):
    """The (T, D) matrix of a head in (B, T, H, D)."""
    return ptr + batch * strides[0] + head * strides[2]


@triton.jit
def _pointers(ptr, start, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)
    tile_ptr = ptr + tl.cast(start, tl.int64) * stride
    return tile_ptr + (row[:, None] * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _load_tile(
    ptr, start, stride, row_mask, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of a (T, D) matrix from `start`: (ROWS, BLOCK_D), 0 beyond D and outside row_mask."""
    pointers = _pointers(ptr, start, stride, ROWS, BLOCK_D)
    column_mask = (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(pointers, mask=row_mask[:, None] & column_mask, other=0.0)


@triton.jit
def _store_tile(ptr, start, stride, row_mask, x, D: tl.constexpr):
    ROWS: tl.constexpr = x.shape[0]
    BLOCK_D: tl.constexpr = x.shape[1]
    mask = row_mask[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    pointers = _pointers(ptr, start, stride, ROWS, BLOCK_D)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keep(
    bits_ptr, start_m, start_n, Tq, Tk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The dropout mask of a tile: (BLOCK_M, BLOCK_N) or transposed, True keeps.

    A word is loaded once and serves 32 keys. Rows and words that do not exist read the last one:
    their bits are not used.
    """
    words = tl.cdiv(Tk, 32)
    row = tl.minimum(tl.arange(0, BLOCK_M), Tq - 1 - start_m)
    word = tl.minimum(tl.arange(0, BLOCK_N // 32), words - 1 - start_n // 32)
    tile_ptr = bits_ptr + (tl.cast(start_m, tl.int64) * words + start_n // 32)
    bit = tl.arange(0, 32)
    if TRANSPOSED:
        bits = tl.load(tile_ptr + (row[None, :] * words + word[:, None]))
        keep = tl.reshape(bits[:, None, :] & (1 << bit)[None, :, None], (BLOCK_N, BLOCK_M))
    else:
        bits = tl.load(tile_ptr + (row[:, None] * words + word[None, :]))
        # In the tensor cores' layout, a thread fixes bits 1 and 2 of a score's column, and the
        # register the other bits: one shift for each word, and constants to test with.
        shifted = bits[:, :, None] >> (bit & 6)[None, None, :]
        keep = tl.reshape(shifted & (1 << (bit & 25))[None, None, :], (BLOCK_M, BLOCK_N))
    return keep != 0


@triton.jit
def _not_empty(start, end):
    """The end of a loop from `start`, such that the compiler knows that it runs at least once.

    Else the compiler zeroes the sums where the loop is skipped; with products that may still be in
    flight there, it waits for every single product.
    """
    end = tl.maximum(end, start + 1)
    tl.assume(start < end)
    return end


@triton.jit
def _key_mask(key, first_key, Tk):
    mask = key < Tk
    if first_key is not None:
        mask &= key >= first_key
    return mask


@triton.jit
def _first_masked(position, start, first_key, BLOCK_N: tl.constexpr):
    """The first key of the tiles that need a mask, for queries from `position` on."""
    if first_key is None:
        return tl.maximum((position + 1) // BLOCK_N * BLOCK_N, start)
    else:
        return start


@triton.jit
def _visible(position, key, first_key):
    visible = key <= position
    if first_key is not None:
        visible &= key >= first_key
    return visible


@triton.jit(do_not_specialize=["H", "Tq", "Tk"])
def causal_attention_fwd_kernel(
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, H, D)
    v_ptr,  # (B, Tk, H, D)
    keep_bits_ptr,  # (B, H, Tq, words), None without dropout
    first_key_ptr,  # (B,) or None
    o_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq)
    q_strides,  # of B, T and H
    k_strides,
    v_strides,
    o_strides,
    scale,
    keep_scale,
    H,
    Tq,
    Tk,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(Tq, BLOCK_M)
    tile, batch, head = _tile_of_head(tiles, H)
    start_m = (tiles - 1 - tile) * BLOCK_M  # the longest rows first
    row = start_m + tl.arange(0, BLOCK_M)
    row_mask = row < Tq
    start = 0
    first_key = None
    if first_key_ptr is not None:
        first_key = tl.minimum(tl.maximum(tl.load(first_key_ptr + batch), 0), Tk)
        row_mask &= row + Tk - Tq >= first_key
        start = first_key // BLOCK_N * BLOCK_N

    q_ptr = _head(q_ptr, q_strides, batch, head)
    k_ptr = _head(k_ptr, k_strides, batch, head)
    v_ptr = _head(v_ptr, v_strides, batch, head)
    first_row = (batch * H + head) * Tq
    if keep_bits_ptr is not None:
        keep_bits_ptr += first_row * tl.cdiv(Tk, 32)
    q = _load_tile(q_ptr, start_m, q_strides[1], row_mask, BLOCK_M, D, BLOCK_D)
    qk_scale = scale * LOG2_E
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)

    position = row + Tk - Tq
    masked = _first_masked(start_m + Tk - Tq, start, first_key, BLOCK_N)
    end = _not_empty(start, tl.minimum(start_m + BLOCK_M + Tk - Tq, Tk))
    for start_n in range(start, end, BLOCK_N):
        key = start_n + tl.arange(0, BLOCK_N)
        key_mask = _key_mask(key, first_key, Tk)
        k = _load_tile(k_ptr, start_n, k_strides[1], key_mask, BLOCK_N, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if start_n >= masked:
            visible = _visible(position[:, None], key[None, :], first_key)
            s = tl.where(visible, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * qk_scale)
        shift = m_new
        if first_key is not None:  # a row that has seen no key yet must not compute −∞ − (−∞)
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(s * qk_scale - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, axis=1)
        if keep_bits_ptr is not None:
            keep = _keep(keep_bits_ptr, start_m, start_n, Tq, Tk, BLOCK_M, BLOCK_N, False)
            # A zero that the compiler does not see: a plain one would be selected after the
            # rounding, once for each 16-bit half of a register.
            p = tl.where(keep, p, tl.minimum(keep_scale, 0.0))
        v = _load_tile(v_ptr, start_n, v_strides[1], key_mask, BLOCK_N, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    # A row that sees no key has acc = total = 0 and m = −∞, so O = 0 and lse = −∞.
    o = acc * (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    lse = (m + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2
    o_ptr = _head(o_ptr, o_strides, batch, head)
    _store_tile(o_ptr, start_m, o_strides[1], row < Tq, o, D)
    tl.store(lse_ptr + first_row + row, lse, mask=row < Tq)


@triton.jit
def _p_and_dp(
    q,  # (BLOCK_M, BLOCK_D)
    do,  # (BLOCK_M, BLOCK_D)
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_D)
    lse,  # (BLOCK_M,), in base 2
    keep_bits_ptr,  # (Tq, words) or None
    start_m,
    start_n,
    first_key,
    Tq,
    Tk,
    qk_scale,
    masked,
):
    """The probabilities and their gradients over keep_scale, both (BLOCK_M, BLOCK_N)."""
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_N: tl.constexpr = k.shape[0]
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    p = tl.exp2(s - lse[:, None])
    if masked:
        position = start_m + Tk - Tq + tl.arange(0, BLOCK_M)
        key = start_n + tl.arange(0, BLOCK_N)
        p = tl.where(_visible(position[:, None], key[None, :], first_key), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    if keep_bits_ptr is not None:
        keep = _keep(keep_bits_ptr, start_m, start_n, Tq, Tk, BLOCK_M, BLOCK_N, False)
        dp = tl.where(keep, dp, 0.0)
    return p, dp


@triton.jit
def _delta_of_few_keys(
    q,  # (BLOCK_M, BLOCK_D)
    do,  # (BLOCK_M, BLOCK_D)
    k_ptr,  # (Tk, D)
    v_ptr,  # (Tk, D)
    lse,  # (BLOCK_M,), in base 2
    keep_bits_ptr,  # (Tq, words) or None
    start_m,
    start_n,
    first_key,
    Tq,
    Tk,
    stride_kt,
    stride_vt,
    qk_scale,
    D: tl.constexpr,
):
    """delta of rows that see at most FEW_KEYS keys, from start_n on, as the mean of dP under P."""
    BLOCK_D: tl.constexpr = q.shape[1]
    key_mask = _key_mask(start_n + tl.arange(0, FEW_KEYS), first_key, Tk)
    k = _load_tile(k_ptr, start_n, stride_kt, key_mask, FEW_KEYS, D, BLOCK_D)
    v = _load_tile(v_ptr, start_n, stride_vt, key_mask, FEW_KEYS, D, BLOCK_D)
    p, dp = _p_and_dp(
        q, do, k, v, lse, keep_bits_ptr, start_m, start_n, first_key, Tq, Tk, qk_scale, True
    )
    total = tl.sum(p, axis=1)
    return tl.sum(p * dp, axis=1) / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["H", "Tq", "Tk"])
def causal_attention_bwd_dq_kernel(
    do_ptr,  # (B, Tq, H, D)
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, H, D)
    v_ptr,  # (B, Tk, H, D)
    o_ptr,  # (B, Tq, H, D)
    lse_ptr,  # (B, H, Tq)
    keep_bits_ptr,  # (B, H, Tq, words), None without dropout
    first_key_ptr,  # (B,) or None
    lse_and_delta_ptr,  # (B, H, Tq, 2), lse in base 2
    dq_ptr,  # (B, Tq, H, D) or None
    q_strides,  # of B, T and H
    k_strides,
    v_strides,
    o_strides,  # of do too
    dq_strides,
    scale,
    keep_scale,
    H,
    Tq,
    Tk,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(Tq, BLOCK_M)
    tile, batch, head = _tile_of_head(tiles, H)
    start_m = (tiles - 1 - tile) * BLOCK_M  # the longest rows first
    row = start_m + tl.arange(0, BLOCK_M)
    row_mask = row < Tq
    first_visible = 0
    first_key = None
    if first_key_ptr is not None:
        first_key = tl.minimum(tl.maximum(tl.load(first_key_ptr + batch), 0), Tk)
        row_mask &= row + Tk - Tq >= first_key
        first_visible = first_key
    start = first_visible // BLOCK_N * BLOCK_N

    k_ptr = _head(k_ptr, k_strides, batch, head)
    v_ptr = _head(v_ptr, v_strides, batch, head)
    do_ptr = _head(do_ptr, o_strides, batch, head)
    q_ptr = _head(q_ptr, q_strides, batch, head)
    first_row = (batch * H + head) * Tq
    if keep_bits_ptr is not None:
        keep_bits_ptr += first_row * tl.cdiv(Tk, 32)
    q = _load_tile(q_ptr, start_m, q_strides[1], row_mask, BLOCK_M, D, BLOCK_D)
    do = _load_tile(do_ptr, start_m, o_strides[1], row_mask, BLOCK_M, D, BLOCK_D)
    # With lse = ∞, a row that does not exist or is padding has p = 0.
    lse = tl.load(lse_ptr + first_row + row, mask=row_mask, other=float("inf")) * LOG2_E

    o_ptr = _head(o_ptr, o_strides, batch, head)
    o = _load_tile(o_ptr, start_m, o_strides[1], row_mask, BLOCK_M, D, BLOCK_D)
    # Where keep_scale is not at least 1, it is 0, and so is O.
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1) / tl.maximum(keep_scale, 1.0)
    few = first_visible // FEW_KEYS * FEW_KEYS
    if start_m + Tk - Tq < few + FEW_KEYS:
        # The rounding of O would be most of dS in a row that sees next to nothing.
        exact = _delta_of_few_keys(
            q, do, k_ptr, v_ptr, lse, keep_bits_ptr, start_m, few, first_key, Tq, Tk,
            k_strides[1], v_strides[1], scale * LOG2_E, D,
        )  # fmt: skip
        delta = tl.where(row + Tk - Tq < few + FEW_KEYS, exact, delta)
    # Interleaved, so that the other kernel reads both with one load.
    pointers = lse_and_delta_ptr + (2 * first_row + (2 * row[:, None] + tl.arange(0, 2)[None, :]))
    tl.store(pointers, tl.join(lse, delta), mask=(row < Tq)[:, None])

    if dq_ptr is not None:
        dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        masked = _first_masked(start_m + Tk - Tq, start, first_key, BLOCK_N)
        end = _not_empty(start, tl.minimum(start_m + BLOCK_M + Tk - Tq, Tk))
        for start_n in range(start, end, BLOCK_N):
            key_mask = _key_mask(start_n + tl.arange(0, BLOCK_N), first_key, Tk)
            k = _load_tile(k_ptr, start_n, k_strides[1], key_mask, BLOCK_N, D, BLOCK_D)
            v = _load_tile(v_ptr, start_n, v_strides[1], key_mask, BLOCK_N, D, BLOCK_D)
            p, dp = _p_and_dp(
                q, do, k, v, lse, keep_bits_ptr, start_m, start_n, first_key, Tq, Tk,
                scale * LOG2_E, start_n >= masked,
            )  # fmt: skip
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        dq_ptr = _head(dq_ptr, dq_strides, batch, head)
        _store_tile(dq_ptr, start_m, dq_strides[1], row < Tq, dq * (scale * keep_scale), D)


@triton.jit(do_not_specialize=["H", "Tq", "Tk"])
def causal_attention_bwd_dkdv_kernel(
    do_ptr,  # (B, Tq, H, D)
    q_ptr,  # (B, Tq, H, D)
    k_ptr,  # (B, Tk, H, D)
    v_ptr,  # (B, Tk, H, D)
    lse_and_delta_ptr,  # (B, H, Tq, 2), lse in base 2
    keep_bits_ptr,  # (B, H, Tq, words), None without dropout
    first_key_ptr,  # (B,) or None
    dk_ptr,  # (B, Tk, H, D) or None
    dv_ptr,  # (B, Tk, H, D) or None
    do_strides,  # of B, T and H
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    scale,
    keep_scale,
    H,
    Tq,
    Tk,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, batch, head = _tile_of_head(tl.cdiv(Tk, BLOCK_N), H)
    start_n = tile * BLOCK_N
    key = start_n + tl.arange(0, BLOCK_N)
    key_mask = key < Tk
    first_query = tl.maximum(start_n + Tq - Tk, 0)
    end = Tq
    first_key = None
    if first_key_ptr is not None:
        first_key = tl.minimum(tl.maximum(tl.load(first_key_ptr + batch), 0), Tk)
        key_mask &= key >= first_key
        first_query = tl.maximum(first_query, first_key + Tq - Tk)
        end = tl.where(start_n + BLOCK_N <= first_key, 0, Tq)  # nothing sees padding

    k_ptr = _head(k_ptr, k_strides, batch, head)
    v_ptr = _head(v_ptr, v_strides, batch, head)
    do_ptr = _head(do_ptr, do_strides, batch, head)
    q_ptr = _head(q_ptr, q_strides, batch, head)
    first_row = (batch * H + head) * Tq
    lse_and_delta_ptr += 2 * first_row
    if keep_bits_ptr is not None:
        keep_bits_ptr += first_row * tl.cdiv(Tk, 32)
    k = _load_tile(k_ptr, start_n, k_strides[1], key_mask, BLOCK_N, D, BLOCK_D)
    v = _load_tile(v_ptr, start_n, v_strides[1], key_mask, BLOCK_N, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)

    start = first_query // BLOCK_M * BLOCK_M
    qk_scale = scale * LOG2_E
    end = _not_empty(start, end)
    unmasked = start_n + BLOCK_N - 1 + Tq - Tk
    if first_key is not None:
        unmasked = end
    for start_m in range(start, end, BLOCK_M):
        row = start_m + tl.arange(0, BLOCK_M)
        position = row + Tk - Tq
        row_mask = row < Tq
        if first_key is not None:
            row_mask &= position >= first_key
        # Everything is transposed, so that P and dS are left operands, straight from registers.
        # Rows that do not exist or are padding have q, do, lse and delta 0, and so add 0.
        q = _load_tile(q_ptr, start_m, q_strides[1], row_mask, BLOCK_M, D, BLOCK_D)
        do = _load_tile(do_ptr, start_m, do_strides[1], row_mask, BLOCK_M, D, BLOCK_D)
        pointers = lse_and_delta_ptr + (2 * row[:, None] + tl.arange(0, 2)[None, :])
        lse, delta = tl.split(tl.load(pointers, mask=row_mask[:, None], other=0.0))
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        if dk_ptr is not None:
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        p = tl.exp2(s - lse[None, :])
        if start_m < unmasked:
            p = tl.where(_visible(position[None, :], key[:, None], first_key), p, 0.0)
        z = p
        if keep_bits_ptr is not None:
            keep = _keep(keep_bits_ptr, start_m, start_n, Tq, Tk, BLOCK_M, BLOCK_N, True)
            z = tl.where(keep, p, 0.0)
        if dv_ptr is not None:
            dv = tl.dot(z.to(do.dtype), do, dv, input_precision="ieee")
        if dk_ptr is not None:
            ds = z * dp - p * delta[None, :]  # over keep_scale
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    if dk_ptr is not None:
        dk_ptr = _head(dk_ptr, dk_strides, batch, head)
        _store_tile(dk_ptr, start_n, dk_strides[1], key < Tk, dk * (scale * keep_scale), D)
    if dv_ptr is not None:
        dv_ptr = _head(dv_ptr, dv_strides, batch, head)
        _store_tile(dv_ptr, start_n, dv_strides[1], key < Tk, dv * keep_scale, D)


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
    B, T, width = qkv.shape
    o = qkv.new_empty(B, T, width // 3)
    return o, _forward(*unpacked(qkv, n_head), keep_bits, first_key, o, scale, dropout_p)


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
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _backward(
        dout, *unpacked(qkv, n_head), out, lse, keep_bits, first_key, *unpacked(dqkv, n_head),
        scale, dropout_p,
    )  # fmt: skip
    return dqkv


def _within_reach(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where positions are farther apart than a tile can address."""
    return [t if t.stride(1) <= MAX_STRIDE else t.contiguous() for t in tensors]


def _strides(*tensors: Tensor | None) -> list[tuple[int, ...]]:
    """Those of B, T and H."""
    return [(0, 0, 0) if t is None else t.stride()[:3] for t in tensors]


def _contiguous_strides(T: int, H: int, D: int) -> tuple[int, int, int]:
    """Those of o and its gradient, which may come as (B, T, H, D) or as (B, T, C)."""
    return T * H * D, H * D, D


def _forward(q, k, v, keep_bits, first_key, o, scale, dropout_p):
    B, Tq, H, D = q.shape
    q, k, v = _within_reach(q, k, v)
    # The kernel takes its maximum before it scales, so the scale must be positive.
    if scale < 0:
        q, scale = -q, -scale
    scale = max(scale, SMALLEST_SCALE)
    lse = q.new_empty(B, H, Tq, dtype=torch.float32)
    if q.numel() > 0:
        tiles = attention_fwd_tiles(D, q.itemsize, q.device)
        launch(
            causal_attention_fwd_kernel, (B * H * cdiv(Tq, tiles.BLOCK_M),), tiles,
            q, k, v, keep_bits, first_key, o, lse,
            *_strides(q, k, v), _contiguous_strides(Tq, H, D),
            scale, keep_scale(dropout_p), H, Tq, k.shape[1], D=D,
        )  # fmt: skip
    return lse


def _backward(do, q, k, v, o, lse, keep_bits, first_key, dq, dk, dv, scale, dropout_p):
    B, Tq, H, D = q.shape
    Tk = k.shape[1]
    q, k, v = _within_reach(q, k, v)
    if q.numel() == 0:  # keys without queries have no gradients
        for grad in (dk, dv):
            if grad is not None:
                grad.zero_()
        return
    o_strides = _contiguous_strides(Tq, H, D)
    lse_and_delta = lse.new_empty(B, H, Tq, 2)
    tiles = attention_dq_tiles(D, q.itemsize)
    launch(
        causal_attention_bwd_dq_kernel, (B * H * cdiv(Tq, tiles.BLOCK_M),), tiles,
        do, q, k, v, o, lse, keep_bits, first_key, lse_and_delta, dq,
        *_strides(q, k, v), o_strides, *_strides(dq),
        scale, keep_scale(dropout_p), H, Tq, Tk, D=D,
    )  # fmt: skip
    if dk is not None or dv is not None:
        tiles = attention_dkdv_tiles(D, q.itemsize, q.device)
        launch(
            causal_attention_bwd_dkdv_kernel, (B * H * cdiv(Tk, tiles.BLOCK_N),), tiles,
            do, q, k, v, lse_and_delta, keep_bits, first_key, dk, dv,
            o_strides, *_strides(q, k, v, dk, dv), scale, keep_scale(dropout_p), H, Tq, Tk, D=D,
        )  # fmt: skip
