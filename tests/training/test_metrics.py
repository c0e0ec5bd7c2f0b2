"""What a run reports, against slow and obvious counts."""

import json
import math
from collections import Counter
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt1_kernels import GPT1Config, GPT1LMHeadModel, reference
from tests.cases import DEVICE
from tests.models import config, randomised, tokens, with_dropout
from training import metrics

VOCABULARY = 12


@pytest.fixture
def corpus():
    """Training tokens and windows; token 10 is seen once, and 11 in the windows alone."""
    rng = np.random.default_rng(0)
    train = rng.integers(0, 10, size=80).astype(np.int32)
    train[-1] = 9  # seen, but followed by nothing where no other 9 is
    train[:-1][train[:-1] == 9] = 8
    train[40] = 10
    return train, rng.integers(0, VOCABULARY, size=(5, 13))


def test_unigram_is_an_add_one_count(corpus):
    train, windows = corpus
    counts = Counter(train.tolist())
    logs = [
        math.log((counts[w] + 1) / (len(train) + VOCABULARY))
        for window in windows.tolist()
        for w in window[1:]
    ]
    expected = math.exp(-sum(logs) / len(logs))
    assert metrics.baselines(train, windows, VOCABULARY).unigram == pytest.approx(expected)


def kneser_ney(train: list[int], w: int, c: int) -> float:
    """p(w | c) word for word as Kneser and Ney have it, interpolated, with one more type a word."""
    pairs = list(pairwise(train))
    q = {x: len({a for a, b in pairs if b == x}) + 1 for x in range(VOCABULARY)}
    q_w = q[w] / sum(q.values())
    n_c = sum(a == c for a, _ in pairs)
    if n_c == 0:
        return q_w
    types = len({b for a, b in pairs if a == c})
    return max(pairs.count((c, w)) - 0.75, 0) / n_c + 0.75 * types / n_c * q_w


def test_bigram_is_interpolated_kneser_ney(corpus):
    train, windows = corpus
    logs = [
        math.log(kneser_ney(train.tolist(), w, c))
        for window in windows.tolist()
        for c, w in pairwise(window)
    ]
    expected = math.exp(-sum(logs) / len(logs))
    assert {9, 10, 11} <= set(windows[:, :-1].ravel())  # one seen once, two that nothing followed
    assert metrics.baselines(train, windows, VOCABULARY).bigram == pytest.approx(expected)


@pytest.mark.parametrize("block", [1, 7, 78, 79])
def test_the_baselines_do_not_depend_on_how_many_tokens_are_counted_at_a_time(
    corpus, monkeypatch, block
):
    whole = metrics.baselines(*corpus, VOCABULARY)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert metrics.baselines(*corpus, VOCABULARY) == whole


def test_the_baselines_do_not_depend_on_the_type_of_the_tokens(corpus):
    train, windows = (tokens + 300 for tokens in corpus)  # pairs beyond what the type holds
    expected = metrics.baselines(train, windows, 400)
    assert metrics.baselines(train.astype(np.uint16), windows, 400) == expected


@pytest.mark.parametrize("context", [3, 9, 11], ids=["seen", "seen-last", "never"])
def test_bigram_probabilities_of_a_context_sum_to_1(corpus, context):
    windows = [np.array([[context, w]]) for w in range(VOCABULARY)]
    total = sum(1 / metrics.baselines(corpus[0], w, VOCABULARY).bigram for w in windows)
    assert total == pytest.approx(1)


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(math.log(7), 7), (710.0, math.inf), (math.inf, math.inf)]
)
def test_perplexity_is_infinite_where_no_float_holds_it(loss, perplexity):
    assert metrics.perplexity(loss) == pytest.approx(perplexity)


def test_bits_per_byte():
    # 8 tokens of 2 bits each, over 4 bytes
    assert metrics.bits_per_byte(2 * math.log(2), tokens=8, n_bytes=4) == pytest.approx(4)


def test_flops_per_token_of_the_paper_counted_by_hand():
    matrices = 12 * (768 * 2304 + 768 * 768 + 768 * 3072 + 3072 * 768) + 40478 * 768
    attention = 12 * 2 * 768 * 512 // 2  # q·k and p·v; a query sees half of the keys
    forward = 2 * (matrices + attention)
    with torch.device("meta"):
        model = GPT1LMHeadModel(GPT1Config())
    assert metrics.flops_per_token(model) == 3 * forward == 724_442_112


def test_flops_per_token_are_those_that_torch_counts():
    """Of plain attention torch counts both halves, and the last token's loss does not exist."""
    shape = config()
    length = shape.n_positions
    model = randomised(GPT1LMHeadModel(shape))
    parameters = dict(model.transformer.named_parameters())
    with FlopCounterMode(display=False) as counter:
        ids = tokens(1, length)
        reference.language_model_loss(parameters, shape, ids).backward()
    unseen_half = 6 * shape.n_layer * length**2 * shape.n_embd
    last_logits = 6 * shape.vocab_size * shape.n_embd
    expected = counter.get_total_flops() - unseen_half + last_logits
    assert length * metrics.flops_per_token(model) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_mean_loss_is_the_models_own_in_any_batches(batch_size):
    """5 windows: the last batch is smaller, or the only one is."""
    model, windows = randomised(GPT1LMHeadModel(with_dropout())), tokens(5, 24)
    loss = metrics.mean_loss(model, windows.cpu(), batch_size, DEVICE, "fp32")
    assert model.training
    with torch.no_grad():
        expected = float(model.eval()(windows, labels=windows).loss)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_mean_loss_under_autocast():
    model, windows = randomised(GPT1LMHeadModel(config())), tokens(3, 24)
    fp32, bf16 = (metrics.mean_loss(model, windows, 3, DEVICE, d) for d in ("fp32", "bf16"))
    assert fp32 != bf16
    assert bf16 == pytest.approx(fp32, rel=6e-3)


def test_the_log_is_a_json_object_a_line(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    rows = [{"step": 0, "loss": 5.5}, {"step": 1, "validation_loss": 0.1}]
    for row in rows:
        log.write(**row)
    log.write(2, loss=float("nan"))
    rows.append({"step": 2, "loss": None})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == rows


def test_the_measured_peak_counts_a_product_and_a_sum(monkeypatch):
    monkeypatch.setattr(metrics.time, "perf_counter", count().__next__)  # a second each
    assert metrics.measured_peak("cpu", "fp32") == 2 * 1024**3


def test_the_measured_peak_is_a_speed():
    assert 1e8 < metrics.measured_peak(DEVICE, "fp32") < 1e16


def test_tensorboard_forgets_what_is_logged_again_and_no_validation(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for log, updates in (
        (metrics.MetricsLog(tmp_path), range(6)),
        (metrics.MetricsLog(tmp_path, 3), range(3, 5)),  # from a checkpoint after 3 updates
    ):
        for step in updates:
            log.write(step, loss=1.0)
            log.write(step + 1, validation_loss=1.0)
        log._board.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    steps = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert steps == {"loss": [0, 1, 2, 3, 3, 4], "validation_loss": [1, 2, 3, 4, 5]}
