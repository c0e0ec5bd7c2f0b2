"""Updates, against plain PyTorch on the fp64 reference, and in micro-batches or twice."""

import copy
from itertools import groupby

import pytest
import torch

from gpt1_kernels import GPT1LMHeadModel, reference
from gpt1_kernels.numerics import CAPS, error
from tests.cases import DEVICE
from tests.models import T, randomised, tokens, with_dropout
from training.optim import make_optimizer, optimizer_tensors
from training.step import SkippedUpdates, apply_losses, train_step

BATCH, UPDATES, RATE, DECAY, CLIP = 4, 3, 1e-2, 0.1, 0.3
UPDATE_TOLERANCE = 1e-4  # Adam blows a small gradient's rounding up; 2e-5 is seen
BATCHES = tokens(UPDATES, BATCH, T)


def fresh_model() -> GPT1LMHeadModel:
    """With dropout on, and far enough from its initial values for CLIP to bite."""
    model = randomised(GPT1LMHeadModel(with_dropout()))
    model.dropout_stream.set_key(5)
    return model


def trained(model, **options):
    """The model after all updates, and their losses and gradient norms: fp32 (2, UPDATES)."""
    optimizer = make_optimizer(model, RATE, DECAY)
    curve = [
        train_step(
            model, model.dropout_stream, optimizer, batch, step, RATE, **{"clip": CLIP, **options},
        )[:2]
        for step, batch in enumerate(BATCHES)
    ]  # fmt: skip
    return model, torch.tensor(curve).T


def plain_pytorch(model, clip=CLIP):
    """What `trained` should give: the reference's loss, a clip by hand, unfused AdamW, in fp64."""
    stream, config = model.dropout_stream, model.config
    model = copy.deepcopy(model.transformer).double()
    parameters = dict(model.named_parameters())
    decaying = [p for p in parameters.values() if p.dim() > 1]
    others = [p for p in parameters.values() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}],
        lr=RATE, foreach=False,
    )  # fmt: skip
    curve = []
    for step, batch in enumerate(BATCHES):
        optimizer.zero_grad()
        loss = reference.language_model_loss(parameters, config, batch, stream.seeds(step))
        loss.backward()
        norm = sum(p.grad.square().sum() for p in parameters.values()).sqrt()
        for parameter in parameters.values():
            parameter.grad *= min(1, clip / norm)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return model, torch.tensor(curve).T


def update_errors(model, expected, before) -> dict[str, float]:
    """Relative errors of what was added to each parameter.

    The key biases are left out: softmax does not see them, so their gradient is rounding noise, and
    Adam makes full steps of it.
    """
    errors = {}
    for name, start in before.named_parameters():
        ours = model.get_parameter(name).detach() - start
        theirs = expected.get_parameter(name).detach() - start
        if name.endswith("c_attn.bias"):
            ours, theirs = (torch.stack([x.chunk(3)[0], x.chunk(3)[2]]) for x in (ours, theirs))
        errors[name] = error(ours, theirs).whole
    return errors


def assert_same_updates(model, expected, before):
    errors = update_errors(model, expected, before)
    assert max(errors.values()) < UPDATE_TOLERANCE, errors


@pytest.mark.parametrize("clip", [CLIP, 100.0])
def test_updates_are_those_of_plain_pytorch(clip):
    before = fresh_model()
    model, (losses, norms) = trained(copy.deepcopy(before), clip=clip)
    expected, (their_losses, their_norms) = plain_pytorch(before, clip)
    assert ((their_norms > clip) == (clip == CLIP)).all()
    assert error(losses, their_losses).whole < CAPS[torch.float32]
    assert error(norms, their_norms).whole < CAPS[torch.float32]
    assert_same_updates(model.transformer, expected, before.transformer)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_draw_the_bits_and_give_the_update_of_the_whole_batch(accumulate):
    before = fresh_model()
    whole, curve = trained(copy.deepcopy(before))
    split, split_curve = trained(copy.deepcopy(before), accumulate=accumulate)
    assert error(split_curve, curve).worst_row < CAPS[torch.float32]
    assert_same_updates(split, whole, before)


def test_two_runs_are_bit_equal():
    first, curve = trained(fresh_model())
    second, second_curve = trained(fresh_model())
    assert torch.equal(curve, second_curve)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_dropout_bits_are_those_of_the_step():
    model, stream = fresh_model(), fresh_model().dropout_stream
    optimizer = make_optimizer(model, 0.0, DECAY)

    def loss(step):  # at rate 0, so that only the bits can differ
        return train_step(model, stream, optimizer, BATCHES[0], step, 0.0)[0]

    first = loss(0)
    assert loss(1) != first
    assert loss(0) == first


def test_bf16_autocast_multiplies_in_bf16_and_keeps_fp32_parameters():
    _, fp32 = trained(fresh_model())
    model, bf16 = trained(fresh_model(), dtype="bf16")
    assert 0 < error(bf16[0], fp32[0]).whole < CAPS[torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU all are cast back together, at the end")
def test_bf16_gradients_are_cast_back_beside_their_layer():
    model, order = fresh_model(), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    trained(model, dtype="bf16")
    of_layer = [int(name.split(".")[2]) for name in order if ".h." in name]
    layers = list(reversed(range(model.config.n_layer)))
    assert [n for n, _ in groupby(of_layer)] == layers * UPDATES


def test_no_gradient_is_left_to_the_next_update():
    model, _ = trained(fresh_model())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_row30_an_update_that_is_not_finite_is_skipped_and_counted(bad):
    """Weights, moments and AdamW's own step stay as they were, and the next update is made."""
    model = fresh_model()
    optimizer = make_optimizer(model, RATE, DECAY)
    skipped = SkippedUpdates(BATCHES.device, total=5)

    def update(step):
        made = train_step(model, model.dropout_stream, optimizer, BATCHES[step], step, RATE)
        skipped.note(step, made.finite)
        return made

    assert update(0).finite
    before = copy.deepcopy((model.state_dict(), optimizer_tensors(model, optimizer)))
    hook = model.transformer.h[1].ln_1.weight.register_hook(lambda g: torch.full_like(g, bad))
    for step in (1, 2):
        assert not update(step).finite
    assert skipped.counts() == (7, 2, 2)
    after = model.state_dict(), optimizer_tensors(model, optimizer)
    for one, other in zip(before, after, strict=True):
        for name, value in one.items():
            assert torch.equal(other[name], value), name
    hook.remove()
    assert update(0).finite
    assert skipped.counts() == (7, 0, 2)
    assert not torch.equal(
        model.state_dict()["transformer.h.1.ln_1.weight"], before[0]["transformer.h.1.ln_1.weight"]
    )


def test_row30_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient():
    model = fresh_model()
    weight = model.transformer.tokens_embed.weight
    before = weight.detach().clone()
    optimizer = make_optimizer(model, RATE, DECAY)
    assert not apply_losses(model, optimizer, [weight.sum() + torch.inf], RATE).finite
    assert torch.equal(weight, before)
