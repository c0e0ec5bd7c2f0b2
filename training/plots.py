"""The picture of a run."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_run(metrics: Path, picture: Path) -> None:
    """Draws training and validation loss, and the learning rate, against updates."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for key, label, style in (
        ("loss", "training", {"linewidth": 0.8, "alpha": 0.7}),
        ("validation_loss", "validation", {"marker": "o", "markersize": 3}),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        top.plot(*zip(*points, strict=True), label=label, **style)
    top.set_ylabel("loss (nats per token)")
    top.grid(alpha=0.3)
    top.legend()
    rates = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    bottom.plot(*zip(*rates, strict=True), color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("update")
    bottom.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
