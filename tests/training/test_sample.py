"""Text from a model in training."""

import pytest
import torch

from gpt1_kernels import GPT1LMHeadModel
from tests.models import randomised, with_dropout
from training.sample import sample
from training.tokenizer import Tokenizer

TEXT = "the low, lower, lowest fence of the newest, widest row"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 60, at_most=True)


@pytest.fixture
def model(tokenizer):
    return randomised(GPT1LMHeadModel(with_dropout(vocab_size=tokenizer.vocab_size)))


def test_a_sample_begins_with_its_prompt_and_is_drawn_by_its_seed(model, tokenizer):
    first = sample(model, tokenizer, "the low", 20, seed=1)
    assert first.startswith("the low")
    assert sample(model, tokenizer, "the low", 20, seed=1) == first
    assert sample(model, tokenizer, "the low", 20, seed=2) != first


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.0}], ids=str)
def test_the_single_likeliest_token_is_the_argmax(model, tokenizer, option):
    ids = tokenizer.encode("the low").tolist()
    model.eval()
    for _ in range(5):
        logits = model(torch.tensor([ids], device=model.transformer.h[0].ln_1.weight.device)).logits
        ids.append(int(logits[0, -1].argmax()))
    assert sample(model, tokenizer, "the low", 5, **option) == tokenizer.decode(ids)


def test_a_sample_longer_than_the_model_sees_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="expected at most n_positions 32"):
        sample(model, tokenizer, TEXT, 40)


@pytest.mark.parametrize("prompt", ["", "語"], ids=["empty", "unknown"])
def test_a_prompt_without_a_known_character(model, tokenizer, prompt):
    assert sample(model, tokenizer, prompt, 5)


def test_a_sample_leaves_the_training_as_it_was(model, tokenizer):
    state, step = torch.get_rng_state(), int(model.dropout_stream.step)
    sample(model, tokenizer, "the", 3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.dropout_stream.step) == step
