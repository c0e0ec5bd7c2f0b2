"""Token ids and targets that are out of range."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt1_kernels.errors import error_record


def check_ids(op: str, ids: Tensor, bound: int, allowed: int | None = None) -> Tensor | None:
    """Which ids lie in [0, bound): None on a CPU, where all do or IndexError is raised.

    On a GPU, the first that does not is recorded for `gpt1_kernels.check_errors`.

    Args:
        allowed: one further value that is accepted, such as an ignore_index.
    """
    valid = (ids >= 0) & (ids < bound)
    if allowed is not None:
        valid |= ids == allowed
    if ids.is_cuda:
        error_record(op, bound, ids.device).note(ids, valid)
        return valid
    if not valid.all():
        value = int(ids[~valid].flatten()[0])
        raise IndexError(f"{op}: id {value} is out of range [0, {bound})")
    return None


def nan_where_invalid(values: Tensor, *validities: Tensor | None) -> Tensor:
    """Writes NaN to the rows (last axis) or elements of `values` whose id was out of range."""
    for valid in validities:
        if valid is not None:
            valid = valid if valid.dim() == values.dim() else valid.unsqueeze(-1)
            values = torch.where(valid, values, torch.nan)
    return values
