"""The tasks of the paper's tables 2 to 4, and anyone's own.

An entry of `TASKS` says what is asked, what counts, and in which forms the files are distributed:
as their authors do, as GLUE does, and on Hugging Face.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase

from training import readers
from training.examples import N_TEXTS, SPLITS, Form, Kind, Task, cell, written

BINARY = ("0", "1")
NLI = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
RTE_NAMES = {
    **dict.fromkeys(("TRUE", "YES", "ENTAILMENT"), "entailment"),
    **dict.fromkeys(("FALSE", "NO", "CONTRADICTION", "UNKNOWN"), "not_entailment"),
}
LETTERS = tuple(ascii_uppercase)
PAIR = ("sentence1", "sentence2")
STS_COLUMNS = ("genre", "file", "year", "id", "score", *PAIR)


def _files(pattern: str) -> dict[str, str]:
    """By split, of files that call the splits train, dev and test."""
    return {
        s: pattern.format(name) for s, name in zip(SPLITS, ("train", "dev", "test"), strict=True)
    }


def _subsets(**patterns: str) -> dict[str, dict[str, str]]:
    """The same where every split has subsets."""
    return {s: {x: _files(p)[s] for x, p in patterns.items()} for s in SPLITS}


def _numbered(labels: Sequence[str]) -> Mapping[str, str]:
    """Labels by number, as Hugging Face's data sets have them."""
    return {str(number): name for number, name in enumerate(labels)}


def _hub(name: str, texts: tuple[str, ...], label: str = "label", **options) -> Form:
    files = options.pop("files", {split: split for split in SPLITS})
    return Form(files, partial(readers.hub, name=name), texts, label, **options)


def _glue(name: str, texts: tuple[str, ...], labels: Sequence[str] = (), **options) -> Form:
    """A task of GLUE on Hugging Face, where the labels of a test set are all −1."""
    return _hub(
        f"nyu-mll/glue:{name}", texts, names=_numbered(labels), unlabelled=("-1", "-1.0"), **options
    )


GLUE = _files("{}.tsv")
cola_rows = partial(readers.tsv, columns=("source", "label", "mark", "sentence"))
sst_rows = partial(readers.tsv, columns=("sentence", "label"))
snli_rows = partial(readers.parallel, columns=("s1", "s2", "labels"))
scitail_rows = partial(readers.tsv, columns=("premise", "hypothesis", "label"))
sts_rows = partial(readers.tsv, columns=STS_COLUMNS, more=True)

