"""GPT-1's kind of BPE (`</w>` closes a word), trained on the text at hand."""

from __future__ import annotations

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
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(ftfy.fix_text, documents), trainer)
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
