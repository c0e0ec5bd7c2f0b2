"""Ids that a GPU found out of range: recorded there without a sync, raised by the host later."""

from __future__ import annotations

import torch
from torch import Tensor


class ErrorRecord:
    """The first id out of range that one op met on one GPU.

    `host` is memory that kernels write to, pinned where the device is a GPU: int64 [1 once there is
    an error, the id]. Whoever finds an id out of range writes it there only if none is recorded.
    """

    def __init__(self, device: torch.device):
        self.device = device
        pinned = device.type == "cuda"
        with torch.inference_mode(False):  # an inference tensor is read-only outside that mode
            self.host = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._values = self.host.numpy()  # the same memory, read at every op call

    def note(self, ids: Tensor, valid: Tensor) -> None:
        """Keeps the first of `ids` that is not `valid`, if there is one; does not wait for it.

        The record is read when the stream comes to it: kernels launched before have written theirs.
        """
        if ids.numel() == 0:
            return
        invalid = ~valid.flatten()
        first = ids.flatten().gather(0, invalid.long().argmax(0, keepdim=True))  # no index waits
        found = torch.cat([invalid.any(0, keepdim=True).long(), first.long()])
        recorded = self.host.to(self.device, non_blocking=True)
        self.host.copy_(torch.where(recorded[0] == 0, found, recorded), non_blocking=True)

    def take(self) -> int | None:
        """The recorded id, which is then forgotten, or None."""
        if self._values[0] == 0:
            return None
        # Kernels may set the flag before they write the id. In a capture nothing may wait, but what
        # came before it has run: `torch.cuda.graph` waits first.
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.device)
        recorded, value = self._values.tolist()  # again: another thread may have taken it
        self._values[:] = 0
        return value if recorded else None


_records: dict[tuple[str, int, torch.device], ErrorRecord] = {}


def error_record(op: str, bound: int, device: torch.device) -> ErrorRecord:
    """The record of an op for ids that must lie in [0, bound) on a device."""
    key = op, bound, device
    # Of two threads that meet here, both get the first record: nobody reads another.
    return _records.get(key) or _records.setdefault(key, ErrorRecord(device))


def raise_recorded() -> None:
    """Raises IndexError if a kernel has recorded an id out of range; else does not wait."""
    for (op, bound, device), record in list(_records.items()):  # a copy: backward's threads add
        value = record.take()
        if value is not None:
            raise IndexError(f"{op}: id {value} is out of range [0, {bound}) on {device}")


def check_errors() -> None:
    """Waits for all GPUs in use and raises what their kernels could not.

    Without it, the next op call raises it.

    Raises:
        IndexError: an op met a token id or a target out of range; names the op, the id, the bound.
    """
    for device in {device for *_, device in list(_records)}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    raise_recorded()