TASKS: dict[str, Task] = {
    "cola": Task(
        "classification", BINARY, ("matthews", "accuracy"), submission="CoLA.tsv",
        forms=(
            Form(
                {"train": "in_domain_train.tsv", "validation": "in_domain_dev.tsv"},
                cola_rows, ("sentence",),
            ),
            Form(GLUE, cola_rows, ("sentence",)),
        ),
        hub=_glue("cola", ("sentence",), BINARY),
    ),
    "sst2": Task(
        "classification", BINARY, ("accuracy",), submission="SST-2.tsv",
        forms=(Form(GLUE, sst_rows, ("sentence",)),),
        hub=_glue("sst2", ("sentence",), BINARY),
    ),
    "snli": Task(
        "entailment", NLI, ("accuracy",), submission="SNLI.tsv",
        forms=(
            Form(
                _files("snli_1.0_{}.jsonl"), readers.json_lines, PAIR, "gold_label",
                unlabelled=("-",),
            ),
            Form(_files("labels.{}"), snli_rows, ("s1", "s2"), "labels"),
            Form({"train": "labels.dev"}, snli_rows, ("s1", "s2"), "labels"),
        ),
        hub=_hub(
            "stanfordnlp/snli", ("premise", "hypothesis"), names=_numbered(NLI), unlabelled=("-1",)
        ),
    ),
    "mnli": Task(
        "entailment", NLI, ("accuracy",), submission="MNLI-{subset}.tsv",
        forms=(
            Form(
                {
                    "train": "multinli_1.0_train.jsonl",
                    "validation": {
                        "m": "multinli_1.0_dev_matched.jsonl",
                        "mm": "multinli_1.0_dev_mismatched.jsonl",
                    },
                },
                readers.json_lines, PAIR, "gold_label", unlabelled=("-",),
            ),
            Form(
                {
                    **_subsets(m="{}_matched.tsv", mm="{}_mismatched.tsv"),
                    "train": "train.tsv",
                },
                readers.tsv, PAIR, "gold_label", unlabelled=("-",),
            ),
        ),
        hub=_glue(
            "mnli", ("premise", "hypothesis"), NLI,
            files={
                "train": "train",
                "validation": {"m": "validation_matched", "mm": "validation_mismatched"},
                "test": {"m": "test_matched", "mm": "test_mismatched"},
            },
        ),
    ),
    "qnli": Task(
        "entailment", TWO_WAY, ("accuracy",), submission="QNLI.tsv",
        forms=(Form(GLUE, readers.tsv, ("question", "sentence")),),
        hub=_glue("qnli", ("question", "sentence"), TWO_WAY),
    ),
    "scitail": Task(
        "entailment", ("entailment", "neutral"), ("accuracy",), submission="SciTail.tsv",
        forms=(
            Form(
                _files("scitail_1.0_{}.tsv"), scitail_rows, ("premise", "hypothesis"),
                names={"entails": "entailment"},
            ),
            Form(_files("scitail_1.0_{}.txt"), readers.json_lines, PAIR, "gold_label"),
        ),
        hub=_hub(
            "allenai/scitail:tsv_format", ("premise", "hypothesis"),
            names={"entails": "entailment"},
        ),
    ),
    "rte": Task(
        "entailment", TWO_WAY, ("accuracy",), submission="RTE.tsv",
        forms=(
            Form(GLUE, readers.tsv, PAIR),
            Form(
                {"train": "*dev*.xml", "test": "*test*.xml"}, readers.rte_pairs, ("t", "h"),
                "entailment", names=RTE_NAMES,
            ),
        ),
        hub=_glue("rte", PAIR, TWO_WAY),
    ),
    "race": Task(
        "choice", LETTERS, ("accuracy",), submission="RACE.json",
        forms=(
            Form(
                _subsets(m="{}/middle/*.txt", h="{}/high/*.txt"), readers.race_passage,
                ("article", "question"), "answer", answers="options", id="id",
            ),
            Form(
                {"train": "race.jsonl"}, readers.json_lines, ("article", "question"), "answer",
                answers="options", id="example_id",
            ),
        ),
        hub=_hub(
            "ehovy/race:all", ("article", "question"), "answer", answers="options",
            id="example_id",
        ),
    ),
    "storycloze": Task(
        "choice", ("1", "2"), ("accuracy",), submission="answer.txt",
        forms=(
            Form(
                {
                    "train": "cloze_test_val__spring2016*.csv",
                    "test": "cloze_test_test__spring2016*.csv",
                },
                readers.csv_table,
                ("InputSentence1+InputSentence2+InputSentence3+InputSentence4",),
                "AnswerRightEnding", id="InputStoryid", held_out=374,
                answers=("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"),
            ),
        ),
    ),
    "mrpc": Task(
        "similarity", BINARY, ("f1", "accuracy"), submission="MRPC.tsv",
        forms=tuple(
            Form(files, readers.tsv, ("#1 String", "#2 String"), "Quality")
            for files in (
                {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"},
                {"train": "msr-para-train.tsv", "validation": "msr-para-val.tsv"},
                GLUE,
            )
        ),
        hub=_glue("mrpc", PAIR, BINARY),
    ),
    "qqp": Task(
        "similarity", BINARY, ("f1", "accuracy"), submission="QQP.tsv",
        forms=(Form(GLUE, readers.tsv, ("question1", "question2"), "is_duplicate"),),
        hub=_glue("qqp", ("question1", "question2"), BINARY),
    ),
    "stsb": Task(
        "similarity", (), ("pearson", "spearman"), submission="STS-B.tsv", score_range=(0.0, 5.0),
        forms=(
            Form(_files("sts-{}.csv"), sts_rows, PAIR, "score"),
            Form(GLUE, readers.tsv, PAIR, "score"),
        ),
        hub=_glue("stsb", PAIR),
    ),
    "openbookqa": Task(  # not in the paper, and smaller than RACE
        "choice", LETTERS, ("accuracy",), submission="OpenBookQA.tsv",
        forms=(
            Form(
                _files("{}.jsonl"), readers.json_lines, ("question.stem",), "answerKey",
                answers="question.choices", id="id",
            ),
        ),
        hub=_hub(
            "allenai/openbookqa:main", ("question_stem",), "answerKey", answers="choices", id="id"
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Custom:
    """A task of your own, `--task custom`: .tsv, .csv or .jsonl files with named columns.

    Cells of a .tsv are not quoted. In .jsonl a dot leads into an object: question.stem.
    """

    kind: Kind = "classification"
    """What is asked: of one text (classification), of two (entailment, similarity), or which answer
    follows one or two (choice)."""
    train: Path | None = None
    """Examples to train on."""
    validation: Path | None = None
    """Examples to validate on. Default: a tenth of the others."""
    test: Path | None = None
    """Examples to predict, with labels or without."""
    texts: tuple[str, ...] = ("text",)
    """The columns of the texts, one or two."""
    label: str = "label"
    """The column of the label."""
    answers: tuple[str, ...] = ("answers",)
    """choice: the column with a list of answers, or a column for each; the last may be empty."""
    labels: tuple[str, ...] = ()
    """The classes in order; choice: what the label calls the answers. Default: the classes that the
    training file has, scores for similarity, and A B C … for choice."""


def custom_task(custom: Custom) -> Task:
    """The task that the options describe, to be loaded from the folder `.`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: too few or too many texts, a label twice, or a training file that cannot be
            read or has no class.
    """
    files = {split: getattr(custom, split) for split in SPLITS}
    for split, file in files.items():
        if file is None and split == "train":
            raise ValueError("--custom.train: not given, expected the file to train on")
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"--custom.{split}: {file}: no such file")
    if len(custom.texts) not in N_TEXTS[custom.kind]:
        expected = " or ".join(map(str, N_TEXTS[custom.kind]))
        raise ValueError(
            f"--custom.texts: {' '.join(custom.texts)}, expected {expected} for {custom.kind}"
        )
    if len(set(custom.labels)) < len(custom.labels):
        raise ValueError(f"--custom.labels: {' '.join(custom.labels)}, expected each once")
    form = Form(
        {s: glob.escape(str(file)) for s, file in files.items() if file is not None},
        readers.by_suffix, custom.texts, custom.label,
        answers=custom.answers[0] if len(custom.answers) == 1 else custom.answers,
    )  # fmt: skip
    labels = custom.labels
    if not labels and custom.kind == "choice":
        labels = LETTERS
    elif not labels and custom.kind != "similarity":
        labels = _classes(custom.train, custom.label)
    scores = ("accuracy",) if labels else ("pearson", "spearman")
    return Task(custom.kind, labels, scores, (form,), submission="predictions.tsv")


def _classes(file: Path, column: str) -> tuple[str, ...]:
    """The labels that occur in a file, sorted."""
    found = set()
    for where, row in readers.by_suffix(file):
        if isinstance(row, Mapping):
            with contextlib.suppress(readers.RowError):
                found.add(written(cell(where, row, column)))
    if found == {""}:  # no classes would make it a regression
        raise ValueError(f"--custom.label: {column} is empty in all of {file}, expected classes")
    return tuple(sorted(found - {""}))
