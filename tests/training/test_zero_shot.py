"""Zero-shot heuristics: what is scored, the scores themselves, the threshold, a whole run."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from gpt1_kernels import GPT1LMHeadModel, use_backend
from tests.cases import DEVICE
from tests.models import config, randomised
from training import checkpoint, zero_shot
from training.examples import Example
from training.tokenizer import Tokenizer
from training.zero_shot import HEURISTICS, Scored, best_threshold, mean_log_probabilities

SHARED = Path(__file__).parents[3] / "shared" / "data"
WORDS = {"very": [50], "negative": [60], "positive": [61, 62]}


def encode(text: str) -> list[int]:
    return WORDS.get(text) or [ord(letter) - 96 for letter in text]


@pytest.mark.parametrize(
    ("name", "example", "expected"),
    [
        ("cola", Example(("abc",)), [([1, 2, 3], 1)]),
        ("sst2", Example(("ab",)), [([1, 2, 50, 60], 3), ([1, 2, 50, 61, 62], 3)]),
        (
            "race", Example(("abc", "d"), ("e", "fg")),
            [([1, 2, 3, 4, 5], 4), ([1, 2, 3, 4, 6, 7], 4)],
        ),
        ("dprd", Example(("a", "bc"), ("d", "ef")), [([1, 4, 2, 3], 2), ([1, 5, 6, 2, 3], 3)]),
        ("dprd", Example(("", "bc"), ("d",)), [([4, 2, 3], 1)]),  # the pronoun comes first
        ("race", Example(("a" * 40, "d"), ("e",)), [([1] * 6 + [4, 5], 7)]),  # cut to 8
    ],
)  # fmt: skip
def test_what_is_asked_and_which_tokens_are_scored(name, example, expected):
    def encoded(text):
        return encode(text) if text else []

    assert HEURISTICS[name](example, encoded, 8) == [Scored(*x) for x in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_mean_log_probabilities_against_plain_pytorch(batch_size):
    model = randomised(GPT1LMHeadModel(config()))
    rng = np.random.default_rng(0)
    sequences = [
        Scored(rng.integers(0, 100, n).tolist(), start)
        for n, start in ((9, 1), (4, 3), (12, 5), (9, 8), (2, 1), (1, 1), (5, 5), (0, 1))
    ]
    with use_backend("portable"):
        found = mean_log_probabilities(model, sequences, batch_size, DEVICE)
    for value, (ids, start) in zip(found, sequences, strict=True):
        ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
        logits = model(ids[None]).logits[0].double()
        scores = [
            torch.log_softmax(logits[i - 1], 0)[ids[i]].item() for i in range(start, len(ids))
        ]
        assert value == pytest.approx(np.mean(scores) if scores else 0, rel=1e-5)


def test_lm_eval_gives_a_saved_model_the_same_log_probabilities(tmp_path):
    """With <unk> for the token that starts a text: GPT-1 has none, and lm-eval asks for one."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    texts = [("the snow fell all day", " by night"), ("by night", " the snow"), ("it", " fell")]
    tokenizer = Tokenizer.train([" ".join(map("".join, texts))], 60, at_most=True)
    model = randomised(GPT1LMHeadModel(config(vocab_size=tokenizer.vocab_size))).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    theirs = harness.HFLM(pretrained=str(tmp_path), prefix_token_id=0, device=DEVICE, batch_size=2)
    assert theirs.max_length == model.config.n_positions
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
    sums = [total for total, _ in theirs.loglikelihood(asked, disable_tqdm=True)]

    parts = [[tokenizer.encode(part).tolist() for part in pair] for pair in texts]
    sequences = [Scored(before + after, len(before)) for before, after in parts]
    with use_backend("portable"):
        means = mean_log_probabilities(model, sequences, 2, DEVICE)
    assert [mean * len(after) for mean, (_, after) in zip(means, parts, strict=True)] == (
        pytest.approx(sums, rel=1e-5)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 60)
    values = np.round(rng.normal(size=60) + 0.7 * labels, 1)  # with ties
    found = matthews_corrcoef(labels, values > best_threshold(values, labels))
    cuts = np.unique(values)[:-1]
    assert found == pytest.approx(max(matthews_corrcoef(labels, values > c) for c in cuts))


