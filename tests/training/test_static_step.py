"""An update on static tensors equals the plain one, and a graph of it equals both.

The graphs are those of a stand-in, which freezes every number that Python passes to PyTorch.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches import seeing_into_our_ops
from gpt1_kernels import GPT1LMHeadModel, use_backend
from gpt1_kernels.backends.portable import embedding, linear_cross_entropy
from tests import cuda_graphs
from tests.cases import backends_of
from tests.models import T, randomised, tokens, with_dropout
from training import static_step
from training.optim import make_optimizer, optimizer_tensors
from training.static_step import WARM_UP, CapturedStep, StaticStep
from training.step import train_step

BATCH, UPDATES, DECAY = 4, 5 + WARM_UP, 0.1
BATCHES = tokens(UPDATES, BATCH, T)
RATES = [1e-2 * (1 + step) / UPDATES for step in range(UPDATES)]
OPTIONS = [
    {"clip": 0.3},
    {"clip": 0.3, "dtype": "bf16"},
    {"clip": 0.3, "accumulate": 2},
    {"clip": 0.3, "accumulate": 2, "dtype": "bf16"},
]
each_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=["fp32", "bf16", "accumulate", "accumulate-bf16"]
)


@pytest.fixture
def _graphs(monkeypatch):
    cuda_graphs.stand_in(monkeypatch)
    for module in (embedding, linear_cross_entropy):  # on a GPU, the host does not look at ids
        monkeypatch.setattr(module, "check_ids", lambda *args: None)


def fresh_model() -> GPT1LMHeadModel:
    model = randomised(GPT1LMHeadModel(with_dropout(n_layer=1)))
    model.dropout_stream.set_key(5)
    return model


def stepper(kind, model, batches=BATCHES, **options):
    optimizer = make_optimizer(model, 0.0, DECAY)
    return kind(model, model.dropout_stream, optimizer, batches.shape[1:], **options)


def plain(model, **options):
    """The same interface over `train_step` with numbers from Python."""
    optimizer = make_optimizer(model, 0.0, DECAY)

    def make(input_ids, step, rate):
        return train_step(model, model.dropout_stream, optimizer, input_ids, step, rate, **options)

    make.optimizer = optimizer
    return make


def trained(make, model, steps=range(UPDATES), batches=BATCHES):
    """All that the updates leave behind, and what they said."""
    said = [make(batches[step], step, RATES[step]) for step in steps]
    return {
        **{f"said.{step}": torch.stack([x.double() for x in s]) for step, s in enumerate(said)},
        **model.state_dict(), **optimizer_tensors(model, make.optimizer),
    }  # fmt: skip


def assert_bit_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@each_option
def test_equals_the_plain_update(options):
    model, other = fresh_model(), fresh_model()
    expected = trained(plain(model, **options), model)
    assert_bit_equal(trained(stepper(StaticStep, other, **options), other), expected)


@each_option
@pytest.mark.usefixtures("_graphs")
def test_replays_equal_the_plain_updates(options):
    """Batch, dropout bits and learning rate change with each; nothing that does was frozen."""
    model, other = fresh_model(), fresh_model()
    expected = trained(plain(model, **options), model)
    captured = stepper(CapturedStep, other, **options)
    assert_bit_equal(trained(captured, other), expected)
    assert captured.graph.replays == UPDATES - WARM_UP


@pytest.mark.usefixtures("_graphs")
@pytest.mark.parametrize("frozen", ["step", "learning_rate"])
def test_a_number_from_python_would_be_frozen(frozen):
    """That the stand-in shows it."""
    model, other = fresh_model(), fresh_model()
    expected = trained(plain(model), model)
    captured = stepper(CapturedStep, other)
    update = captured.update

    def with_a_number():
        value = getattr(captured, frozen)
        setattr(captured, frozen, value.numpy().item())
        made = update()
        setattr(captured, frozen, value)
        return made

    captured.update = with_a_number
    actual = trained(captured, other)
    same = [
        torch.equal(actual[f"said.{step}"], expected[f"said.{step}"]) for step in range(UPDATES)
    ]
    assert all(same[: WARM_UP + 1])
    assert not any(same[WARM_UP + 2 :])


@pytest.mark.usefixtures("_graphs")
def test_a_replayed_update_that_is_not_finite_is_skipped():
    model = fresh_model()
    captured = stepper(CapturedStep, model)
    trained(captured, model, range(WARM_UP + 1))
    gain = model.transformer.h[0].ln_1.weight
    kept = gain.detach().clone()
    with torch.no_grad():
        gain[0] = torch.nan
    before = copy.deepcopy(trained(captured, model, []))
    assert not captured(BATCHES[4], 4, RATES[4]).finite
    after = trained(captured, model, [])
    for name, value in before.items():
        assert torch.equal(after[name].nan_to_num(7), value.nan_to_num(7)), name
    with torch.no_grad():
        gain.copy_(kept)
    assert captured(BATCHES[4], 4, RATES[4]).finite


@pytest.mark.usefixtures("_graphs")
def test_a_capture_that_fails_is_made_again():
    model, other = fresh_model(), fresh_model()
    expected = trained(plain(model), model)
    captured = stepper(CapturedStep, other)
    update = captured.update

    def out_of_memory():
        raise torch.OutOfMemoryError

    trained(captured, other, range(WARM_UP))
    captured.update = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        captured(BATCHES[WARM_UP], WARM_UP, RATES[WARM_UP])
    captured.update = update
    rest = trained(captured, other, range(WARM_UP, UPDATES))
    assert torch.equal(rest[f"said.{UPDATES - WARM_UP - 1}"], expected[f"said.{UPDATES - 1}"])


on_kernels = pytest.mark.parametrize(
    "backend", [b for b in ("triton", "cuda_host") if b in backends_of("layer_norm")]
)
SHORT = BATCHES[:, :2, :8]


@pytest.mark.skipif("cuda_host" not in backends_of("layer_norm"), reason="needs the host build")
@pytest.mark.usefixtures("_graphs")
def test_replays_on_kernels(monkeypatch):
    monkeypatch.setattr(static_step, "WARM_UP", 1)
    model, other = fresh_model(), fresh_model()
    options, steps = {"dtype": "bf16"}, range(3)
    with use_backend("cuda_host"):
        expected = trained(plain(model, **options), model, steps, SHORT)
        captured = stepper(CapturedStep, other, SHORT, **options)
        assert_bit_equal(trained(captured, other, steps, SHORT), expected)


class HostDoesNotWait(TorchDispatchMode):
    """Fails where the host would wait for a GPU: for a number, or for a copy of one of its own."""

    WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name.removeprefix("aten::") not in self.WAITS, function
        return function(*args, **(kwargs or {}))


@on_kernels
@pytest.mark.usefixtures("_graphs")
def test_the_host_waits_for_nothing(backend):
    """In the launchers too, which a graph's stand-in does not look into."""
    step = stepper(StaticStep, fresh_model(), SHORT, dtype="bf16")
    with use_backend(backend):
        step(SHORT[0], 0, RATES[0])
        mode = HostDoesNotWait()
        with mode, seeing_into_our_ops(mode, backend):
            step(SHORT[1], 1, RATES[1])
    with pytest.raises(AssertionError, match="_local_scalar_dense"), mode:
        float(BATCHES[0][0, 0])
