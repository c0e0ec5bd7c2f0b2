"""The models: dropout against the oracle, padding, checkpointing, arguments, errors."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import prune

import gpt1_kernels.model
from gpt1_kernels import (
    GPT1DoubleHeadsModel,
    GPT1ForSequenceClassification,
    GPT1LMHeadModel,
    GPT1Model,
    reference,
    use_backend,
)
from gpt1_kernels.cache import KeyValueCache
from gpt1_kernels.rng import keep_mask
from gpt1_kernels.weight_cast import cast_once
from tests.cases import DEVICE, assert_same, backends_of
from tests.models import T, V, config, randomised, tokens, with_dropout

MODELS = [GPT1Model, GPT1LMHeadModel, GPT1DoubleHeadsModel, GPT1ForSequenceClassification]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(actual, expected):
    return float((actual - expected).detach().norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("row_offset", [0, 7 * T])
@pytest.mark.parametrize(
    "model_config",
    [config(layer_norm_epsilon=0.1), with_dropout()],
    ids=["plain", "dropout"],
)
def test_language_model_against_the_oracle_in_fp64(model_config, row_offset):
    model, ids = randomised(GPT1LMHeadModel(model_config)), tokens(3, T)
    seeds = model.dropout_stream.seeds(5)
    parameters = {
        name.removeprefix("transformer."): p.detach().double().requires_grad_()
        for name, p in model.named_parameters()
    }
    drops = seeds if model.transformer.drops else None
    expected = reference.language_model_loss(parameters, model_config, ids, drops, row_offset)
    expected.backward()
    loss = model(ids, labels=ids, dropout_seeds=seeds, row_offset=row_offset).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        assert relative(gradient, parameters[name.removeprefix("transformer.")].grad) < 1e-5, name


@pytest.mark.parametrize("pad", [(4, 0), (0, 4)], ids=["left", "right"])
def test_row09_a_padded_batch_has_the_loss_of_the_sequences_alone(pad):
    model, ids = randomised(GPT1LMHeadModel(config())), tokens(2, T - 4)
    padded = torch.nn.functional.pad(ids, pad)
    mask = (padded > 0).long()  # no token is 0
    losses = (
        model(ids, labels=ids).loss,
        model(padded, mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), labels=padded).loss,
    )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(x, [*model.parameters()]) for x in losses))


def test_positions_may_be_those_of_one_row_and_fill_the_table():
    model, ids = randomised(GPT1Model(config(n_positions=T))).eval(), tokens(2, T)
    positions = torch.arange(T, device=DEVICE).flip(0)
    expected = model(ids, position_ids=positions.expand(2, T)).last_hidden_state
    for shape in ((T,), (1, T)):
        actual = model(ids, position_ids=positions.view(shape)).last_hidden_state
        assert torch.equal(actual, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU asserts")
def test_a_position_out_of_range_beside_embeddings_raises():
    model = randomised(GPT1Model(config()))
    embeddings = torch.zeros(1, 2, model.config.n_embd)
    with pytest.raises(IndexError):
        model(inputs_embeds=embeddings, position_ids=torch.tensor([0, -1]))


def test_each_forward_in_training_draws_new_bits_and_evaluation_none():
    model, ids = randomised(GPT1LMHeadModel(with_dropout())), tokens(2, T)
    losses = {model(ids, labels=ids).loss.item() for _ in range(3)}
    assert len(losses) == 3
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert int(model.dropout_stream.step) == 3
    seeds = model.dropout_stream.seeds(0)
    assert torch.equal(model(ids, dropout_seeds=seeds).logits, model(ids).logits)


@pytest.mark.parametrize("site", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_draws_without_the_others(site):
    model, ids = randomised(GPT1Model(config(**{site: 0.5}))), tokens(2, T)
    one, again, other = (
        model(ids, dropout_seeds=model.dropout_stream.seeds(step)).last_hidden_state
        for step in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


def test_micro_batches_draw_what_the_whole_batch_draws():
    model, ids = randomised(GPT1LMHeadModel(with_dropout())), tokens(4, T)
    seeds = model.dropout_stream.seeds(0)
    with torch.no_grad():
        whole = model(ids, dropout_seeds=seeds).logits
        parts = [
            model(ids[i : i + 2], dropout_seeds=seeds, row_offset=i * T).logits for i in (0, 2)
        ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("autocast", [False, True])
def test_row19_checkpointing_changes_no_gradient(autocast, name):
    model, ids = randomised(GPT1LMHeadModel(with_dropout())), tokens(2, T)
    seeds = model.dropout_stream.seeds(3)

    def run():
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, dropout_seeds=seeds).loss
        loss.backward()
        return loss, gradients(model)

    loss, expected = run()
    getattr(model, f"{name}_enable")()
    again, actual = run()
    assert torch.equal(loss, again)
    assert_same(actual, expected)
    getattr(model, f"{name}_disable")()
    assert not model.transformer.gradient_checkpointing


class NoisyAdapter(torch.nn.Module):
    """As LoRA's, with its own dropout."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.extra = torch.nn.Linear(*base.weight.shape)

    def forward(self, x):
        return self.base(x) + self.extra(torch.nn.functional.dropout(x))


