"""Against `transformers`' OpenAIGPT models with random weights, fp32, without dropout."""

import pytest
import torch

from gpt1_kernels import (
    GPT1DoubleHeadsModel,
    GPT1ForSequenceClassification,
    GPT1LMHeadModel,
    GPT1Model,
)
from tests.models import T, V, config, randomised, tokens

transformers = pytest.importorskip("transformers")

RELATIVE = 1e-5
NOISE = 1e-7  # of a gradient that is 0 in exact arithmetic, such as a choice's bias


def both(ours_class, theirs_class, tmp_path, **overrides):
    """A model and its twin, opened from the folder that ours wrote; both in training."""
    ours = randomised(ours_class(config(**overrides)))
    ours.save_pretrained(tmp_path)
    theirs = theirs_class.from_pretrained(tmp_path, attn_implementation="eager")
    return ours, theirs.to(ours.transformer.tokens_embed.weight.device).train()


def assert_near(name, actual, expected):
    distance = (actual - expected).norm()
    assert distance <= RELATIVE * expected.norm() + NOISE, f"{name}: {distance:.1e}"


def assert_same_gradients(ours, theirs, loss, their_loss):
    loss.backward()
    their_loss.backward()
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        assert_near(name, parameter.grad, expected[name].grad)
        compared += 1
    assert compared == len([p for p in expected.values() if p.grad is not None])


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"token_type_ids": tokens(3, T)},
        {"position_ids": torch.arange(T).flip(0)},
        {"attention_mask": torch.ones(3, T)},
    ],
    ids=lambda x: "-".join(x) or "plain",
)
def test_language_model(tmp_path, inputs):
    ours, theirs = both(GPT1LMHeadModel, transformers.OpenAIGPTLMHeadModel, tmp_path)
    ids = tokens(3, T)
    labels = ids.clone()
    labels[:, :4] = -100
    inputs = {k: x.to(ids.device) for k, x in inputs.items()}
    a = ours(ids, labels=labels, return_logits=True, output_hidden_states=True, **inputs)
    b = theirs(ids, labels=labels, output_hidden_states=True, **inputs)
    assert_near("logits", a.logits, b.logits)
    assert_near("loss", a.loss, b.loss)
    assert len(a.hidden_states) == len(b.hidden_states) == 3
    for ours_state, their_state in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_near("hidden_states", ours_state, their_state)
    assert_same_gradients(ours, theirs, a.loss, b.loss)


def test_double_heads(tmp_path):
    ours, theirs = both(GPT1DoubleHeadsModel, transformers.OpenAIGPTDoubleHeadsModel, tmp_path)
    ids = tokens(3, 2, T)
    mc_token_ids = torch.tensor([[T - 1, 5], [3, 4], [0, T - 1]], device=ids.device)
    inputs = {
        "mc_token_ids": mc_token_ids,
        "labels": ids,
        "mc_labels": torch.tensor([0, 1, 1], device=ids.device),
    }
    a, b = ours(ids, return_logits=True, **inputs), theirs(ids, **inputs)
    for name in ("logits", "mc_logits", "loss", "mc_loss"):
        assert_near(name, getattr(a, name), getattr(b, name))
    assert_same_gradients(ours, theirs, a.loss + 0.5 * a.mc_loss, b.loss + 0.5 * b.mc_loss)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem_type"),
    [
        (3, torch.tensor([0, 2, 1]), None),
        (1, torch.tensor([0.5, -1.0, 2.0]), None),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0]]), "multi_label_classification"),
    ],
    ids=["classes", "regression", "multi-label"],
)
def test_sequence_classification(tmp_path, num_labels, labels, problem_type):
    ours, theirs = both(
        GPT1ForSequenceClassification,
        transformers.OpenAIGPTForSequenceClassification,
        tmp_path,
        num_labels=num_labels,
        problem_type=problem_type,
        pad_token_id=0,
    )
    ids = tokens(3, T)
    ids[0, 10:] = 0
    ids[1, -1:] = 0
    labels = labels.to(ids.device)
    a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert a.logits.shape == (3, num_labels)
    assert_near("logits", a.logits, b.logits)
    assert_near("loss", a.loss, b.loss)
    assert_same_gradients(ours, theirs, a.loss, b.loss)


@pytest.mark.parametrize(
    ("ours_class", "theirs_name", "shape"),
    [
        (GPT1Model, "OpenAIGPTModel", (2, T)),
        (GPT1LMHeadModel, "OpenAIGPTLMHeadModel", (2, T)),
        (GPT1DoubleHeadsModel, "OpenAIGPTDoubleHeadsModel", (2, 3, T)),
    ],
)
def test_their_folders_open_here(tmp_path, ours_class, theirs_name, shape):
    c = config()
    theirs = getattr(transformers, theirs_name)(
        transformers.OpenAIGPTConfig(
            vocab_size=V, n_positions=32, n_embd=48, n_layer=2, n_head=4, a_key_of_theirs=3
        )
    )
    theirs = randomised(theirs).eval()
    theirs.save_pretrained(tmp_path)
    ours = ours_class.from_pretrained(tmp_path).to(theirs.device)
    assert (ours.config.n_embd, ours.config.extra["a_key_of_theirs"]) == (c.n_embd, 3)
    ids = tokens(*shape)
    with torch.no_grad():
        for a, b in zip(ours(ids).to_tuple(), theirs(ids).to_tuple(), strict=True):
            assert_near(theirs_name, a, b)


def test_our_folder_keeps_their_keys(tmp_path):
    transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=V, n_embd=48, n_layer=1, n_head=4, hello="world")
    ).save_pretrained(tmp_path / "theirs")
    GPT1LMHeadModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").hello == "world"
    assert isinstance(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"),
        transformers.OpenAIGPTLMHeadModel,
    )
