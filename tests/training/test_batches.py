"""Batches: padding that changes nothing, weights that average, buckets that visit everything."""

import numpy as np
import pytest
import torch

from gpt1_kernels import GPT1TaskModel, use_backend
from gpt1_kernels.task_model import HEAD_KEY
from tests.cases import DEVICE
from tests.models import V, config, randomised
from training import batches
from training.batches import Buckets, by_length, collate
from training.inputs import Encoded


@pytest.fixture(autouse=True)
def _portable():
    """What is tested here is the same for every backend."""
    with use_backend("portable"):
        yield


RNG = np.random.default_rng(0)


def encoded(*lengths: int, label=0) -> Encoded:
    return Encoded(tuple(RNG.integers(1, V, length) for length in lengths), label)


RAGGED = [encoded(5, 9, 3, label=2), encoded(7, 4), encoded(12, 12, 2, 6, label=1), encoded(8)]
PAIRS = [encoded(n, n, label=n % 2) for n in (9, 4, 12, 7, 5)]


def task_model(head: str, **overrides) -> GPT1TaskModel:
    return randomised(GPT1TaskModel(config(extra={HEAD_KEY: head}, num_labels=2, **overrides)))


def outputs(model, batch):
    batch = batch.to(DEVICE)
    return model(
        batch.input_ids, batch.extract, batch.members, batch.lm_targets, batch.lm_weight
    )  # fmt: skip


