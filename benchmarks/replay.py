"""A clock that moves by what was measured elsewhere.

pytest-benchmark times calls on the host, one function after the other. Ours are timed side by side,
on a GPU by its own events; pytest-benchmark gets their rounds by this clock, for its statistics,
`--benchmark-json` and `--benchmark-compare`.
"""

from __future__ import annotations

from collections.abc import Sequence

_now = 0.0


def clock() -> float:
    """Seconds; goes to `pytest.mark.benchmark(timer=clock)`."""
    return _now


def replay(benchmark, seconds: Sequence[float]) -> None:
    """Makes each of the seconds a round of the `benchmark` fixture of a test with this clock."""
    rounds = iter(seconds)
    benchmark.pedantic(_pass, setup=lambda: ((next(rounds),), {}), rounds=len(seconds))


def _pass(seconds: float) -> None:
    global _now
    _now += seconds
