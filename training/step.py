"""One update: forward → loss → backward → clip → optimizer → schedule."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gpt1_kernels.rng import DropoutStream


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """bf16 autocast, or nothing for fp32."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def train_step(
    model: nn.Module,
    dropout_stream: DropoutStream,
    optimizer: torch.optim.Optimizer,
    input_ids: Tensor,
    step: int,
    learning_rate: float,
    *,
    accumulate: int = 1,
    clip: float = 1.0,
    dtype: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Updates the model on one batch.

    Split into micro-batches, the batch draws the same dropout bits and gives the same gradient (up
    to rounding) as in one piece: every sequence has as many targets as any other.

    Args:
        input_ids: (B, T); accumulate divides B.
        step: number of the update; selects the dropout bits.

    Returns:
        The loss and the gradient's norm before clipping, as scalars on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    seeds = dropout_stream.seeds(step)
    total = torch.zeros((), device=input_ids.device)
    tokens = 0
    for part in input_ids.chunk(accumulate):
        with autocast(input_ids.device.type, dtype):
            loss = model(part, labels=part, dropout_seeds=seeds, row_offset=tokens).loss
        (loss / accumulate).backward()
        total += loss.detach() / accumulate
        tokens += part.numel()
    norm = clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
