"""What the machine can do at most, measured: the bandwidth of a copy, the rate of a product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.roofline import Floor
from benchmarks.timing import measure

COPIED = {"cuda": 4 << 30, "cpu": 128 << 20}  # bytes, far more than any cache
SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices of the product
ROUNDS = 11


@dataclass(frozen=True)
class Ceilings:
    bandwidth: float
    """Bytes a second, those read and those written."""
    rate: float
    """FLOPs a second."""

    def seconds(self, floor: Floor) -> float:
        """The least time in which these bytes can be moved and these FLOPs done (roofline)."""
        return max(floor.bytes / self.bandwidth, floor.flops / self.rate)


@cache
def measured(device: str, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device type, "cuda" or "cpu"; the product is of random matrices."""
    source = torch.randn(COPIED[device] // 4, device=device)
    target, n = torch.empty_like(source), SIDE[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    functions = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = measure(functions, device, ROUNDS)
    return Ceilings(
        bandwidth=2 * source.nbytes / times["copy"].median,
        rate=2 * n**3 / times["product"].median,
    )
