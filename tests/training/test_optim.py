"""AdamW and its schedule, against the formulas and against the rule that was released in 2018."""

import math
from itertools import islice

import numpy as np
import pytest
import torch

from gpt1_kernels import GPT1LMHeadModel
from gpt1_kernels.numerics import error
from tests.cases import DEVICE
from tests.models import config, with_dropout
from training.data import Corpus, Windows
from training.optim import make_optimizer, warmup_cosine, warmup_linear
from training.step import train_step
from training.tokenizer import Tokenizer

B1, B2, EPS, DECAY = 0.9, 0.999, 1e-8, 0.01
UPDATES, PEAK = 138, 2e-3


def test_tensors_of_two_or_more_dimensions_decay():
    model = GPT1LMHeadModel(config())
    decaying, others = make_optimizer(model, 1e-3, DECAY).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (DECAY, 0)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = [{name_of[p] for p in group["params"]} for group in (decaying, others)]
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names[0] == {
        "transformer.tokens_embed.weight",
        "transformer.positions_embed.weight",
        *(f"transformer.h.{layer}.{m}.weight" for layer in range(2) for m in matrices),
    }
    assert names[1] == set(name_of.values()) - names[0]  # biases and gains


def test_frozen_parameters_are_left_out():
    model = GPT1LMHeadModel(config())
    model.transformer.requires_grad_(False)
    model.transformer.h[0].ln_1.weight.requires_grad_(True)
    decaying, others = make_optimizer(model, 1e-3, DECAY).param_groups
    assert not decaying["params"]
    assert others["params"] == [model.transformer.h[0].ln_1.weight]


def test_the_constants_of_adam():
    optimizer = make_optimizer(GPT1LMHeadModel(config()), 1e-3, DECAY)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (B1, B2), EPS)


def test_the_schedule_at_its_corners():
    assert warmup_cosine(0, 2000, 10000) == 0
    assert warmup_cosine(1000, 2000, 10000) == 0.5
    assert warmup_cosine(2000, 2000, 10000) == 1
    assert warmup_cosine(6000, 2000, 10000) == pytest.approx(0.5)
    assert warmup_cosine(10000, 2000, 10000) == 0
    assert warmup_cosine(0, 0, 10) == 1  # no warm-up
    assert warmup_cosine(9, 10, 10) == 0.9  # nothing but warm-up


def test_the_schedule_is_linear_then_half_a_cosine():
    warmup, total = 200, 1000
    shares = torch.tensor([warmup_cosine(t, warmup, total) for t in range(total + 1)])
    angle = torch.linspace(0, math.pi, total - warmup + 1, dtype=torch.float64)
    torch.testing.assert_close(shares[: warmup + 1], torch.linspace(0, 1, warmup + 1))
    torch.testing.assert_close(shares[warmup:], (angle / 2).cos().square().float())


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0), (1, 0.5 * 0.999), (2, 0.998), (3, 0.997), (500, 0.5), (999, 0.001), (1000, 0)],
)
def test_the_fine_tuning_schedule_is_the_released_warmup_linear(step, share):
    """(x / w up to w, then 1) · (1 − x), x = t / total: of 1,000 updates 2 warm up."""
    assert warmup_linear(step, 0.002, 1000) == pytest.approx(share, abs=1e-12)
    assert warmup_linear(step, 0.0, 1000) == pytest.approx(1 - step / 1000)


def test_the_fine_tuning_schedule_over_138_updates():
    """Story Cloze at batch 32: the first update has rate 0, the second is past the warm-up."""
    rates = [6.25e-5 * warmup_linear(t, 0.002, 138) for t in range(138)]
    assert rates[:2] == [0, pytest.approx(6.25e-5 * 137 / 138)]
    assert rates[-1] == pytest.approx(6.25e-5 / 138)
    assert sum(rates) == pytest.approx(6.25e-5 * 137 / 2)


def test_the_released_warmup_cosine_jumps_at_the_end_of_its_warm_up_and_ours_does_not():
    def released(x, warmup):
        return x / warmup if x <= warmup else 0.5 * (1 + math.cos(math.pi * x))

    assert released(0.25, 0.25) - released(0.2501, 0.25) > 0.14
    assert warmup_cosine(2500, 2500, 10000) - warmup_cosine(2501, 2500, 10000) < 1e-6
    assert released(1.0, 0.25) == warmup_cosine(10000, 2500, 10000) == 0


def rate_correction(t: int) -> float:
    """What the released rule multiplies the learning rate by at update t = 1, 2, …"""
    return math.sqrt(1 - B2**t) / (1 - B1**t)


