"""Decoding with the key/value cache, and the choice of a token."""

import copy

import pytest
import torch

from gpt1_kernels import GPT1LMHeadModel
from gpt1_kernels.cache import KeyValueCache, LayerCache
from gpt1_kernels.generation import choose
from tests.cases import DEVICE
from tests.models import config, randomised, tokens, with_dropout

NEW = 12
CHOICES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.3},
    "top-k": {"temperature": 1.3, "top_k": 5},
    "top-1": {"temperature": 1.3, "top_k": 1},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "both": {"temperature": 1.3, "top_k": 20, "top_p": 0.8},
}


@pytest.fixture(scope="module")
def model():
    """Strong blocks under plain LayerNorms, no token favoured: it does not repeat one token."""
    model = randomised(GPT1LMHeadModel(config())).eval()
    table = model.transformer.tokens_embed.weight
    with torch.no_grad():
        table.div_(table.norm(dim=1, keepdim=True))
        for name, parameter in model.transformer.h.named_parameters():
            if ".ln_" in name:
                parameter.fill_(float(name.endswith("weight")))
            elif parameter.dim() == 2 and ".c_fc" not in name:
                parameter.mul_(4)
        model.transformer.positions_embed.weight.mul_(2)
    return model


@pytest.fixture
def call_lengths(model):
    """The number of tokens that each forward pass of the backbone runs."""
    lengths = []

    def record(module, inputs):
        lengths.append(inputs[0].shape[1])

    handle = model.transformer.register_forward_pre_hook(record)
    yield lengths
    handle.remove()


def uncached(model, ids, new_tokens, mask=None, seed=None, **choice):
    """The oracle: all of the sequence runs again for every token."""
    mask = torch.ones_like(ids) if mask is None else mask
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    with torch.no_grad():
        for _ in range(new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(ids, mask, position_ids=positions).logits[:, -1]
            chosen = choose(logits, **choice, generator=generator)[:, None]
            ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    return ids


def left_padded(lengths, width):
    """Prompts of these lengths behind token 7, which must not matter, and their mask."""
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    mask = mask.long().to(DEVICE)
    return torch.where(mask != 0, tokens(len(lengths), width), 7), mask


def test_the_model_of_these_tests_is_not_monotonous(model):
    rows = model.generate(tokens(3, 4), max_new_tokens=28)[:, 4:]
    assert all(len(row.unique()) >= 4 for row in rows)
    assert len(rows.unique(dim=0)) == 3


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("length", [1, 2, 9, 32 - NEW], ids=lambda n: f"prompt-{n}")
def test_the_cache_changes_no_token(model, call_lengths, length, choice):
    ids = tokens(2, length)
    actual = model.generate(ids, max_new_tokens=NEW, seed=3, **choice)
    assert call_lengths == [length] + [1] * (NEW - 1)
    assert torch.equal(actual, uncached(model, ids, NEW, seed=3, **choice))


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_the_cache_changes_no_token_of_a_left_padded_batch(model, choice):
    ids, mask = left_padded([3, 10, 1], 10)
    actual = model.generate(ids, mask, max_new_tokens=NEW, seed=3, **choice)
    assert torch.equal(actual, uncached(model, ids, NEW, mask, seed=3, **choice))


@pytest.mark.parametrize("lengths", [(3, 10, 1), (10, 10), (4, 2)], ids=str)
def test_row09_a_left_padded_row_continues_as_it_does_alone(model, lengths):
    ids, mask = left_padded(lengths, 10)
    actual = model.generate(ids, mask, max_new_tokens=NEW)
    assert torch.equal(actual[:, :10], ids)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, 10 - length :], max_new_tokens=NEW)
        assert torch.equal(actual[row, 10:], alone[0, length:])


def test_columns_of_padding_alone_neither_run_nor_count(model, call_lengths):
    ids, mask = left_padded([4, 2], 30)
    actual = model.generate(ids, mask, max_new_tokens=28)
    assert call_lengths[0] == 4
    expected = model.generate(ids[:, -4:], mask[:, -4:], max_new_tokens=28)
    assert torch.equal(actual[:, 30:], expected[:, 4:])


def test_greedy_tokens_are_those_of_transformers(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    theirs = transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path).to(DEVICE)
    ids = tokens(2, 5)
    expected = theirs.generate(ids, max_new_tokens=27, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, max_new_tokens=27), expected)


@pytest.mark.parametrize("pieces", [(8,), (6, 1, 1), (5, 3)], ids=str)
def test_logits_through_the_cache_are_those_of_one_pass(model, pieces):
    """Pieces of several tokens too: queries that are fewer than the keys, but more than one."""
    ids, mask = left_padded([4, 8], 8)
    cache, logits = KeyValueCache(n_layer=2, capacity=20), []
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            first = None if cache.length else mask[:, : pieces[0]]
            logits.append(model(piece, first, cache=cache).logits)
        expected = model(ids, mask).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], expected[real], rtol=1e-5, atol=1e-5)
    assert cache.length == 8


