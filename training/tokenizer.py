"""GPT-1's kind of BPE (`</w>` closes a word), trained on the text at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import ftfy
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

UNKNOWN, END_OF_WORD = "<unk>", "</w>"


def train_tokenizer(documents: Sequence[str], vocab_size: int, at_most: bool = False) -> Tokenizer:
    """A lower-casing BPE whose `tokenizer.json` opens in `transformers`' OpenAIGPTTokenizer.

    Args:
        vocab_size: number of entries: `<unk>` (id 0), the text's characters, and merges.
        at_most: accept a smaller vocabulary where the text supports no more.

    Raises:
        ValueError: the text cannot support so many entries, or has more characters than that.
    """
    text = [ftfy.fix_text(document) for document in documents]
    # The trainer gives closing characters ids in the random order of a hash table, and of equally
    # frequent merges it takes that of the lower ids. Named first, they have an order.
    alphabet = _train(text, 1, [UNKNOWN]).get_vocab()
    closing = sorted(entry for entry in alphabet if entry.endswith(END_OF_WORD))
    model = json.loads(_train(text, vocab_size, [UNKNOWN, *closing]).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = _tokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.add_special_tokens([UNKNOWN])
    size = tokenizer.get_vocab_size()
    if size > vocab_size:
        raise ValueError(f"--vocab-size: {vocab_size}, but the text's characters alone are {size}")
    if size < vocab_size and not at_most:
        raise ValueError(f"--vocab-size: {vocab_size}, but the text supports only {size} entries")
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """The tokens of all documents, one after the other: int32 (tokens,)."""
    paragraphs = [p for d in documents for p in ftfy.fix_text(d).split("\n")]
    encodings = tokenizer.encode_batch_fast(paragraphs, add_special_tokens=False)
    return np.concatenate([np.asarray(e.ids, dtype=np.int32) for e in encodings])


def _train(text: Sequence[str], vocab_size: int, first_entries: list[str]) -> Tokenizer:
    tokenizer = _tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=first_entries,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def _tokenizer(**model) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD, **model))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return tokenizer
