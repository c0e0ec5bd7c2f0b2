"""Calls of the Triton launchers at GPT-1's widths, to compile them for checks and to tune them.

Each returns what its launchers returned. Tensors are made on torch's default device: random on a
GPU, uninitialised on a CPU, where the launches only compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.backends import kernel

N, C, F, T, V, HEADS = 32768, 768, 3072, 512, 40478, 12
N_HEAD = 4096  # rows: two chunks of logits, or more


def layer_norm(rows: int, dtype: torch.dtype) -> list:
    x, dy, w, stat = _new(dtype, rows, C), _new(dtype, rows, C), _new(dtype, C), _new(None, rows)
    return [
        _call("layer_norm", "fwd", x, w, w, 1e-5),
        _call("layer_norm", "bwd", dy, x, w, stat, stat, [True] * 3),
    ]


def dropout_add_layer_norm(rows: int, dtype: torch.dtype) -> list:
    x, dy, w, stat = _new(dtype, rows, C), _new(dtype, rows, C), _new(dtype, C), _new(None, rows)
    dropout = 0.1, rows
    return [
        _call("dropout_add_layer_norm", "fwd", x, dy, w, w, w, _seed(), 1e-5, *dropout, True),
        _call(
            "dropout_add_layer_norm", "bwd", dy, dy, x, w, stat, stat, _seed(), *dropout, [True] * 5
        ),
    ]


def dropout_mask(length: int, dtype: torch.dtype, batch: int = 1) -> list:
    run = kernel("triton", "dropout_mask", "dropout_mask")
    return [run(_seed(), (batch, HEADS, length, length), 0.1, length, True)]


def causal_attention(length: int, dtype: torch.dtype, batch: int = 2) -> list:
    qkv, lse = _new(dtype, batch, length, 3 * C), _new(None, batch, HEADS, length)
    out, dout = _new(dtype, batch, length, C), _new(dtype, batch, length, C)
    bits = _integers(2**31, batch, HEADS, length, (length + 31) // 32).int()
    options = bits, None, (C // HEADS) ** -0.5, 0.1
    return [
        _call("causal_attention", "qkvpacked_fwd", qkv, HEADS, *options),
        _call("causal_attention", "qkvpacked_bwd", dout, qkv, HEADS, out, lse, *options),
    ]


def gelu_ffn(rows: int, dtype: torch.dtype) -> list:
    x, dy, pre = _new(dtype, rows, C), _new(dtype, rows, C), _new(dtype, rows, F)
    w_fc, w_proj = _new(dtype, C, F), _new(dtype, F, C)
    return [
        _call("gelu_ffn", "fwd", x, w_fc, _new(dtype, F), w_proj, _new(dtype, C), [True] * 2),
        _call("gelu_ffn", "bwd", dy, x, pre, pre, w_fc, w_proj, [True] * 5),
    ]


def embedding(length: int, dtype: torch.dtype, batch: int = 2) -> list:
    """With positions by order and no types, and with both given."""
    ids, given = _integers(V, batch, length), _integers(1000, batch, length)
    table, positions = _new(dtype, V, C), _new(dtype, 1000, C)
    dout, dropout = _new(dtype, batch, length, C), (_seed(), 0.1, length)
    results = []
    for other in (None, given):
        read = ids, other, other, *dropout
        results += [
            _call("embedding", "fwd", ids, table, positions, *read[1:], dtype),
            _call("embedding", "bwd", dout, *read, V, 1000, dtype, [True] * 2),
        ]
    return results


def linear_cross_entropy(rows: int, dtype: torch.dtype, vocabulary: int = 1000) -> list:
    """With gradients, without, and the backward of "none"."""
    h, w = _new(dtype, rows, C), _new(dtype, vocabulary, C)
    targets, weight = _integers(vocabulary, rows), _new(None, rows)
    scale_gradients = kernel("triton", "linear_cross_entropy", "scale_gradients")
    return [
        *(
            _call("linear_cross_entropy", "fwd", h, w, targets, None, -100, needs)
            for needs in ([True] * 2, [False] * 2)
        ),
        _call("linear_cross_entropy", "bwd", weight, h, w, targets, weight, -100, [True] * 2),
        scale_gradients(h, _new(None, vocabulary, C), weight[0], dtype),
    ]


GPT1 = {
    "layer_norm": lambda dtype: layer_norm(N, dtype),
    "dropout_add_layer_norm": lambda dtype: dropout_add_layer_norm(N, dtype),
    "dropout_mask": lambda dtype: dropout_mask(T, dtype, N // T),
    "causal_attention": lambda dtype: causal_attention(T, dtype, N // T),
    "gelu_ffn": lambda dtype: gelu_ffn(N, dtype),
    "embedding": lambda dtype: embedding(T, dtype, N // T),
    "linear_cross_entropy": lambda dtype: linear_cross_entropy(N_HEAD, dtype, V),
}
"""By op: a function of the dtype, at the sizes of GPT-1's training."""

OVER_LENGTHS = [
    layer_norm, dropout_add_layer_norm, dropout_mask, causal_attention, gelu_ffn, embedding,
    linear_cross_entropy,
]  # fmt: skip
"""Functions of a length and a dtype."""


def _call(op: str, direction: str, *args):
    return kernel("triton", op, f"{op}_{direction}")(*args)


def _new(dtype: torch.dtype | None, *shape: int) -> Tensor:
    make = torch.randn if torch.get_default_device().type == "cuda" else torch.empty
    return make(*shape, dtype=dtype)


def _integers(bound: int, *shape: int) -> Tensor:
    return torch.randint(bound, shape)


def _seed() -> Tensor:
    return torch.zeros(2, dtype=torch.int64)
