"""One cast of all weights gives what autocast gives, bit for bit."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt1_kernels import GPT1LMHeadModel
from gpt1_kernels.layers import Conv1D
from gpt1_kernels.weight_cast import cast_once
from tests.cases import DEVICE
from tests.models import T, config, randomised, tokens, with_dropout

BATCH = tokens(4, T)


class Casts(TorchDispatchMode):
    """Counts the casts of one tensor, and of many."""

    def __init__(self):
        super().__init__()
        self.single = self.together = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.single += function is torch.ops.aten._to_copy.default
        self.together += function is torch.ops.aten._foreach_copy_.default
        return function(*args, **(kwargs or {}))


def model_with(*, frozen=(), checkpointing=False):
    model = randomised(GPT1LMHeadModel(with_dropout()))
    model.dropout_stream.set_key(5)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def loss_and_gradients(model, casting, run=None, micro_batches=2):
    """The sum of losses, and the gradients, over micro-batches of one update."""
    seeds, total, run = model.dropout_stream.seeds(3), 0.0, model if run is None else run
    with casting:
        for number, part in enumerate(BATCH.chunk(micro_batches)):
            with torch.autocast(DEVICE, torch.bfloat16):
                offset = number * part.numel()
                loss = run(part, labels=part, dropout_seeds=seeds, row_offset=offset).loss
            loss.backward()
            total += loss.detach()
    return {"loss": total} | {name: p.grad for name, p in model.named_parameters()}


def assert_bit_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            assert actual[name].dtype == value.dtype
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointing": True},
        {"frozen": ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_attn.bias"]},
    ],
    ids=["plain", "checkpointing", "frozen"],
)
def test_losses_and_gradients_are_those_of_autocast(options, micro_batches):
    expected = loss_and_gradients(model_with(**options), nullcontext(), None, micro_batches)
    model = model_with(**options)
    actual = loss_and_gradients(model, cast_once(model, torch.bfloat16), None, micro_batches)
    assert_bit_equal(actual, expected)


def test_compiled():
    model, other = model_with(), model_with()
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    expected = loss_and_gradients(model, cast_once(model, torch.bfloat16))
    actual = loss_and_gradients(other, cast_once(other, torch.bfloat16), compiled)
    assert_bit_equal(actual, expected)


def test_one_cast_forward_and_one_backward():
    """What stays: the head's table is cast in its loss, the sum of dW in fp32 is not."""
    model = model_with()
    with Casts() as without:
        loss_and_gradients(model, nullcontext(), None, 1)
    with Casts() as casts:
        loss_and_gradients(model, cast_once(model, torch.bfloat16), None, 1)
    per_layer = 2 * len([m for m in model.transformer.h[0].modules() if isinstance(m, Conv1D)])
    assert without.together == 0
    assert casts.together == 2
    assert without.single - casts.single == len(model.transformer.h) * (per_layer + 2)  # a bias


def test_the_model_is_left_as_it_was():
    model = model_with(frozen=["transformer.h.0.mlp.c_fc.weight"])
    modules = [m for m in model.modules() if isinstance(m, Conv1D)]
    with cast_once(model, torch.bfloat16):
        assert {m.product_weight.dtype for m in modules} == {torch.bfloat16}
        assert all(m.product_weight.requires_grad == m.weight.requires_grad for m in modules)
    assert all(m.product_weight is m.weight for m in modules)
    with pytest.raises(KeyError), cast_once(model, torch.bfloat16):
        raise KeyError
    assert all(m.product_weight is m.weight for m in modules)


def test_weights_of_the_dtype_are_used_as_they_are():
    model = GPT1LMHeadModel(config()).to(torch.bfloat16)
    with cast_once(model, torch.bfloat16):
        assert model.transformer.h[0].mlp.c_fc.cast is None


def test_no_gradient_at_all():
    """As behind a Function that gives none, where autograd still runs the backward before it."""

    class Barrier(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    layer = Conv1D(8, 8).to(DEVICE)
    with cast_once(layer, torch.bfloat16):
        x = torch.randn(2, 8, dtype=torch.bfloat16, device=DEVICE)
        Barrier.apply(layer(x)).sum().backward()
    assert layer.weight.grad is None
