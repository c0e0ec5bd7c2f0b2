"""The regression guard: all that is measured without a GPU, beside `baseline.json`.

    python -m benchmarks.guard
    python -m benchmarks.guard --update --parts bytes launches

`pytest` compares too, what fits into a few minutes of it. A change that makes a number worse or
better runs the second line and is committed with the new numbers.

    bytes     that each op moves at GPT-1's training shape (`benchmarks.traffic`); minutes
    launches  of an update (`benchmarks.launches`)
    triton    of each kernel, for compute capabilities 8.0, 9.0 and 10.0: registers, shared memory,
    cuda      instructions of the main loop, share of the bytes that are moved 16 or more at a time;
              stack and spills are not here, since the tests allow none
    host      the time of an op's call, forward and backward, in those of an empty op
              (`benchmarks.host_overhead`)
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import tyro

from benchmarks import baseline, cuda_code, traffic, triton_code
from benchmarks.cuda_code import OUTDATED
from benchmarks.host_overhead import host_overhead
from benchmarks.launches import launches_by_layer
from csrc.build import is_outdated
from gpt1_kernels.backends.cuda import extension

CAPABILITIES = 80, 90, 100
ROUNDS = 200  # of a call whose time on the host is measured


class Part(NamedTuple):
    """How a part of the baseline is measured."""

    rows: Callable[[], Iterator[baseline.Rows]]
    """Some at a time."""
    versions: Callable[[], dict[str, str]] = dict
    """What the numbers depend on beside our source."""
    absence: Callable[[], str | None] = lambda: None
    """Why it cannot be measured here, or None."""


def _bytes() -> Iterator[baseline.Rows]:
    for name, call in traffic.CALLS.items():
        for backend in call.counted_at:
            yield traffic.row(name, backend)


def _launches() -> Iterator[baseline.Rows]:
    """By name, on each backend: the launches of a layer, and those beside the layers."""
    rows: dict[str, dict[str, int]] = {}
    for backend in traffic.COUNTING:
        for name, (of_layer, rest) in launches_by_layer(backend).items():
            counts = {f"{backend}, a layer": of_layer, f"{backend}, besides": rest}
            rows.setdefault(name, {}).update(counts)
    yield rows


def _host() -> Iterator[baseline.Rows]:
    for backend in traffic.COUNTING:
        for op, (beyond, empty) in host_overhead(backend, ROUNDS).items():
            yield {f"{op} on {backend}": {"empty ops": round(1 + beyond / empty, 2)}}


def _host_build() -> str | None:
    reason = OUTDATED if is_outdated("_cuda_host") else extension.absence("cuda_host")
    return reason and f"backend cuda_host: {reason}"


def _torch() -> dict[str, str]:
    return {"torch": torch.__version__.partition("+")[0]}


def _torch_and_python() -> dict[str, str]:
    return {**_torch(), "Python": ".".join(platform.python_version_tuple()[:2])}


PARTS = {
    "bytes": Part(_bytes, absence=_host_build),
    "launches": Part(_launches, _torch, _host_build),
    "triton": Part(lambda: map(triton_code.rows, CAPABILITIES), triton_code.versions),
    "cuda": Part(
        lambda: map(cuda_code.rows, CAPABILITIES), cuda_code.versions, cuda_code.absence
    ),
    "host": Part(_host, _torch_and_python, _host_build),
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
