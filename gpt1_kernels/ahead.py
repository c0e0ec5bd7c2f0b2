"""Attention's dropout bits, drawn on a stream beside the one that computes.

Drawing is integer arithmetic, and what runs meanwhile is bound by memory or the tensor cores. It
costs no memory, since the bits of all layers are kept until backward in any case: 25 MB a layer at
GPT-1's shape, of which 13.4, the causal half, are read. Blocks that backward recomputes keep
none, and draw their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import local

import torch
from torch import Tensor

from gpt1_kernels.ops import dropout_mask


def draws_ahead(seed: Tensor) -> bool:
    """Whether a second stream can be used: on a GPU, and not under torch.compile."""
    return seed.is_cuda and not torch.compiler.is_compiling()


def draw_ahead(
    seeds: Sequence[Tensor],
    shape: tuple[int, int, int, int],
    probabilities: Sequence[float],
    row_offset: int,
) -> Iterator[Tensor]:
    """The bits of one attention after the other; the drawing begins with the call.

    The current stream waits for each result as it is taken, also in a CUDA graph that captures it.

    Args:
        seeds: int64 (2,) of each attention.
        shape: (B, H, Tq, Tk).
        probabilities: of dropping, in each attention.
        row_offset: as in `ops.causal_attention`, in tokens.
    """
    device = seeds[0].device
    here, beside = torch.cuda.current_stream(device), _stream_beside(device)
    beside.wait_stream(here)  # for the seeds
    drawn = []
    with torch.cuda.stream(beside):
        for seed, p in zip(seeds, probabilities, strict=True):
            bits = dropout_mask(seed, shape, p, row_offset=row_offset * shape[1], causal=True)
            bits.record_stream(here)  # else their memory might be reused before it is read
            drawn.append((bits, beside.record_event()))
    return _waited_for(drawn, here)


def _waited_for(drawn: list[tuple[Tensor, torch.cuda.Event]], stream: torch.cuda.Stream):
    for bits, ready in drawn:
        stream.wait_event(ready)
        yield bits


_of_thread = local()


def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """One for each thread (of the 32 that PyTorch has), so that none captures another's work."""
    streams = vars(_of_thread)
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]
