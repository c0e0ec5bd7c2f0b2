"""Dropout bits that are drawn on another stream: the same ones, and read only when they are there.

Where there is no GPU, stand-ins for streams write down who waits for whom.
"""

from contextlib import contextmanager

import pytest
import torch

from gpt1_kernels import GPT1LMHeadModel, ahead, model, ops
from tests.cases import DEVICE, SEED, P
from tests.models import T, randomised, tokens, with_dropout
from tests.test_compile import LowLevelCalls

BATCH = tokens(4, T)


class Stream:
    """A stand-in; `known` is what has happened on a stream, or before something it waited for."""

    current: "Stream"

    def __init__(self):
        self.known: set = set()

    def wait_stream(self, other):
        self.known |= other.known

    def record_event(self):
        return frozenset(self.known)

    def wait_event(self, event):
        self.known |= event


class Calls(LowLevelCalls):
    """Notes on the current stream which bits are drawn; a reader must know of them."""

    def __init__(self):
        super().__init__()
        self.drawn_beside, self.read = set(), set()
        self.main = Stream.current

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, stream = super().__torch_dispatch__(function, types, args, kwargs), Stream.current
        if function is torch.ops.gpt1_kernels.dropout_mask.default:
            assert "seeds" in stream.known, "drawn before the seeds are there"
            stream.known.add(out.data_ptr())
            if stream is not self.main:
                self.drawn_beside.add(out.data_ptr())
        elif function.namespace == "gpt1_kernels" and "attention" in function.__name__:
            bits = {x.data_ptr() for x in args if getattr(x, "dtype", None) == torch.int32}
            assert bits <= stream.known, "read before they are drawn"
            self.read |= bits
        return out


@pytest.fixture
def _streams(monkeypatch):
    @contextmanager
    def on(stream):
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    main, beside = Stream(), Stream()
    main.known.add("seeds")
    monkeypatch.setattr(Stream, "current", main, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(ahead, "_stream_beside", lambda device: beside)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda bits, stream: None)
    monkeypatch.setattr(model, "draws_ahead", lambda seed: True)


def loss_and_gradients(micro_batches=1, checkpointing=False, probabilities=None):
    fresh = randomised(GPT1LMHeadModel(with_dropout()))
    if probabilities is not None:
        for block, p in zip(fresh.transformer.h, probabilities, strict=True):
            block.attn.dropout_p = p
    if checkpointing:
        fresh.gradient_checkpointing_enable()
    fresh.dropout_stream.set_key(5)
    seeds, total = fresh.dropout_stream.seeds(3), 0.0
    for number, part in enumerate(BATCH.chunk(micro_batches)):
        offset = number * part.numel()
        loss = fresh(part, labels=part, dropout_seeds=seeds, row_offset=offset).loss
        loss.backward()
        total += loss.detach()
    return [total, *(p.grad for p in fresh.parameters())]


@pytest.mark.skipif(DEVICE == "cuda", reason="of CPU stand-ins")
@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_results_are_those_of_bits_drawn_in_line(micro_batches, checkpointing, monkeypatch):
    with Calls() as calls:
        actual = loss_and_gradients(micro_batches, checkpointing)
    if checkpointing:  # blocks that are recomputed draw their own
        assert not calls.drawn_beside
    else:
        assert calls.drawn_beside == calls.read
        assert len(calls.read) == 2 * micro_batches  # one a layer
    monkeypatch.setattr(model, "draws_ahead", lambda seed: False)
    for one, other in zip(actual, loss_and_gradients(micro_batches, checkpointing), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(DEVICE == "cuda", reason="of CPU stand-ins")
@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize("probabilities", [(0.5, 0.1), (0.0, 0.5)])
def test_each_attention_has_bits_of_its_own_probability(probabilities, monkeypatch):
    """They were drawn with the configuration's, and the survivors scaled by the module's."""
    actual = loss_and_gradients(probabilities=probabilities)
    monkeypatch.setattr(model, "draws_ahead", lambda seed: False)
    for one, other in zip(actual, loss_and_gradients(probabilities=probabilities), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(DEVICE == "cuda", reason="of CPU stand-ins")
@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize("options", [{"n_layer": 0}, {"attn_pdrop": 0.0}], ids=str)
def test_where_no_attention_drops_nothing_is_drawn(options):
    fresh = randomised(GPT1LMHeadModel(with_dropout(**options)))
    with Calls() as calls:
        fresh(BATCH, labels=BATCH).loss.backward()
    assert not calls.drawn_beside


@pytest.mark.skipif(DEVICE == "cuda", reason="of CPU stand-ins")
@pytest.mark.usefixtures("_streams")
def test_the_stand_ins_see_a_missing_wait(monkeypatch):
    monkeypatch.setattr(Stream, "wait_event", lambda stream, event: None)
    with pytest.raises(AssertionError, match="read before they are drawn"), Calls():
        loss_and_gradients()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu(checkpointing, monkeypatch):
    actual = loss_and_gradients(2, checkpointing)
    monkeypatch.setattr(model, "draws_ahead", lambda seed: False)
    for one, other in zip(actual, loss_and_gradients(2, checkpointing), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_bits_given_are_those_of_the_seed(packed):
    qkv = torch.randn(2, 20, 48, device=DEVICE)
    offset, heads = 7, 2

    def attend(**options):
        if packed:
            return ops.causal_attention_qkvpacked(qkv, heads, dropout_p=P, **options)
        q, k, v = qkv.unflatten(2, (3, heads, 8)).unbind(2)
        return ops.causal_attention(q, k, v, dropout_p=P, **options)

    bits = ops.dropout_mask(SEED, (2, heads, 20, 20), P, row_offset=offset * heads, causal=True)
    assert torch.equal(attend(keep_bits=bits), attend(seed=SEED, row_offset=offset))
    with pytest.raises(ValueError, match=r"keep_bits has shape \(2, 2, 20\), expected \(2, 2, 20,"):
        attend(keep_bits=bits[..., 0])
    with pytest.raises(TypeError, match="keep_bits has dtype"):
        attend(keep_bits=bits.long())


@pytest.mark.parametrize("packed", [False, True])
def test_a_probability_above_1_is_refused_with_bits_too(packed):
    """Survivors would be multiplied by a negative scale."""
    qkv = torch.randn(1, 4, 24, device=DEVICE)
    bits = torch.zeros(1, 1, 4, 1, dtype=torch.int32, device=DEVICE)
    op, inputs = ops.causal_attention, qkv.view(1, 4, 3, 1, 8).unbind(2)
    if packed:
        op, inputs = ops.causal_attention_qkvpacked, (qkv, 1)
    with pytest.raises(ValueError, match=r"dropout_p is 1.5, expected a probability in \[0, 1\]"):
        op(*inputs, dropout_p=1.5, keep_bits=bits)
