"""Compares runs in one picture: `python training/plot.py RUN [RUN …]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from training import cli
from training.plots import plot_runs


@dataclass(frozen=True)
class PlotConfig:
    """Draws the losses and learning rates of runs of pretrain.py."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Their folders."""
    out: Path = Path("losses.png")
    """The picture."""


def main(config: PlotConfig) -> None:
    plot_runs(config.runs, config.out)
    print(config.out)


if __name__ == "__main__":
    cli.run(main, PlotConfig)