def adapt(block):
    block.attn.c_attn = NoisyAdapter(block.attn.c_attn)


def hook(block):
    block.mlp.c_fc.register_forward_hook(lambda *args: torch.nn.functional.dropout(args[-1]))


def replace_forward(block):
    """As accelerate does."""
    forward = block.mlp.c_fc.forward
    block.mlp.c_fc.forward = lambda x: torch.nn.functional.dropout(forward(x))


def set_dropout(block):
    block.ln_1.dropout_p = 0.5


@pytest.mark.parametrize(
    ("shape", "add"),
    [
        (with_dropout(), adapt),
        (with_dropout(), hook),
        (with_dropout(), replace_forward),
        pytest.param(config(), set_dropout, id="set_dropout-where-the-configuration-has-none"),
    ],
)
def test_row19_checkpointing_keeps_the_mask_of_what_was_added(shape, add):
    """It drew another mask when it was recomputed."""
    model, ids = randomised(GPT1LMHeadModel(shape)), tokens(2, T)
    for block in model.transformer.h:
        add(block)
    model.to(DEVICE)

    def run():
        model.zero_grad()
        torch.manual_seed(5)
        model.dropout_stream.set_key(5)
        model(ids, labels=ids).loss.backward()
        return gradients(model)

    expected = run()
    model.gradient_checkpointing_enable()
    assert_same(run(), expected)


