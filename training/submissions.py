"""Predictions in the files that evaluation servers take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from training.examples import Example, Task

Line = tuple[str | int, str]  # an example's id and its prediction


def glue(lines: Sequence[Line]) -> str:
    """GLUE's: a header, then index and prediction between tabs."""
    return "".join(f"{a}\t{b}\n" for a, b in [("index", "prediction"), *lines])


def story_cloze(lines: Sequence[Line]) -> str:
    """`answer.txt` of the Story Cloze Test: ids of stories and numbers of endings."""
    return "".join(f"{a},{b}\n" for a, b in [("InputStoryid", "AnswerRightEnding"), *lines])


def race(lines: Sequence[Line]) -> str:
    """The list `answers` of each passage, as in RACE's own files."""
    answers: dict[str, list[str]] = {}
    for passage, answer in lines:
        answers.setdefault(str(passage), []).append(answer)
    return json.dumps(answers, indent=1) + "\n"


FORMATS: dict[str, Callable[[Sequence[Line]], str]] = {
    ".tsv": glue,
    ".txt": story_cloze,
    ".json": race,
}


def write(
    folder: Path, task: Task, examples: Sequence[Example], predictions: np.ndarray
) -> list[Path]:
    """Writes the task's submission, a file for each subset, and returns the files.

    Args:
        predictions: (examples,), numbers of classes or answers, or scores, which are clipped to the
            task's range.
    """
    lines: dict[str, list[Line]] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        name = task.submission.format(subset=example.subset)
        value = (
            f"{np.clip(prediction, *task.score_range):.3f}"
            if task.regression
            else (example.names or task.labels)[int(prediction)]
        )
        lines.setdefault(name, []).append((example.id, value))
    folder.mkdir(parents=True, exist_ok=True)
    for name, its in lines.items():
        text = FORMATS[Path(name).suffix](its)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in lines]
