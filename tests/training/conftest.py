"""A corpus of invented words, small enough to train on in a second, and runs on it."""

import random
from pathlib import Path

import pytest

from training import pretrain
from training.config import PretrainConfig

STEPS, EVERY = 9, 3


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """The tokens that the tests make stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT1_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 6 documents."""
    folder, rng = tmp_path_factory.mktemp("text") / "corpus", random.Random(0)
    folder.mkdir()
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(150)]
    for number in range(6):
        lines = (" ".join(rng.choices(words, k=60)) for _ in range(8))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def run(corpus):
    """run(out, **changes): the same small run into `out`, in this process."""

    def run(out: Path, **changes) -> None:
        settings = {
            "preset": "mini", "data": (str(corpus),), "steps": STEPS, "batch_size": 2,
            "vocab_size": 200, "checkpoint_every": EVERY, "eval_every": EVERY, "device": "cpu",
        }  # fmt: skip
        pretrain.main(PretrainConfig(**{**settings, **changes}, out=out))

    return run


@pytest.fixture(scope="session")
def whole(run, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


@pytest.fixture(scope="session")
def whole_lstm(run, tmp_path_factory) -> Path:
    """The same with the LSTM."""
    out = tmp_path_factory.mktemp("runs") / "whole_lstm"
    run(out, backbone="lstm")
    return out