def test_the_cache_counts_positions_without_layers():
    model, ids = randomised(GPT1LMHeadModel(config(n_layer=0))).eval(), tokens(2, 8)
    cache = KeyValueCache(n_layer=0, capacity=8)
    logits = [model(piece, cache=cache).logits for piece in ids.split(5, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits)


def test_the_cache_is_of_the_blocks_that_are_there(model):
    shorter, ids = copy.deepcopy(model), tokens(2, 5)
    del shorter.transformer.h[1:]
    expected = uncached(shorter, ids, 4, **CHOICES["greedy"])
    assert torch.equal(shorter.generate(ids, max_new_tokens=4), expected)


def test_the_cache_is_written_in_place():
    layer, k = LayerCache(capacity=5), torch.randn(2, 3, 4, 8)
    first_k, first_v = layer.append(k, -k)
    second_k, second_v = layer.append(k[:, :1], k[:, :1])
    assert second_k.shape == (2, 4, 4, 8)
    assert second_k.data_ptr() == first_k.data_ptr()
    assert second_v.data_ptr() == first_v.data_ptr()
    assert torch.equal(second_k, torch.cat([k, k[:, :1]], 1))
    assert torch.equal(second_v, torch.cat([-k, k[:, :1]], 1))
    with pytest.raises(ValueError, match="cache: 6 positions, expected at most its 5"):
        layer.append(k[:, :2], k[:, :2])


def test_rows_end_at_the_stop_token_and_the_batch_with_the_last(model, call_lengths):
    ids = tokens(3, 4)
    free = model.generate(ids, max_new_tokens=NEW)[:, 4:]
    stop = int(free[0, 2])
    call_lengths.clear()
    stopped = model.generate(ids, max_new_tokens=NEW, stop_token=stop)[:, 4:]
    ends = [(row == stop).nonzero() for row in free]
    ends = [int(e[0]) + 1 if len(e) else NEW for e in ends]
    assert min(ends) < max(ends), "the rows must end at different lengths"
    assert stopped.shape[1] == len(call_lengths) == max(ends)
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, :end], free[row, :end])
        assert (stopped[row, end:] == stop).all()


def test_a_single_row_stops_early(model, call_lengths):
    ids = tokens(1, 4)
    free = model.generate(ids, max_new_tokens=NEW)[0]
    call_lengths.clear()
    stopped = model.generate(ids, max_new_tokens=NEW, stop_token=int(free[4]))
    assert torch.equal(stopped[0], free[:5])
    assert call_lengths == [4]


def test_a_seed_a_generator_and_the_default_generator_reproduce(model):
    ids, options = tokens(2, 4), {"max_new_tokens": NEW, "temperature": 2.0}
    seeded = model.generate(ids, seed=0, **options)
    generator = torch.Generator(ids.device).manual_seed(0)
    assert torch.equal(model.generate(ids, seed=generator, **options), seeded)
    assert not torch.equal(model.generate(ids, seed=generator, **options), seeded)
    assert not torch.equal(model.generate(ids, seed=6, **options), seeded)
    torch.manual_seed(5)
    by_default = model.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **options), by_default)


def test_modes_and_dropout_are_left_as_found():
    model = randomised(GPT1LMHeadModel(with_dropout()))
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    model.dropout_stream.advance()
    ids = tokens(1, 4)
    first = model.generate(ids, max_new_tokens=NEW)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW), first)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(ids, max_new_tokens=100)
    assert [module.training for module in model.modules()] == modes
    assert model.dropout_stream.step == 1
    model(ids, labels=ids).loss.backward()


def test_modes_are_left_as_found_by_an_error_on_the_way():
    model = randomised(GPT1LMHeadModel(config()))

    def fail(module, inputs):
        raise RuntimeError("on the way")

    model.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        model.generate(tokens(1, 4), max_new_tokens=1)
    assert all(module.training for module in model.modules())


