"""Examples of a task, read from its files and split into those to train, validate and test on.

The texts of an example are, in order:

| kind | texts | answers |
|---|---|---|
| classification | (text,) | |
| entailment | (premise, hypothesis) | |
| similarity | (one, other) | |
| choice | (context,) or (context, question) | one or more, not as many for every example |
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from training.readers import Row, RowError

T = TypeVar("T")
Kind = Literal["classification", "entailment", "similarity", "choice"]
N_TEXTS = {"classification": (1,), "entailment": (2,), "similarity": (2,), "choice": (1, 2)}
SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE, SPLIT_SEED = 0.1, 3535999445  # the seed of the released code's split


@dataclass(frozen=True)
class Example:
    """A row of a task."""

    texts: tuple[str, ...]
    answers: tuple[str, ...] = ()
    label: int | float | None = None
    """Number of the class or of the right answer, or a score; None where it is not known."""
    subset: str = ""
    """Of the split, where it has several."""
    id: str | int = 0
    """As a submission names it."""
    names: tuple[str, ...] = ()
    """Of the answers, as the label calls them."""


@dataclass(frozen=True)
class Form:
    """One way in which a task's files are distributed."""

    files: Mapping[str, str | Mapping[str, str]]
    """A pattern of file names by split, or one for each subset of the split."""
    rows: Callable[[Path], Iterator[Row]]
    """Reads a file."""
    texts: tuple[str, ...]
    """Columns; several with a + between them are joined by spaces. A dot leads into an object."""
    label: str = "label"
    answers: str | tuple[str, ...] = ()
    """A column with a list of all, or a column for each."""
    id: str = ""
    """A column; by default the row's number."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The task's names of labels that these files call otherwise."""
    unlabelled: tuple[str, ...] = ()
    """Labels that say that there is none. Such rows are left out, except in a test set."""
    held_out: int | None = None
    """Rows of "train" that the released code validates on, where "validation" is missing."""


@dataclass(frozen=True)
class Task:
    """What is asked, how it is scored, and where the examples are."""

    kind: Kind
    labels: tuple[str, ...]
    """The classes, or names for the answers in their order; none for a regression."""
    scores: tuple[str, ...]
    """Keys of `scores.SCORES`; the first, over all validation examples, decides which epoch is the
    best: where these have subsets (MNLI, RACE), over the subsets together."""
    forms: tuple[Form, ...]
    hub: Form | None = None
    """The same from Hugging Face, for which `files` has names of splits."""
    submission: str = ""
    """Name of the file that an evaluation server expects; {subset} stands for the subset's."""
    score_range: tuple[float, float] = (-math.inf, math.inf)
    """Of a regression."""

    @property
    def outputs(self) -> int:
        """Of the head; for multiple choice those of one answer."""
        return 1 if self.kind == "choice" else max(1, len(self.labels))

    @property
    def regression(self) -> bool:
        """Whether labels are scores."""
        return not self.labels


@dataclass(frozen=True)
class TaskData:
    """The examples of a task by split; "test" is empty where there is none."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    notes: tuple[str, ...] = ()
    """Where the validation examples come from, if not a file, and why rows were left out."""
    held_out: bool = False
    """Whether the validation examples are training examples held out."""


def load(task: Task, folder: Path | None, *, skip_bad_rows: bool = False) -> TaskData:
    """Reads a task's files, in whichever of its forms they are.

    Without a validation file, a tenth of the training rows is held out, always the same, so that no
    first text (premise, passage) is on both sides; for Story Cloze it is the released code's split.

    Args:
        folder: with the task's files; None for the Hugging Face data set of the task.
        skip_bad_rows: leaves out the rows that cannot be used.

    Raises:
        FileNotFoundError: the folder has no training file in a form known.
        ImportError: folder is None and `datasets` is absent.
        ValueError: a row or a file that cannot be used; names the file and the line.
    """
    form = form_of(task, folder)
    notes: list[str] = []
    splits: dict[str, list[Example]] = {}
    for split, purpose in zip(SPLITS, ("train", "validate", "test"), strict=True):
        if split in form.files:
            skipped = notes if skip_bad_rows else None
            splits[split] = list(_examples(task, form, folder, split, skipped))
            if not splits[split] and split != "test":
                raise ValueError(f"{_source(form, folder, split)}: no examples to {purpose} on")
    train, validation = splits["train"], splits.get("validation")
    held_out = validation is None
    if held_out:
        train, validation = _hold_out(train, form.held_out, _source(form, folder, "train"))
        notes.append(f"no file to validate on: held out {len(validation)} training examples")
    return TaskData(train, validation, splits.get("test", []), tuple(notes), held_out)


def chosen(examples: Sequence[T], most: int) -> list[T]:
    """At most so many of the examples, drawn at random but always the same, in their order."""
    kept = np.random.default_rng(0).permutation(len(examples))[:most]
    return [examples[i] for i in sorted(kept)]


def form_of(task: Task, folder: Path | None) -> Form:
    """The form of a task's files, with those that are there; None is Hugging Face's.

    Raises:
        FileNotFoundError: the folder has no training file in a form known.
        ValueError: folder is None and Hugging Face does not have the task.
    """
    if folder is None:
        if task.hub is None:
            raise ValueError("--data-dir: not given, and this task is not on Hugging Face")
        return task.hub
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    for form in task.forms:
        present = {split: _present(folder, files) for split, files in form.files.items()}
        if present["train"]:
            return replace(form, files={split: files for split, files in present.items() if files})
    wanted = [" or ".join(_by_subset(form.files["train"]).values()) for form in task.forms]
    raise FileNotFoundError(f"{folder} has neither {' nor '.join(wanted)}")


def _present(folder: Path, files: str | Mapping[str, str]) -> Mapping[str, str]:
    """Those of a split's subsets that are there."""
    return {s: pattern for s, pattern in _by_subset(files).items() if _matches(folder, pattern)}


