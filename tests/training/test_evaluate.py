"""The commands that look at finished runs: `evaluate.py` and `plot.py`."""

import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt1_kernels import GPT1LMHeadModel
from training import evaluate
from training.data import Corpus
from training.evaluate import EvaluateConfig, main

PLOT = Path(__file__).parents[2] / "training" / "plot.py"


@pytest.mark.parametrize("backbone", ["whole", "whole_lstm"])
def test_each_held_out_document_and_all_of_them_have_a_perplexity(backbone, request, capsys):
    whole = request.getfixturevalue(backbone)
    capsys.readouterr()  # what its training said
    main(EvaluateConfig(whole, device="cpu"))
    *documents, total = capsys.readouterr().out.splitlines()
    rows = [re.match(r" *([\d.]+) +([\d,]+) tokens  (.+)", line).groups() for line in documents]
    perplexity, tokens, name = re.match(r" *([\d.]+) +([\d,]+) tokens  (.+)", total).groups()
    assert name == "all"
    counts = [int(n.replace(",", "")) for _, n, _ in rows]
    assert sum(counts) == int(tokens.replace(",", ""))
    mean = sum(math.log(float(p)) * n for (p, _, _), n in zip(rows, counts, strict=True))
    assert math.exp(mean / sum(counts)) == pytest.approx(float(perplexity), rel=1e-3)
    result = json.loads((whole / "result.json").read_text())
    assert float(perplexity) == pytest.approx(result["validation perplexity"], rel=0.05)


def test_the_mean_is_over_the_tokens_of_the_documents_held_out(whole, corpus, monkeypatch, capsys):
    def tokenised(part, tokenizer):
        assert part.digest == Corpus([corpus]).validation.digest
        return SimpleNamespace(tokens=np.arange(13), bounds=[0, 2, 3, 13])

    monkeypatch.setattr(evaluate, "tokenised", tokenised)
    monkeypatch.setattr(evaluate, "mean_loss", lambda model, tokens, config: len(tokens) / 10)
    main(EvaluateConfig(whole, device="cpu"))
    *_, total = capsys.readouterr().out.splitlines()
    mean = (2 * 0.2 + 10 * 1.0) / 12  # of a single token nothing is predicted
    assert total.split() == [f"{math.exp(mean):.2f}", "12", "tokens", "all"]


@pytest.mark.parametrize(("length", "windows"), [(3 * 128 + 50, (3, 128)), (50, (1, 50))])
def test_all_windows_of_a_document_count(whole, length, windows):
    model = GPT1LMHeadModel.from_pretrained(whole / "model")
    tokens = np.arange(length) % 200
    windows = torch.from_numpy(tokens[: math.prod(windows)]).view(windows)
    expected = model(windows, labels=windows).loss.item()
    found = evaluate.mean_loss(model, tokens, EvaluateConfig(whole, device="cpu"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_text_is_read_as_it_was_trained_on(whole, tmp_path, capsys):
    file, out = tmp_path / "text.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"body": f"one {n}\ntwo"}) + "\n" for n in range(30)))
    options = {"text_column": "body", "sentence_shuffled": True}
    digest = Corpus([file], **options).train.digest
    out.mkdir()
    (out / "model").symlink_to(whole / "model")
    (out / "config.json").write_text(json.dumps({"data": [str(file)], "text": digest, **options}))
    main(EvaluateConfig(out, device="cpu"))
    assert capsys.readouterr().out.endswith(" all\n")


def test_another_text_than_the_one_trained_on_is_refused(whole, corpus, tmp_path):
    out, text = tmp_path / "run", tmp_path / "text"
    shutil.copytree(whole, out)
    shutil.copytree(corpus, text)
    (text / "new.txt").write_text("One more document.")
    options = json.loads((out / "config.json").read_text()) | {"data": [str(text)]}
    (out / "config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=f"{text}: not as when {out} was trained"):
        main(EvaluateConfig(out, device="cpu"))


def test_documents_of_a_token_each_are_refused(whole, monkeypatch):
    store = SimpleNamespace(tokens=np.arange(3), bounds=range(4))
    monkeypatch.setattr(evaluate, "tokenised", lambda part, tokenizer: store)
    with pytest.raises(ValueError, match="expected a held-out document of 2 or more tokens"):
        main(EvaluateConfig(whole, device="cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": Path("other/config.json")}, "config.json: expected a run of pretrain.py"),
        ({"batch_size": 0}, "--batch-size: 0, expected at least 1"),
        ({"device": "tpu"}, "--device: tpu, expected cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "--device: cuda:99, but torch sees"),
        ({"run": Path("other")}, "other: expected a run of pretrain.py"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    Path("other/config.json").write_text('{"task": "sst2"}')  # of a fine-tuning
    with pytest.raises(ValueError, match=message):
        main(EvaluateConfig(**{"run": tmp_path, "device": "cpu", **options}))


def test_runs_are_compared_in_one_picture(whole, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "losses.png"
    arguments = [str(PLOT), str(whole), str(whole), "--out", str(picture)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(PLOT), run_name="__main__")
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_log_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(PLOT), str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PLOT), run_name="__main__")
    assert "metrics.jsonl" in end.value.code
