"""The figures of a result and the tables that people read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.ceilings import Ceilings
from benchmarks.compare import Result
from benchmarks.compare_models import ModelResult
from benchmarks.timing import Timing


@dataclass(frozen=True)
class Figures:
    """What a line shows, in SI units; shares and ratios as fractions."""

    implementation: str
    seconds: float
    low: float
    high: float
    rounds: int
    flops_per_s: float
    bytes_per_s: float
    """Of the floor's bytes: those that had to be moved, not those that were."""
    share_of_floor: float | None
    """The floor's time over the measured: 1 is as fast as the machine's ceilings allow."""
    times_best_peer: float | None
    """The best peer's time over this one's: above 1 is faster than every peer."""
    peak_bytes: int | None


def figures(results: Sequence[Result], ceilings: Ceilings | None) -> list[Figures]:
    """Of the results of one case in one direction; without ceilings no shares of the floor."""
    medians = [r.timing.median for r in results if r.kind == "peer"]
    best_peer = min(medians, default=None)
    return [_figures(result, ceilings, best_peer) for result in results]


def _figures(result: Result, ceilings: Ceilings | None, best_peer: float | None) -> Figures:
    timing = result.timing
    floor = ceilings and sum(map(ceilings.seconds, result.floors))
    return Figures(
        implementation=result.implementation,
        **_spread(timing),
        flops_per_s=sum(floor.flops for floor in result.floors) / timing.median,
        bytes_per_s=sum(floor.bytes for floor in result.floors) / timing.median,
        share_of_floor=floor and floor / timing.median,
        times_best_peer=best_peer and best_peer / timing.median,
        peak_bytes=result.peak_bytes,
    )


def _spread(timing: Timing) -> dict[str, float]:
    named = asdict(timing)
    return {"seconds": named.pop("median"), **named}


HEADER = ("", "µs", "quartiles", "FLOP/s", "bytes/s", "of floor", "x best peer", "peak MB")


def cells(line: Figures) -> tuple[str, ...]:
    """A line of the table, under HEADER."""
    return (
        line.implementation,
        number(1e6 * line.seconds),
        f"{number(1e6 * line.low)}-{number(1e6 * line.high)}",
        rate(line.flops_per_s) if line.flops_per_s else "",
        rate(line.bytes_per_s),
        _percent(line.share_of_floor),
        _ratio(line.times_best_peer),
        _megabytes(line.peak_bytes),
    )


@dataclass(frozen=True)
class ModelFigures:
    """What a line of a whole model shows."""

    implementation: str
    seconds: float
    low: float
    high: float
    rounds: int
    tokens_per_s: float
    flops_per_s: float
    utilisation: float | None
    """MFU: the FLOPs a second that the model needs, over the ceiling."""
    times_best_peer: float | None
    times_transformers: float | None
    """The eager one's time for a token over this one's."""
    peak_bytes: int | None


def model_figures(results: Sequence[ModelResult], rate: float | None) -> list[ModelFigures]:
    """Of the results of one size and pass; `rate` is the ceiling, FLOPs a second, if known."""
    rates = [r.tokens / r.timing.median for r in results]
    pairs = list(zip(results, rates, strict=True))
    peers = {r.implementation: tokens for r, tokens in pairs if r.kind == "peer"}
    best_peer, eager = max(peers.values(), default=None), peers.get("transformers")
    return [
        ModelFigures(
            implementation=r.implementation,
            **_spread(r.timing),
            tokens_per_s=tokens,
            flops_per_s=r.flops / r.timing.median,
            utilisation=rate and r.flops / r.timing.median / rate,
            times_best_peer=best_peer and tokens / best_peer,
            times_transformers=eager and tokens / eager,
            peak_bytes=r.peak_bytes,
        )
        for r, tokens in pairs
    ]


MODEL_HEADER = (
    "", "ms", "quartiles", "tokens/s", "FLOP/s", "MFU", "x best peer", "x transformers", "peak MB",
)  # fmt: skip


def model_cells(line: ModelFigures) -> tuple[str, ...]:
    """A line of the table, under MODEL_HEADER."""
    return (
        line.implementation,
        number(1e3 * line.seconds),
        f"{number(1e3 * line.low)}-{number(1e3 * line.high)}",
        number(line.tokens_per_s),
        rate(line.flops_per_s),
        _percent(line.utilisation),
        _ratio(line.times_best_peer),
        _ratio(line.times_transformers),
        _megabytes(line.peak_bytes),
    )


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.1%}"


def _ratio(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _megabytes(bytes: int | None) -> str:
    return "" if bytes is None else number(1e-6 * bytes)


def number(x: float) -> str:
    """Three significant digits, thousands in full."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def rate(x: float) -> str:
    """Three significant digits and a prefix of the unit: 3.03 T."""
    scale, prefix = (1e12, "T") if x >= 1e12 else (1e9, "G") if x >= 1e9 else (1e6, "M")
    return f"{number(x / scale)} {prefix}"


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text: the first column to the left, the others to the right, empty ones left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    rows, widths = list(zip(*columns, strict=True)), [max(map(len, c)) for c in columns]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