def follow_released_rule(optimizer: torch.optim.AdamW, t: int) -> None:
    """Makes the next update, the t-th, that of the released rule."""
    for group in optimizer.param_groups:
        group["eps"] = EPS / math.sqrt(1 - B2**t)
        if group["weight_decay"] > 0:
            group["weight_decay"] = DECAY * rate_correction(t)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda optimizer, t: None, 1 - 1e-3 - 1e-5),
        (follow_released_rule, 1 - 1e-3 * (1 - 10**-6.5) - 10**-5.5),
    ],
    ids=["adamw", "released"],
)
def test_the_first_update_by_hand(rule, expected):
    """Weight 1, gradient 1, rate 1e-3: √(1 − b2) / (1 − b1) is 10^−0.5, and so much less decays.

    eps, 1e-8, is added to √v, 10^−1.5, which makes the step smaller by a share of 10^−6.5.
    """
    module = torch.nn.ParameterList([torch.ones(1, 1, dtype=torch.float64)])
    optimizer = make_optimizer(module, 1e-3, DECAY)
    rule(optimizer, 1)
    module[0].grad = torch.ones(1, 1, dtype=torch.float64)
    optimizer.step()
    assert module[0].item() == pytest.approx(expected, rel=0, abs=2e-11)


def test_adamw_equals_the_released_rule_with_its_decay_and_eps_set_at_each_update():
    """The released rule decays by the corrected rate and adds eps before v is corrected.

    In fp64 the two are 5e-14 apart. The gradients span 1e-9 … 1, so that eps is seen too.
    """
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(6, 50, dtype=torch.float64, generator=generator)
    scale = torch.logspace(-9, 0, 50, dtype=torch.float64)
    module = torch.nn.ParameterList([start.clone()])
    optimizer = make_optimizer(module, 1e-3, DECAY)

    released, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, 301):
        gradient = scale * torch.randn(start.shape, dtype=torch.float64, generator=generator)
        rate = 1e-3 * warmup_cosine(t, 50, 300)

        m = B1 * m + (1 - B1) * gradient
        v = B2 * v + (1 - B2) * gradient**2
        corrected_rate = rate * math.sqrt(1 - B2**t) / (1 - B1**t)
        released = released - corrected_rate * (m / (v.sqrt() + EPS) + DECAY * released)

        for group in optimizer.param_groups:
            group["lr"] = rate
        follow_released_rule(optimizer, t)
        module[0].grad = gradient
        optimizer.step()
    torch.testing.assert_close(module[0].detach(), released, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("updates", "ratio"), [(138, 0.22), (2000, 0.63)])
def test_the_released_rule_decays_less_than_plain_adamw(updates, ratio):
    """In all, over a fine-tuning of so many updates under its warm-up of 0.2 % and linear decay."""
    shares = [warmup_linear(t - 1, 0.002, updates) for t in range(1, updates + 1)]
    released = sum(share * rate_correction(t) for t, share in enumerate(shares, 1))
    assert released / sum(shares) == pytest.approx(ratio, abs=0.005)


def fresh_model() -> GPT1LMHeadModel:
    torch.manual_seed(0)
    return GPT1LMHeadModel(with_dropout(vocab_size=300)).to(DEVICE)


def trained(text, before_update):
    """A small model after 138 updates at the peak rate of `--preset mini`, and their losses."""
    model = fresh_model()
    stream = model.dropout_stream
    stream.set_key(0)
    optimizer = make_optimizer(model, PEAK, DECAY)
    windows, losses = Windows(text, 32, 4, seed=0), []
    for step in range(UPDATES):
        before_update(optimizer, step + 1)
        batch = windows.batch(step).to(DEVICE)
        rate = PEAK * warmup_cosine(step, UPDATES // 4, UPDATES)
        losses.append(train_step(model, stream, optimizer, batch, step, rate)[0])
    return model, torch.stack(losses)


def test_plain_adamw_trains_as_the_released_rule_does():
    """Presidential messages, the same batches and dropout under both rules.

    Plain AdamW takes Σ rate · 0.01 · (1 − correction) = 1.1e-3 more of every weight, and that is
    the size of what is seen: losses at most 1.2e-4 nats apart while they fall by 0.57, and every
    parameter's movement within 0.3 % of the released rule's. The bounds are twice that, for
    another machine's rounding. `c_attn` alone moves differently, and is seen in the losses only: at
    the start its gradients are as small as eps, which the two rules add at different places.
    """
    documents = ["".join(pieces) for pieces in islice(Corpus(), 2)]
    tokenizer = Tokenizer.train(documents, 300)
    text = np.concatenate([tokenizer.encode(document) for document in documents])
    start = fresh_model()
    plain, losses = trained(text, lambda optimizer, t: None)
    released, released_losses = trained(text, follow_released_rule)
    assert losses[-10:].mean() < losses[0] - 0.5
    assert 0 < (losses - released_losses).abs().max() < 2.5e-4
    for name, parameter in start.named_parameters():
        if "c_attn" not in name:
            moved, expected = (m.get_parameter(name) - parameter for m in (plain, released))
            assert 0 < error(moved, expected).whole < 6e-3, name
