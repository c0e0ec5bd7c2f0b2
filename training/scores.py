"""What predictions are worth: the metrics of the paper's tables, their baselines, their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn import metrics

from training.examples import Example, Task

ROUNDING = 1e-12  # of the mean of equal scores


def _correlation(function: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    """0 where one side is constant: it says nothing of the other."""

    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        constant = np.ptp(labels) == 0 or np.ptp(predictions) == 0
        return 0.0 if constant else float(function(labels, predictions).statistic)

    return score


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": metrics.accuracy_score,
    "f1": lambda labels, predictions: metrics.f1_score(labels, predictions, zero_division=0.0),
    "matthews": metrics.matthews_corrcoef,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
"""By name, of (labels, predictions): (examples,) each. f1 is that of class 1, as GLUE has it."""


def evaluate(task: Task, examples: Sequence[Example], predictions: np.ndarray) -> dict[str, float]:
    """The task's scores over the examples with a label, and over each of several subsets."""
    known = np.array([example.label is not None for example in examples], dtype=bool)
    labels = np.array([example.label for example in examples])[known]
    subsets = np.array([example.subset for example in examples])[known]
    predictions = np.asarray(predictions)[known]
    if not len(labels):
        return {}
    labels = labels.astype(np.float64 if task.regression else np.int64)
    values = {name: float(SCORES[name](labels, predictions)) for name in task.scores}
    names = sorted(set(subsets))
    for subset in names if len(names) > 1 else ():
        here = subsets == subset
        for name in task.scores:
            values[f"{name} {subset}"] = float(SCORES[name](labels[here], predictions[here]))
    return values


def baseline(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, float]:
    """The scores without reading the text: the most frequent class, the mean score, or guessing."""
    if task.kind == "choice":
        return {"accuracy": float(np.mean([1 / len(example.answers) for example in examples]))}
    labels = np.array([example.label for example in train])
    constant = labels.mean() if task.regression else np.bincount(labels).argmax()
    return evaluate(task, examples, np.full(len(examples), constant))


@dataclass(frozen=True)
class Spread:
    """A score over several seeds."""

    median: float
    low: float
    high: float
    mean: float
    interval: tuple[float, float]
    """The 95 % confidence interval of the mean, by Student's t; infinite for a single seed."""


def spread(results: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Median, range, mean and its interval of every score, over the results of the seeds."""
    return {name: spread_of([result[name] for result in results]) for name in results[0]}


def spread_of(values: Sequence[float]) -> Spread:
    """The same of one score."""
    values = np.asarray(values)
    n, mean = len(values), float(values.mean())
    half = np.inf
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Spread(
        float(np.median(values)), float(values.min()), float(values.max()), mean,
        (mean - half, mean + half),
    )  # fmt: skip


def verdict(spread: Spread, reference: float) -> str:
    """ "beats" or "worse" where the 95 % interval excludes the reference, else "no difference"."""
    low, high = spread.interval
    if low > reference + ROUNDING:
        return "beats"
    return "worse" if high < reference - ROUNDING else "no difference"
