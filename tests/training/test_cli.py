"""The command line: what its end says, and lists."""

import sys

import pytest

from training import cli
from training.config import PretrainConfig
from training.finetune_config import FinetuneConfig


def status(monkeypatch, main, *words: str) -> int | str | None:
    """What the script ends with: None, a number, or the line that it prints."""
    monkeypatch.setattr(sys, "argv", ["script", *words])
    try:
        return cli.run(main, PretrainConfig)
    except SystemExit as end:
        return end.code


def test_main_gets_the_options(monkeypatch):
    given = []
    assert status(monkeypatch, given.append, "--data", "a", "b", "--steps", "3") is None
    assert given == [PretrainConfig(data=("a", "b"), steps=3)]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("--steps: 0, expected at least 1"), "error: --steps: 0, expected at least 1"),
        (FloatingPointError("updates 1 to 9 skipped"), "error: updates 1 to 9 skipped"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_goes_wrong_has_no_traceback(monkeypatch, raised, expected):
    def main(config):
        raise raised

    assert status(monkeypatch, main) == expected


def test_a_bug_has_one(monkeypatch):
    with pytest.raises(AttributeError):
        status(monkeypatch, lambda config: config.no_such_option)


@pytest.mark.parametrize("again", [["--data", "b"], ["--data=b"]])
def test_a_list_given_twice_is_refused(monkeypatch, again):
    expected = "error: --data: given 2 times, expected once, with all values"
    assert status(monkeypatch, print, "--data", "a", *again) == expected


def test_a_list_within_an_option_is_refused_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--custom.texts", "a", "--custom.texts", "b"])
    with pytest.raises(SystemExit, match=r"error: --custom\.texts: given 2 times"):
        cli.run(print, FinetuneConfig)


def test_of_another_option_the_last_counts(monkeypatch):
    given = []
    status(monkeypatch, given.append, "--steps", "3", "--steps", "5")
    assert given[0].steps == 5