DPRD = """The bee sat on it and a fit bee because it had pollen.
it
The bee,a Fit Bee
a fit bee

Ann saw the shed of Bo, she ran.
she
Ann,Bo
Ann
"""


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_pronouns_are_found_as_words(tmp_path, end):
    (tmp_path / "dprd.txt").write_text(DPRD + end)
    assert zero_shot.read_dprd(tmp_path / "dprd.txt") == [
        Example(
            ("The bee sat on", "and a fit bee because it had pollen."), ("The bee", "a Fit Bee"), 1
        ),
        Example(("Ann saw the shed of Bo,", "ran."), ("Ann", "Bo"), 0),
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [("she\n", "he\n"), ("Ann,Bo\nAnn", "Ann,Bo\nJo"), ("she\n", ""), ("Ann\n", "Ann\nrest\n")],
)
def test_a_group_that_is_none_is_named_with_file_and_line(tmp_path, old, new):
    (tmp_path / "dprd.txt").write_text(DPRD.replace(old, new))
    with pytest.raises(ValueError, match=r"dprd.txt:6: expected a sentence, a pronoun in it"):
        zero_shot.read_dprd(tmp_path / "dprd.txt")


def test_the_real_pronouns():
    file = SHARED / "dprd" / "train.c.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    examples = zero_shot.read_dprd(file)
    assert len(examples) == 1316
    assert {len(example.answers) for example in examples} == {2}


def test_the_threshold_of_cola_is_chosen_on_other_sentences_than_those_asked_about(monkeypatch):
    def length(model, sequences, *_):
        return np.array([float(len(s.ids)) for s in sequences])

    monkeypatch.setattr(zero_shot, "mean_log_probabilities", length)
    model = SimpleNamespace(config=SimpleNamespace(n_positions=9))
    tokenizer = SimpleNamespace(encode=lambda text: np.arange(len(text)))
    rows = {"train": [(1, 0), (3, 1)], "validation": [(1, 0), (3, 0), (5, 1)]}
    splits = {
        split: [Example(("a" * n,), label=label) for n, label in its] for split, its in rows.items()
    }
    options = zero_shot.ZeroShotConfig(Path())
    assert zero_shot.zero_shot("cola", splits, model, tokenizer, options) == pytest.approx(0.5)


def test_without_a_file_to_validate_on_all_questions_are_asked(tmp_path):
    question = {"question": "who?", "options": ["a", "b"], "answer": "A"}
    rows = (
        json.dumps({"example_id": str(i), "article": f"text {i}", **question}) for i in range(30)
    )
    (tmp_path / "race.jsonl").write_text("\n".join(rows))
    tasks = zero_shot.read_tasks(zero_shot.ZeroShotConfig(tmp_path, race=tmp_path))
    assert len(tasks["race"]["validation"]) == 30
    rows = "".join(f"x\t{i % 2}\t\tsentence {i}\n" for i in range(30))
    (tmp_path / "in_domain_train.tsv").write_text(rows)
    tasks = zero_shot.read_tasks(zero_shot.ZeroShotConfig(tmp_path, cola=tmp_path))
    assert {split: len(its) for split, its in tasks["cola"].items()} == {
        "train": 27, "validation": 3,
    }  # fmt: skip


def test_all_checkpoints_of_a_run_are_asked(whole, tmp_path, capsys):
    (tmp_path / "sst2").mkdir()
    lines = "".join(f"{'abcdefghij'[i % 10 :]} {i}\t{i % 2}\n" for i in range(20))
    for name in ("train", "dev"):
        (tmp_path / "sst2" / f"{name}.tsv").write_text(lines)
    (tmp_path / "cola").mkdir()
    for name in ("train", "dev"):
        rows = "".join(f"x\t{i % 2}\t\t{'abcdefghij'[i % 9 :]}\n" for i in range(20))
        (tmp_path / "cola" / f"in_domain_{name}.tsv").write_text(rows)
    (tmp_path / "dprd.txt").write_text(DPRD)
    options = zero_shot.ZeroShotConfig(
        whole, cola=tmp_path / "cola", sst2=tmp_path / "sst2", dprd=tmp_path / "dprd.txt",
        examples=12, dprd_best=0.8, out=tmp_path / "out", device=DEVICE,
    )  # fmt: skip
    with use_backend("portable"):
        zero_shot.main(options)
    rows = json.loads((tmp_path / "out" / "zero_shot.json").read_text())
    assert [row["step"] for row in rows] == [6, 9]
    assert "update 9: cola" in capsys.readouterr().out
    for row in rows:
        scores, normalised = row["scores"], row["normalised"]
        assert normalised["cola"] == pytest.approx(scores["cola"] / 0.35)
        assert normalised["sst2"] == pytest.approx((scores["sst2"] - 0.5) / 0.432)
        assert normalised["dprd"] == pytest.approx((scores["dprd"] - 0.5) / 0.3)
    assert (tmp_path / "out" / "zero_shot.png").read_bytes().startswith(b"\x89PNG")

    folder = whole / "checkpoints" / "step-00000009"  # SST-2 by hand
    model, tokenizer = GPT1LMHeadModel.from_pretrained(folder), Tokenizer.open(folder)
    hits = 0
    examples = zero_shot.read_tasks(options)["sst2"]["validation"]
    assert len(examples) == 12
    for example in examples:
        before = tokenizer.encode(f"{example.texts[0]} very").tolist()
        scores = []
        for word in ("negative", "positive"):
            ids = before + tokenizer.encode(word).tolist()
            losses = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            told = [losses[i - 1, ids[i]].item() for i in range(len(before), len(ids))]
            scores.append(np.mean(told))
        hits += int(np.argmax(scores)) == example.label
    assert rows[-1]["scores"]["sst2"] == hits / 12