def test_what_a_batch_holds():
    first, second = np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8])
    batch = collate([Encoded((first,), 1), Encoded((second, first), 0)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [1, 2, 3, 0, 0]]
    assert batch.extract.tolist() == [2, 4, 2]
    assert batch.members.tolist() == [[0, -1], [1, 2]]
    ignored = [-100] * 3
    assert batch.lm_targets.tolist() == [[2, 3, *ignored], [5, 6, 7, 8, -100], [2, 3, *ignored]]
    sixth, twelfth = 1 / 6, 1 / 12
    expected = [[sixth] * 2 + [0] * 3, [twelfth] * 4 + [0], [sixth] * 2 + [0] * 3]
    torch.testing.assert_close(batch.lm_weight, torch.tensor(expected))
    assert batch.labels.tolist() == [1, 0]
    assert collate([Encoded((first,), None)]).labels is None
    assert collate([Encoded((first,), 2.5)]).labels.dtype == torch.float32


@pytest.mark.parametrize(("head", "examples"), [("choice", RAGGED), ("sum", PAIRS)])
def test_padding_changes_no_result(head, examples):
    """Alone, beside longer ones, or padded further: the same scores, loss and gradients."""
    model = task_model(head)
    whole = outputs(model, collate(examples, length=32))
    whole.lm_loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    tight = outputs(model, collate(examples))
    tight.lm_loss.backward()
    torch.testing.assert_close(tight.logits, whole.logits)
    torch.testing.assert_close(tight.lm_loss, whole.lm_loss)
    for name, gradient in gradients.items():
        ours = dict(model.named_parameters())[name].grad
        assert (ours - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name

    sequences = sum(len(example.sequences) for example in examples)
    losses = 0
    for example, logits in zip(examples, tight.logits, strict=True):
        alone = outputs(model, collate([example]))
        losses += alone.lm_loss * len(example.sequences) / sequences
        torch.testing.assert_close(alone.logits[0], logits[: alone.logits.shape[1]])
        assert (logits[alone.logits.shape[1] :] == -torch.inf).all()
    torch.testing.assert_close(losses, tight.lm_loss)


@pytest.mark.parametrize(("head", "examples"), [("choice", RAGGED), ("sum", PAIRS)])
def test_row08_what_padding_holds_reaches_no_result(head, examples, monkeypatch):
    model, results = task_model(head), []
    for padding in (0, 7):
        monkeypatch.setattr(batches, "PADDING", padding)
        batch = collate(examples, length=20)
        model.zero_grad()
        out = outputs(model, batch)
        loss = out.lm_loss + out.logits[batch.members >= 0].sum()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results.append([out.lm_loss, out.logits, *gradients])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(("head", "examples"), [("choice", RAGGED), ("sum", PAIRS)])
def test_micro_batches_draw_the_bits_and_sum_to_the_losses_of_the_whole(head, examples, parts):
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    model = task_model(head, summary_first_dropout=0.5, **dropout)
    seeds, batch = model.dropout_stream.seeds(3), collate(examples).to(DEVICE)

    def run(first, part):
        return model(
            part.input_ids, part.extract, part.members, part.lm_targets, part.lm_weight,
            dropout_seeds=seeds, first_sequence=first,
        )  # fmt: skip

    whole = run(0, batch)
    split = [(run(first, part), part) for first, part in batch.split(parts)]
    assert len(split) == parts
    torch.testing.assert_close(sum(out.lm_loss for out, _ in split), whole.lm_loss)
    torch.testing.assert_close(torch.cat([out.logits for out, _ in split]), whole.logits)
    assert torch.cat([part.labels for _, part in split]).tolist() == batch.labels.tolist()


@pytest.mark.parametrize(("examples", "batch_size"), [(1497, 32), (40, 40), (7, 2)])
def test_an_epoch_visits_every_example_once_but_the_remainder(examples, batch_size):
    lengths = np.random.default_rng(1).integers(5, 500, examples)
    buckets = Buckets(lengths, batch_size, seed=4)
    seen = [[buckets.batch(e * buckets.per_epoch + i) for i in range(buckets.per_epoch)]
            for e in range(2)]  # fmt: skip
    for epoch in seen:
        visited = np.concatenate(epoch)
        assert len(visited) == len(set(visited)) == examples // batch_size * batch_size
    if examples > batch_size:
        assert not np.array_equal(*seen)


def test_batches_are_a_pure_function_of_seed_and_step():
    lengths = np.arange(100)
    buckets = Buckets(lengths, 8, seed=1)
    assert np.array_equal(buckets.batch(30), Buckets(lengths, 8, seed=1).batch(30))
    assert not np.array_equal(buckets.batch(30), Buckets(lengths, 8, seed=2).batch(30))


def test_examples_of_one_length_stay_in_the_order_that_was_drawn():
    """On every machine: in which order NumPy sorts them by default depends on the processor."""
    lengths, epoch = np.arange(800) % 3, 2
    drawn = np.random.default_rng([7, epoch]).permutation(800).reshape(2, 400)
    ordered = [sorted(stretch, key=lengths.__getitem__) for stretch in drawn]
    buckets = Buckets(lengths, 8, seed=7)
    batches = [buckets.batch(epoch * 100 + step) for step in range(100)]
    assert {tuple(batch) for batch in batches} == {
        tuple(batch) for batch in np.reshape(ordered, (100, 8))
    }


def test_batches_hold_examples_of_like_length_and_waste_little():
    lengths = np.random.default_rng(1).integers(5, 500, 6000)
    buckets = Buckets(lengths, 32, seed=0)
    of_batch = [lengths[buckets.batch(step)] for step in range(buckets.per_epoch)]
    padded = sum(x.max() * len(x) for x in of_batch) / sum(x.sum() for x in of_batch)
    shuffled = np.random.default_rng(2).permutation(lengths)[: 187 * 32].reshape(187, 32)
    assert padded < 1.03 < 1.8 < (shuffled.max(1) * 32).sum() / shuffled.sum()
    assert np.corrcoef(np.arange(187), [x.mean() for x in of_batch])[0, 1] < 0.2  # no curriculum


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"--batch-size: 32, expected at most the 5 examples"):
        Buckets(np.ones(5), 32, seed=0)


def test_evaluation_sees_every_example_once_the_shortest_first():
    batches = list(by_length([*RAGGED, *PAIRS], 4))
    assert sorted(np.concatenate(batches)) == list(range(9))
    examples = [*RAGGED, *PAIRS]
    lengths = [examples[i].length for batch in batches for i in batch]
    assert lengths == sorted(lengths)
    assert [len(batch) for batch in batches] == [4, 4, 1]
