"""The command, end to end: `python training/pretrain.py` from another working directory."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import training.pretrain
from gpt1_kernels import GPT1LMHeadModel
from training.data import Corpus, spread_windows
from training.metrics import baselines, flops_per_token, mean_loss
from training.optim import warmup_cosine
from training.run import usable
from training.static_step import StaticStep
from training.store import tokenised
from training.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
CLOCK = {"tokens_per_second", "flop_utilisation"}
STEPS = 4


def pretrain(folder: Path, *options: str) -> subprocess.CompletedProcess:
    # Kernels in Triton's interpreter would take minutes: here as a user would, without.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPOSITORY / "training" / "pretrain.py"), "--preset", "mini"]
    return subprocess.run(
        [*command, "--steps", str(STEPS), "--batch-size", "2", "--vocab-size", "200", *options],
        cwd=folder, env={**environment, "PYTHONPATH": str(REPOSITORY)}, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(corpus) -> Path:
    """A working directory with `corpus` in it."""
    return corpus.parent


@pytest.fixture(scope="module")
def runs(folder) -> list[subprocess.CompletedProcess]:
    """Two runs of one seed, into `first` and `second`."""
    return [pretrain(folder, "--data", "corpus", "--out", out) for out in ("first", "second")]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_command_succeeds_and_ends_in_its_result(runs):
    for run in runs:
        assert "in fp32, backend portable, to" in run.stdout
        assert run.returncode == 0, run.stderr
        number = r"(\d+\.\d+)"
        result = re.fullmatch(
            f"validation perplexity {number}, unigram {number}, bigram {number}, "
            f"bits per byte {number}",
            run.stdout.splitlines()[-1],
        )
        model, unigram, bigram, bits = map(float, result.groups())
        assert 1 < bigram < unigram < model < 300  # after 4 updates it knows less than counts do
        assert 0 < bits < 8


def test_the_folder_holds_what_a_run_leaves(runs, folder):
    out = folder / "first"
    assert {path.name for path in out.iterdir()} == {
        "metrics.jsonl", "loss.png", "samples.txt", "config.json", "model", "checkpoints",
        "result.json", ".lock",
        *(["tensorboard"] if importlib.util.find_spec("tensorboard") else []),
    }  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.txt").read_text().count("update ") == STEPS + 1
    config = json.loads((out / "config.json").read_text())
    assert (config["preset"], config["steps"], config["out"]) == ("mini", STEPS, "first")
    assert config["data"] == [str(folder / "corpus")]


def test_the_log_has_every_update_and_the_model_learns(runs, folder):
    rows = metrics(folder / "first")
    updates = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in updates] == list(range(STEPS))
    assert [row["step"] for row in validations] == list(range(STEPS + 1))
    assert updates[0]["learning_rate"] == 0
    assert validations[1] == {**validations[0], "step": 1}  # the first update has rate 0
    assert validations[-1]["validation_loss"] < validations[0]["validation_loss"] - 0.05
    assert all(row[key] > 0 for row in updates for key in (*CLOCK, "gradient_norm"))


def test_two_runs_of_a_seed_are_equal_to_the_bit(runs, folder):
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(folder / name)]
        for name in ("first", "second")
    ]
    assert rows[0] == rows[1]
    for file in ("model/model.safetensors", "model/tokenizer.json", "samples.txt"):
        assert (folder / "first" / file).read_bytes() == (folder / "second" / file).read_bytes()
    assert len(load_file(folder / "first" / "model" / "model.safetensors")) > 40


def test_the_model_opens_here_and_in_transformers_with_its_tokenizer(runs, folder):
    transformers = pytest.importorskip("transformers")
    ours = GPT1LMHeadModel.from_pretrained(folder / "first" / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "first" / "model").eval()
    assert type(theirs) is transformers.OpenAIGPTLMHeadModel
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "first" / "model")
    text = (folder / "corpus" / "0.txt").read_text()[:200]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == Tokenizer.open(folder / "first" / "model").encode(text).tolist()
    assert ids.max() < ours.config.vocab_size == 200
    assert tokenizer.decode(ids[0]) == " ".join(text.split())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_the_result_is_that_of_the_model_on_the_text_held_out(whole, corpus):
    text, tokenizer = Corpus([corpus]), Tokenizer.open(whole / "model")
    learned = Tokenizer.train(chain.from_iterable(text.train), 200)
    assert tokenizer.fingerprint == learned.fingerprint
    train = tokenised(text.train, tokenizer).tokens
    validation = tokenised(text.validation, tokenizer).tokens
    windows = spread_windows(validation, 128, 256)
    model = GPT1LMHeadModel.from_pretrained(whole / "model")
    loss = mean_loss(model, windows, 2, "cpu", "fp32")
    counted = baselines(train, windows.numpy(), 200)
    n_bytes = sum(len(piece.encode()) for document in text.validation for piece in document)
    assert json.loads((whole / "result.json").read_text()) == {
        "validation perplexity": pytest.approx(math.exp(loss)),
        "unigram": counted.unigram,
        "bigram": counted.bigram,
        "bits per byte": pytest.approx(loss / math.log(2) * len(validation) / n_bytes),
    }


def test_the_options_reach_the_updates(run, tmp_path, monkeypatch):
    made, seeds, windows = [], [], training.data.Windows

    def drawn(tokens, length, batch_size, seed):
        seeds.append(seed)
        return windows(tokens, length, batch_size, seed)

    class Watched(StaticStep):
        def __init__(self, model, stream, optimizer, batch, **options):
            super().__init__(model, stream, optimizer, batch, **options)
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            seeds.extend((int(stream.key), torch.initial_seed()))
            made.append((decays, batch, options))

    monkeypatch.setattr(training.data, "Windows", drawn)
    monkeypatch.setattr(training.pretrain, "StaticStep", Watched)
    run(tmp_path, batch_size=4, accumulate=2, clip=0.25, weight_decay=0.5, seed=3, warmup=4)
    options = {"accumulate": 2, "clip": 0.25, "dtype": "fp32"}
    assert made == [([0.5, 0.0], (4, 128), options)]
    assert seeds == [3, 3, 3]
    rates = {row["step"]: row["learning_rate"] for row in metrics(tmp_path) if "loss" in row}
    assert rates == {step: 2e-3 * warmup_cosine(step, 4, 9) for step in (0, 2, 5, 8)}


def test_samples_are_drawn_in_the_dtype_of_the_run(run, tmp_path, monkeypatch):
    """Some backends take no other."""
    dtypes = []

    def sample(*_, **__):
        dtypes.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return ""

    monkeypatch.setattr(training.pretrain, "sample", sample)
    run(tmp_path, steps=1, dtype="bf16")
    assert dtypes == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "gone"), "gone: no such file or folder"),
        (("--data", "corpus/0.txt", "--out", "corpus"), "--out: corpus is not empty"),
    ],
    ids=["data", "out"],
)
def test_a_mistake_is_one_line_of_error(folder, options, message):
    run = pretrain(folder, *options)
    assert run.returncode != 0
    assert run.stderr.startswith(f"error: {message}")
    assert run.stderr.count("\n") == 1


def test_the_text_is_named_so_that_it_is_found_from_another_folder(
    run, corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(corpus.parent)
    run(tmp_path, data=(corpus.name,), steps=1)
    assert json.loads((tmp_path / "config.json").read_text())["data"] == [str(corpus)]


def test_the_utilisation_is_a_share_of_the_peak(run, tmp_path, monkeypatch):
    monkeypatch.setattr(training.metrics, "measured_peak", lambda *_: 1e12)
    run(tmp_path, steps=1)
    flops = flops_per_token(GPT1LMHeadModel.from_pretrained(tmp_path / "model"))
    row = next(row for row in metrics(tmp_path) if "loss" in row)
    assert row["flop_utilisation"] == pytest.approx(row["tokens_per_second"] * flops / 1e12)


def test_a_vocabulary_that_was_asked_for_is_not_smaller(run, tmp_path):
    with pytest.raises(ValueError, match="--vocab-size: 9999, but the text supports only"):
        run(tmp_path, vocab_size=9999)


def test_a_file_or_a_folder_below_one_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "run", file / "a" / "run"):
        with pytest.raises(NotADirectoryError, match=f"--out: {file} is a file"):
            usable(folder)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(PermissionError, match=f"--out: {tmp_path} cannot be written to"):
        usable(tmp_path)


def test_a_new_or_an_empty_folder_is_taken(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        assert usable(folder) == folder
        assert folder.is_dir()
