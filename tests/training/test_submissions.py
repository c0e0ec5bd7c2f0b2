"""The files that evaluation servers take, character by character."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from training.examples import Example, load
from training.submissions import write
from training.tasks import TASKS

PAIR = ("a", "b")


def rows(texts, ids, subset=""):
    return [Example(texts, id=i, subset=subset) for i in ids]


@pytest.mark.parametrize(
    ("task", "examples", "predictions", "expected"),
    [
        ("cola", rows(("a",), range(2)), [1, 0], {"CoLA.tsv": "index\tprediction\n0\t1\n1\t0\n"}),
        (
            "rte", rows(PAIR, range(2)), [1, 0],
            {"RTE.tsv": "index\tprediction\n0\tnot_entailment\n1\tentailment\n"},
        ),
        (
            "mnli", rows(PAIR, [0], "m") + rows(PAIR, [0], "mm"), [2, 1],
            {
                "MNLI-m.tsv": "index\tprediction\n0\tcontradiction\n",
                "MNLI-mm.tsv": "index\tprediction\n0\tneutral\n",
            },
        ),
        (
            "stsb", rows(PAIR, range(3)), [-0.2, 2.71828, 6],
            {"STS-B.tsv": "index\tprediction\n0\t0.000\n1\t2.718\n2\t5.000\n"},
        ),
        (
            "storycloze", rows(("a",), ["b-7", "c-8"]), [0, 1],
            {"answer.txt": "InputStoryid,AnswerRightEnding\nb-7,1\nc-8,2\n"},
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_the_files_are_as_the_server_expects(tmp_path, task, examples, predictions, expected):
    files = write(tmp_path / "out", TASKS[task], examples, np.array(predictions))
    assert {file.name: file.read_text() for file in files} == expected


def test_race_answers_are_listed_by_passage(tmp_path):
    examples = rows(PAIR, ["high1.txt", "high1.txt"], "h") + rows(PAIR, ["middle2.txt"], "m")
    (file,) = write(tmp_path, TASKS["race"], examples, np.array([3, 0, 1]))
    assert file.name == "RACE.json"
    assert json.loads(file.read_text()) == {"high1.txt": ["D", "A"], "middle2.txt": ["B"]}


def test_an_answer_has_the_name_that_its_row_gives_it(tmp_path):
    """As in ARC, where some questions have answers A to D and others 1 to 4."""
    lines = []
    for one, other in ("AB", "12", "BA"):
        choices = [{"text": "x", "label": one}, {"text": "y", "label": other}]
        question = {"stem": "?", "choices": choices}
        lines.append(json.dumps({"id": one, "question": question, "answerKey": other}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "dev.jsonl")
    examples = load(TASKS["openbookqa"], tmp_path).validation
    assert [example.label for example in examples] == [1, 1, 1]
    (file,) = write(tmp_path, TASKS["openbookqa"], examples, np.array([0, 1, 1]))
    assert file.read_text() == "index\tprediction\nA\tA\n1\t2\nB\tA\n"


def test_a_regression_without_a_range_is_not_clipped(tmp_path):
    task = replace(TASKS["stsb"], score_range=(-np.inf, np.inf))
    (file,) = write(tmp_path, task, rows(PAIR, [0]), np.array([-7.25]))
    assert file.read_text().endswith("0\t-7.250\n")
