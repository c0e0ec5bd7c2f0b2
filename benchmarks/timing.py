"""Times functions side by side: by device events on a GPU, by the wall clock on a CPU.

Rounds of all functions alternate, so that they meet the same machine. On a GPU a round is

    busy device · read 4 × L2 · event · function · event

While the device is kept busy, the host launches the whole function before the first event is
reached: what is measured is the device's work without the gaps between launches. The read evicts
from L2 the inputs and what earlier rounds wrote, and leaves nothing dirty that the function would
have to write back.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch

SHORTEST_WAIT, LONGEST_WAIT = 1 << 17, 1 << 27  # cycles: about 70 µs and 70 ms


@dataclass(frozen=True)
class Timing:
    """Seconds of a call."""

    median: float
    low: float
    """The first quartile of the rounds."""
    high: float
    """The third."""
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarises the rounds of one function."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device | str, rounds: int
) -> dict[str, Timing]:
    """The time of each function, after a call of each to warm up."""
    return {name: Timing.of(s) for name, s in samples(functions, device, rounds).items()}


def samples(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    rounds: int,
    until: float = inf,
) -> dict[str, list[float]]:
    """As `measure`, but the seconds of each round.

    Args:
        until: of `time.monotonic`; no round but the first starts later.
    """
    for function in functions.values():
        function()
    with no_garbage_collection():
        on_gpu = torch.device(device).type == "cuda"
        return (_on_gpu if on_gpu else _on_cpu)(functions, _rounds(rounds, until))


def peak_memory(function: Callable[[], object], device: torch.device | str) -> int | None:
    """Bytes that a call allocates at most, beyond what is there before it; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rounds(count: int, until: float) -> Iterator[int]:
    for i in range(count):
        if i > 0 and time.monotonic() > until:
            return
        yield i


def _on_cpu(functions: Mapping[str, Callable], rounds: Iterator[int]) -> dict[str, list[float]]:
    seconds = {name: [] for name in functions}
    for _ in rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _on_gpu(functions: Mapping[str, Callable], rounds: Iterator[int]) -> dict[str, list[float]]:
    cache = torch.cuda.get_device_properties().L2_cache_size
    larger_than_cache = torch.zeros(4 * cache, dtype=torch.int8, device="cuda").view(torch.int32)

    def launch(function: Callable, wait: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(wait)
        larger_than_cache.amax()
        start.record()
        function()
        end.record()
        return start, end

    def enough_wait(function: Callable) -> int:
        wait = SHORTEST_WAIT
        while wait < LONGEST_WAIT:
            start, _ = launch(function, wait)
            host_was_ahead = not start.query()
            torch.cuda.synchronize()
            if host_was_ahead:
                return 2 * wait
            wait *= 2
        return wait

    waits = {name: enough_wait(function) for name, function in functions.items()}
    events = {name: [] for name in functions}
    for _ in rounds:
        for name, function in functions.items():
            events[name].append(launch(function, waits[name]))
    torch.cuda.synchronize()
    milliseconds = {n: [start.elapsed_time(end) for start, end in events[n]] for n in functions}
    return {name: [1e-3 * ms for ms in each] for name, each in milliseconds.items()}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
