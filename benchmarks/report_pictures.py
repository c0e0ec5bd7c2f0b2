"""The pictures of a record: how near the floors ops come, and how they stand beside peers."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from benchmarks.ceilings import Ceilings
from benchmarks.compare import Result

COLOURS = {"ours": "tab:red", "peer": "tab:blue", "yardstick": "tab:gray"}


def draw_roofline(results: list[Result], ceilings: Ceilings, path: Path) -> None:
    """FLOP/s against FLOPs a byte, and bytes/s of what has no matrix products, as bars."""
    multiplying = [r for r in results if sum(f.flops for f in r.floors) > 0]
    moving = [r for r in results if sum(f.flops for f in r.floors) == 0 and r.kind != "yardstick"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 0.16 * len(moving) + 5))

    intensity = np.logspace(-1, 5, 200)
    roof = np.minimum(intensity * ceilings.bandwidth, ceilings.rate)
    left.loglog(intensity, 1e-12 * roof, color="black", label="ceilings, measured")
    for kind in COLOURS:
        those = [r for r in multiplying if r.kind == kind]
        x = [sum(f.flops for f in r.floors) / sum(f.bytes for f in r.floors) for r in those]
        y = [1e-12 * sum(f.flops for f in r.floors) / r.timing.median for r in those]
        left.loglog(x, y, "o", color=COLOURS[kind], label=kind, alpha=0.7)
    left.set_xlabel("FLOPs a byte that the op cannot but do and move")
    left.set_ylabel("TFLOP/s")
    left.legend()

    names = [f"{r.case}, {r.direction}, {r.implementation}" for r in moving]
    rates = [1e-12 * sum(f.bytes for f in r.floors) / r.timing.median for r in moving]
    right.barh(names, rates, color=[COLOURS[r.kind] for r in moving])
    right.axvline(1e-12 * ceilings.bandwidth, color="black")
    right.set_xlabel("TB/s of the bytes that the op cannot but move; the line is a copy's")
    right.tick_params(axis="y", labelsize=6)
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_peers(results: list[Result], path: Path) -> None:
    """The median time of each implementation, a panel for each case: both passes, or forward."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        directions = {r.direction for r in results if r.case == result.case}
        if result.direction == ("both" if "both" in directions else "forward"):
            grouped.setdefault(f"{result.case}, {result.direction}", []).append(result)
    rows = -(-len(grouped) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(14, 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(grouped) :]:
        axis.axis("off")
    swatches = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    axes.flat[0].legend(handles=swatches, fontsize=8)
    for axis, (title, group) in zip(axes.flat, grouped.items(), strict=False):
        timings = [r.timing for r in group]
        spread = [[t.median - t.low for t in timings], [t.high - t.median for t in timings]]
        axis.barh(
            [r.implementation for r in group], [1e6 * t.median for t in timings],
            xerr=1e6 * np.array(spread), color=[COLOURS[r.kind] for r in group],
        )  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("µs")
        axis.tick_params(axis="y", labelsize=8)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