def test_row28_a_damaged_checkpoint_is_refused_and_the_others_are_asked(whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "dprd.txt").write_text(DPRD)
    options = zero_shot.ZeroShotConfig(tmp_path / "run", dprd=tmp_path / "dprd.txt", device=DEVICE)
    for damaged, asked in (("step-00000009", "update 6: dprd"), ("step-00000006", "")):
        with (tmp_path / "run" / "checkpoints" / damaged / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        ends = pytest.raises(ValueError, match="none of 2 checkpoints can be used")
        with use_backend("portable"), contextlib.nullcontext() if asked else ends:
            zero_shot.main(options)
        printed = capsys.readouterr().out
        assert f"{damaged}/model.safetensors: not as it was written" in printed
        assert asked in printed
    (row,) = json.loads((tmp_path / "run" / "zero_shot.json").read_text())
    assert row["step"] == 6


@pytest.mark.parametrize(
    ("module", "name"), [(checkpoint, "_digest_of_file"), (zero_shot, "backbone_at")]
)
def test_a_checkpoint_that_its_run_removes_meanwhile_does_not_end_the_sweep(
    whole, tmp_path, monkeypatch, capsys, module, name
):
    def removed(path):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006", ignore_errors=True)
        return original(path)

    original = getattr(module, name)
    monkeypatch.setattr(module, name, removed)
    shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "dprd.txt").write_text(DPRD)
    options = zero_shot.ZeroShotConfig(tmp_path / "run", dprd=tmp_path / "dprd.txt", device=DEVICE)
    with use_backend("portable"):
        zero_shot.main(options)
    printed = capsys.readouterr().out
    assert "refused: " in printed
    assert "update 9: dprd" in printed


def test_an_interrupted_sweep_keeps_its_scores(whole, tmp_path, monkeypatch):
    def interrupted(*_):
        if (tmp_path / "zero_shot.json").exists():
            raise KeyboardInterrupt
        return 0.5

    (tmp_path / "dprd.txt").write_text(DPRD)
    monkeypatch.setattr(zero_shot, "zero_shot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zero_shot.main(zero_shot.ZeroShotConfig(whole, dprd=tmp_path / "dprd.txt", out=tmp_path))
    rows = json.loads((tmp_path / "zero_shot.json").read_text())
    assert [row["scores"] for row in rows] == [{"dprd": 0.5}]


def test_a_folder_that_cannot_take_the_scores_is_refused_before_any(whole, tmp_path, monkeypatch):
    (tmp_path / "dprd.txt").write_text(DPRD)
    monkeypatch.setattr(zero_shot, "zero_shot", lambda *_: pytest.fail("scored"))
    file = tmp_path / "dprd.txt"
    with pytest.raises(NotADirectoryError, match=f"--out: {file} is a file, expected a folder"):
        zero_shot.main(zero_shot.ZeroShotConfig(whole, dprd=file, out=file, device=DEVICE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one of --cola"),
        ({"dprd": Path("dprd.txt")}, "no checkpoints, expected a run of"),
        ({"examples": 0}, "--examples: 0, expected at least 1"),
        ({"examples": 1, "cola": Path("cola")}, "--examples: 1, expected .* 2 for CoLA"),
        ({"batch_size": 0}, "--batch-size: 0, expected at least 1"),
        ({"dprd_best": 0.5}, "--dprd-best: 0.5, expected above 0.5"),
        ({"device": "foo"}, "--device: foo, expected cpu, cuda or cuda:N"),
    ],
)
def test_what_is_missing_or_out_of_range_is_named(tmp_path, options, message):
    (tmp_path / "dprd.txt").write_text(DPRD)
    options = {k: tmp_path / x if isinstance(x, Path) else x for k, x in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        zero_shot.main(zero_shot.ZeroShotConfig(tmp_path, **options))
