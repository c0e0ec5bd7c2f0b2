"""GPT-1's BPE (`</w>` closes a word): OpenAI's vocabulary, a saved one, or one trained on a text.

Two styles turn text into words; the BPE behind them is the same. Both fix the text with ftfy first.

- `hf`: the ids of transformers' OpenAIGPTTokenizer. BERT's normaliser (lower case, no accents) and
  punctuation rules; white space, newlines included, leaves no token.
- `openai`: the ids of the code released with the paper (`text_utils.py` of
  openai/finetune-transformer-lm): its clean-up, spaCy's English tokenizer, lower case; a run of
  white space with a newline in it becomes the token of `\\n`. Needs spaCy, whose
  rules are those of the version installed, not those of 2018. spaCy is given what stands between
  two spaces at a time: over a whole text, spaCy 3 lets a special case that it finds across a space
  (`' '` for `''`) hide one beside it, which changed 1 word in 100 novels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Literal

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

Style = Literal["hf", "openai"]

UNKNOWN, END_OF_WORD, NEWLINE = "<unk>", "</w>", "\n</w>"
FILES = (("encoder_bpe_40000.json", "vocab_40000.bpe"), ("vocab.json", "merges.txt"))
NORMALIZER = normalizers.BertNormalizer(lowercase=True)
PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()
LONGEST = 1000  # characters of a word to learn from, as the trainer's time grows with the square
MOST_REPEATS = 2**16
MOST_CHUNKS = 2**19  # whose ids are remembered, in some 150 MB

DASHES_AND_MARKS = str.maketrans(
    {
        "\N{EM DASH}": "-",
        "\N{EN DASH}": "-",
        "\N{HORIZONTAL BAR}": "-",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{ACUTE ACCENT}": "'",
    }
)
# No backslash: in the released pattern, not a raw string, it turned into a second plus sign.
PUNCTUATION = re.compile(r"-+|~+|!+|\"+|;+|\?+|\++|,+|\)+|\(+|/+|\*+|\[+|\]+|\}+|\{+|\|+|_+")
NEWLINES, SPACES = re.compile(r"\s*\n\s*"), re.compile(r"[^\S\n]+")


class Tokenizer:
    """Text → ids → text. Made by `open` or `train`.

    In both styles a text falls into chunks between spaces and newlines, and the ids of a chunk do
    not depend on its neighbours: they are found once and looked up from then on.
    """

    def __init__(self, pipeline: tokenizers.Tokenizer, style: Style = "hf"):
        """
        Args:
            pipeline: as `_pipeline` builds it.

        Raises:
            ImportError: style openai without spaCy.
            ValueError: no such style.
        """
        self.style = style
        self._pipeline = pipeline
        self._bpe = tokenizers.Tokenizer(pipeline.model)  # for text already split into words
        self._words = _words(style)
        self._ids: dict[str, list[int]] = {}

    @classmethod
    def open(cls, path: str | Path, style: Style | None = None) -> Tokenizer:
        """Opens a `tokenizer.json`, or a folder that `save` wrote or that has OpenAI's two files.

        Args:
            path: the file, or a folder with `tokenizer.json`, with `encoder_bpe_40000.json` and
                `vocab_40000.bpe`, or with the same under transformers' names, `vocab.json` and
                `merges.txt`.
            style: default: the style it was saved with, and hf where nothing says so.

        Raises:
            FileNotFoundError: none of these is there.
            ValueError: not a vocabulary of this kind, or one saved with another style.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            saved = _saved_style(file.with_name("tokenizer_config.json"))
            if style and saved and style != saved:
                raise ValueError(f"{path}: saved with style {saved}, but {style} was asked for")
            return cls(_read_pipeline(file), style or saved or "hf")
        for names in FILES:
            vocab, merges = (path / name for name in names)
            if vocab.is_file() and merges.is_file():
                return cls(_read_files(vocab, merges), style or "hf")
        raise FileNotFoundError(
            f"{path}: expected a tokenizer.json, or a folder with one or with "
            + " or ".join(" and ".join(names) for names in FILES)
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        style: Style = "hf",
        at_most: bool = False,
    ) -> Tokenizer:
        """Counts the words of the texts, one text at a time, and learns the merges.

        The same texts always give the same vocabulary.

        Args:
            vocab_size: number of entries: `<unk>` (id 0), the texts' characters, the merges and, in
                style openai, the newline.
            at_most: accept a smaller vocabulary where the texts support no more.

        Raises:
            ValueError: the texts cannot support so many entries, or have more characters than that.
        """
        words, newline = _words(style), [NEWLINE] if style == "openai" else []
        counts, chunks = Counter(), Counter()
        for text in tqdm(texts, desc="counting words", unit="text", delay=1, leave=False):
            chunks.update(_chunks(ftfy.fix_text(text), style))
            if len(chunks) > MOST_CHUNKS:
                _add(counts, chunks, words)
        _add(counts, chunks, words)
        # Given in order: the trainer's own order of them, and so its merges, vary between runs.
        endings = sorted({word[-1] + END_OF_WORD for word in counts})
        learner = tokenizers.Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
        learner.train_from_iterator(
            _repeated(counts),
            trainers.BpeTrainer(
                vocab_size=max(vocab_size - len(newline), 0),
                special_tokens=[UNKNOWN, *endings],
                end_of_word_suffix=END_OF_WORD,
                show_progress=False,
            ),
        )
        model = _model(learner)
        vocab = model["vocab"] | {entry: len(model["vocab"]) for entry in newline}
        size, merges = len(vocab), len(model["merges"])
        if size > vocab_size:
            raise ValueError(
                f"--vocab-size: {vocab_size}, but the text's characters alone are {size}"
            )
        if size < vocab_size and not at_most:
            raise ValueError(
                f"--vocab-size: {vocab_size}, but the text supports only {size} entries "
                f"({merges} merges)"
            )
        return cls(_pipeline(vocab, [tuple(pair) for pair in model["merges"]]), style)

    @property
    def vocab_size(self) -> int:
        return self._pipeline.get_vocab_size()

    @property
    def dtype(self) -> np.dtype:
        """Of ids: the smallest of uint16 and uint32 that holds them all."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the style, the vocabulary and the merges, in hexadecimal digits."""
        model = _model(self._pipeline)
        parts = [self.style, model["vocab"], model["merges"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def versions(self) -> str:
        """Of the libraries whose rules decide on the ids, beside vocabulary and style."""
        names = ["ftfy", "tokenizers", *(["spacy"] if self.style == "openai" else [])]
        return " ".join(f"{name} {version(name)}" for name in names)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: (tokens,) of `dtype`."""
        return self._encode_fixed(ftfy.fix_text(text).strip())

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of a text that comes in pieces, cut before a line or a word: as of the whole.

        The text has no white space at its ends. ftfy sees a piece at a time, so a `<` keeps it from
        replacing HTML entities in the rest of the piece only.
        """
        for piece in pieces:
            yield self._encode_fixed(ftfy.fix_text(piece))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The words of the ids, lower-cased, with a space between each two."""
        return self._pipeline.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `open` and transformers read.

        The style is an entry of the latter. transformers does not know of it: there, a tokenizer of
        either style encodes in style hf, and ftfy is the caller's. `vocab.json` and `merges.txt`
        hold the same vocabulary in the format of OpenAI's two files, for readers of those.

        Raises:
            OSError: it cannot be written; names the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._pipeline.save(str(folder / "tokenizer.json"))
            self._pipeline.model.save(str(folder))
        except Exception as error:  # tokenizers knows no other
            raise OSError(f"{folder}: the tokenizer could not be written, {error}") from None
        config = {
            "tokenizer_class": "OpenAIGPTTokenizer",
            "unk_token": UNKNOWN,
            "style": self.style,
        }
        text = json.dumps(config, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _encode_fixed(self, text: str) -> np.ndarray:
        chunks = _chunks(text, self.style)
        if len(self._ids) > MOST_CHUNKS:
            self._ids.clear()
        new = [chunk for chunk in set(chunks) if chunk not in self._ids]
        if self.style == "hf":  # which finds <unk> in a text too
            encodings = self._pipeline.encode_batch_fast(new, add_special_tokens=False)
        else:
            encodings = self._bpe.encode_batch_fast(self._words(new), is_pretokenized=True)
        self._ids.update(zip(new, (e.ids for e in encodings), strict=True))
        ids = chain.from_iterable(map(self._ids.__getitem__, chunks))
        return np.fromiter(ids, dtype=self.dtype)


def _chunks(text: str, style: Style) -> list[str]:
    """What stands between spaces and newlines; in style openai newlines too, after the clean-up."""
    if style == "hf":
        text = text.replace("\n", " ")
    else:
        text = PUNCTUATION.sub(r" \g<0> ", text.translate(DASHES_AND_MARKS))
        text = SPACES.sub(" ", NEWLINES.sub(" \n ", text))
    return text.split(" ")


def _words(style: Style) -> Callable[[Sequence[str]], list[list[str]]]:
    """A function from chunks to the words of each, lower-cased."""
    if style not in ("hf", "openai"):
        raise ValueError(f"style: {style}, expected hf or openai")
    if style == "hf":
        normalise, split = NORMALIZER.normalize_str, PRE_TOKENIZER.pre_tokenize_str
        return lambda chunks: [[word for word, _ in split(normalise(chunk))] for chunk in chunks]
    try:
        import spacy
    except ImportError:
        raise ImportError(
            "style openai needs spaCy, `pip install spacy`; style hf does not"
        ) from None
    language = spacy.blank("en")

    def words(chunks: Sequence[str]) -> list[list[str]]:
        with language.memory_zone():  # or it would remember every word that it has ever seen
            return [[word.text.lower() for word in language.tokenizer(chunk)] for chunk in chunks]

    return words


def _add(counts: Counter, chunks: Counter, words: Callable) -> None:
    """Moves the counts of chunks to those of their words, or of pieces of the longest."""
    for found, count in zip(words(list(chunks)), chunks.values(), strict=True):
        for word in found:
            if word != "\n":
                for start in range(0, len(word), LONGEST):
                    counts[word[start : start + LONGEST]] += count
    chunks.clear()


def _repeated(counts: Counter) -> Iterator[str]:
    """Every word as often as it was counted: a trainer takes text, not counts."""
    for word, count in counts.items():
        for start in range(0, count, MOST_REPEATS):
            yield f"{word} " * min(MOST_REPEATS, count - start)


def _pipeline(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """As transformers' OpenAIGPTTokenizer builds it."""
    pipeline = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=UNKNOWN,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
        )
    )
    pipeline.normalizer, pipeline.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    pipeline.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    pipeline.add_special_tokens([UNKNOWN])
    return pipeline


