"""Compares runs in one picture: `python training/plot.py RUN [RUN …]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from training.plots import plot_runs


@dataclass(frozen=True)
class PlotConfig:
    """Draws the losses and learning rates of runs of pretrain.py."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Their folders."""
    out: Path = Path("losses.png")
    """The picture."""


if __name__ == "__main__":
    try:
        config = tyro.cli(PlotConfig)
        plot_runs(config.runs, config.out)
        print(config.out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