class Wrapped(torch.nn.Module):
    """As others' code wraps a block, to read or to change what it returns."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return self.block(*args)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_blocks_may_be_wrapped(p, monkeypatch):
    """The model reads what its blocks drop where they show it, and not in evaluation."""
    model = randomised(GPT1LMHeadModel(with_dropout(embd_pdrop=0.0, attn_pdrop=p)))
    ids = tokens(2, T)

    def outputs():
        model.dropout_stream.set_key(5)
        return model.train()(ids).logits, model.eval()(ids).logits

    expected = outputs()
    monkeypatch.setattr(gpt1_kernels.model, "draws_ahead", lambda seed: True)
    model.transformer.h = torch.nn.ModuleList(map(Wrapped, model.transformer.h))
    for actual, other in zip(outputs(), expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("side", ["left", "right"])
def test_row08_padding_never_reaches_a_real_token(side):
    model, ids = randomised(GPT1LMHeadModel(config())).eval(), tokens(2, T)
    pad = 5
    mask = torch.ones(2, T, dtype=torch.int64, device=DEVICE)
    real = slice(pad, None) if side == "left" else slice(None, T - pad)
    mask[1] = 0
    mask[1, real] = 1
    embeds = model.transformer.tokens_embed.weight[ids].detach()
    poisoned = torch.where(mask[..., None] == 1, embeds, torch.nan)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(
        inputs_embeds=poisoned.requires_grad_(), attention_mask=mask, position_ids=positions
    ).logits
    with torch.no_grad():
        alone = model(ids[1:, real]).logits[0]
    assert relative(out[1, real], alone) < 1e-5
    out[mask == 1].sum().backward()
    assert poisoned.grad[mask == 1].isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.transformer.h.parameters())


def test_the_output_is_read_by_attribute_index_and_key():
    model, ids = randomised(GPT1LMHeadModel(config())).eval(), tokens(1, 5)
    out = model(ids, labels=ids)
    assert out.loss is out[0] is out["loss"]
    assert out[1] is out.logits
    assert out[:2] == (out.loss, out.logits)
    assert list(out) == ["loss", "logits"]
    assert out.hidden_states is None
    assert [type(x) for x in model(ids, labels=ids, return_dict=False)] == [torch.Tensor] * 2
    with pytest.raises(AttributeError, match="has no 'logit'"):
        _ = out.logit


@pytest.mark.parametrize("model_class", MODELS)
def test_every_model_returns_a_tuple_on_request(model_class):
    model, ids = randomised(model_class(config())).eval(), tokens(1, 5)
    actual = model(ids, return_dict=False)
    assert type(actual) is tuple
    assert all(map(torch.equal, actual, model(ids).to_tuple()))


def test_a_value_set_by_attribute_is_found_by_key_and_index():
    """The Trainer reads `output["loss"]`, to which others have added by attribute."""
    model, ids = randomised(GPT1LMHeadModel(config())).eval(), tokens(1, 5)
    out = model(ids, labels=ids)
    out.loss = out.loss + 1
    assert out.loss is out["loss"] is out[0]
    out.logits = None
    assert out.to_tuple() == (out.loss,)
    assert out.logits is None


@pytest.mark.parametrize(
    ("model_class", "shape"), [(GPT1LMHeadModel, (1, 5)), (GPT1DoubleHeadsModel, (1, 2, 5))]
)
def test_logits_in_training_only_on_request(model_class, shape):
    model, ids = randomised(model_class(config())), tokens(*shape)
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, return_logits=True).logits.shape == (*shape, V)
    assert model(ids).logits.shape == (*shape, V)
    assert model.eval()(ids, labels=ids).logits.shape == (*shape, V)


@pytest.mark.parametrize(("keep", "expected"), [(1, [4]), (3, [2, 3, 4]), ([0, 4], [0, 4])])
def test_logits_to_keep(keep, expected):
    model, ids = randomised(GPT1LMHeadModel(config())).eval(), tokens(2, 5)
    keep = torch.tensor(keep, device=DEVICE) if isinstance(keep, list) else keep
    kept = model(ids, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, model(ids).logits[:, expected])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": tokens(1, 33)}, ValueError, "33 positions, expected at most n_positions 32"),
        ({"input_ids": tokens(1, 3), "output_attentions": True}, ValueError, "output_attentions"),
        ({}, ValueError, "expected exactly one"),
        (
            {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 48, device=DEVICE)},
            ValueError,
            "expected exactly one",
        ),
        (
            {"inputs_embeds": torch.zeros(2, 3, 47, device=DEVICE)},
            ValueError,
            r"inputs_embeds: shape \(2, 3, 47\), expected \(2, 3, 48\)",
        ),
    ],
    ids=["too-long", "attentions", "no-input", "two-inputs", "width"],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        randomised(GPT1LMHeadModel(config()))(**arguments)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("attention_mask", (4, T // 2)), ("attention_mask", (1, T)), ("attention_mask", (T,)),
     ("token_type_ids", (4, T // 2)), ("position_ids", (4, T // 2)), ("position_ids", (T - 1,)),
     ("labels", (1, T)), ("mc_token_ids", (1,)), ("dropout_seeds", (7, 2))],
)  # fmt: skip
def test_shapes_that_do_not_fit_the_ids_are_named(name, shape):
    given = {"attention_mask": torch.ones_like(tokens(2, T))}
    given[name] = torch.ones(shape, dtype=torch.int64, device=DEVICE)
    expected = rf"{name}: shape {re.escape(str(shape))}, expected \([28]"
    with pytest.raises(ValueError, match=expected):
        randomised(GPT1DoubleHeadsModel(config()))(tokens(2, T), **given)


@pytest.mark.parametrize("shape", [(T,), (2, 1, T)])
def test_a_classifier_takes_no_other_axes(shape):
    model = randomised(GPT1ForSequenceClassification(config(pad_token_id=0)))
    with pytest.raises(ValueError, match=rf"input_ids: shape {re.escape(str(shape))}, expected"):
        model(tokens(*shape))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(0, T), (2, 0)])
def test_row05_empty_batches(shape, masked):
    model, ids = randomised(GPT1LMHeadModel(with_dropout())), tokens(*shape)
    mask = torch.ones_like(ids) if masked else None
    output = model(ids, mask, labels=ids, return_logits=True)
    assert output.logits.shape == (*shape, V)
    output.loss.backward()
    assert not any(p.grad.any() for p in model.parameters())
    output = model.eval()(ids, mask, cache=KeyValueCache(2, T))
    assert output.logits.shape == (*shape, V)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU reports these later")
def test_ids_and_masks_that_are_refused_at_once():
    model = randomised(GPT1LMHeadModel(config()))
    with pytest.raises(IndexError, match=rf"id {V} is out of range \[0, {V}\)"):
        model(torch.tensor([[1, V]]))
    with pytest.raises(IndexError, match=r"linear_cross_entropy: id -5 is out of range"):
        model(tokens(1, 3), labels=torch.tensor([[1, 2, -5]]))
    with pytest.raises(ValueError, match="row 1 has a hole"):
        model(tokens(2, 3), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]]))


def test_a_batch_without_a_pad_token_is_refused():
    model = randomised(GPT1ForSequenceClassification(config()))
    assert model(tokens(1, 5)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="pad_token_id: None in the configuration"):
        model(tokens(2, 5))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_scored_wherever_the_padding_is(side):
    model = randomised(GPT1ForSequenceClassification(config(pad_token_id=0))).eval()
    ids = tokens(1, 5)
    pad = (3, 0) if side == "left" else (0, 3)
    mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(torch.nn.functional.pad(ids, pad), mask, position_ids=positions).logits
    torch.testing.assert_close(padded, model(ids).logits)


def test_a_regression_takes_values_of_any_dtype():
    model = randomised(GPT1ForSequenceClassification(config(num_labels=1, pad_token_id=0)))
    labels = torch.tensor([1.0, -2.0], device=DEVICE)
    expected = model(tokens(2, 5), labels=labels).loss
    for dtype in (torch.int64, torch.float64):
        loss = model(tokens(2, 5), labels=labels.to(dtype)).loss
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)


def classes_and_loss(labels):
    model = randomised(GPT1ForSequenceClassification(config(num_labels=3, pad_token_id=0)))
    return model.bfloat16()(tokens(2, 5), labels=labels).loss


def choices_and_loss(labels):
    model = randomised(GPT1DoubleHeadsModel(config()))
    return model.bfloat16()(tokens(2, 3, 5), mc_labels=labels).mc_loss


@pytest.mark.parametrize("loss_of", [classes_and_loss, choices_and_loss])
def test_losses_of_labels_in_a_column_and_in_fp32(loss_of):
    labels = torch.tensor([2, 0], device=DEVICE)
    loss = loss_of(labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss_of(labels[:, None]), loss)


def test_the_kind_of_problem_outranks_the_number_of_labels():
    settings = {"num_labels": 1, "problem_type": "multi_label_classification"}
    model = randomised(GPT1ForSequenceClassification(config(**settings))).eval()
    output = model(tokens(1, 5), labels=torch.ones(1, 1, device=DEVICE))
    torch.testing.assert_close(output.loss, -output.logits.sigmoid().log().mean())


def test_a_stated_problem_outranks_the_dtype_of_the_labels():
    settings = {"num_labels": 3, "problem_type": "multi_label_classification", "pad_token_id": 0}
    model, ids = randomised(GPT1ForSequenceClassification(config(**settings))), tokens(2, 5)
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]], device=DEVICE)
    assert model(ids, labels=labels).loss == model(ids, labels=labels.float()).loss
    with pytest.raises(ValueError, match="Target size"):
        model(ids, labels=labels[:, 0])


@pytest.mark.parametrize("shape", [(T,), (2, T), (2, 3, T)], ids=str)
def test_embeddings_in_place_of_ids_take_all_that_ids_take(shape):
    model, ids = randomised(GPT1Model(with_dropout())), tokens(*shape)
    positions = torch.arange(T, device=DEVICE).flip(0).expand(shape)
    options = {
        "token_type_ids": ids.flip(-1), "position_ids": positions, "row_offset": 7 * T,
        "attention_mask": torch.ones_like(ids), "dropout_seeds": model.dropout_stream.seeds(0),
    }  # fmt: skip
    expected = model(ids, **options).last_hidden_state
    actual = model(inputs_embeds=model.tokens_embed(ids), **options).last_hidden_state
    assert actual.shape == (*shape, model.config.n_embd)
    torch.testing.assert_close(actual, expected)
    rows = {k: x.reshape(-1, T) for k, x in options.items() if getattr(x, "shape", ()) == shape}
    flat = model(ids.view(-1, T), **options | rows).last_hidden_state
    assert torch.equal(expected.view_as(flat), flat)


def test_double_heads_read_the_last_token_by_default():
    model, ids = randomised(GPT1DoubleHeadsModel(config())).eval(), tokens(2, 3, T)
    last = torch.full((2, 3), T - 1, device=DEVICE)
    torch.testing.assert_close(model(ids).mc_logits, model(ids, mc_token_ids=last).mc_logits)


def test_the_classifier_drops_by_its_own_site():
    model = randomised(GPT1DoubleHeadsModel(config(summary_first_dropout=0.5)))
    ids, seeds = tokens(2, 3, T), model.dropout_stream.seeds(0)
    one, again = (model(ids, dropout_seeds=seeds).mc_logits for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, model(ids, dropout_seeds=model.dropout_stream.seeds(1)).mc_logits)
    second = model(ids[1:], dropout_seeds=seeds, row_offset=3 * T).mc_logits
    torch.testing.assert_close(second, one[1:])
    state = model.transformer(ids).last_hidden_state[..., -1, :]
    kept = keep_mask(seeds[-1], 6, state.shape[-1], 0.5).view(state.shape)
    expected = model.multiple_choice_head.summary(2 * state * kept).squeeze(-1)
    torch.testing.assert_close(one, expected)
    assert not torch.equal(one, model.eval()(ids).mc_logits)


def test_a_classifier_dropout_set_after_construction_drops():
    model, ids = randomised(GPT1DoubleHeadsModel(config())), tokens(2, 3, T)
    model.multiple_choice_head.dropout_p = 0.5
    assert not torch.equal(model(ids).mc_logits, model(ids).mc_logits)
    model.multiple_choice_head.eval()
    assert torch.equal(model(ids).mc_logits, model(ids).mc_logits)


@pytest.mark.parametrize("size", [V - 10, V + 10])
def test_resized_embeddings_keep_the_old_rows(size):
    model, ids = randomised(GPT1LMHeadModel(config())).eval(), tokens(1, 5) % (V - 10)
    old, before = model.transformer.tokens_embed.weight.clone(), model(ids).logits
    table = model.resize_token_embeddings(size)
    kept = min(size, V)
    assert table.weight is model.transformer.tokens_embed.weight
    assert (model.config.vocab_size, table.num_embeddings) == (size, size)
    assert torch.equal(table.weight[:kept], old[:kept])
    assert size < V or float(table.weight[V:].detach().std()) == pytest.approx(0.02, rel=0.2)
    table.weight.requires_grad_(False)
    assert not model.resize_token_embeddings(size).weight.requires_grad
    with pytest.raises(ValueError, match="vocab_size: 0, expected"):
        model.resize_token_embeddings(0)
    after = model(ids).logits
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    assert model.bfloat16().resize_token_embeddings(size).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("model_class", MODELS)
def test_initial_weights_follow_the_paper(model_class):
    model = model_class(replace(config(), n_embd=192, initializer_range=0.5))
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            assert float(p.detach().std()) == pytest.approx(0.5, rel=0.3), name
        else:
            assert torch.equal(p, torch.full_like(p, float("ln" in name and "weight" in name)))


def test_a_layer_runs_the_kernels_of_the_chosen_backend(launches):
    ids = tokens(2, T)
    model = randomised(GPT1Model(with_dropout(n_layer=1)))
    seeds = model.dropout_stream.seeds(0)
    block = model.h[0]

    def run():
        h = model.tokens_embed.weight[ids].detach()
        y = block.ln_1(h, 2 * h, seeds[2], x_bias=block.attn.c_proj.bias)
        return y, torch.autograd.grad(y.square().sum(), list(block.ln_1.parameters()))

    results = {}
    for name in ("triton", "portable"):
        with use_backend(name):
            results[name] = run()
    assert launches["triton", "layer_norm_bwd_kernel"] == 1
    torch.testing.assert_close(results["triton"], results["portable"])


def test_hidden_states_have_whole_gradients():
    """Those of their residual included, though blocks fork what has two readers."""
    model = randomised(GPT1Model(config()))
    output = model(tokens(2, T), output_hidden_states=True)
    between = output.hidden_states[1]
    (gradient,) = torch.autograd.grad(output.last_hidden_state.square().sum(), between)
    h = between.detach().requires_grad_()
    last, _ = model.h[1](h, h, None, 0, None)
    (expected,) = torch.autograd.grad(last.square().sum(), h)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_hooks_on_projections_run(name):
    """As those of pruning, which prepare the weight of every update anew."""
    model, ids = randomised(GPT1LMHeadModel(config())), tokens(2, T)
    projection = model.transformer.h[0].get_submodule(name)
    prune.random_unstructured(projection, "weight", 0.5)
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            with cast_once(model, torch.bfloat16):
                loss = model(ids, labels=ids).loss
            assert torch.equal(model(ids, labels=ids).loss, loss)
        (gradient,) = torch.autograd.grad(loss, projection.weight_orig)
        assert not gradient[projection.weight_mask == 0].any()
        with torch.no_grad():
            projection.weight_orig -= gradient
    actual = model(ids, labels=ids).loss
    prune.remove(projection, "weight")
    torch.testing.assert_close(actual, model(ids, labels=ids).loss)


@pytest.mark.parametrize("backend", backends_of("dropout_add_layer_norm"))
def test_forks_change_no_bit_of_gradients(backend):
    model = randomised(GPT1Model(with_dropout()))
    seeds = model.dropout_stream.seeds(0)

    def gradients(output_hidden_states):
        """Where hidden states are asked for, blocks are not forked from each other."""
        with use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
            h = model(
                tokens(2, T), dropout_seeds=seeds, output_hidden_states=output_hidden_states
            ).last_hidden_state
            return torch.autograd.grad(h.float().square().sum(), list(model.parameters()))

    for forked, single in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(forked, single)
