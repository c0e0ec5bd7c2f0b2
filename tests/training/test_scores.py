"""Scores against their formulas, their baselines, and their spread over seeds."""

import math
import warnings

import numpy as np
import pytest

from training.examples import Example, Task
from training.scores import SCORES, baseline, evaluate, spread

LABELS = np.array([1, 1, 1, 0, 0, 1, 0, 1])
PREDICTIONS = np.array([1, 0, 1, 0, 1, 1, 0, 1])  # tp 4, tn 2, fp 1, fn 1
A, B = np.array([0.0, 1, 2, 3, 5]), np.array([0.0, 1, 4, 9, 25])


@pytest.mark.parametrize(
    ("name", "labels", "predictions", "expected"),
    [
        ("accuracy", LABELS, PREDICTIONS, 6 / 8),
        ("f1", LABELS, PREDICTIONS, 8 / (8 + 1 + 1)),
        ("matthews", LABELS, PREDICTIONS, (4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3)),
        ("pearson", A, B, 75.2 / math.sqrt(14.8 * 418.8)),
        ("spearman", A, B, 1.0),
        ("f1", LABELS, np.zeros(8, int), 0.0),
        ("matthews", LABELS, np.ones(8, int), 0.0),
        ("pearson", A, np.ones(5), 0.0),
        ("spearman", np.ones(5), A, 0.0),
    ],
)
def test_a_score_is_its_formula_and_0_where_nothing_is_told(name, labels, predictions, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SCORES[name](labels, predictions) == pytest.approx(expected, rel=1e-12)


def task(**changes) -> Task:
    settings = {"kind": "classification", "labels": ("0", "1"), "scores": ("f1", "accuracy")}
    return Task(**{**settings, **changes}, forms=())


def test_subsets_are_scored_apart_and_unlabelled_examples_not_at_all():
    rows = [(1, "m", 1), (0, "m", 1), (None, "m", 1), (0, "mm", 0), (1, "mm", 0)]
    examples = [Example(("x",), label=label, subset=subset) for label, subset, _ in rows]
    found = evaluate(task(scores=("accuracy",)), examples, np.array([row[2] for row in rows]))
    assert found == {"accuracy": 0.5, "accuracy m": 0.5, "accuracy mm": 0.5}
    one = evaluate(task(scores=("accuracy",)), examples[:3], np.array([1, 0, 0]))
    assert one == {"accuracy": 1.0}
    assert evaluate(task(), [Example(("x",))], np.zeros(1)) == {}


def test_baselines():
    train = [Example(("x",), label=label) for label in (1, 1, 0)]
    held = [Example(("x",), label=label) for label in (1, 0, 0, 0)]
    assert baseline(task(), train, held) == {"f1": pytest.approx(0.4), "accuracy": 0.25}
    regression = task(kind="similarity", labels=(), scores=("pearson", "spearman"))
    scored = [Example(("x", "y"), label=label) for label in (1.0, 2.5)]
    assert baseline(regression, scored, scored) == {"pearson": 0.0, "spearman": 0.0}
    asked = [Example(("x",), ("a",) * n, label=0) for n in (2, 4)]
    assert baseline(task(kind="choice"), asked, asked) == {"accuracy": 0.375}


def test_the_spread_over_seeds():
    result = spread([{"accuracy": x} for x in (0.5, 0.7, 0.9, 0.6)])["accuracy"]
    assert (result.median, result.low, result.high) == (pytest.approx(0.65), 0.5, 0.9)
    half = 3.182446 * np.std([0.5, 0.7, 0.9, 0.6], ddof=1) / 2  # t of 3 degrees of freedom
    assert result.interval == pytest.approx((0.675 - half, 0.675 + half), rel=1e-6)
    assert spread([{"accuracy": 0.5}])["accuracy"].interval == (-math.inf, math.inf)
