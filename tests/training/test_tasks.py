"""Tasks from files as they are distributed: every form, every mistake, and the splits."""

import json
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from training import examples, readers
from training.batches import Buckets
from training.examples import Example, chosen, load
from training.tasks import LETTERS, STS_COLUMNS, TASKS, Custom, custom_task

SHARED = Path(__file__).parents[3] / "shared" / "data"


def tsv(*rows: tuple[str, ...]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def nli(**changes) -> dict:
    return {"sentence1": "A man sleeps.", "sentence2": "He rests.", **changes}


PASSAGE = {
    "article": "Snow fell all day.", "questions": ["When?", "What fell?"], "answers": ["B", "A"],
    "options": [["by night", "by day"], ["snow", "rain", "hail"]], "id": "high1.txt",
}  # fmt: skip
QUESTIONS = [
    ((PASSAGE["article"], question), tuple(options), label)
    for question, options, label in zip(
        PASSAGE["questions"], PASSAGE["options"], (1, 0), strict=True
    )
]
CLOZE = ",".join(
    ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5)), "RandomFifthSentenceQuiz1",
     "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
)  # fmt: skip
STORY = (
    '{id},"Ann said ""no"", twice.",She left.,It rained.,"Bob, too.",They met.,They sang.,{right}'
)
STORY_TEXT = 'Ann said "no", twice. She left. It rained. Bob, too.'
MNLI = ("index", "genre", "sentence1", "sentence2", "label1", "gold_label")
MNLI_TEST = MNLI[:4]
QQP = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2",
        "sentence1", "sentence2", "score")  # fmt: skip
HEADER = "\t".join(STS_COLUMNS)
RTE_PAIR = '<pair id="{id}" {label} task="IE"><t>It snows &amp; hails.</t><h>It snows.</h></pair>'

