"""Stores of tokens: what is in them, when they are written, and what an interruption leaves."""

import gc
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from training import store
from training.data import Corpus
from training.store import TokenStore, tokenised, write
from training.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ["The first document.\n\n", "Its second piece."],
    ["The second — short."],
    ["\x07"],  # of which ftfy leaves nothing
    ["The last."],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["".join(d) for d in DOCUMENTS] + ["The file ends."], 40, at_most=True)


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"This is document {number}.")
    return Corpus([folder])


@pytest.fixture
def written(monkeypatch) -> list[Path]:
    """The folders that `write` was called for."""
    folders = []

    def counted(folder, *args):
        folders.append(folder)
        return write(folder, *args)

    monkeypatch.setattr(store, "write", counted)
    return folders


def test_a_store_holds_the_tokens_of_every_document(tokenizer, tmp_path):
    write(tmp_path / "store", DOCUMENTS, tokenizer)
    opened = TokenStore.open(tmp_path / "store")
    ids = [tokenizer.encode("".join(pieces)) for pieces in DOCUMENTS]
    np.testing.assert_array_equal(opened.tokens, np.concatenate(ids))
    np.testing.assert_array_equal(opened.bounds, np.cumsum([0, *map(len, ids)]))
    assert opened.bounds[2] == opened.bounds[3], "the document without tokens"
    assert opened.text_bytes == sum(len("".join(pieces).encode()) for pieces in DOCUMENTS)
    assert opened.fingerprint == tokenizer.fingerprint
    assert isinstance(opened.tokens, np.memmap)


