"""The dropout stream: its definition in `rng`, and every backend's bits against it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt1_kernels import ops, rng, use_backend
from gpt1_kernels.backends.portable import dropout as portable
from gpt1_kernels.rng import DropoutStream
from tests.cases import DEVICE, backends_of

BACKENDS = pytest.mark.parametrize("backend", backends_of("dropout_mask"))

WORDS = 0xD636B4F5, 0x384DB9BD, 0x613D1695, 0xA7EAC001  # block 5, row 2 of the known answer
VALUES = [half for word in WORDS for half in (word & 0xFFFF, word >> 16)]


def seed_of(key: int, site: int = 3, step: int = 7) -> torch.Tensor:
    return torch.tensor([key, (site << 32) + step], device=DEVICE)


def test_philox_known_answer():
    key = 12345678901234
    counter = [torch.tensor(c) for c in (5, 2, 7, 3)]
    words = rng.philox4x32(counter, [torch.tensor(key & 0xFFFFFFFF), torch.tensor(key >> 32)])
    assert [f"{int(w):08x}" for w in words] == ["d636b4f5", "384db9bd", "613d1695", "a7eac001"]


def test_an_element_draws_its_half_word_of_its_block():
    mask = rng.keep_mask(seed_of(12345678901234), 3, 48, 0.5)
    assert mask[2, 40:48].tolist() == [value >= 32768 for value in VALUES]


@BACKENDS
def test_a_value_at_the_threshold_is_kept(backend):
    """Of either half of a word."""
    with use_backend(backend):
        for k, value in enumerate(VALUES):
            for p, kept in ((value / 65536, 1), ((value + 1) / 65536, 0)):
                bits = ops.dropout_mask(seed_of(12345678901234), (3, 48), p)
                assert rng.unpack_bits(bits, 48)[2, 40 + k] == kept


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, 0), (0.1, 6554), (0.5, 32768), (1 - 1e-6, 65536), (1.0, 65536)]
)
def test_threshold_rounds_to_the_nearest_of_65536(p, expected):
    assert rng.threshold(p) == expected


def test_survivors_keep_the_mean():
    for p in (0.1, 0.3):
        share = rng.keep_mask(seed_of(1), 512, 512, p).float().mean()
        assert abs(share - (1 - p)) < 4 * (p * (1 - p)) ** 0.5 / 512
        assert rng.keep_scale(p) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert rng.keep_scale(1.0) == 0.0


def test_what_is_dropped_is_zero_whatever_it_was():
    x = torch.full((9, 16), torch.inf, device=DEVICE)
    keep = rng.keep_mask(seed_of(1), 9, 16, 0.5, 3)
    assert torch.equal(rng.dropout(x, 0.5, seed_of(1), 3), torch.where(keep, x, 0))


@given(st.integers(0, 3), st.integers(1, 100))
@settings(max_examples=25, deadline=None)
def test_packing_is_undone_and_leaves_unused_bits_zero(rows, columns):
    mask = rng.keep_mask(seed_of(rows), rows, columns, 0.5)
    words = rng.pack_bits(mask)
    assert words.shape == (rows, -(-columns // 32))
    assert torch.equal(rng.unpack_bits(words, columns), mask)
    assert not rng.unpack_bits(words, 32 * words.shape[1])[:, columns:].any()


@BACKENDS
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("shape", "row_offset"),
    [
        ((1, 1), 0),
        ((7, 33), 5),
        ((2, 3, 130, 64), 0),
        ((3, 300), 2**32 - 3),  # the last rows that a counter can number
        ((0, 5), 0),
        ((4, 0), 0),
    ],
)
def test_bits_are_those_of_the_definition(backend, p, shape, row_offset):
    seed = seed_of(-(2**62) - 12345)
    rows = torch.Size(shape[:-1]).numel()
    with use_backend(backend):
        with_a_gap = seed.repeat_interleave(2)[::2]
        bits = ops.dropout_mask(with_a_gap, shape, p, row_offset=row_offset)
    expected = rng.keep_mask(seed, rows, shape[-1], p, row_offset).view(shape)
    assert bits.dtype == torch.int32
    assert torch.equal(bits, rng.pack_bits(expected))


@BACKENDS
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (65, 65), (130, 130), (129, 130), (3, 200), (70, 133)]
)
def test_causal_bits_are_right_up_to_the_diagonal(backend, queries, keys):
    seed, shape = seed_of(99), (2, 2, queries, keys)
    with use_backend(backend):
        bits = ops.dropout_mask(seed, shape, 0.7, row_offset=11, causal=True)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril(keys - queries)
    expected = rng.keep_mask(seed, 4 * queries, keys, 0.7, 11).view(shape)
    assert torch.equal(rng.unpack_bits(bits, keys) & visible, expected & visible)


@BACKENDS
def test_every_part_of_the_counter_changes_the_bits(backend):
    with use_backend(backend):
        masks = [
            ops.dropout_mask(seed, (8, 64), 0.5, row_offset=offset)
            for seed, offset in (
                (seed_of(1), 0),
                (seed_of(1 + 2**40), 0),
                (seed_of(1, site=4), 0),
                (seed_of(1, step=8), 0),
                (seed_of(1), 8),
            )
        ]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert not torch.equal(one, other)


def test_a_row_may_be_longer_than_a_chunk():
    columns = 8 * portable.BLOCKS_PER_CHUNK + 9
    with use_backend("portable"):
        bits = ops.dropout_mask(seed_of(5), (2, columns), 0.5)
    assert torch.equal(rng.unpack_bits(bits, columns), rng.keep_mask(seed_of(5), 2, columns, 0.5))


@BACKENDS
def test_two_halves_of_a_batch_draw_what_the_whole_draws(backend):
    seed = seed_of(5)
    with use_backend(backend):
        whole = ops.dropout_mask(seed, (10, 70), 0.2)
        halves = [ops.dropout_mask(seed, (5, 70), 0.2, row_offset=o) for o in (0, 5)]
    assert torch.equal(whole, torch.cat(halves))


def test_a_stream_gives_each_site_and_step_its_seed():
    stream = DropoutStream(n_layer=2)
    stream.set_key(42)
    first, second = stream.advance(), stream.advance()
    assert first[:, 0].unique().tolist() == [42]
    assert (first[:, 1] >> 32).tolist() == [*range(7), rng.CLASSIFIER_SITE]
    assert torch.equal(second[:, 1] - first[:, 1], torch.ones(8, dtype=torch.int64))
    assert torch.equal(stream.seeds(0), first)
    stream.set_key(42)
    assert torch.equal(stream.advance(), first)
    assert not stream.state_dict()


def test_a_drawn_seed_follows_the_default_generator():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(rng.draw_seed(torch.device(DEVICE)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], rng.draw_seed(torch.device(DEVICE)))


def test_no_seed_is_drawn_in_the_capture_of_a_graph(monkeypatch):
    """It would be drawn once, by the host: replays would all have the same bits."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="seed: None in the capture"):
        rng.draw_seed(torch.device("cuda"))