# task, files, and (texts, answers, label) of the examples of some splits
FORMS = {
    "cola": (
        "cola",
        {
            "in_domain_train.tsv": tsv(
                ("gj04", "1", "", 'He said "go.'), ("gj04", "0", "*", "Go he.")
            ),
            "in_domain_dev.tsv": tsv(("cj99", "0", "*", "The the.")),
        },
        {
            "train": [(('He said "go.',), (), 1), (("Go he.",), (), 0)],
            "validation": [(("The the.",), (), 0)],
        },
    ),
    "cola-glue": (
        "cola",
        {
            "train.tsv": tsv(("gj04", "1", "", "He goes.")),
            "dev.tsv": tsv(("gj04", "0", "*", "Goes.")),
            "test.tsv": tsv(("index", "sentence"), ("0", "He went.")),
        },
        {"train": [(("He goes.",), (), 1)], "test": [(("He went.",), (), None)]},
    ),
    "sst2-glue": (
        "sst2",
        {
            "train.tsv": tsv(("sentence", "label"), ("so good", "1")),
            "dev.tsv": tsv(("sentence", "label"), ("so bad", "0")),
            "test.tsv": tsv(("index", "sentence"), ("0", "so what")),
        },
        {"validation": [(("so bad",), (), 0)], "test": [(("so what",), (), None)]},
    ),
    "sst2-without-header": (
        "sst2",
        {"train.tsv": tsv(("so good", "1")), "dev.tsv": tsv(("so bad", "0"))},
        {"train": [(("so good",), (), 1)], "validation": [(("so bad",), (), 0)]},
    ),
    "snli": (
        "snli",
        {
            "snli_1.0_train.jsonl": jsonl(nli(gold_label="-"), nli(gold_label="contradiction")),
            "snli_1.0_dev.jsonl": jsonl(nli(gold_label="-"), nli(gold_label="neutral")),
            "snli_1.0_test.jsonl": jsonl(nli(gold_label="-"), nli(gold_label="entailment")),
        },
        {
            "train": [(("A man sleeps.", "He rests."), (), 2)],
            "validation": [(("A man sleeps.", "He rests."), (), 1)],
            "test": [
                (("A man sleeps.", "He rests."), (), None),
                (("A man sleeps.", "He rests."), (), 0),
            ],
        },
    ),
    "snli-parallel": (
        "snli",
        {f"{column}.{split}": f"{value}\n" for split in ("train", "dev")
         for column, value in (("s1", "A man."), ("s2", "A boy."), ("labels", "neutral"))},
        {"train": [(("A man.", "A boy."), (), 1)], "validation": [(("A man.", "A boy."), (), 1)]},
    ),
    "mnli": (
        "mnli",
        {
            "multinli_1.0_train.jsonl": jsonl(nli(gold_label="entailment")),
            "multinli_1.0_dev_matched.jsonl": jsonl(nli(gold_label="neutral")),
            "multinli_1.0_dev_mismatched.jsonl": jsonl(nli(gold_label="contradiction")),
        },
        {"validation": [
            (("A man sleeps.", "He rests."), (), 1), (("A man sleeps.", "He rests."), (), 2),
        ]},
    ),
    "mnli-glue": (
        "mnli",
        {
            "train.tsv": tsv(MNLI, ("0", "fiction", "One.", "Two.", "neutral", "neutral")),
            "dev_matched.tsv": tsv(MNLI, ("0", "fiction", "One.", "1.", "neutral", "entailment")),
            "dev_mismatched.tsv": tsv(MNLI, ("0", "fiction", "One.", "2.", "x", "contradiction")),
            "test_matched.tsv": tsv(MNLI_TEST, ("0", "fiction", "One.", "3.")),
            "test_mismatched.tsv": tsv(MNLI_TEST, ("0", "fiction", "One.", "4.")),
        },
        {
            "validation": [(("One.", "1."), (), 0), (("One.", "2."), (), 2)],
            "test": [(("One.", "3."), (), None), (("One.", "4."), (), None)],
        },
    ),
    "qnli": (
        "qnli",
        {
            name: tsv(("index", "question", "sentence", "label"), ("0", "Who?", "Ann.", label))
            for name, label in (("train.tsv", "entailment"), ("dev.tsv", "not_entailment"))
        },
        {"train": [(("Who?", "Ann."), (), 0)], "validation": [(("Who?", "Ann."), (), 1)]},
    ),
    "scitail-tsv": (
        "scitail",
        {
            f"scitail_1.0_{split}.tsv": tsv(("Ice is cold.", "It is.", label))
            for split, label in (("train", "entails"), ("dev", "neutral"), ("test", "neutral"))
        },
        {
            "train": [(("Ice is cold.", "It is."), (), 0)],
            "test": [(("Ice is cold.", "It is."), (), 1)],
        },
    ),
    "scitail-jsonl": (
        "scitail",
        {
            f"scitail_1.0_{split}.txt": jsonl(nli(gold_label="neutral"))
            for split in ("train", "dev")
        },
        {"validation": [(("A man sleeps.", "He rests."), (), 1)]},
    ),
    "rte-glue": (
        "rte",
        {
            name: tsv(("index", "sentence1", "sentence2", "label"), ("0", "A b.", "A.", label))
            for name, label in (("train.tsv", "not_entailment"), ("dev.tsv", "entailment"))
        },
        {"train": [(("A b.", "A."), (), 1)], "validation": [(("A b.", "A."), (), 0)]},
    ),
    "rte-xml": (
        "rte",
        {
            "rte1dev.xml": "<entailment-corpus>" + "".join(
                RTE_PAIR.format(id=i, label=f'value="{x}"').replace("It snows &", f"{i} snows &")
                for i, x in enumerate(["TRUE", "FALSE"])
            ) + "</entailment-corpus>",
            "RTE3_test.xml": "<entailment-corpus>"
            + RTE_PAIR.format(id=9, label='entailment="NO"') + "</entailment-corpus>",
        },
        {"test": [(("It snows & hails.", "It snows."), (), 1)]},
    ),
    "race": (
        "race",
        {
            f"{split}/{level}/1.txt": json.dumps({**PASSAGE, "id": f"{level}1.txt"})
            for split in ("train", "dev", "test") for level in ("middle", "high")
        },
        {"train": QUESTIONS * 2, "test": QUESTIONS * 2},
    ),
    "storycloze": (
        "storycloze",
        {
            "cloze_test_val__spring2016 - cloze_test_ALL_val.csv": "\n".join(
                [CLOZE, *(STORY.format(id=i, right=2) for i in range(400))]
            ),
            "cloze_test_test__spring2016 - cloze_test_ALL_test.csv": "\n".join(
                [CLOZE, STORY.format(id="b-7", right=1)]
            ),
        },
        {"test": [((STORY_TEXT,), ("They met.", "They sang."), 0)]},
    ),
    "mrpc": (
        "mrpc",
        {
            f"msr_paraphrase_{split}.txt":
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
            f'{label}\t1\t2\tHe said "yes.\tYes, he said.\r\n' * copies
            for split, label, copies in (("test", 1, 1),)
        } | {
            "msr_paraphrase_train.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
            "0\t1\t2\tOne.\tTwo.\r\n1\t1\t2\tThree.\tFour.\r\n"
        },
        {"test": [(('He said "yes.', "Yes, he said."), (), 1)]},
    ),
    "qqp": (
        "qqp",
        {
            name: tsv(QQP, ("0", "1", "2", "Why?", "How?", label))
            for name, label in (("train.tsv", "1"), ("dev.tsv", "0"))
        } | {"test.tsv": tsv(("id", "question1", "question2"), ("0", "Who?", "What?"))},
        {"train": [(("Why?", "How?"), (), 1)], "test": [(("Who?", "What?"), (), None)]},
    ),
    "stsb": (
        "stsb",
        {
            "sts-train.csv": "news\tf\t2012\t1\t2.500\tA \"plane.\tA jet.\tsource\tsource\r\n",
            "sts-dev.csv": "news\tf\t2012\t1\t0.0\tA.\tB.\n",
        },
        {"train": [(('A "plane.', "A jet."), (), 2.5)], "validation": [(("A.", "B."), (), 0.0)]},
    ),
    "stsb-glue": (
        "stsb",
        {
            "train.tsv": tsv(STSB, ("0", "n", "f", "2012", "1", "", "", "A.", "B.", "5.000")),
            "dev.tsv": tsv(STSB, ("0", "n", "f", "2012", "1", "", "", "C.", "D.", "1.25")),
            "test.tsv": tsv(STSB[:-1], ("0", "n", "f", "2012", "1", "", "", "E.", "F.")),
        },
        {"train": [(("A.", "B."), (), 5.0)], "test": [(("E.", "F."), (), None)]},
    ),
    "openbookqa": (
        "openbookqa",
        {
            f"{split}.jsonl": jsonl({
                "id": "7", "answerKey": "2", "question": {"stem": "Ice is", "choices": [
                    {"text": "hot", "label": "1"}, {"text": "cold", "label": "2"},
                ]},
            })
            for split in ("train", "dev")
        },
        {"train": [(("Ice is",), ("hot", "cold"), 1)]},
    ),
}  # fmt: skip


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode())
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_official_files(tmp_path, form):
    task, files, expected = FORMS[form]
    data = load(TASKS[task], written(tmp_path, files))
    for split, rows in expected.items():
        found = [(e.texts, e.answers, e.label) for e in getattr(data, split)]
        assert found == rows, split


