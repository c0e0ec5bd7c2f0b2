"""AdamW as GPT-1 was trained with it, and its learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW, b1=0.9, b2=0.999, eps=1e-8; decay on tensors of two or more dimensions only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """The share of the peak rate at update `step` (from 0): linear from 0, then cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_linear(step: int, warmup_share: float, total: int) -> float:
    """The share of the peak rate at update `step` (from 0) of a fine-tuning.

    As in the code released with the paper: linear from 0 over `warmup_share` of the updates, and a
    linear decay to 0 that also acts on the warm-up.
    """
    x = step / total
    return (x / warmup_share if x <= warmup_share and warmup_share > 0 else 1.0) * (1 - x)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Both moments of every parameter, as `exp_avg.<name>` and so on, and AdamW's own `step`."""
    states = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    tensors = {f"{m}.{name}": state[m] for name, state in states.items() for m in MOMENTS}
    if states:
        tensors["step"] = next(iter(states.values()))["step"]
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Undoes `optimizer_tensors`.

    Raises:
        ValueError: a moment is missing or left over, or has another shape than its parameter.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {f"{m}.{name}": p.shape for name, p in parameters.items() for m in MOMENTS}
    shapes["step"] = torch.Size()
    wrong = {n for n, x in tensors.items() if x.shape != shapes.get(n)} | shapes.keys() - tensors
    if wrong:
        raise ValueError(f"optimizer: {', '.join(sorted(wrong))} do not fit the model")
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            key: tensors[saved].to(parameter.device, copy=True)
            for key, saved in (("step", "step"), *((m, f"{m}.{name}") for m in MOMENTS))
        }
