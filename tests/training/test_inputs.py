"""The four input transformations, and what they do with texts that are too long."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.examples import Example
from training.inputs import Specials, cut_longest, encode, layout
from training.tokenizer import Tokenizer

S, D, E = 100, 101, 102
SPECIALS = Specials.after(100)
A, B, C = [1, 2, 3], [4, 5], [6, 7, 8, 9]


@pytest.mark.parametrize(
    ("kind", "texts", "answers", "expected"),
    [
        ("classification", [A], [], [[S, *A, E]]),
        ("entailment", [A, B], [], [[S, *A, D, *B, E]]),
        ("similarity", [A, B], [], [[S, *A, D, *B, E], [S, *B, D, *A, E]]),
        ("choice", [A], [B, C], [[S, *A, D, *B, E], [S, *A, D, *C, E]]),
        ("choice", [A, B], [C], [[S, *A, *B, D, *C, E]]),
        ("choice", [A, B], [C, A, B], [[S, *A, *B, D, *x, E] for x in (C, A, B)]),
    ],
)
def test_the_layout_is_the_papers(kind, texts, answers, expected):
    assert (SPECIALS.start, SPECIALS.delimiter, SPECIALS.extract) == (S, D, E)
    for truncation in ("longest", "released"):
        assert layout(kind, texts, answers, SPECIALS, 32, truncation) == expected


@pytest.mark.parametrize("room", [7, 6, 5])
def test_both_orders_of_a_pair_are_the_same_input(room):
    """Also when a token must go and the two parts are of the same length."""
    one, other = [1, 2, 3, 4], [5, 6, 7, 8]
    there, back = (layout("similarity", x, [], SPECIALS, room + 3)
                   for x in ([one, other], [other, one]))  # fmt: skip
    assert there == back
    assert sorted(there[0]) == sorted(there[1])  # both orders hold the same tokens


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [
        ((3, 2), 5, (3, 2)),
        ((9, 2), 8, (6, 2)),  # only the longest
        ((9, 2), 4, (2, 2)),
        ((9, 2), 3, (1, 2)),  # of two alike the first
        ((9, 8, 2), 12, (5, 5, 2)),
        ((300, 10, 10), 50, (30, 10, 10)),
        ((5,), 2, (2,)),
    ],
)
def test_the_longest_part_is_cut_first(lengths, room, expected):
    parts = [list(range(length)) for length in lengths]
    assert cut_longest(parts, room) == [list(range(length)) for length in expected]


@given(st.lists(st.lists(st.integers(0, 9), max_size=40), min_size=1, max_size=4),
       st.integers(4, 60))  # fmt: skip
def test_a_cut_fills_the_room_and_no_part_falls_below_the_others(parts, room):
    cut = cut_longest(parts, room)
    assert sum(map(len, cut)) == min(room, sum(map(len, parts)))
    for part, kept in zip(parts, cut, strict=True):
        assert part[: len(kept)] == kept
        assert len(kept) == len(part) or len(kept) >= max(map(len, cut)) - 1


@pytest.mark.parametrize("n_positions", [6, 9, 14, 16])
@pytest.mark.parametrize("truncation", ["longest", "released"])
@pytest.mark.parametrize(
    ("kind", "n_texts", "n_answers"),
    [("classification", 1, 0), ("entailment", 2, 0), ("similarity", 2, 0), ("choice", 2, 3)],
)
def test_special_tokens_stay_and_the_sequence_fits(
    kind, n_texts, n_answers, truncation, n_positions
):
    texts, answers = [list(range(50))] * n_texts, [list(range(50, 90))] * n_answers
    delimiters = 0 if kind == "classification" else 1
    for sequence in layout(kind, texts, answers, SPECIALS, n_positions, truncation):
        assert (sequence[0], sequence[-1], sequence.count(D)) == (S, E, delimiters)
        assert len(sequence) <= n_positions
        if truncation == "longest":
            assert len(sequence) == n_positions


def test_the_released_rule_keeps_254_tokens_of_a_segment_at_512_positions():
    """n_ctx // 2 − 2, although the short answer leaves room; ours keeps 506."""
    story, answer = list(range(90)) * 7, [95, 96, 97]
    (released,) = layout("choice", [story], [answer], SPECIALS, 512, "released")
    assert released == [S, *story[:254], D, *answer, E]
    (ours,) = layout("choice", [story], [answer], SPECIALS, 512)
    assert ours == [S, *story[:506], D, *answer, E]
    (both,) = layout("choice", [story], [story], SPECIALS, 512, "released")
    assert len(both) == 2 * 254 + 3


def test_no_room_for_a_token_of_each_part_is_an_error():
    with pytest.raises(ValueError, match=r"room for 2 tokens .* at least one for each of 3 parts"):
        layout("choice", [A, B], [C], SPECIALS, 5)


def test_an_example_is_tokenised_with_specials_after_the_vocabulary():
    tokenizer = Tokenizer.train(["snow fell all day by night"], 60, at_most=True)
    v = tokenizer.vocab_size
    example = Example(("Snow fell",), ("by day", "by night"), label=1)
    encoded = encode(example, "choice", tokenizer, 64)
    ids = tokenizer.encode("snow fell").tolist()
    for sequence, answer in zip(encoded.sequences, example.answers, strict=True):
        expected = [v, *ids, v + 1, *tokenizer.encode(answer).tolist(), v + 2]
        assert sequence.dtype == np.int64
        assert sequence.tolist() == expected
    assert (encoded.label, encoded.length) == (1, max(map(len, encoded.sequences)))
