"""The regression guard: all that is measured without a GPU, beside `baseline.json`.

    python -m benchmarks.guard
    python -m benchmarks.guard --update --parts bytes launches

`pytest` compares too, what fits into a few minutes of it. A change that makes a number worse or
better runs the second line and is committed with the new numbers.

    bytes     that each op moves at GPT-1's training shape (`benchmarks.traffic`); minutes
    launches  of a training step (`benchmarks.launches`)
    triton    registers, shared memory, instructions of the main loop and share of 16-byte accesses
    cuda      of each kernel, for compute capabilities 8.0, 9.0 and 10.0; stack and spills are in
              the tests, which allow none
    host      a call of an op, forward and backward, in calls of an empty op
              (`benchmarks.host_overhead`)
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import tyro

from benchmarks import baseline, cuda_code, host_overhead, launches, traffic, triton_code
from gpt1_kernels.backends.cuda import extension

CAPABILITIES = 80, 90, 100


class Part(NamedTuple):
    """How a part of the baseline is measured."""

    rows: Callable[[], Iterator[baseline.Rows]]
    """Some at a time."""
    versions: Callable[[], dict[str, str]] = dict
    absence: Callable[[], str | None] = lambda: None
    """Why it cannot be measured here, or None."""


def _bytes() -> Iterator[baseline.Rows]:
    for name, call in traffic.CALLS.items():
        for backend in call.counted_at:
            yield traffic.row(name, backend)


def _host_build() -> str | None:
    return extension.absence("cuda_host")


PARTS = {
    "bytes": Part(_bytes, absence=_host_build),
    "launches": Part(lambda: iter([launches.rows()]), launches.versions, _host_build),
    "triton": Part(lambda: map(triton_code.rows, CAPABILITIES), triton_code.versions),
    "cuda": Part(
        lambda: map(cuda_code.rows, CAPABILITIES), cuda_code.versions, cuda_code.absence
    ),
    "host": Part(
        lambda: map(host_overhead.rows, host_overhead.COMPARED), host_overhead.versions, _host_build
    ),
}  # fmt: skip


@dataclass(frozen=True)
class GuardConfig:
    """Compares what is measured without a GPU with benchmarks/baseline.json."""

    parts: tuple[Literal[tuple(PARTS)], ...] = tuple(PARTS)
    """What to measure."""
    update: bool = False
    """Write the numbers of these parts to the file."""


def main(config: GuardConfig) -> bool:
    """Prints what differs; whether nothing does, or all of it was written."""
    agreed = True
    for name in config.parts:
        part = PARTS[name]
        if (reason := part.absence()) is not None:
            print(f"{name}: not measured: {reason}")
            agreed = agreed and not config.update
            continue
        versions = part.versions()
        if not config.update and (reason := baseline.mismatch(name, versions)) is not None:
            print(f"{name}: not compared: {reason}")
            continue
        rows = {}
        for some in part.rows():
            rows |= some
        found = list(baseline.differences(name, rows, whole=True))
        print(f"{name}: {len(rows)} rows, {len(found)} differences", flush=True)
        for difference in found:
            print(f"  {difference}")
        if config.update:
            baseline.update(name, rows, versions)
        agreed = agreed and (config.update or not found)
    return agreed


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(GuardConfig)))