def _matches(folder: Path, pattern: str) -> list[Path]:
    return [folder / name for name in sorted(glob.glob(pattern, root_dir=folder))]


def _source(form: Form, folder: Path | None, split: str) -> str:
    """What a split is read from: its file, or the folder of several."""
    if folder is None:
        return "the data set"
    patterns = _by_subset(form.files[split]).values()
    files = [file for pattern in patterns for file in _matches(folder, pattern)]
    return str(files[0] if len(files) == 1 else folder)


def _by_subset(files: str | Mapping[str, str]) -> Mapping[str, str]:
    return {"": files} if isinstance(files, str) else files


def _examples(
    task: Task, form: Form, folder: Path | None, split: str, skipped: list[str] | None
) -> Iterator[Example]:
    for subset, pattern in _by_subset(form.files[split]).items():
        files = [pattern] if folder is None else _matches(folder, pattern)
        rows = chain.from_iterable(map(form.rows, files))
        for number, (where, row) in enumerate(rows):
            try:
                if isinstance(row, RowError):
                    raise row
                example = _example(task, form, where, row, labelled=split != "test")
                if example is not None:
                    row_id = cell(where, row, form.id) if form.id else number
                    yield replace(example, subset=subset, id=row_id)
            except RowError as error:
                if skipped is None:
                    raise
                skipped.append(f"skipped: {error}")


def _example(
    task: Task, form: Form, where: str, row: Mapping[str, Any], labelled: bool
) -> Example | None:
    """None for a row whose label is one of `unlabelled`, where labels are needed."""
    texts = tuple(
        " ".join(_text(where, row, x) for x in ([column] if column in row else column.split("+")))
        for column in form.texts
    )
    answers, names = _answers(where, row, form, task)
    try:
        raw = written(cell(where, row, form.label))
    except RowError:
        if labelled:
            raise
        raw = ""
    example = Example(texts, answers, names=names)
    if raw in form.unlabelled or (not raw and not labelled):
        return None if labelled else example
    if task.regression:
        return replace(example, label=_score(where, form.label, raw, task.score_range))
    names, raw = names or task.labels, form.names.get(raw, raw)
    if raw not in names:
        raise RowError(
            f"{where}: {form.label} is {raw!r}, expected one of {', '.join(names) or 'none'}"
        )
    return replace(example, label=names.index(raw))


def _answers(
    where: str, row: Mapping[str, Any], form: Form, task: Task
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The answers, and what the label calls them; both empty but for multiple choice."""
    if task.kind != "choice":
        return (), ()
    if isinstance(form.answers, tuple):  # cells after the last answer are empty
        cells = [written(cell(where, row, column)) for column in form.answers]
        while cells and not cells[-1]:
            cells.pop()
        answers, names = cells, task.labels
    else:
        answers, names = cell(where, row, form.answers), task.labels
        if isinstance(answers, dict):  # lists of texts and labels, as Hugging Face has them
            answers, names = answers.get("text"), answers.get("label")
        elif isinstance(answers, list) and all(isinstance(x, dict) for x in answers):
            answers, names = [x.get("text") for x in answers], [x.get("label") for x in answers]
        if not isinstance(answers, list) or not isinstance(names, list | tuple):
            raise RowError(f"{where}: {form.answers} is no list of answers")
    if not answers:
        raise RowError(f"{where}: no answers")
    answers = tuple(_checked(where, "an answer", answer) for answer in answers)
    if len(names) < len(answers):
        raise RowError(f"{where}: {len(answers)} answers, but names for {len(names)}")
    return answers, tuple(str(name) for name in names[: len(answers)])


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    return _checked(where, column, cell(where, row, column))


def _checked(where: str, name: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{where}: {name} is empty or not a text")
    if "\0" in text:
        raise RowError(f"{where}: {name} holds NUL bytes, expected text")
    return text


def cell(where: str, row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, into which a dot may lead; a RowError where there is none."""
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise RowError(f"{where}: no column {column!r}, it has {', '.join(map(str, row))}")
        value = value[name]
    return value


def written(value: Any) -> str:
    """A label or an answer as text, which is empty where a file has nothing or null."""
    return "" if value is None else str(value).strip()


def _score(where: str, column: str, raw: str, score_range: tuple[float, float]) -> float:
    low, high = score_range
    try:
        score = float(raw)
    except ValueError:
        score = math.nan
    if not (math.isfinite(score) and low <= score <= high):
        raise RowError(f"{where}: {column} is {raw!r}, expected a number in [{low}, {high}]")
    return score


def _hold_out(
    examples: Sequence[Example], count: int | None, source: str
) -> tuple[list[Example], list[Example]]:
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    if count is not None:  # as in datasets.py of openai/finetune-transformer-lm
        if len(examples) <= count:
            raise ValueError(
                f"{source}: {len(examples)} examples, expected more than the {count} that are held "
                "out to validate on"
            )
        train, held = train_test_split(
            np.arange(len(examples)), test_size=count, random_state=SPLIT_SEED
        )
    else:
        groups = [example.texts[0] for example in examples]
        if len(set(groups)) < 2:
            raise ValueError(f"{source}: expected at least 2 different texts, to validate on one")
        splitter = GroupShuffleSplit(1, test_size=HELD_OUT_SHARE, random_state=SPLIT_SEED)
        train, held = next(splitter.split(examples, groups=groups))
    return [examples[i] for i in train], [examples[i] for i in held]
