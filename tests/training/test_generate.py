"""The command that continues text, and the samples of a training run."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt1_kernels import GPT1LMHeadModel
from tests.models import config, randomised, with_dropout
from training import generate
from training.generate import GenerateConfig, main, open_model, single_token
from training.sample import sample
from training.tokenizer import Tokenizer

TEXT = "the house met. the senate met. the people of the states are free, and the house is free."
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as `pretrain.py` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train([TEXT], 60, at_most=True)
    model = randomised(GPT1LMHeadModel(config(vocab_size=tokenizer.vocab_size)))
    model.save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    (folder / "config.json").write_text('{"preset": "mini"}')
    return folder


def expected(run, *prompts, tokens=9, seed=4, **options):
    """What `sample` answers to the prompts in turn, with one generator."""
    model, tokenizer = open_model(run)
    generator = torch.Generator().manual_seed(seed)
    return [sample(model, tokenizer, p, tokens, seed=generator, **options) for p in prompts]


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_command_continues_a_prompt(run):
    command = [
        sys.executable, "training/generate.py", "--model", str(run), "--prompt", "The house",
        "--tokens", "9", "--temperature", "1.5", "--top-k", "7", "--top-p", "0.9", "--seed", "4",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    (text,) = expected(run, "The house", temperature=1.5, top_k=7, top_p=0.9)
    assert result.stdout == text + "\n"
    assert text.startswith("the house ")


@pytest.mark.usefixtures("on_the_cpu")
def test_every_line_of_the_input_is_continued(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The house\n\n  \nthe house\nthe people"))
    main(GenerateConfig(run, tokens=9, seed=4))
    lines = capsys.readouterr().out.splitlines()
    assert lines == expected(run, "the house", "the house", "the people")
    assert lines[0] != lines[1], "one stream of draws serves all lines"


@pytest.mark.usefixtures("on_the_cpu")
def test_a_conversation_outlives_a_line_that_is_too_long(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"the house\n{'free ' * 99}\nthe people\n"))
    main(GenerateConfig(run, tokens=9, seed=4))
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected(run, "the house", "the people")
    assert printed.err.startswith("error: --tokens: a prompt of 99 tokens and 9 new ones, expected")


@pytest.mark.usefixtures("on_the_cpu")
def test_a_prompt_and_its_continuation_may_fill_the_positions(run, capsys):
    model, tokenizer = open_model(run)
    room = model.config.n_positions - len(tokenizer.encode("the house"))
    main(GenerateConfig(run, "the house", tokens=room))
    assert capsys.readouterr().out.startswith("the house ")
    with pytest.raises(ValueError, match=f"2 tokens and {room + 1} new ones, expected at most"):
        main(GenerateConfig(run, "the house", tokens=room + 1))


@pytest.mark.usefixtures("on_the_cpu")
def test_a_model_folder_serves_as_well_as_a_run(run, capsys):
    for folder in (run, run / "model"):
        main(GenerateConfig(folder, "the house", tokens=9, temperature=0.0))
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.usefixtures("on_the_cpu")
def test_the_text_ends_after_the_stop_token(run, capsys):
    (free,) = expected(run, "the house", tokens=20, top_k=None, temperature=3.0)
    words, (_, tokenizer) = free.split(), open_model(run)
    at = next(
        i for i, word in enumerate(words)
        if i > 2 and word not in words[:i] and len(tokenizer.encode(word)) == 1
    )  # fmt: skip
    options = {"tokens": 20, "seed": 4, "top_k": None, "temperature": 3.0}
    main(GenerateConfig(run, "the house", stop=words[at], **options))
    assert capsys.readouterr().out == " ".join(words[: at + 1]) + "\n"


def test_text_is_joined_at_the_ends_of_words(run):
    _, tokenizer = open_model(run)
    ids = tokenizer.encode("The states, the house.")
    assert len(ids) > 5
    assert tokenizer.decode(ids) == "the states , the house ."


def test_a_sample_of_a_model_in_training_is_without_dropout_and_leaves_it_in_training(run):
    _, tokenizer = open_model(run)
    model = randomised(GPT1LMHeadModel(with_dropout(vocab_size=tokenizer.vocab_size)))
    texts = {sample(model, tokenizer, "the people", 12, seed=3) for _ in range(3)}
    assert len(texts) == 1
    assert texts.pop().startswith("the people ")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": " "}, ValueError, "--prompt: ' ', expected some text"),
        ({"prompt": "the", "tokens": 50}, ValueError, "--tokens: a prompt of 1 tokens and 50 new"),
        ({"prompt": "the", "tokens": 0}, ValueError, "--tokens: 0, expected at least 1"),
        ({"prompt": "the", "seed": -1}, ValueError, "--seed: -1, expected 0 to"),
        ({"prompt": "the", "seed": 2**63}, ValueError, f"--seed: {2**63}, expected 0 to"),
        ({"prompt": "the", "temperature": float("nan")}, ValueError, "temperature: nan, expected"),
        ({"prompt": "the", "temperature": -1.0}, ValueError, "temperature: -1.0"),
        ({"prompt": "the", "stop": "the house"}, ValueError, "--stop: 'the house' is 2 tokens"),
        ({"prompt": "the", "stop": "☃"}, ValueError, "--stop: '☃' is 1 tokens, expected one"),
        ({"model": Path("nowhere")}, FileNotFoundError, "nowhere.config.json: no such file"),
    ],
)
@pytest.mark.usefixtures("on_the_cpu")
def test_what_is_refused(run, options, error, message):
    with pytest.raises(error, match=message):
        main(GenerateConfig(**{"model": run, "tokens": 9, **options}))


@pytest.mark.usefixtures("on_the_cpu")
def test_a_model_that_diverged_is_refused(run, monkeypatch):
    model, tokenizer = open_model(run)
    torch.nn.init.constant_(model.transformer.h[0].ln_1.bias, torch.nan)
    monkeypatch.setattr(generate, "open_model", lambda folder: (model, tokenizer))
    with pytest.raises(ValueError, match="weights that are not finite"):
        main(GenerateConfig(run, "the"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    randomised(GPT1LMHeadModel(config())).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer\.json"):
        open_model(tmp_path)


def test_a_run_that_has_not_ended_is_named_with_what_serves_as_well(tmp_path):
    (tmp_path / "config.json").write_text('{"preset": "mini", "resume": "auto"}')
    with pytest.raises(FileNotFoundError, match=r"model: no such folder.*checkpoints serves"):
        open_model(tmp_path)


def test_a_stop_word_is_one_token_at_the_end_of_a_word(run):
    _, tokenizer = open_model(run)
    assert tokenizer.decode([single_token(tokenizer, "The")]) == "the"
    assert tokenizer.decode([single_token(tokenizer, ".")]) == "."


def test_an_error_of_the_command_is_one_line(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(run), "--prompt", " "])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "training" / "generate.py"), run_name="__main__")
    # A string is what the interpreter prints before it exits with 1.
    assert end.value.code == "error: --prompt: ' ', expected some text"
