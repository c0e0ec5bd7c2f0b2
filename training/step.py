"""One update: forward → loss → backward → clip → optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gpt1_kernels.rng import DropoutStream
from gpt1_kernels.weight_cast import cast_once

CLIP_EPS = 1e-6  # as in `torch.nn.utils.clip_grad_norm_`


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """bf16 autocast, or nothing for fp32."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def weights_in(model: nn.Module, dtype: str) -> contextlib.AbstractContextManager:
    """For bf16, the model's weights cast once for all that `autocast` runs inside.

    Not on a CPU, where it would save no launches: there each gradient is cast back in its layer's
    backward, and a layer's bf16 gradients reuse the memory of those of the layer before.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if dtype == "fp32" or on_cpu:
        return contextlib.nullcontext()
    return cast_once(model, torch.bfloat16)


class Update(NamedTuple):
    """What an update says of itself: scalars on the device."""

    loss: Tensor
    gradient_norm: Tensor
    """Before clipping."""
    finite: Tensor
    """bool; False where loss or gradient was not finite, and the update was skipped."""


def train_step(
    model: nn.Module,
    dropout_stream: DropoutStream,
    optimizer: torch.optim.Optimizer,
    input_ids: Tensor,
    step: int | Tensor,
    learning_rate: float | Tensor,
    *,
    accumulate: int = 1,
    clip: float = 1.0,
    dtype: str = "fp32",
) -> Update:
    """Updates the model on one batch, unless its loss or gradient is not finite.

    Split into micro-batches, the batch draws the same dropout bits and gives the same gradient (up
    to rounding) as in one piece: every sequence has as many targets as any other. The host waits
    for nothing: the optimizer itself skips an update on the device.

    Args:
        optimizer: a fused one.
        input_ids: (B, T); accumulate divides B.
        step: number of the update; selects the dropout bits. A tensor, like the learning rate, is
            read on the device.
    """
    seeds = dropout_stream.seeds(step)

    def losses() -> Iterator[Tensor]:
        tokens = 0
        with weights_in(model, dtype):
            for part in input_ids.chunk(accumulate):
                with autocast(input_ids.device.type, dtype):
                    loss = model(part, labels=part, dropout_seeds=seeds, row_offset=tokens).loss
                yield loss / accumulate
                tokens += part.numel()

    return apply_losses(model, optimizer, losses(), learning_rate, clip=clip)


def apply_losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Tensor],
    learning_rate: float | Tensor,
    *,
    clip: float = 1.0,
) -> Update:
    """Updates the model by the gradient of a sum of losses, unless it is not finite.

    Args:
        optimizer: a fused one.
        losses: scalars, one at a time: the next micro-batch runs after this one's backward.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    total = torch.zeros((), device=next(model.parameters()).device)
    for loss in losses:
        loss.backward()
        total += loss.detach()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    finite = torch.isfinite(total + norm)
    # As torch's GradScaler does: a fused optimizer divides gradients by grad_scale as it reads
    # them, and skips the update where found_inf is set.
    optimizer.grad_scale = ((norm + CLIP_EPS) / clip).clamp(min=1)
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(total, norm, finite)


class SkippedUpdates:
    """Counts, on the device, the updates that were skipped."""

    def __init__(self, device: str, total: int = 0):
        self._counts = torch.tensor([total, 0, -1], device=device)

    def note(self, step: int, finite: Tensor) -> None:
        """Counts update `step`; the host does not wait for it."""
        total, in_a_row, last = self._counts.unbind()
        skipped = ~finite
        self._counts = torch.stack(
            [total + skipped, (in_a_row + 1) * skipped, torch.where(skipped, step, last)]
        )

    def counts(self) -> tuple[int, int, int]:
        """All of them, those in a row now, and the step of the last; waits for the device."""
        return tuple(self._counts.tolist())
