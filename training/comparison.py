"""Variants of a fine-tuning over the same seeds: compared, and set beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.scores import spread_of, verdict

# Radford et al. 2018, on test sets: table 5 and, for the last four, tables 2 and 3.
PAPER: dict[str, dict[str, float]] = {
    "cola": {"full": 0.454, "no-lm": 0.479, "scratch": 0.189, "lstm": 0.303},
    "sst2": {"full": 0.913, "no-lm": 0.920, "scratch": 0.840, "lstm": 0.905},
    "mrpc": {"full": 0.823, "no-lm": 0.849, "scratch": 0.794, "lstm": 0.832},
    "stsb": {"full": 0.820, "no-lm": 0.832, "scratch": 0.309, "lstm": 0.718},
    "qqp": {"full": 0.703, "no-lm": 0.698, "scratch": 0.655, "lstm": 0.681},
    "mnli": {"full": 0.818, "no-lm": 0.811, "scratch": 0.757, "lstm": 0.737},
    "qnli": {"full": 0.881, "no-lm": 0.869, "scratch": 0.712, "lstm": 0.811},
    "rte": {"full": 0.560, "no-lm": 0.544, "scratch": 0.538, "lstm": 0.546},
    "snli": {"full": 0.899},
    "scitail": {"full": 0.883},
    "race": {"full": 0.590},
    "storycloze": {"full": 0.865},
}
# Its figure 2, left, read off by eye: from no block to all of them.
PAPER_TRANSFER = {"mnli": "about 0.72 to 0.82", "race": "about 0.4 to 0.6"}
ABSENT = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Compared:
    """A score of one variant, or the difference of two."""

    values: list[float]
    """By seed."""
    mean: float
    interval: tuple[float, float]
    """Of the mean, 95 %."""
    verdict: str
    """"beats", "worse" or "no difference"."""

    def __str__(self) -> str:
        mean, low, high = (f"{x:.3f}" for x in (self.mean, *self.interval))
        return f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Comparison:
    """The variants of a task, by name."""

    score: str
    """Which one it is."""
    examples: dict[str, int]
    """By split."""
    baseline: float
    validation: dict[str, Compared]
    """Against the baseline."""
    training: dict[str, Compared]
    """The same on examples that were trained on."""
    full_against: dict[str, Compared]
    """The full variant's score minus each other one's, seed by seed, against 0."""
    paper: dict[str, float]
    """The paper's scores of those that it has."""


def compare(
    task: str,
    score: str,
    examples: dict[str, int],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Comparison:
    """Compares what `finetune` returned for variants over the same seeds.

    Args:
        score: the one that counts.
        examples: how many there are of each split.
        results: by variant, in the order of the seeds.
    """

    def values(variant: str, split: str) -> np.ndarray:
        return np.array([result[split][score] for result in results[variant]])

    baseline = next(iter(results.values()))[0]["baseline"][score]
    return Comparison(
        score, examples, baseline,
        validation={name: against(values(name, "validation"), baseline) for name in results},
        training={name: against(values(name, "training"), baseline) for name in results},
        full_against={
            name: against(values("full", "validation") - values(name, "validation"), 0.0)
            for name in results
            if "full" in results and name != "full"
        },
        paper=PAPER.get(task, {}),
    )  # fmt: skip


def against(values: np.ndarray, reference: float) -> Compared:
    """The mean of the seeds' values, and whether its interval excludes the reference."""
    spread = spread_of(values)
    return Compared(values.tolist(), spread.mean, spread.interval, verdict(spread, reference))


NOTE = """
Mean over the seeds and its 95 % interval, after the best epoch, on the validation examples. "beats"
and "worse" say that the interval excludes the baseline: the commonest class, the mean score, or
guessing. Of full against another variant it is the interval of the differences, seed by seed, and
excludes 0. The best epoch is chosen on the same examples, which favours every variant a little over
the baseline. The paper's numbers are of {paper}.
"""


def ablations_table(comparisons: Mapping[str, Comparison]) -> str:
    """Variants by tasks, with the baseline and the paper's numbers, in Markdown."""
    columns = {}
    for task, c in comparisons.items():
        columns[f"{task}, {c.score}"] = {
            **{name: judged(x) for name, x in c.validation.items()},
            "baseline": f"{c.baseline:.3f}",
            **{f"full against {name}": judged(x) for name, x in c.full_against.items()},
            **{
                f"paper, {name}": f"{c.paper[name]:.3f}" if name in c.paper else ABSENT
                for name in c.validation
            },
            **sizes(c),
        }
    return markdown(columns) + NOTE.format(paper="its tables 2, 3 and 5, on test sets")


def transfer_table(comparisons: Mapping[str, Comparison]) -> str:
    """Transferred blocks by tasks, on validation and on training examples, in Markdown.

    Args:
        comparisons: of nothing, the embeddings, and 1, 2, … blocks, in this order.
    """
    columns = {}
    for task, c in comparisons.items():
        rows = [
            "nothing",
            "embeddings",
            *(f"to block {k}" for k in range(1, len(c.validation) - 1)),
        ]
        columns[f"{task}, {c.score}"] = {
            **{row: judged(x) for row, x in zip(rows, c.validation.values(), strict=True)},
            "baseline": f"{c.baseline:.3f}",
            "all against nothing": judged(c.full_against["scratch"]),
            "paper": PAPER_TRANSFER.get(task, ABSENT),
            **sizes(c),
        }
        columns[f"{task}, training examples"] = {
            row: str(x) for row, x in zip(rows, c.training.values(), strict=True)
        }
    return markdown(columns) + NOTE.format(paper="its figure 2, left, read off by eye")


def sizes(comparison: Comparison) -> dict[str, str]:
    return {f"examples, {split}": f"{count:,}" for split, count in comparison.examples.items()}


def judged(compared: Compared) -> str:
    return f"{compared}, {compared.verdict}"


def markdown(columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table: columns by header, cells by row; the rows are those of the first column."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row in next(iter(columns.values())):
        lines.append([row, *(column.get(row, "") for column in columns.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
