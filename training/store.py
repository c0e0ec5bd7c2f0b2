"""Tokens on disk: a flat file and an index of documents, cached under the hash of their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from training.tokenizer import Tokenizer

if TYPE_CHECKING:
    from training.data import Part

TOKENS, BOUNDS, DESCRIPTION = "tokens.bin", "documents.bin", "store.json"
BOUND = np.dtype("<i8")
FORMAT = "1"  # to be raised when the code gives other files for the same texts and tokenizer


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The tokens of documents, one document after the other, as memory maps of files."""

    tokens: np.ndarray  # (tokens,), uint16 or uint32
    bounds: np.ndarray  # int64 (documents + 1,): document i is tokens[bounds[i] : bounds[i + 1]]
    text_bytes: int
    """Of the text in UTF-8, as read."""
    fingerprint: str
    """Of the tokenizer."""

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """
        Raises:
            FileNotFoundError: nothing of this kind is there.
            ValueError: a file is shorter or longer than the store says.
        """
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return cls(
            _map(folder / TOKENS, np.dtype(about["dtype"]), about["tokens"]),
            _map(folder / BOUNDS, BOUND, about["documents"] + 1),
            about["text_bytes"],
            about["fingerprint"],
        )


def cache_folder() -> Path:
    """`GPT1_KERNELS_CACHE`, or `~/.cache/gpt1_kernels`."""
    return Path(os.environ.get("GPT1_KERNELS_CACHE") or Path.home() / ".cache" / "gpt1_kernels")


def tokenised(part: Part, tokenizer: Tokenizer, cache: Path | None = None) -> TokenStore:
    """The tokens of a part of a corpus: from the cache, or written there first.

    The folder is named by the hash of the texts, the tokenizer and the libraries that it builds on.
    It appears there complete or not at all; whoever needs the same at the same time waits for it.
    Any folder of the cache may be deleted while no program uses it.

    Args:
        cache: default: `cache_folder()`.

    Raises:
        ValueError: the text has changed since its corpus was made.
    """
    parts = (FORMAT, part.digest, tokenizer.fingerprint, tokenizer.versions)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    folder = (cache or cache_folder()) / "tokens" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            write(folder, part, tokenizer, part.characters)
    return TokenStore.open(folder)


def write(
    folder: Path,
    documents: Iterable[Iterable[str]],
    tokenizer: Tokenizer,
    characters: int | None = None,
) -> None:
    """Writes a store in a stream: no more than a piece of a document is in memory.

    It grows in a folder beside, `<folder>.partial`, and takes its name when everything has reached
    the disk. What an interrupted call has left there is deleted first. Shows its progress if it
    takes more than a second.

    Args:
        folder: must not exist.
        documents: each as pieces of its text, as `Tokenizer.encode_pieces` takes them.
        characters: of all documents, for the progress bar and to notice a text that has changed.

    Raises:
        ValueError: the documents have more or fewer characters.
    """
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_files(partial, documents, tokenizer, characters)
        os.rename(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_files(
    folder: Path,
    documents: Iterable[Iterable[str]],
    tokenizer: Tokenizer,
    characters: int | None,
) -> None:
    dtype = tokenizer.dtype.newbyteorder("<")
    n_tokens = n_documents = n_bytes = n_characters = 0

    def counted(pieces: Iterable[str]) -> Iterator[str]:
        nonlocal n_bytes, n_characters
        for piece in pieces:
            n_characters += len(piece)
            n_bytes += len(piece.encode("utf-8", "surrogatepass"))
            yield piece
            bar.update(len(piece))

    bar = tqdm(
        total=characters, desc="tokenising", unit="char", unit_scale=True, delay=1,
        dynamic_ncols=True,
    )  # fmt: skip
    with bar, (folder / TOKENS).open("wb") as tokens, (folder / BOUNDS).open("wb") as bounds:
        bounds.write(np.array(0, BOUND).tobytes())
        for document in documents:
            for ids in tokenizer.encode_pieces(counted(document)):
                tokens.write(ids.astype(dtype, copy=False).tobytes())
                n_tokens += len(ids)
            bounds.write(np.array(n_tokens, BOUND).tobytes())
            n_documents += 1
    if characters not in (None, n_characters):  # the name, which is a digest, would be another's
        raise ValueError(
            f"--data: {n_characters} characters, expected the {characters} of a moment ago; "
            "the text must not change while it is read"
        )
    about = {
        "dtype": dtype.str,
        "tokens": n_tokens,
        "documents": n_documents,
        "text_bytes": n_bytes,
        "fingerprint": tokenizer.fingerprint,
    }
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync(path)


def _map(file: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = file.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{file}: {size} bytes, expected {count * dtype.itemsize}; delete the folder"
        )
    return np.memmap(file, dtype, mode="r") if count else np.empty(0, dtype)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and sys.platform == "win32":  # where no program can open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
