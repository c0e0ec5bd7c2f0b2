"""Attention's dropout bits, drawn on a stream beside the one that computes.

Drawing is integer arithmetic, and what runs meanwhile is bound by memory or the matrix units. Until
backward the bits of all layers are in memory in any case, 25 MB a layer at GPT-1's shape (of
which 13.4, the causal half, are read). That does not hold for blocks that backward recomputes:
those draw their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from gpt1_kernels.ops import dropout_mask


def draws_ahead(seed: Tensor) -> bool:
    """Whether there are streams: on a GPU, and not in a graph of the compiler's."""
    return seed.is_cuda and not torch.compiler.is_compiling()


def draw_ahead(
    seeds: Sequence[Tensor], shape: tuple[int, int, int, int], p: float, row_offset: int
) -> Iterator[Tensor]:
    """The bits of one attention after the other; the drawing begins with the call.

    The current stream is told to wait for those that are asked for. That holds in a CUDA graph that
    is captured on it, too.

    Args:
        seeds: int64 (2,) of each attention.
        shape: (B, H, Tq, Tk).
        row_offset: as in `ops.causal_attention`, in tokens.
    """
    device = seeds[0].device
    here, beside = torch.cuda.current_stream(device), _stream_beside(device)
    beside.wait_stream(here)  # for the seeds
    drawn = []
    with torch.cuda.stream(beside):
        for seed in seeds:
            bits = dropout_mask(seed, shape, p, row_offset=row_offset * shape[1], causal=True)
            bits.record_stream(here)  # or their memory would be drawn to again before it is read
            drawn.append((bits, beside.record_event()))
    return _waited_for(drawn, here)


def _waited_for(drawn: list[tuple[Tensor, torch.cuda.Event]], stream: torch.cuda.Stream):
    for bits, ready in drawn:
        stream.wait_event(ready)
        yield bits


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
