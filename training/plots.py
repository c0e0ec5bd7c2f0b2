"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from training.readers import RowError, json_lines

if TYPE_CHECKING:
    from training.comparison import Comparison

MOST_NUMBERED = 20  # classes; counts of more would not be legible, and take minutes to draw


def plot_runs(runs: Sequence[Path], picture: Path) -> None:
    """Draws training and validation losses, and learning rates, of runs against updates.

    Args:
        runs: folders with `metrics.jsonl`; a run keeps its colour in both curves.

    Raises:
        FileNotFoundError: a folder without it.
        ValueError: no runs, a file without a line, or a line that is not JSON; names it. A picture
            without a suffix, from which its format is known.
    """
    if not runs:
        raise ValueError("runs: none, expected one or more folders")
    if not picture.suffix:
        raise ValueError(f"{picture}: expected a suffix, such as .png")
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for number, run in enumerate(runs):
        file, colour = run / "metrics.jsonl", f"C{number}"
        rows = []
        for _, row in json_lines(file):
            if isinstance(row, RowError):
                raise row
            rows.append(row)
        if not rows:
            raise ValueError(f"{file}: empty, expected the log of a run")
        name = f"{_plain(run.absolute().name)}, " if len(runs) > 1 else ""
        for axis, key, label, style in (
            (top, "loss", "training", {"linewidth": 0.8, "alpha": 0.5}),
            (top, "validation_loss", "validation", {"marker": "o", "markersize": 3}),
            (bottom, "learning_rate", None, {}),
        ):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            label = label and name + label
            axis.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    top.set_ylabel("loss (nats per token)")
    top.legend()
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("update")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_predictions(
    labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], picture: Path
) -> None:
    """Draws a confusion matrix of classes, or scores against scores where there are none.

    Args:
        labels, predictions: (examples,), numbers of classes, or scores.
        classes: their names, in order; those that never occur are left out. An answer that only
            its question has a name for is shown by its place, from 1.
    """
    from sklearn.metrics import ConfusionMatrixDisplay  # a second that pre-training is spared

    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    if classes:
        seen = np.union1d(labels, predictions).astype(int)
        names = [_plain(classes[i]) if i < len(classes) else f"{i + 1}" for i in seen]
        ConfusionMatrixDisplay.from_predictions(
            labels, predictions, labels=seen, display_labels=names, ax=axis, colorbar=False,
            cmap="Blues", include_values=len(seen) <= MOST_NUMBERED,
        )  # fmt: skip
    else:
        axis.scatter(labels, predictions, s=8, alpha=0.4)
        axis.grid(alpha=0.3)
    axis.set_xlabel("predicted class" if classes else "score")
    axis.set_ylabel("class" if classes else "predicted score")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_zero_shot(rows: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Draws scores between guessing (0) and the best other model (1) against updates.

    Args:
        rows: of the checkpoints in order: `step`, and `normalised` scores by task.
    """
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    for name in rows[0]["normalised"]:
        values = [row["normalised"][name] for row in rows]
        axis.plot(steps, values, marker="o", markersize=3, label=name)
    axis.set_xscale("log")
    axis.set_xlabel("pre-training update")
    axis.set_ylabel("0: guessing, 1: the best other model")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_ablations(comparisons: Mapping[str, Comparison], picture: Path) -> None:
    """Draws the variants of each task as bars with their 95 % intervals.

    A dashed line is the task's baseline; open markers are the paper's numbers.
    """
    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(comparisons), 4), layout="constrained")
    variants = list(next(iter(comparisons.values())).validation)
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        x = np.arange(len(comparisons)) + (number - (len(variants) - 1) / 2) * width
        scores = [c.validation[variant] for c in comparisons.values()]
        errors = [score.interval[1] - score.mean for score in scores]
        axis.bar(x, [score.mean for score in scores], width, yerr=errors, capsize=3, label=variant)
        published = [c.paper.get(variant, np.nan) for c in comparisons.values()]
        axis.plot(x, published, "o", color="black", fillstyle="none")
    for number, comparison in enumerate(comparisons.values()):
        axis.hlines(comparison.baseline, number - 0.45, number + 0.45, "black", "dashed")
    axis.plot([], "o", color="black", fillstyle="none", label="the paper")
    axis.plot([], "--", color="black", label="baseline")
    names = [f"{task}\n{c.score}" for task, c in comparisons.items()]
    axis.set_xticks(range(len(names)), names)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_transfer(comparisons: Mapping[str, Comparison], picture: Path) -> None:
    """Draws scores against transferred blocks, with 95 % bands; dashed on training examples.

    A dotted line is the task's baseline.
    """
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, (task, comparison) in enumerate(comparisons.items()):
        colour = f"C{number}"
        blocks = np.arange(len(comparison.validation)) - 1
        for scores, style, alpha, label in (
            (comparison.validation, "-", 0.2, f"{task}, {comparison.score}"),
            (comparison.training, "--", 0.08, f"{task}, training examples"),
        ):
            means = [score.mean for score in scores.values()]
            axis.plot(blocks, means, style, color=colour, marker="o", markersize=3, label=label)
            low, high = zip(*(score.interval for score in scores.values()), strict=True)
            axis.fill_between(blocks, low, high, color=colour, alpha=alpha, linewidth=0)
        axis.axhline(comparison.baseline, color=colour, linestyle=":", linewidth=0.8)
    axis.set_xticks(blocks, ["nothing", "0", *map(str, blocks[2:])])
    axis.set_xlabel("pre-trained blocks, above the embeddings")
    axis.set_ylabel("score")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _plain(text: str) -> str:
    """A text in which two dollar signs do not enclose a formula, which may be none."""
    return text.replace("$", r"\$")
