"""The tokenizer: what it learns, what it refuses, and the same ids from `transformers`."""

import json

import numpy as np
import pytest

from training.tokenizer import encode, train_tokenizer

TEXT = ["The low, lower, lowest fence.\nThe LOWEST newest fence!", "A wider, widest low fence."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 45)


def test_the_vocabulary_has_the_size_asked_for_and_unknown_first(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(45))
    assert vocabulary["<unk>"] == 0


def test_a_word_ends_in_its_suffix(tokenizer):
    assert tokenizer.encode("low fence").tokens == ["low</w>", "fence</w>"]
    assert tokenizer.encode("lower lowa").tokens == ["lower</w>", "lo", "w", "a</w>"]
    assert tokenizer.decode(tokenizer.encode("low fence").ids) == "low fence"


def test_text_is_lower_cased(tokenizer):
    assert tokenizer.encode("The LOWEST").ids == tokenizer.encode("the lowest").ids
    assert not [t for t in tokenizer.get_vocab() if t != t.lower()]


def test_a_character_never_seen_is_unknown(tokenizer):
    assert tokenizer.encode("語").ids == [0]


def test_documents_are_encoded_one_after_the_other(tokenizer):
    ids = encode(tokenizer, TEXT)
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(" ".join(TEXT)).ids


def test_mojibake_is_mended_before_learning_and_before_encoding():
    tokenizer = train_tokenizer(["naïve cliché naïve cliché"], 19)
    broken = "naïve".encode().decode("latin-1")
    assert encode(tokenizer, [broken]).tolist() == tokenizer.encode("naïve").ids
    assert train_tokenizer([broken], 99, at_most=True).get_vocab() == (
        train_tokenizer(["naïve"], 99, at_most=True).get_vocab()
    )


def test_an_empty_document_has_no_tokens(tokenizer):
    assert encode(tokenizer, [""]).tolist() == []


def test_two_trainings_are_alike(tokenizer):
    """`BpeTrainer` alone is not repeatable: its ids, and merges of one count, follow a hash."""
    for _ in range(5):
        assert train_tokenizer(TEXT, 45).to_str() == tokenizer.to_str()


def test_row31_a_vocabulary_smaller_than_the_alphabet_is_refused():
    with pytest.raises(ValueError, match=r"--vocab-size: 5, but the text's characters alone are"):
        train_tokenizer(TEXT, 5)


def test_row31_a_vocabulary_that_the_text_cannot_fill_is_refused_unless_at_most():
    with pytest.raises(ValueError, match=r"--vocab-size: 5000, but the text supports only (\d+)"):
        train_tokenizer(TEXT, 5000)
    size = train_tokenizer(TEXT, 5000, at_most=True).get_vocab_size()
    assert 45 < size < 5000
    assert train_tokenizer(TEXT, size).get_vocab_size() == size


@pytest.mark.parametrize("class_name", ["OpenAIGPTTokenizer", "AutoTokenizer"])
def test_transformers_opens_it_and_gives_the_same_ids(tokenizer, tmp_path, class_name):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openai-gpt"}))
    theirs = getattr(transformers, class_name).from_pretrained(tmp_path)
    text = "The newest FENCES, 語: lower — naïve?\n wide\tlow"
    ids = tokenizer.encode(text).ids
    assert 0 in ids
    assert theirs(text)["input_ids"] == ids
    assert theirs.convert_ids_to_tokens(ids) == tokenizer.encode(text).tokens
    assert len(theirs) == tokenizer.get_vocab_size()
