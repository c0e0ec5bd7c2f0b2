"""The fine-tuned model: against the oracle in fp64 and transformers, its folder, its errors."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from gpt1_kernels import GPT1DoubleHeadsModel, GPT1Model, GPT1TaskModel, reference
from gpt1_kernels.rng import keep_mask, keep_scale
from gpt1_kernels.task_model import HEAD_KEY
from tests.cases import DEVICE
from tests.models import T, config, randomised, tokens

DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.1)
HEADS = {"sum": ("classifier", 3), "choice": ("multiple_choice_head.summary", 1)}
EXTRACT = torch.tensor([T - 1, 5, 9, 12, 3, T - 1], device=DEVICE)


def task_model(head: str, num_labels: int = 3, **overrides) -> GPT1TaskModel:
    model = GPT1TaskModel(config(extra={HEAD_KEY: head}, num_labels=num_labels, **overrides))
    return randomised(model)


def oracle(model, ids, members, seeds, first_sequence, lm_targets, lm_weight):
    """lm_loss and logits in plain PyTorch and fp64, and the parameters they depend on."""
    parameters = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    backbone = {n.removeprefix("transformer."): p for n, p in parameters.items()}
    h = reference.hidden_states(
        backbone, model.config, ids, seeds, row_offset=first_sequence * ids.shape[1]
    )
    lm_loss = reference.cross_entropy(
        (h @ backbone["tokens_embed.weight"].t()).flatten(0, 1), lm_targets.flatten(),
        reduction="sum", token_weight=lm_weight.flatten().double(),
    )  # fmt: skip
    states = h[torch.arange(len(ids)), EXTRACT]
    name, _ = HEADS[model.head]
    if model.head == "sum":
        states = torch.stack([states[row].sum(0) for row in members])
    p, before = model.config.summary_first_dropout, first_sequence
    if seeds is not None and p:
        before = before // members.shape[1] if model.head == "sum" else before
        keep = keep_mask(seeds[-1], *states.shape, p, before)
        states = torch.where(keep, states * keep_scale(p), 0)
    outputs = states @ parameters[f"{name}.weight"].t() + parameters[f"{name}.bias"]
    if model.head == "choice":
        scores = outputs.squeeze(1)
        outputs = torch.stack([
            torch.stack([scores[i] if i >= 0 else scores[0] * 0 - torch.inf for i in row])
            for row in members
        ])  # fmt: skip
    return lm_loss, outputs, parameters


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("first_sequence", [0, 4])
@pytest.mark.parametrize(
    ("head", "members"),
    [
        ("sum", [[0], [1], [2], [3], [4], [5]]),  # classification, entailment
        ("sum", [[0, 1], [2, 3], [4, 5]]),  # similarity
        ("choice", [[0, 1, 2], [3, 4, 5]]),
        ("choice", [[0, -1, -1], [1, 2, -1], [3, 4, 5]]),  # varying numbers of answers
    ],
)
def test_losses_and_gradients_against_the_oracle(head, members, first_sequence, dropout):
    model = task_model(head, **dropout)
    ids, members = tokens(6, T), torch.tensor(members, device=DEVICE)
    labels = torch.zeros(len(members), dtype=torch.int64, device=DEVICE)
    targets, weight = ids.roll(-1, 1), torch.rand(6, T).to(DEVICE)
    targets[:, -1] = -100
    seeds = model.dropout_stream.seeds(2)
    drops = seeds if dropout else None

    expected_lm, expected, parameters = oracle(
        model, ids, members, drops, first_sequence, targets, weight
    )
    (cross_entropy(expected, labels) + 0.5 * expected_lm).backward()
    out = model(
        ids, EXTRACT, members, targets, weight, dropout_seeds=seeds, first_sequence=first_sequence
    )
    (cross_entropy(out.logits, labels) + 0.5 * out.lm_loss).backward()
    torch.testing.assert_close(out.logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.lm_loss.item() == pytest.approx(expected_lm.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        gradient = parameters[name].grad
        distance = (parameter.grad - gradient).norm()
        assert distance <= 1e-5 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("head", HEADS)
def test_row10_without_a_target_the_language_model_has_no_loss(head):
    model, ids = task_model(head), tokens(6, T)
    members = torch.arange(6, device=DEVICE).view(3, 2)
    targets, weight = torch.full_like(ids, -100), torch.ones(6, T, device=DEVICE)
    loss = model(ids, EXTRACT, members, targets, weight).lm_loss
    loss.backward()
    assert loss == 0
    assert not model.transformer.tokens_embed.weight.grad.any()


@pytest.mark.parametrize("head", HEADS)
def test_row19_activation_checkpointing_changes_no_gradient(head):
    ids, members = tokens(6, T), torch.arange(6, device=DEVICE).view(3, 2)
    model = task_model(head, **DROPOUT)
    seeds, gradients = model.dropout_stream.seeds(0), []
    for _ in range(2):
        model.zero_grad()
        out = model(ids, EXTRACT, members, ids, torch.ones(6, T, device=DEVICE),
                    dropout_seeds=seeds)  # fmt: skip
        (out.logits.square().sum() + out.lm_loss).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()
    assert all(map(torch.equal, *gradients))


def test_both_orders_of_a_pair_score_the_same_to_the_last_bit():
    model = task_model("sum", num_labels=1).eval()
    ids = tokens(6, T)
    pairs = torch.arange(6, device=DEVICE).view(3, 2)
    scores = model(ids, EXTRACT, pairs).logits
    assert torch.equal(scores, model(ids, EXTRACT, pairs.flip(1)).logits)
    assert not torch.equal(scores[0], scores[1])


def test_choice_is_the_double_heads_model_and_opens_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = task_model("choice").eval()
    model.save_pretrained(tmp_path)
    ids, members = tokens(6, T), torch.arange(6, device=DEVICE).view(2, 3)
    scores = model(ids, EXTRACT, members).logits
    ours = GPT1DoubleHeadsModel.from_pretrained(tmp_path).to(DEVICE)
    shaped = {"input_ids": ids.view(2, 3, T), "mc_token_ids": EXTRACT.view(2, 3)}
    assert torch.equal(ours(**shaped).mc_logits, scores)
    theirs = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(tmp_path).to(DEVICE)
    torch.testing.assert_close(theirs(**shaped).mc_logits, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("members", [[[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3], [4, 5]]])
def test_a_classifier_is_a_backbone_of_transformers_and_a_linear_layer(tmp_path, members):
    transformers = pytest.importorskip("transformers")
    model = task_model("sum").eval()
    model.save_pretrained(tmp_path)
    theirs, info = transformers.OpenAIGPTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    head = load_file(tmp_path / "model.safetensors", device=DEVICE)
    ids, members = tokens(6, T), torch.tensor(members, device=DEVICE)
    states = theirs.to(DEVICE)(ids).last_hidden_state[torch.arange(6), EXTRACT]
    scores = states[members].sum(1) @ head["classifier.weight"].T + head["classifier.bias"]
    expected = model(ids, EXTRACT, members).logits
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_folder_gives_the_model_back_and_its_backbone(tmp_path, head):
    model = task_model(head).eval()
    model.save_pretrained(tmp_path)
    opened = GPT1TaskModel.from_pretrained(tmp_path)
    assert (opened.head, opened.config.num_labels) == (head, HEADS[head][1])
    assert opened.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value.cpu()), name
    backbone = GPT1Model.from_pretrained(tmp_path).state_dict()
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(backbone[name], value.cpu()), name
    name, outputs = HEADS[head]
    assert opened.get_parameter(f"{name}.weight").shape[0] == outputs


def test_the_head_is_drawn_as_the_paper_draws_weights():
    model = GPT1TaskModel(config(n_embd=192, num_labels=40))
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.classifier.bias, torch.zeros(40))


@pytest.mark.parametrize("head", HEADS)
def test_the_classifier_drops_in_training_only_and_by_its_own_site(head):
    model = task_model(head, summary_first_dropout=0.5)
    ids, members = tokens(6, T), torch.arange(6, device=DEVICE).view(3, 2)
    first, again, other = (
        model(ids, EXTRACT, members, dropout_seeds=model.dropout_stream.seeds(step)).logits
        for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(model(ids, EXTRACT, members).logits, model(ids, EXTRACT, members).logits)
    model.eval()
    assert torch.equal(model(ids, EXTRACT, members).logits, model(ids, EXTRACT, members).logits)


@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_and_a_tuple_are_returned_on_request(head):
    model, ids = task_model(head), tokens(6, T)
    members = torch.arange(6, device=DEVICE).view(3, 2)
    logits, states = model(ids, EXTRACT, members, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(states, model.transformer(ids, output_hidden_states=True)[1])
    assert torch.equal(logits, model(ids, EXTRACT, members).logits)


def test_a_choice_dropout_set_after_construction_drops():
    model, ids = task_model("choice"), tokens(6, T)
    members = torch.arange(6, device=DEVICE).view(3, 2)
    model.multiple_choice_head.dropout_p = 0.5
    assert not torch.equal(model(ids, EXTRACT, members).logits, model(ids, EXTRACT, members).logits)


def test_an_unknown_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task_head: 'tail', expected 'sum' or 'choice'"):
        GPT1TaskModel(config(extra={HEAD_KEY: "tail"}))
    task_model("sum").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_labels": 5}))
    with pytest.raises(ValueError, match=r"classifier\.\w+: shape .*, expected .*5"):
        GPT1TaskModel.from_pretrained(tmp_path)