@pytest.mark.parametrize(("size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_take_no_more_bytes_than_they_need(size, itemsize, tmp_path):
    class Numbers:
        """A tokenizer whose text is ids."""

        dtype = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
        fingerprint = "numbers"

        def encode_pieces(self, pieces):
            return (np.array(piece.split(), dtype=self.dtype) for piece in pieces)

    write(tmp_path / "store", [["0 1"], [f"{size - 1}"]], Numbers())
    opened = TokenStore.open(tmp_path / "store")
    assert opened.tokens.tolist() == [0, 1, size - 1]
    assert (tmp_path / "store" / "tokens.bin").stat().st_size == 3 * itemsize


def test_a_text_without_tokens_has_a_store(tokenizer, tmp_path):
    write(tmp_path / "store", [], tokenizer)
    assert len(TokenStore.open(tmp_path / "store").tokens) == 0


def test_tokens_are_written_once_for_the_same_content(corpus, tokenizer, tmp_path, written):
    first = tokenised(corpus.train, tokenizer, tmp_path / "cache")
    expected = [tokenizer.encode("".join(pieces)) for pieces in corpus.train]
    np.testing.assert_array_equal(first.tokens, np.concatenate(expected))
    tokenizer.save(tmp_path / "saved")
    again = Corpus([tmp_path / "text"])
    second = tokenised(again.train, Tokenizer.open(tmp_path / "saved"), tmp_path / "cache")
    np.testing.assert_array_equal(second.tokens, first.tokens)
    assert len(written) == 1


def test_other_content_has_another_store(corpus, tokenizer, tmp_path, written, monkeypatch):
    cache = tmp_path / "cache"
    tokenised(corpus.train, tokenizer, cache)
    tokenised(corpus.validation, tokenizer, cache)
    tokenised(corpus.train, Tokenizer.train(["The other texts."], 25, at_most=True), cache)
    (tmp_path / "text" / "0.txt").write_text("Something else.")
    changed = Corpus([tmp_path / "text"])
    tokenised(changed.train, tokenizer, cache)
    monkeypatch.setattr(Tokenizer, "versions", "ftfy 99")
    tokenised(changed.train, tokenizer, cache)
    monkeypatch.setattr(store, "FORMAT", "99")
    tokenised(changed.train, tokenizer, cache)
    assert len(written) == len(set(written)) == 6


def test_the_cache_is_where_the_argument_or_the_environment_says(
    corpus, tokenizer, tmp_path, written, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GPT1_KERNELS_CACHE", raising=False)
    tokenised(corpus.train, tokenizer)
    monkeypatch.setenv("GPT1_KERNELS_CACHE", "")
    tokenised(corpus.train, tokenizer)
    monkeypatch.setenv("GPT1_KERNELS_CACHE", str(tmp_path / "variable"))
    tokenised(corpus.train, tokenizer)
    tokenised(corpus.train, tokenizer, tmp_path / "argument")
    folders = ("home/.cache/gpt1_kernels", "variable", "argument")
    assert [folder.parents[1] for folder in written] == [tmp_path / name for name in folders]


def test_two_that_need_the_same_at_once_write_it_once(corpus, tokenizer, tmp_path, written):
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(tokenised(corpus.train, tokenizer, tmp_path / "cache"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert len({result.tokens.tobytes() for result in results}) == 1
    assert len(results) == 4


# Stands in for a part of a corpus, so that the process need not import torch.
SLOW_WRITER = """
import signal, sys, time
from pathlib import Path
from training.store import tokenised
from training.tokenizer import Tokenizer

class Part:
    digest, characters = "a part", None

    def __iter__(self):
        yield ["The first document."] * 10_000
        print("half", flush=True)
        time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
saved, cache = map(Path, sys.argv[1:])
tokenised(Part(), Tokenizer.open(saved), cache)
"""


class WholePart:
    digest, characters = "a part", None

    def __iter__(self):
        return iter([["The first document."] * 10_000, ["The last."]])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_process_leaves_no_half_written_store(how, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    cache = tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "saved"), str(cache)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout.readline() == "half\n"
        (partial,) = (cache / "tokens").glob("*.partial")
        process.send_signal(how)
        assert process.wait(timeout=60) != 0
    folder = partial.with_suffix("")
    assert not folder.exists()
    assert partial.exists() == (how == signal.SIGKILL)

    done = tokenised(WholePart(), tokenizer, cache)
    first, last = (tokenizer.encode(text) for text in ("The first document.", "The last."))
    np.testing.assert_array_equal(done.tokens, np.concatenate([np.tile(first, 10_000), last]))
    assert {path for path in (cache / "tokens").iterdir() if path.is_dir()} == {folder}


def test_a_failure_half_way_leaves_nothing(tokenizer, tmp_path):
    def failing() -> Iterator[list[str]]:
        yield DOCUMENTS[0]
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        write(tmp_path / "cache" / "store", failing(), tokenizer)
    assert not list((tmp_path / "cache").iterdir())


def test_all_has_reached_the_disk_when_a_store_takes_its_name(tokenizer, tmp_path, monkeypatch):
    folder, synced, opened = tmp_path / "store", [], []

    def noted(file: int) -> None:
        opened.append(file)
        synced.append((os.fstat(file).st_ino, folder.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    write(folder, DOCUMENTS, tokenizer)
    before = [(path.stat().st_ino, False) for path in (folder, *folder.iterdir())]
    assert sorted(synced[:-1]) == sorted(before)
    assert synced[-1] == (tmp_path.stat().st_ino, True)
    for file in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


@pytest.mark.parametrize("text", ["This is", "This is document 0, and more."])
def test_a_text_that_changes_while_it_is_read_has_no_store(text, corpus, tokenizer, tmp_path):
    for file in (tmp_path / "text").iterdir():
        file.write_text(text)
    with pytest.raises(ValueError, match=r"--data: \d+ characters, expected the \d+ of a moment"):
        tokenised(corpus.train, tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


@pytest.mark.parametrize("file", ["tokens.bin", "documents.bin"])
def test_a_file_that_lost_its_end_or_has_another_is_an_error(file, tokenizer, tmp_path):
    write(tmp_path / "store", DOCUMENTS, tokenizer)
    path = tmp_path / "store" / file
    content = path.read_bytes()
    for damaged in (content[:-1], content + content):
        path.write_bytes(damaged)
        expected = f"{file}: {len(damaged)} bytes, expected {len(content)}"
        with pytest.raises(ValueError, match=expected):
            TokenStore.open(tmp_path / "store")


def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path):
    def documents(count: int) -> Iterator[list[str]]:
        for _ in range(count):
            gc.collect()  # cycles that ftfy leaves
            yield ["The first document. The second. " * 500] * 4

    def peak(count: int) -> int:
        tracemalloc.start()
        write(tmp_path / str(count), documents(count), tokenizer)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)  # imports and caches
    gc.freeze()  # collections are quick then
    assert peak(32) < 1.2 * peak(4)
    assert (
        TokenStore.open(tmp_path / "32").text_bytes
        == 8 * TokenStore.open(tmp_path / "4").text_bytes
    )
