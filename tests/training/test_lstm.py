"""The LSTM baseline: its recurrence, what it cannot see, its folders, generation and errors."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gpt1_kernels import GPT1Config, GPT1LMHeadModel, use_backend
from gpt1_kernels.rng import keep_mask, keep_scale
from gpt1_kernels.task_model import HEAD_KEY
from tests.cases import DEVICE
from tests.models import T, V, randomised, tokens
from tests.models import config as transformer_config
from training import lstm, metrics

UNITS = 40
DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "summary_first_dropout"), 0.1)


@pytest.fixture(autouse=True)
def _portable():
    with use_backend("portable"):
        yield


def config(**overrides) -> GPT1Config:
    extra = {"model_type": lstm.MODEL_TYPE, lstm.UNITS: UNITS, **overrides.pop("extra", {})}
    return transformer_config(n_layer=1, extra=extra, **overrides)


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
def test_the_states_are_those_of_the_recurrence(dropout):
    """Hochreiter & Schmidhuber 1997 with a forget gate, step by step in fp64."""
    model = randomised(lstm.LSTMModel(config(**dropout)))
    ids, first_row = tokens(3, T), 5 * T
    seeds = model.dropout_stream.seeds(2)
    found = model(ids, dropout_seeds=seeds, row_offset=first_row).last_hidden_state

    w = {name: p.detach().double() for name, p in model.named_parameters()}

    def dropped(x, site):
        if not dropout:
            return x
        keep = keep_mask(seeds[site], x.shape[0] * T, x.shape[2], 0.1, first_row)
        return torch.where(keep.view(x.shape), x * keep_scale(0.1), 0)

    x = w["tokens_embed.weight"][ids] + w["positions_embed.weight"][:T]
    x = dropped(x, 0)
    h = c = torch.zeros(3, UNITS, dtype=torch.float64, device=DEVICE)
    states = []
    for t in range(T):
        gates = (
            x[:, t] @ w["h.0.lstm.weight_ih_l0"].T + w["h.0.lstm.bias_ih_l0"]
            + h @ w["h.0.lstm.weight_hh_l0"].T + w["h.0.lstm.bias_hh_l0"]
        )  # fmt: skip
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    y = dropped(torch.stack(states, 1), 2)
    expected = y @ w["h.0.c_proj.weight"].T + w["h.0.c_proj.bias"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_layer_runs_in_fp32_under_autocast():
    model, seen = randomised(lstm.LSTMModel(config())), []

    def note(module, args):
        seen.append((args[0].dtype, torch.is_autocast_enabled(args[0].device.type)))

    model.h[0].lstm.register_forward_pre_hook(note)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        state = model(tokens(3, T)).last_hidden_state
    assert seen == [(torch.float32, False)]
    assert state.dtype == torch.bfloat16


def test_no_state_sees_what_follows():
    model = randomised(lstm.LSTMModel(config())).eval()
    ids = tokens(2, T)
    other = ids.clone()
    other[:, 10:] = (other[:, 10:] + 1) % V
    one, changed = (model(x).last_hidden_state for x in (ids, other))
    assert torch.equal(one[:, :10], changed[:, :10])
    assert (one[:, 10:] != changed[:, 10:]).any(-1).all()


@pytest.mark.parametrize("head", ["sum", "choice"])
def test_padding_on_the_right_changes_nothing(head):
    shape = config(extra={HEAD_KEY: head}, num_labels=3)
    model = randomised(lstm.LSTMTaskModel(shape)).eval()
    ids, members = tokens(4, T), torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    extract = torch.tensor([9, 4, 7, 9], device=DEVICE)
    padded, short = model(ids, extract, members), model(ids[:, :10], extract, members)
    torch.testing.assert_close(padded.logits, short.logits, rtol=1e-5, atol=1e-6)
    assert padded.logits.shape == (2, 3 if head == "sum" else 2)


def test_micro_batches_draw_the_bits_of_the_whole_batch():
    model = randomised(lstm.LSTMModel(config(**DROPOUT)))
    ids, seeds = tokens(4, T), model.dropout_stream.seeds(0)
    whole = model(ids, dropout_seeds=seeds).last_hidden_state
    second = model(ids[2:], dropout_seeds=seeds, row_offset=2 * T).last_hidden_state
    torch.testing.assert_close(second, whole[2:])
    assert not torch.allclose(model(ids, dropout_seeds=model.dropout_stream.seeds(1))[0], whole)


@pytest.mark.parametrize("name", ["language_model", "task_model", "bare"])
def test_a_folder_opens_as_what_was_saved(tmp_path, name):
    cls = getattr(lstm.BACKBONES["lstm"], name)
    model = randomised(cls(config(extra={HEAD_KEY: "choice"})))
    model.save_pretrained(tmp_path)
    opened = getattr(lstm.backbone_at(tmp_path), name).from_pretrained(tmp_path)
    assert type(opened) is cls
    for key, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], value), key
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == [cls.__name__]
    assert (saved["model_type"], saved["lstm_units"]) == ("gpt1-lstm", UNITS)
    backbone = lstm.backbone_at(tmp_path).bare.from_pretrained(tmp_path)
    assert torch.equal(backbone.h[0].lstm.weight_hh_l0, model.state_dict()[
        next(key for key in load_file(tmp_path / "model.safetensors") if "weight_hh" in key)
    ])  # fmt: skip


def test_neither_takes_the_other_for_its_own(tmp_path):
    randomised(lstm.LSTMLMHeadModel(config())).save_pretrained(tmp_path / "lstm")
    randomised(GPT1LMHeadModel(transformer_config())).save_pretrained(tmp_path / "transformer")
    assert lstm.backbone_at(tmp_path / "transformer") is lstm.BACKBONES["transformer"]
    with pytest.raises(ValueError, match=r"weights: missing .*attn.*, unexpected .*lstm"):
        GPT1LMHeadModel.from_pretrained(tmp_path / "lstm")
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="gpt1-lstm"):
        transformers.AutoConfig.from_pretrained(tmp_path / "lstm")


@pytest.mark.parametrize("prompts", [1, 3])
def test_generation_goes_on_from_all_that_was_seen(prompts):
    model = randomised(lstm.LSTMLMHeadModel(config())).eval()
    ids = expected = tokens(prompts, 4)
    for _ in range(9):
        likeliest = model(expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, likeliest], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=9), expected)


def test_padding_on_the_left_is_refused():
    model = randomised(lstm.LSTMLMHeadModel(config())).eval()
    mask = torch.tensor([[0, 1, 1, 1]], device=DEVICE)
    with pytest.raises(RuntimeError, match="attention_mask: padding on the left"):
        model(tokens(1, 4), mask)


@pytest.mark.parametrize(("preset", "units"), [("gpt1", 2048), ("mini", 344)])
def test_the_units_are_the_papers_or_as_many_for_the_width(preset, units):
    shape, transformer = lstm.shape("lstm", preset), lstm.shape("transformer", preset)
    assert (shape.extra["lstm_units"], shape.n_layer) == (units, 1)
    assert transformer == GPT1Config.preset(preset)
    for name in ("n_embd", "n_positions", "vocab_size", "resid_pdrop"):
        assert getattr(shape, name) == getattr(transformer, name)


@pytest.mark.parametrize("units", [None, 0, 1.5])
def test_units_that_are_none_are_refused(units):
    with pytest.raises(ValueError, match=f"lstm_units: {units}, expected a whole number of at"):
        lstm.LSTMModel(config(extra={lstm.UNITS: units}))


def test_its_flops_counted_by_hand():
    n = transformer_config().n_embd
    weights = 4 * UNITS * (n + UNITS) + UNITS * n + V * n
    assert metrics.flops_per_token(lstm.LSTMLMHeadModel(config())) == 6 * weights
