"""Error metrics, the tolerances of the parity tests, and the dtypes of activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CAPS = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 1e-6}
WORST_ROW_FACTOR = 3
ALLOWED_FACTOR = 2
ABSOLUTE_SLACK = 2e-6


@dataclass(frozen=True)
class Error:
    """Relative errors against an fp64 oracle: of the whole tensor and of its worst row."""

    whole: float
    worst_row: float


def error(actual: Tensor, oracle: Tensor) -> Error:
    """Measures `actual` against `oracle`, both of one shape; a row is a slice of the last axis.

    The norm of a row is taken as at least a tenth of the root-mean-square row norm, so that a row
    of rounding noise does not decide. An oracle of nothing but zeros has no scale: the errors are
    absolute. A value that is not finite gives an infinite error.
    """
    if actual.shape != oracle.shape:
        raise ValueError(f"actual: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    if oracle.numel() == 0:
        return Error(0.0, 0.0)
    oracle = oracle.detach().double().reshape(-1, oracle.shape[-1] if oracle.dim() else 1)
    difference = actual.detach().to(oracle).reshape_as(oracle) - oracle
    if not difference.isfinite().all():
        return Error(float("inf"), float("inf"))
    if not oracle.any():
        return Error(float(difference.norm()), float(difference.norm(dim=1).max()))
    row_norms = oracle.norm(dim=1)
    scale = row_norms.clamp(min=0.1 * row_norms.square().mean().sqrt())
    return Error(
        float(difference.norm() / oracle.norm()), float((difference.norm(dim=1) / scale).max())
    )


def allowed(plain: Error, dtype: torch.dtype) -> Error:
    """What a kernel may lose where plain PyTorch of the same dtype loses `plain`."""
    cap = CAPS[dtype]
    return Error(
        ALLOWED_FACTOR * min(plain.whole, cap) + ABSOLUTE_SLACK,
        ALLOWED_FACTOR * min(plain.worst_row, WORST_ROW_FACTOR * cap) + ABSOLUTE_SLACK,
    )


def assert_close(
    name: str, actual: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype
) -> None:
    """Raises AssertionError unless `actual` passes the rule.

    On a single number PyTorch's error may be tiny by luck: there the cap decides.

    Args:
        plain: what PyTorch gives in the same dtype.
        oracle: what it gives in fp64.
        dtype: of the activations, which decides the cap for fp32 losses and gradients too.
    """
    lost = error(plain, oracle) if oracle.numel() > 1 else Error(CAPS[dtype], CAPS[dtype])
    got, limit = error(actual, oracle), allowed(lost, dtype)
    if not (got.whole <= limit.whole and got.worst_row <= limit.worst_row):
        raise AssertionError(f"{name}: {got} exceeds {limit}")
