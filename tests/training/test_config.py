"""The options: what the presets fill in, and what is refused."""

import re
from pathlib import Path

import pytest
import torch
import tyro

from gpt1_kernels import backends
from training.config import PretrainConfig, complete, default_dtype


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default of --out looks at ./runs


def test_the_gpt1_preset_is_the_papers_recipe():
    config = complete(PretrainConfig(preset="gpt1", steps=100_000, device="cpu"))
    assert config.learning_rate == 2.5e-4
    assert config.warmup == 2000
    assert config.batch_size == 64
    assert config.weight_decay == 0.01
    assert config.clip == 1.0


def test_what_is_not_given_comes_from_the_preset_and_the_machine():
    config = complete(PretrainConfig(preset="mini", device="cpu"))
    assert (config.steps, config.batch_size, config.learning_rate) == (1800, 8, 2e-3)
    assert (config.warmup, config.eval_every) == (450, 180)
    assert (config.dtype, config.out) == ("fp32", Path("runs/mini-1"))
    missing = {name for name, value in vars(config).items() if value is None}
    assert missing == {"vocab_size", "tokenizer", "style"}


def test_the_machine_chooses_the_preset():
    expected = ("gpt1", "cuda") if torch.cuda.is_available() else ("mini", "cpu")
    config = complete(PretrainConfig())
    assert (config.preset, config.device) == expected
    assert complete(PretrainConfig(device="cpu")).preset == "mini"


def test_what_is_given_is_kept():
    given = PretrainConfig(
        preset="gpt1", data=("x",), out=Path("y"), steps=7, batch_size=6, accumulate=3,
        vocab_size=99, learning_rate=1.0, warmup=0, weight_decay=0.0, clip=2.0, eval_every=5,
        sample_every=4, checkpoint_every=3, keep=0,
        device="cpu", seed=2**63 - 1, backend="portable", dtype="bf16", compile=True,
    )  # fmt: skip
    assert complete(given) == given


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (4, 1), (7999, 1999), (8000, 2000)])
def test_a_short_run_warms_up_over_a_quarter(steps, warmup):
    config = complete(PretrainConfig(steps=steps, device="cpu"))
    assert config.warmup == warmup
    assert config.eval_every == max(1, steps // 10)


def test_a_run_may_warm_up_to_its_end_and_is_sampled_when_it_is_validated():
    config = complete(PretrainConfig(steps=50, warmup=50, eval_every=3, device="cpu"))
    assert (config.warmup, config.sample_every) == (50, 3)


def test_the_folder_is_the_first_that_is_free():
    (Path("runs") / "mini-1").mkdir(parents=True)
    assert complete(PretrainConfig(device="cpu")).out == Path("runs/mini-1")  # empty
    Path("runs/mini-1/metrics.jsonl").touch()
    assert complete(PretrainConfig(device="cpu")).out == Path("runs/mini-2")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("accumulate", 0, "at least 1"),
        ("accumulate", 3, "a divisor of --batch-size 8"),
        ("vocab_size", 0, "at least 1"),
        ("eval_every", 0, "at least 1"),
        ("sample_every", 0, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("max_skipped", 0, "at least 1"),
        ("keep", -1, "at least 0"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("learning_rate", float("inf"), "above 0, and finite"),
        ("clip", -1.0, "above 0"),
        ("clip", float("inf"), "above 0, and finite"),
        ("weight_decay", -0.1, "at least 0"),
        ("weight_decay", float("inf"), "at least 0, and finite"),
        ("warmup", -1, "0 to --steps 1800"),
        ("warmup", 1801, "0 to --steps 1800"),
        ("seed", -1, "0 to 2^63 - 1"),
        ("seed", 2**63, "0 to 2^63 - 1"),
        ("cuda_graph", True, "a GPU, not --device cpu"),
        ("backend", "fast", "one of auto, triton, cuda, cuda_host, portable"),
        ("data", ("",), "no empty path"),
        ("device", "tpu", "cpu, cuda or cuda:N"),
        ("device", "meta", "cpu, cuda or cuda:N"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(option, value, expected):
    with pytest.raises(ValueError) as raised:
        complete(PretrainConfig(**{"device": "cpu", option: value}))
    flag = "--" + option.replace("_", "-")
    assert str(raised.value).startswith(f"{flag}: {value}, expected {expected}")


@pytest.mark.parametrize("asked_by", ["option", "environment"])
def test_a_backend_that_cannot_run_on_the_device_is_refused_at_once(monkeypatch, asked_by):
    monkeypatch.setattr(backends, "_environment_choice", backends._environment_choice.__wrapped__)
    if asked_by == "environment":
        monkeypatch.setenv("GPT1_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="backend 'cuda' was asked for but "):
        complete(PretrainConfig(device="cpu", backend="cuda" if asked_by == "option" else "auto"))


def test_a_backend_that_does_not_take_the_dtype_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda *_: None)
    with pytest.raises(ValueError, match=r"'cuda_host' was .* does not take torch\.float32"):
        complete(PretrainConfig(device="cpu", backend="cuda_host"))
    assert complete(PretrainConfig(device="cpu", backend="cuda_host", dtype="bf16"))


def test_a_size_beside_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="--vocab-size: 5000, expected none beside --tokenizer"):
        complete(PretrainConfig(device="cpu", vocab_size=5000, tokenizer=Path("x")))


@pytest.mark.parametrize(
    "data", [".", "runs", "r*", "link"], ids=["above", "itself", "pattern", "link"]
)
def test_a_folder_of_text_that_would_hold_the_run_is_refused(data):
    Path("runs").mkdir()
    Path("link").symlink_to("runs")
    with pytest.raises(ValueError, match=f"--out: runs, in --data {re.escape(data)}, which would"):
        complete(PretrainConfig(device="cpu", data=("elsewhere", data), out=Path("runs")))


def test_a_gpu_that_is_not_there_is_refused():
    count = torch.cuda.device_count()
    with pytest.raises(ValueError) as raised:
        complete(PretrainConfig(device=f"cuda:{count}"))
    assert str(raised.value) == f"--device: cuda:{count}, but torch sees {count} GPUs"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--preset", "gpt2"), ("--dtype", "fp8"), ("--steps", "many"), ("--seed", "0.5")],
)
def test_the_command_line_refuses_what_is_of_no_option_type(flag, value, capsys):
    with pytest.raises(SystemExit) as raised:
        tyro.cli(PretrainConfig, args=[flag, value])
    assert raised.value.code != 0
    message = capsys.readouterr().err
    assert flag in message
    assert value in message


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_the_dtype_is_one_of_the_gpu_asked_for(capability, dtype, monkeypatch):
    """And not of the one that is current."""
    capabilities = {torch.device("cuda:1"): capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: dtype == "fp32")
    assert default_dtype(torch.device("cuda:1")) == dtype