def test_autocast_keeps_the_cache_in_its_dtype(model):
    ids = tokens(1, 5)
    with torch.autocast(ids.device.type, torch.bfloat16):
        actual = model.generate(ids, max_new_tokens=NEW)
        cache = KeyValueCache(2, capacity=8)
        with torch.no_grad():
            model(ids, cache=cache)
            k, _ = cache.layers[1].append(*[torch.zeros(1, 1, 4, 12, device=ids.device)] * 2)
    assert k.dtype == torch.bfloat16
    assert actual.shape == (1, 5 + NEW)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_new_tokens": 25},
            "a prompt of 8 tokens and 25 new ones are 33, expected at most n_positions 32",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens: 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature: -1.0, expected a finite number of at least 0"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": 0}, "top_k: 0, expected at least 1"),
        ({"top_p": 0.0}, r"top_p: 0.0, expected a share in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p: 1.1"),
        ({"attention_mask": torch.ones(2, 7)}, r"attention_mask: shape \(2, 7\), expected .*2, 8"),
        (
            {"attention_mask": torch.tensor([[1] * 8, [1] * 7 + [0]])},
            "attention_mask: row 1, expected padding on the left",
        ),
        (
            {"attention_mask": torch.tensor([[1, 0] * 3 + [1, 1], [1] * 8])},
            "attention_mask: row 0, expected padding on the left",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 8, [0] * 8])},
            "attention_mask: row 1, expected padding on the left",
        ),
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, r"input_ids: shape \(2, 0\)"),
        ({"input_ids": torch.ones(8, dtype=torch.int64)}, r"input_ids: shape \(8,\)"),
    ],
)
def test_arguments_that_are_refused(model, options, message):
    arguments = {"input_ids": tokens(2, 8), "max_new_tokens": 4, **options}
    arguments = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)


def test_the_last_position_can_be_filled(model):
    assert model.generate(tokens(1, 31), max_new_tokens=1).shape == (1, 32)


@pytest.mark.parametrize(("rows", "layers"), [(0, 2), (2, 0)])
def test_no_rows_and_no_layers(rows, layers):
    model = GPT1LMHeadModel(config(n_layer=layers)).to(DEVICE)
    assert model.generate(tokens(rows, 4), max_new_tokens=3).shape == (rows, 7)


def test_activation_checkpointing_changes_no_token(model):
    expected = model.generate(tokens(2, 4), max_new_tokens=NEW)
    model.activation_checkpointing_enable()
    actual = model.generate(tokens(2, 4), max_new_tokens=NEW)
    model.activation_checkpointing_disable()
    assert torch.equal(actual, expected)


def test_no_logits_but_the_last_and_no_graph(model):
    seen = []
    handle = model.register_forward_hook(lambda *call: seen.append(call[-1].logits))
    model.generate(tokens(2, 5), max_new_tokens=2)
    handle.remove()
    assert [logits.shape[:2] for logits in seen] == [(2, 1)] * 2
    assert not any(logits.requires_grad for logits in seen)


def test_a_cache_is_refused_where_it_would_mislead(model):
    ids = tokens(1, 4)
    with pytest.raises(ValueError, match="cache: the model is in training"):
        randomised(GPT1LMHeadModel(config()))(ids, cache=KeyValueCache(2, 8))
    with pytest.raises(ValueError, match="cache: 3 layers, expected 2"):
        model(ids, cache=KeyValueCache(3, 8))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=ids.device)
    with pytest.raises(ValueError, match="attention_mask: padding on the right"):
        model(ids.expand(2, 4), mask, cache=KeyValueCache(2, 8))
    cache = KeyValueCache(2, 40)
    with torch.no_grad():
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="attention_mask: expected None after the 4 positions"):
            model(ids, torch.ones_like(ids), cache=cache)
        with pytest.raises(ValueError, match="input_ids: 33 positions, expected at most"):
            model(tokens(1, 29), cache=cache)


def frequencies(logits, draws=20_000, **choice):
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(draws, -1), generator=generator, **choice)
    return drawn.bincount(minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize("temperature", [2e-38, 1e-320])
def test_tiny_temperatures_take_the_likeliest_token(temperature):
    assert choose(torch.tensor([[50.0, 60.0, -60.0]]), temperature).item() == 1


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0]),
        # Of the two likeliest, 4/7 alone holds half.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        # The share is of the tempered probabilities: 16/30 alone holds half.
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_in_proportion(choice, expected):
    p = frequencies(torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log(), **choice)
    expected = torch.tensor(expected)
    assert torch.equal(p > 0, expected > 0)
    # Five standard deviations of 20,000 draws.
    assert ((p - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_no_more_tokens_are_drawn_from_than_hold_top_p():
    assert (frequencies(torch.zeros(1, 4), temperature=1.0, top_p=0.5) > 0).sum() == 2


def test_logits_of_16_bits_are_drawn_from_in_fp32():
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, other = (
        choose(x, 1.0, top_p=0.9, generator=torch.Generator().manual_seed(0))
        for x in (logits, logits.float())
    )
    assert torch.equal(one, other)


def test_rows_draw_independently():
    logits = torch.zeros(64, 50)
    assert len(choose(logits, 1.0, generator=torch.Generator().manual_seed(0)).unique()) > 20
