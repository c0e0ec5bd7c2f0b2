"""Rows of the files in which tasks are distributed: TSV, CSV, JSON, XML, Hugging Face data sets.

Every reader yields (where, row): where the row is, for messages, and its values by column. A row
that cannot be read comes as the `RowError` that says why, so that those after it can be.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

LONGEST_CELL = 2**31 - 1  # characters of a CSV file's; csv itself stops at 131,072


class RowError(ValueError):
    """A row that cannot be used; the message says where it is and why."""


Row = tuple[str, Mapping[str, Any] | RowError]


def tsv(file: Path, columns: Sequence[str] = (), *, more: bool = False) -> Iterator[Row]:
    """Lines of cells between tabs; a quotation mark is a character like any other.

    Lines without a character in their cells are left out, as in all tables here.

    Args:
        columns: their names where the file has no header, which a first line is that holds one of
            these names. Without names the first line is always the header.
        more: a row may have further cells.

    Raises:
        ValueError: a file that is not UTF-8.
    """
    lines = enumerate(_lines(file), 1)
    yield from _table(file, ((n, line.split("\t")) for n, line in lines), columns, more)


def csv_table(file: Path) -> Iterator[Row]:
    """Records of cells between commas, quoted where needed, below a header.

    Raises:
        ValueError: a file that is not UTF-8, or a quotation that does not end.
    """
    csv.field_size_limit(LONGEST_CELL)
    records = csv.reader((line + "\n" for line in _lines(file)), strict=True)
    try:
        yield from _table(file, ((records.line_num, cells) for cells in records), (), False)
    except csv.Error as error:
        raise ValueError(f"{file}:{records.line_num}: {error}") from None


def json_lines(file: Path) -> Iterator[Row]:
    """A JSON object a line; blank lines are left out.

    Raises:
        ValueError: a file that is not UTF-8.
    """
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            where = f"{file}:{number}"
            yield where, _json_object(where, line)


def race_passage(file: Path) -> Iterator[Row]:
    """The questions of a passage of RACE, each with the passage's article.

    Raises:
        ValueError: a file that is not UTF-8.
    """
    passage = _json_object(str(file), "\n".join(_lines(file)))
    if isinstance(passage, RowError):
        yield str(file), passage
        return
    lists = [passage.get(name) for name in ("questions", "options", "answers")]
    if not all(isinstance(x, list) for x in lists) or len({*map(len, lists)}) != 1:
        message = f"{file}: expected lists questions, options, answers of one length"
        yield str(file), RowError(message)
        return
    for number, (question, options, answer) in enumerate(zip(*lists, strict=True)):
        yield f"{file}: question {number}", {
            "article": passage.get("article"), "question": question, "options": options,
            "answer": answer, "id": passage.get("id", file.name),  # names are not unique, ids are
        }  # fmt: skip


def rte_pairs(file: Path) -> Iterator[Row]:
    """The pairs of an RTE challenge: `t`, `h`, and `entailment`, which the first called `value`.

    Raises:
        ValueError: not well-formed.
    """
    try:
        tree = ElementTree.parse(file)
    except ElementTree.ParseError as error:
        raise ValueError(f"{file}: not XML, {error}") from None
    for pair in tree.iter("pair"):
        row = {**pair.attrib, **{child.tag: child.text for child in pair}}
        if "value" in row:
            row["entailment"] = row.pop("value")
        yield f"{file}: pair {pair.get('id')}", row


def parallel(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Files `<column><suffix>` beside the one given, of which line i makes row i.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: they differ in length.
    """
    files = [file.with_name(column + file.suffix) for column in columns]
    lines = [list(_lines(_existing(path))) for path in files]
    if len({*map(len, lines)}) != 1:
        counts = ", ".join(f"{path.name} {len(x)}" for path, x in zip(files, lines, strict=True))
        raise ValueError(f"{file.parent}: expected as many lines in each file, found {counts}")
    for number, cells in enumerate(zip(*lines, strict=True), 1):
        yield f"{file}:{number}", dict(zip(columns, cells, strict=True))


def dprd_groups(file: Path) -> Iterator[Row]:
    """Groups of five lines: a sentence, a pronoun, two candidates, the answer, and a blank one.

    A row has what is `left` and `right` of the pronoun, where it first occurs as a word, the
    `candidates`, and the `answer`, which is one of them.

    Raises:
        ValueError: a file that is not UTF-8.
    """
    lines = [line.strip() for line in "\n".join(_lines(file)).rstrip().split("\n")]
    for first in range(0, len(lines), 5):
        where = f"{file}:{first + 1}"
        sentence, pronoun, candidates, answer, blank = (lines[first : first + 5] + [""] * 5)[:5]
        parts = re.split(rf"(?<!\w){re.escape(pronoun)}(?!\w)", sentence, maxsplit=1)
        names = [name.strip() for name in candidates.split(",")]
        by_lower = {name.lower(): name for name in names}
        if not pronoun or len(parts) != 2 or answer.lower() not in by_lower or blank:
            expected = (
                "a sentence, a pronoun in it, candidates with commas, one of them, and a blank"
            )
            yield where, RowError(f"{where}: expected {expected}")
        else:
            yield where, {
                "left": parts[0].strip(), "right": parts[1].strip(), "candidates": names,
                "answer": by_lower[answer.lower()],
            }  # fmt: skip


def hub(split: str, name: str) -> Iterator[Row]:
    """A split of a Hugging Face data set, `NAME` or `NAME:CONFIG`.

    Raises:
        ImportError: `datasets` is absent.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"{name}: needs datasets, `pip install datasets`, or its files in --data-dir"
        ) from None
    path, _, config = name.partition(":")
    for number, row in enumerate(load_dataset(path, config or None, split=split)):
        yield f"{name} {split}, row {number}", row


SUFFIXES = {".tsv": tsv, ".csv": csv_table, ".jsonl": json_lines}


def by_suffix(file: Path) -> Iterator[Row]:
    """The rows of a `.tsv`, `.csv` or `.jsonl` file with named columns.

    Raises:
        ValueError: another suffix, or what the reader of this one raises.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: expected a name that ends in {', '.join(SUFFIXES)}")
    yield from SUFFIXES[file.suffix](file)


def _lines(file: Path) -> Iterator[str]:
    """The lines between \\n or \\r\\n only: a sentence may hold other line breaks of Unicode."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as text:
            for line in text:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8, {error}") from None


def _table(
    file: Path, records: Iterable[tuple[int, list[str]]], columns: Sequence[str], more: bool
) -> Iterator[Row]:
    for number, cells in records:
        if not any(cells):
            continue
        if not columns or (number == 1 and not {*columns}.isdisjoint(cells)):
            columns, more = cells, False
            continue
        where = f"{file}:{number}"
        if len(cells) < len(columns) or (len(cells) > len(columns) and not more):
            names = ", ".join(columns)
            yield (
                where,
                RowError(f"{where}: {len(cells)} cells, expected the {len(columns)} of {names}"),
            )
        else:
            yield where, dict(zip(columns, cells, strict=False))


def _json_object(where: str, text: str) -> Mapping[str, Any] | RowError:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError(f"{where}: not JSON, {error}")
    if not isinstance(row, dict):
        return RowError(f"{where}: {type(row).__name__}, expected a JSON object")
    return row


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file