def _model(pipeline: tokenizers.Tokenizer) -> dict:
    return json.loads(pipeline.to_str())["model"]


def _read_pipeline(file: Path) -> tokenizers.Tokenizer:
    """Rebuilds the pipeline from vocabulary and merges, and refuses a file with another one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model = content["model"]
        vocab = model["vocab"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        added = {token["content"] for token in content["added_tokens"]}
        found = content["normalizer"], content["pre_tokenizer"], model["end_of_word_suffix"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the tokenizer.json of a BPE ({error!r})") from None
    ours = json.loads(_pipeline({UNKNOWN: 0}, []).to_str())
    expected = ours["normalizer"], ours["pre_tokenizer"], END_OF_WORD
    if found != expected:
        raise ValueError(f"{file}: {found}, expected GPT-1's {expected}")
    if not added <= {UNKNOWN}:
        raise ValueError(f"{file}: has added tokens {sorted(added)}, expected {UNKNOWN} alone")
    return _checked(file, vocab, file, merges)


def _read_files(vocab_file: Path, merges_file: Path) -> tokenizers.Tokenizer:
    try:
        vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{vocab_file}: not JSON ({error})") from None
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges_file}: not UTF-8, {error}") from None
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return _checked(vocab_file, vocab, merges_file, merges)


def _checked(
    vocab_file: Path, vocab: dict[str, int], merges_file: Path, merges: list
) -> tokenizers.Tokenizer:
    has_ids = isinstance(vocab, dict) and all(isinstance(i, int) for i in vocab.values())
    if not has_ids or set(vocab.values()) != set(range(len(vocab))) or UNKNOWN not in vocab:
        raise ValueError(
            f"{vocab_file}: expected the ids 0, 1, 2, … of a vocabulary with {UNKNOWN}"
        )
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(
                f"{merges_file}: the merge {' '.join(pair)!r} is not one of the vocabulary's"
            )
    return _pipeline(vocab, merges)


def _saved_style(config: Path) -> Style | None:
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("style")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: not a JSON object ({error})") from None
