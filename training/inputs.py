"""The four input transformations of the paper's figure 1: an example → sequences of ids.

With s, $, e for the start, delimiter and extract tokens, which follow the vocabulary:

| kind | sequences |
|---|---|
| classification | s text e |
| entailment | s premise $ hypothesis e |
| similarity | s one $ other e, and s other $ one e |
| choice | for each answer: s context question $ answer e |

**Too long.** By default the longest part (text, premise, context, question, answer, …) loses its
end, down to the length of the next longest and so on, until the sequence fits. `released` is the
rule of openai/finetune-transformer-lm: what is left and what is right of the delimiter keep their
first n_positions // 2 − 2 tokens each, however short the other is. Special tokens always stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from training.examples import Example, Kind
from training.tokenizer import Tokenizer

Truncation = Literal["longest", "released"]
Ids = list[int]


@dataclass(frozen=True)
class Specials:
    """Ids of the special tokens, in the order of the released code."""

    start: int
    delimiter: int
    extract: int

    @classmethod
    def after(cls, vocab_size: int) -> Specials:
        """Those that follow a vocabulary."""
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


N_SPECIALS = 3


@dataclass(frozen=True, eq=False)
class Encoded:
    """The sequences of an example."""

    sequences: tuple[np.ndarray, ...]
    """int64 (tokens,) each, in the order of the table above."""
    label: int | float | None

    @property
    def length(self) -> int:
        """Of the longest sequence."""
        return max(map(len, self.sequences))


def encode(
    example: Example,
    kind: Kind,
    tokenizer: Tokenizer,
    n_positions: int,
    truncation: Truncation = "longest",
) -> Encoded:
    """Tokenises an example and lays out its sequences, none longer than n_positions.

    Raises:
        ValueError: n_positions has no room for a token of each part.
    """
    texts = [tokenizer.encode(text).tolist() for text in example.texts]
    answers = [tokenizer.encode(answer).tolist() for answer in example.answers]
    specials = Specials.after(tokenizer.vocab_size)
    sequences = layout(kind, texts, answers, specials, n_positions, truncation)
    return Encoded(tuple(np.array(s, dtype=np.int64) for s in sequences), example.label)


def layout(
    kind: Kind,
    texts: Sequence[Ids],
    answers: Sequence[Ids],
    specials: Specials,
    n_positions: int,
    truncation: Truncation = "longest",
) -> list[Ids]:
    """The sequences of an example whose parts are tokenised; see `encode`."""

    def fitted(*parts: Ids) -> list[Ids]:
        if truncation == "longest":
            return cut_longest(parts, n_positions - (2 if kind == "classification" else 3))
        *left, right = parts if kind != "classification" else (*parts, [])
        most = n_positions // 2 - 2
        return [list(chain(*left))[:most], right[:most]]

    def sequence(left: Sequence[Ids], right: Ids) -> Ids:
        return [specials.start, *chain(*left), specials.delimiter, *right, specials.extract]

    match kind:
        case "classification":
            return [[specials.start, *fitted(*texts)[0], specials.extract]]
        case "entailment":
            premise, hypothesis = fitted(*texts)
            return [sequence([premise], hypothesis)]
        case "similarity":
            # Sorted, so that both orders of the same pair are the same input, to the last bit.
            one, other = fitted(*sorted(texts))
            return [sequence([one], other), sequence([other], one)]
        case "choice":
            return [sequence(left, a) for *left, a in (fitted(*texts, a) for a in answers)]


def cut_longest(parts: Sequence[Ids], room: int) -> list[Ids]:
    """Takes tokens from the end of the longest part, of the first such, until all fit into room.

    Raises:
        ValueError: not even one token of each part fits.
    """
    if room < len(parts):
        raise ValueError(f"n_positions: room for {room} tokens beside the special ones, expected "
                         f"at least one for each of {len(parts)} parts")  # fmt: skip
    lengths = [len(part) for part in parts]
    while (excess := sum(lengths) - room) > 0:
        longest = max(range(len(parts)), key=lengths.__getitem__)
        others = [length for i, length in enumerate(lengths) if i != longest]
        lengths[longest] -= max(1, min(excess, lengths[longest] - max(others, default=0)))
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