def test_every_task_of_the_paper_is_there_with_its_metric():
    paper = {
        "snli": "accuracy", "mnli": "accuracy", "qnli": "accuracy", "rte": "accuracy",
        "scitail": "accuracy", "race": "accuracy", "storycloze": "accuracy", "mrpc": "f1",
        "qqp": "f1", "stsb": "pearson", "sst2": "accuracy", "cola": "matthews",
    }  # fmt: skip
    assert {name: TASKS[name].scores[0] for name in paper} == paper
    assert {FORMS[form][0] for form in FORMS} == TASKS.keys()  # each has a test above


def test_subsets_and_ids_are_those_of_the_submissions(tmp_path):
    mnli = load(TASKS["mnli"], written(tmp_path / "mnli", FORMS["mnli-glue"][1]))
    assert [(e.subset, e.id) for e in mnli.test] == [("m", 0), ("mm", 0)]
    race = load(TASKS["race"], written(tmp_path / "race", FORMS["race"][1]))
    ids = [("m", "middle1.txt")] * 2 + [("h", "high1.txt")] * 2
    assert [(e.subset, e.id) for e in race.test] == ids
    (tmp_path / "2.txt").write_text(json.dumps({k: x for k, x in PASSAGE.items() if k != "id"}))
    assert [row["id"] for _, row in readers.race_passage(tmp_path / "2.txt")] == ["2.txt"] * 2
    cloze = load(TASKS["storycloze"], written(tmp_path / "cloze", FORMS["storycloze"][1]))
    assert [e.id for e in cloze.test] == ["b-7"]


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("sst2", "train.tsv", "a\t1\nb 0\n", r"train.tsv:2: 1 cells, expected the 2 of sentence"),
        ("sst2", "train.tsv", "a\t1\nb\t0\tc\n", r"train.tsv:2: 3 cells, expected the 2"),
        ("sst2", "train.tsv", "a\t1\n\nb\n", r"train.tsv:3: 1 cells"),
        ("sst2", "train.tsv", "a\t1\nb\t\n", r"train.tsv:2: label is '', expected one of 0, 1"),
        ("sst2", "train.tsv", "a\t1\nb\t2\n", r"train.tsv:2: label is '2', expected one of 0, 1"),
        ("sst2", "train.tsv", "a\t1\n \t0\n", r"train.tsv:2: sentence is empty"),
        ("sst2", "train.tsv", "a\t1\nb\u00f6\t0\n".encode("latin-1"), r"train.tsv: not UTF-8"),
        ("sst2", "train.tsv", "text\tlabel\nb\t0\n", r"train.tsv:2: no column 'sentence', it has"),
        ("sst2", "train.tsv", "", r"train\.tsv: no examples to train on"),
        ("sst2", "train.tsv", "a\t1\nb\0b\t0\n", r"train.tsv:2: sentence holds NUL bytes, expect"),
        ("snli", "snli_1.0_train.jsonl", jsonl(nli(gold_label="neutral", sentence1="a\0")),
         r"train.jsonl:1: sentence1 holds NUL bytes"),
        ("race", "race.jsonl",
         jsonl({"article": "a", "question": "b", "options": ["x", "y\0"], "answer": "A"}),
         r"race.jsonl:1: an answer holds NUL bytes"),
        ("rte", "train.tsv", "index\tsentence1\tlabel\n0\ta\tentailment\n",
         r"train.tsv:2: no column 'sentence2', it has index, sentence1, label"),
        ("rte", "train.tsv", "index\tsentence1\tsentence2\n0\ta\tb\n", r":2: no column 'label'"),
        ("rte", "1dev.xml", "<a><pair id='3' value='TRUE'><t>x</t></a>", r"1dev.xml: not XML"),
        ("rte", "1dev.xml", "<a><pair id='3' value='TRUE'><t>x</t></pair></a>",
         r"1dev.xml: pair 3: no column 'h'"),
        ("stsb", "sts-train.csv", "g\tf\ty\t1\t5.1\ta\tb\n",
         r"sts-train.csv:1: score is '5.1', expected a number in \[0.0, 5.0\]"),
        ("stsb", "sts-train.csv", "g\tf\ty\t1\tnan\ta\tb\n", r"sts-train.csv:1: score is 'nan'"),
        ("stsb", "sts-train.csv", "g\tf\ty\t1\t3\ta\n", r"train.csv:1: 6 cells, expected the 7"),
        ("snli", "snli_1.0_train.jsonl", '{"gold_label"\n', r"train.jsonl:1: not JSON"),
        ("snli", "snli_1.0_train.jsonl", "[" * 100_000, r"train.jsonl:1: not JSON, maximum rec"),
        ("snli", "snli_1.0_train.jsonl", "[1]\n", r"train.jsonl:1: list, expected a JSON object"),
        ("snli", "snli_1.0_train.jsonl", jsonl(nli(gold_label="neutral", sentence2=None)),
         r"train.jsonl:1: sentence2 is empty or not a text"),
        ("race", "race.jsonl",
         jsonl({"article": "a", "question": "b", "options": [], "answer": "A"}),
         r"race.jsonl:1: no answers"),
        ("race", "race.jsonl",
         jsonl({"article": "a", "question": "b", "options": None, "answer": "A"}),
         r"race.jsonl:1: options is no list of answers"),
        ("race", "race.jsonl",
         jsonl({"article": "a", "question": "b", "options": ["x", ""], "answer": "A"}),
         r"race.jsonl:1: an answer is empty"),
        ("race", "race.jsonl",
         jsonl({"article": "a", "question": "b", "options": ["x", "y"], "answer": "C"}),
         r"race.jsonl:1: answer is 'C', expected one of A, B"),
        ("stsb", "sts-train.csv", f"{HEADER}\ng\tf\t2012\t0\t1.0\ta\tb\tc\n",
         r"csv:2: 8 cells, expected the 7 of genre"),
        ("storycloze", "cloze_test_val__spring2016.csv", f'{CLOZE}\n1,"a\n',
         r"cloze_test_val__spring2016.csv:2: unexpected end of data"),
        ("storycloze", "cloze_test_val__spring2016.csv", f"{CLOZE}\n1,a,b\n", r"csv:2: 3 cells"),
        ("storycloze", "cloze_test_val__spring2016.csv", f"{CLOZE}\n{STORY.format(id=1, right=1)}",
         r"\.csv: 1 examples, expected more than the 374 that are held out"),
    ],
)  # fmt: skip
def test_row31_a_mistake_is_named_with_file_and_line(tmp_path, task, file, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(content)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n")
    with pytest.raises(ValueError, match=message):
        load(TASKS[task], tmp_path)


def test_without_the_validation_file_of_a_form_examples_are_held_out(tmp_path):
    rows = "".join(f"text {number}\t1\n" for number in range(20))
    (tmp_path / "train.tsv").write_text(rows)
    data = load(TASKS["sst2"], tmp_path)
    assert (len(data.train), len(data.validation), data.held_out) == (18, 2, True)


def test_a_text_that_is_a_columns_name_makes_no_header(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("fine\t1\nsentence\t0\n")
    assert [e.texts for e in load(TASKS["sst2"], tmp_path).train] == [("fine",), ("sentence",)]


def test_other_line_breaks_of_unicode_end_no_line(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_bytes("a\rb\t1\r\nc\u2028d\t0\n".encode())
    assert [e.texts for e in load(TASKS["sst2"], tmp_path).train] == [("a\rb",), ("c\u2028d",)]


def test_a_race_passage_with_lists_of_different_lengths_is_refused(tmp_path):
    files = FORMS["race"][1] | {"train/high/1.txt": json.dumps({**PASSAGE, "answers": ["A"]})}
    with pytest.raises(ValueError, match=r"high/1.txt: expected lists questions, options, answers"):
        load(TASKS["race"], written(tmp_path, files))


def test_parallel_files_of_different_lengths_or_missing_are_refused(tmp_path):
    written(tmp_path, {"labels.dev": "neutral\n", "s1.dev": "a\nb\n"})
    with pytest.raises(FileNotFoundError, match=r"s2.dev: no such file"):
        load(TASKS["snli"], tmp_path)
    (tmp_path / "s2.dev").write_text("a\n")
    with pytest.raises(ValueError, match=r"found s1.dev 2, s2.dev 1, labels.dev 1"):
        load(TASKS["snli"], tmp_path)


def test_a_column_may_have_dots_and_plus_signs_in_its_name(tmp_path):
    (tmp_path / "a.csv").write_text("what.is+said,label\nhello,x\n")
    custom = Custom(
        train=tmp_path / "a.csv", validation=tmp_path / "a.csv", texts=("what.is+said",)
    )
    assert load(custom_task(custom), Path()).train == [Example(("hello",), label=0)]


def test_bad_rows_are_left_out_on_request_and_reported(tmp_path):
    rows = ("a\t1", "b\t7", "\t0", "cut short", "c\t0")
    written(tmp_path, {"train.tsv": "\n".join(rows) + "\n", "dev.tsv": "d\t1\n"})
    data = load(TASKS["sst2"], tmp_path, skip_bad_rows=True)
    assert [(e.texts, e.id) for e in data.train] == [(("a",), 0), (("c",), 4)]
    assert all(note.startswith("skipped: ") for note in data.notes)
    assert [note.rsplit("/", 1)[1] for note in data.notes] == [
        "train.tsv:2: label is '7', expected one of 0, 1",
        "train.tsv:3: sentence is empty or not a text",
        "train.tsv:4: 1 cells, expected the 2 of sentence, label",
    ]


def test_all_files_of_a_pattern_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    files = {
        f"{split}/high/{number}.txt": json.dumps({**PASSAGE, "id": number})
        for split in ("train", "dev") for number in "213"
    }  # fmt: skip
    find = examples.glob.glob
    monkeypatch.setattr(
        examples.glob, "glob", lambda *args, **options: sorted(find(*args, **options))[::-1]
    )
    race = load(TASKS["race"], written(tmp_path, files))
    assert [example.id for example in race.train] == list("112233")


def test_subsets_that_are_not_there_are_not_missed(tmp_path):
    files = {k: v for k, v in FORMS["mnli-glue"][1].items() if "mismatched" not in k}
    data = load(TASKS["mnli"], written(tmp_path, files))
    assert [e.subset for e in data.validation + data.test] == ["m", "m"]
    assert data.notes == ()


@pytest.mark.parametrize(("most", "count"), [(0, 0), (3, 3), (20, 20), (99, 20)])
def test_the_chosen_examples_are_always_the_same_and_in_order(most, count):
    examples = list(range(20))
    found = chosen(examples, most)
    assert found == chosen(examples, most) == sorted({*found})
    assert len(found) == count
    assert (found == examples[:most]) == (most in (0, 20, 99)), "not the first ones"


def test_a_folder_without_the_files_says_what_it_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} has neither snli.* nor labels.train"):
        load(TASKS["snli"], tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/gone is no folder"):
        load(TASKS["snli"], tmp_path / "gone")
    with pytest.raises(ValueError, match=r"--data-dir: not given, and .* not on Hugging Face"):
        load(TASKS["storycloze"], None)


@pytest.mark.parametrize(
    ("task", "splits", "expected"),
    [
        ("rte", {"train": [{"sentence1": "a", "sentence2": "b", "label": 1}]}, [1]),
        ("stsb", {"train": [{"sentence1": "a", "sentence2": "b", "label": 2.5}]}, [2.5]),
        (
            "snli",
            {"train": [{"premise": "a", "hypothesis": "b", "label": x} for x in (-1, 2, 0)]},
            [2, 0],
        ),
        (
            "race",
            {"train": [{"article": "a", "question": "b", "options": ["x", "y"], "answer": "B",
                        "example_id": "high1.txt"}]},
            [1],
        ),
        (
            "openbookqa",
            {"train": [{"question_stem": "a", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
                        "answerKey": "B", "id": "7-980"}]},
            [1],
        ),
    ],
)  # fmt: skip
def test_hugging_face_data_sets(monkeypatch, task, splits, expected):
    calls, hidden = [], "label" in splits["train"][0]

    def load_dataset(path, config, split):
        calls.append((path, config, split))
        unlabelled = [{**row, "label": -1} for row in splits["train"]]
        return unlabelled if split == "test" and hidden else splits["train"]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load(TASKS[task], None)
    assert [e.label for e in data.train] == expected
    assert all((e.label is None) == hidden for e in data.test)
    assert [split for *_, split in calls] == ["train", "validation", "test"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install datasets"):
        load(TASKS[task], None)


def test_the_subsets_of_mnli_are_the_splits_of_their_names():
    assert TASKS["mnli"].hub.files == {
        "train": "train",
        "validation": {"m": "validation_matched", "mm": "validation_mismatched"},
        "test": {"m": "test_matched", "mm": "test_mismatched"},
    }


GLUE_CARD = """---
configs:
- config_name: rte
  data_files:
  - {split: train, path: rte/train.jsonl}
  - {split: validation, path: rte/validation.jsonl}
  - {split: test, path: rte/test.jsonl}
dataset_info:
- config_name: rte
  features:
  - {name: sentence1, dtype: string}
  - {name: sentence2, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': entailment, '1': not_entailment}}}
---
"""


def test_the_library_of_hugging_face_reads_what_is_called_as_the_data_set_is(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    labels = {"train": 0, "validation": 1, "test": -1}
    files = {f"rte/{split}.jsonl": jsonl(nli(label=label)) for split, label in labels.items()}
    written(tmp_path / "nyu-mll" / "glue", {"README.md": GLUE_CARD, **files})
    data = load(TASKS["rte"], None)
    texts = ("A man sleeps.", "He rests.")
    assert [data.train, data.validation, data.test] == [
        [Example(texts, label=label)] for label in (0, 1, None)
    ]


def test_the_split_of_story_cloze_is_the_released_codes(tmp_path):
    """1,497 and 374 of 1,871 stories, and those that its seed draws in numpy's old generator."""
    stories = "\n".join([CLOZE, *(STORY.format(id=i, right=1 + i % 2) for i in range(1871))])
    data = load(TASKS["storycloze"], written(tmp_path, {"cloze_test_val__spring2016.csv": stories}))
    order = np.random.RandomState(3535999445).permutation(1871)
    assert [int(e.id) for e in data.validation] == order[:374].tolist()
    assert [int(e.id) for e in data.train] == order[374:].tolist()
    assert (len(data.train), len(data.validation)) == (1497, 374)
    # (n // batch) · epochs updates
    assert Buckets(np.ones(1497), batch_size=32, seed=0).per_epoch * 3 == 138


def test_without_a_validation_file_a_tenth_is_held_out_and_no_text_is_on_both_sides(tmp_path):
    lines = [f"{{}} {i // 4}\n" for i in range(400)]
    files = {"s1.dev": "".join(lines).format(*["p"] * 400), "labels.dev": "neutral\n" * 400}
    files["s2.dev"] = "".join(f"h {i}\n" for i in range(400))
    first, again = (load(TASKS["snli"], written(tmp_path, files)) for _ in range(2))
    assert first == again
    train, held = ({e.texts[0] for e in x} for x in (first.train, first.validation))
    assert (len(train), len(held), train & held) == (90, 10, set())
    assert (len(first.train), len(first.validation)) == (360, 40)
    assert first.notes == ("no file to validate on: held out 40 training examples",)


CUSTOM_FILES = {
    "a.csv": 'review,stars\n"good, ""very""",pos\nbad,neg\nawful,neg\n',
    "b.tsv": "one\tother\tscore\na\tb\t-7.5\nc\td\t2\n",
    "c.jsonl": jsonl(
        {"q": {"stem": "Is?"}, "options": ["x", "y", "z"], "right": "C"},
        {"q": {"stem": "Was?"}, "options": ["x", "y"], "right": "A"},
    ),
    "e.jsonl": jsonl(
        {"q": "Is?", "a1": "x", "a2": "y", "a3": "z", "meta": {"right": "C"}},
        {"q": "Was?", "a1": "x", "a2": "y", "a3": None, "meta": {"right": "A"}},
    ),
    "d.tsv": "q\ta1\ta2\ta3\tright\nIs?\tx\ty\tz\t2\nWas?\tx\t\t\t0\n",
}


@pytest.mark.parametrize(
    ("custom", "labels", "expected"),
    [
        (
            {"train": "a.csv", "texts": ("review",), "label": "stars", "answers": ()},
            ("neg", "pos"),
            [(('good, "very"',), (), 1), (("bad",), (), 0), (("awful",), (), 0)],
        ),
        (
            {"kind": "similarity", "train": "b.tsv", "texts": ("one", "other"), "label": "score"},
            (), [(("a", "b"), (), -7.5), (("c", "d"), (), 2.0)],
        ),
        (
            {"kind": "choice", "train": "c.jsonl", "texts": ("q.stem",), "answers": ("options",),
             "label": "right"},
            LETTERS, [(("Is?",), ("x", "y", "z"), 2), (("Was?",), ("x", "y"), 0)],
        ),
        (
            {"kind": "choice", "train": "d.tsv", "texts": ("q",), "answers": ("a1", "a2", "a3"),
             "label": "right", "labels": ("0", "1", "2")},
            ("0", "1", "2"), [(("Is?",), ("x", "y", "z"), 2), (("Was?",), ("x",), 0)],
        ),
        (
            {"kind": "choice", "train": "e.jsonl", "texts": ("q",), "answers": ("a1", "a2", "a3"),
             "label": "meta.right"},
            LETTERS, [(("Is?",), ("x", "y", "z"), 2), (("Was?",), ("x", "y"), 0)],
        ),
        (
            {"train": "e.jsonl", "texts": ("q",), "label": "meta.right"}, ("A", "C"),
            [(("Is?",), (), 1), (("Was?",), (), 0)],
        ),
    ],
    ids=[
        "classification-csv", "similarity-tsv", "choice-jsonl", "choice-tsv", "choice-null",
        "classification-dotted",
    ],
)  # fmt: skip
def test_a_custom_task_needs_no_code(tmp_path, custom, labels, expected):
    written(tmp_path, CUSTOM_FILES)
    file = tmp_path / custom["train"]
    task = custom_task(Custom(**{**custom, "train": file, "validation": file, "test": file}))
    data = load(task, Path())
    assert task.labels == labels
    assert [(e.texts, e.answers, e.label) for e in data.train] == expected
    assert data.train == data.validation == data.test


@pytest.mark.parametrize(
    ("answers", "message"),
    [("\tx\ty", "an answer is empty"), ("x\ty\tz", "3 answers, but names for 2")],
)
def test_answers_without_a_text_or_a_name_are_refused(tmp_path, answers, message):
    file = tmp_path / "a.tsv"
    file.write_text(f"q\ta1\ta2\ta3\tright\nIs?\t{answers}\t1\n")
    custom = Custom(
        "choice", file, file, texts=("q",), answers=("a1", "a2", "a3"), label="right",
        labels=("0", "1"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        load(custom_task(custom), Path())


def test_a_custom_score_is_finite(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text("one\tother\tlabel\nA cat.\tA dog.\tinf\n")
    custom = Custom("similarity", file, file, texts=("one", "other"))
    with pytest.raises(ValueError, match="label is 'inf', expected a number"):
        load(custom_task(custom), Path())


@pytest.mark.parametrize(
    ("suffix", "row", "bad", "unlabelled"),
    [
        (".tsv", "{}\t{}\n", "odd\t\n", ("fine\t\n", "fine\t \n")),
        (".csv", "{},{}\n", "odd,\n", ("fine,\n", 'fine,""\n')),
        (
            ".jsonl", '{{"text": "{}", "label": "{}"}}\n', '{"text": "odd", "label": null}\n',
            ('{"text": "fine", "label": null}\n', '{"text": "fine", "label": ""}\n'),
        ),
    ],
)  # fmt: skip
def test_a_custom_label_that_is_blank_is_none_and_a_blank_line_is_no_row(
    tmp_path, suffix, row, bad, unlabelled
):
    header = "" if suffix == ".jsonl" else row.format("text", "label")
    good = row.format("good", "pos") + row.format("poor", "neg")
    files = {"train": good + bad, "validation": good, "test": "".join(unlabelled) + good}
    written(tmp_path, {f"{name}{suffix}": f"{header}{x}\n" for name, x in files.items()})
    task = custom_task(Custom(**{name: tmp_path / f"{name}{suffix}" for name in files}))
    assert task.labels == ("neg", "pos")
    with pytest.raises(ValueError, match=r"train.*: label is '', expected one of neg, pos"):
        load(task, Path())
    data = load(task, Path(), skip_bad_rows=True)
    assert [e.label for e in data.train] == [1, 0]
    assert [e.label for e in data.test] == [None, None, 1, 0]
    assert [note.split(": ")[0] for note in data.notes] == ["skipped"]


def test_a_cell_of_a_csv_file_may_be_of_many_lines(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"' + "long\n" * 40_000 + '",x\n')
    custom = Custom(train=tmp_path / "a.csv", validation=tmp_path / "a.csv")
    assert len(load(custom_task(custom), Path()).train[0].texts[0]) == 200_000


def test_custom_classes_are_sorted_and_a_file_may_be_named_like_a_pattern(tmp_path):
    file, classes = tmp_path / "own [1].csv", "jihgfedcba"
    file.write_text("text,label\n" + "".join(f"of {name},{name}\n" for name in classes))
    task = custom_task(Custom(train=file, validation=file))
    assert task.labels == tuple(sorted(classes))
    assert [example.label for example in load(task, Path()).train] == list(range(10))[::-1]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("", None, "train.csv: no examples to train on"),
        ("text,label\n", None, "train.csv: no examples to train on"),
        ("text,label\n", "text,label\none,a\n", "train.csv: no examples to train on"),
        ("text,label\none,a\n", "text,label\n", "validation.csv: no examples to validate on"),
        ("text,label\none,a\none,b\n", None, "train.csv: expected at least 2 different texts"),
    ],
)
def test_a_custom_file_with_too_few_examples_is_named(tmp_path, train, validation, message):
    texts = {"train": train} if validation is None else {"train": train, "validation": validation}
    files = {split: tmp_path / f"{split}.csv" for split in texts}
    for split, text in texts.items():
        files[split].write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{message}"):
        load(custom_task(Custom(**files)), Path())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--custom.train: not given"),
        ({"train": "gone.csv"}, "--custom.train: .*gone.csv: no such file"),
        ({"train": "a.csv", "texts": ("a", "b")}, "--custom.texts: a b, expected 1 for class"),
        ({"train": "a.csv", "kind": "choice", "texts": ()}, "expected 1 or 2 for choice"),
        ({"train": "a.csv", "labels": ("x", "y", "x")}, "--custom.labels: x y x, expected each"),
        ({"train": "a.txt", "texts": ("a",)}, "a.txt: expected a name that ends in .tsv, .csv"),
        ({"train": "blank.csv"}, "--custom.label: label is empty in all of .*blank.csv, expected"),
    ],
)
def test_custom_options_that_do_not_fit_are_named(tmp_path, options, message):
    written(tmp_path, CUSTOM_FILES | {"a.txt": "x", "blank.csv": "text,label\none,\ntwo, \n"})
    if "train" in options:
        options = {**options, "train": tmp_path / options["train"]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        custom_task(Custom(**options))


@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [
        ("cola", (8551, 527, 0), {0, 1}),
        ("sst2", (6920, 872, 0), {0, 1}),
        ("snli", (8862, 980, 0), {0, 1, 2}),
        ("rte", (2490, 277, 0), {0, 1}),
        ("stsb", (5749, 1500, 0), None),
        ("mrpc", (3576, 500, 0), {0, 1}),
        ("race", (450, 50, 0), {0, 1, 2, 3}),
        ("openbookqa", (4458, 499, 500), {0, 1, 2, 3}),
    ],
)
def test_real_files(name, sizes, labels):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    data = load(TASKS[name], folder)
    splits = data.train, data.validation, data.test
    assert tuple(map(len, splits)) == sizes
    assert all(isinstance(e, Example) and all(e.texts) for split in splits for e in split)
    counts = Counter(e.label for e in data.train)
    assert labels is None or counts.keys() == labels
