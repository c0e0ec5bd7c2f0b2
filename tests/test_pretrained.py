"""Model folders: what is accepted, what is refused, and under which name."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpt1_kernels import (
    GPT1Config,
    GPT1DoubleHeadsModel,
    GPT1ForSequenceClassification,
    GPT1LMHeadModel,
    GPT1Model,
    GPT1TaskModel,
    pretrained,
)
from gpt1_kernels.convert import convert
from gpt1_kernels.task_model import HEAD_KEY
from tests.models import config, randomised, tokens

TABLE = "transformer.tokens_embed.weight"
FC = "transformer.h.0.mlp.c_fc.weight"
CLASSES = [GPT1Model, GPT1LMHeadModel, GPT1DoubleHeadsModel, GPT1ForSequenceClassification]


@pytest.fixture
def folder(tmp_path):
    randomised(GPT1LMHeadModel(config())).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state) or state, folder / "model.safetensors")


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_folder_gives_back_the_same_model(tmp_path, model_class):
    values = {
        "resid_pdrop": 0.2, "embd_pdrop": 0.3, "attn_pdrop": 0.4, "summary_first_dropout": 0.6,
        "layer_norm_epsilon": 1e-3, "initializer_range": 0.1, "problem_type": "regression",
        "pad_token_id": 5, "num_labels": 1, "extra": {"hello": [1, 2]},
    }  # fmt: skip
    model = randomised(model_class(config(**values)))
    model.save_pretrained(tmp_path / "new" / "folder")
    opened = model_class.from_pretrained(tmp_path / "new" / "folder")
    assert opened.config.extra["hello"] == [1, 2]
    assert vars(opened.config) | {"extra": model.config.extra} == vars(model.config)
    assert not opened.training
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name].to(value.device), value), name


def test_the_tied_table_is_saved_once_under_the_name_of_the_input(folder):
    state = load_file(folder / "model.safetensors")
    assert TABLE in state
    assert "lm_head.weight" not in state
    assert not [name for name in state if "dropout" in name]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {k.removeprefix("transformer."): v for k, v in s.items()},
        lambda s: {("lm_head.weight" if k == TABLE else k): v for k, v in s.items()},
        lambda s: {**s, "lm_head.weight": s[TABLE].clone()},
        lambda s: {**s, "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32)},
        lambda s: {**s, "transformer.position_ids": torch.arange(32)},
    ],
    ids=["no-prefix", "table-as-head", "table-twice", "mask", "positions"],
)
def test_names_that_other_releases_used(folder, change):
    expected = GPT1LMHeadModel.from_pretrained(folder)
    edit(folder, change)
    opened, ids = GPT1LMHeadModel.from_pretrained(folder), tokens(1, 5).cpu()
    assert torch.equal(opened(ids).logits, expected(ids).logits)


def test_a_backbone_opens_in_a_model_with_a_head_of_its_own(folder):
    model = GPT1ForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model.score.weight.shape == (3, 48)
    assert torch.equal(
        model.transformer.tokens_embed.weight, load_file(folder / "model.safetensors")[TABLE]
    )


@pytest.mark.parametrize("model_class", [GPT1TaskModel, *CLASSES[2:]])
def test_a_language_model_leaves_out_the_head_of_another(tmp_path, model_class):
    model, ids = randomised(model_class(config())), tokens(1, 5).cpu()
    model.save_pretrained(tmp_path)
    opened = GPT1LMHeadModel.from_pretrained(tmp_path)
    expected = GPT1Model.from_pretrained(tmp_path)(ids).last_hidden_state
    torch.testing.assert_close(opened.transformer(ids).last_hidden_state, expected)
    other = {GPT1ForSequenceClassification: GPT1DoubleHeadsModel}
    with pytest.raises(ValueError, match="unexpected"):  # its own would be drawn anew
        other.get(model_class, GPT1ForSequenceClassification).from_pretrained(tmp_path)


def without(name):
    return lambda s: {k: v for k, v in s.items() if k != name}


def test_half_a_head_is_not_drawn_anew(tmp_path):
    GPT1TaskModel(config()).save_pretrained(tmp_path)
    edit(tmp_path, without("classifier.bias"))
    with pytest.raises(ValueError, match=r"missing \['classifier.bias'\]"):
        GPT1TaskModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.h.1.ln_1.weight"), r"missing \['transformer.h.1.ln_1.weight'\]"),
        (lambda s: {**s, "h.7.ln_1.weight": torch.ones(48)}, r"unexpected \['transformer.h.7"),
        (
            lambda s: {**s, TABLE: torch.ones(7, 48)},
            rf"{TABLE}: shape \(7, 48\), expected \(103, 48\)",
        ),
        (
            lambda s: {**s, FC: s[FC].t().contiguous()},
            rf"{FC}: shape \(192, 48\), expected \(48, 192\)",
        ),
        (lambda s: {**s, "lm_head.weight": 2 * s[TABLE]}, f"{TABLE}: two tensors that differ"),
    ],
    ids=["missing", "unexpected", "shape", "transposed", "untied"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        GPT1LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        GPT1LMHeadModel.from_pretrained(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize("damage", ["cut", "pickle", "header"])
def test_row28_a_damaged_file_is_refused_and_nothing_executed(folder, damage):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "pickle": pickle.dumps(Bomb()),
            "header": (2**60).to_bytes(8, "little") + whole[8:],
        }[damage]
    )
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole"):
        GPT1LMHeadModel.from_pretrained(folder)


def test_weights_given_are_written_in_any_layout(folder):
    model = GPT1LMHeadModel.from_pretrained(folder)
    state = {name: 2 * x for name, x in model.state_dict().items()}
    state[FC] = state[FC].t().contiguous().t()
    model.save_pretrained(folder, state)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], x) for name, x in state.items())


def test_row29_weights_that_cannot_be_written_are_named(folder, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: could not be written, No space left"):
        GPT1LMHeadModel(config()).save_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"), [('{"n_embd": 48,', "not JSON"), ("[]", "list, expected an object")]
)
def test_row28_a_damaged_configuration_is_refused_by_name(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        GPT1LMHeadModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        convert(folder, folder / "ours")


def test_an_activation_of_another_kind_is_refused(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "afn": "relu"}))
    with pytest.raises(ValueError, match="afn: 'relu', expected 'gelu'"):
        GPT1LMHeadModel.from_pretrained(folder)


def test_the_paper_is_the_default_configuration():
    c = GPT1Config.preset("gpt1")
    assert c == GPT1Config()
    assert (c.vocab_size, c.n_positions, c.n_embd, c.n_layer, c.n_head) == (40478, 512, 768, 12, 12)
    assert {c.resid_pdrop, c.embd_pdrop, c.attn_pdrop, c.summary_first_dropout} == {0.1}
    assert (c.layer_norm_epsilon, c.initializer_range) == (1e-5, 0.02)
    with torch.device("meta"):
        model = GPT1LMHeadModel(c)
    assert sum(p.numel() for p in model.parameters()) == 116_534_784


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 50, "n_head": 4}, "n_embd: 50, expected a multiple of n_head 4"),
        ({"vocab_size": 0}, "vocab_size: 0, expected an integer of at least 1"),
        ({"n_layer": -1}, "n_layer: -1, expected an integer of at least 0"),
        ({"n_layer": 2.0}, "n_layer: 2.0, expected an integer"),
        ({"n_head": None}, "n_head: None, expected an integer"),
        ({"attn_pdrop": 1.5}, r"attn_pdrop: 1.5, expected a probability"),
        ({"afn": "swish"}, "afn: 'swish'"),
        ({"problem_type": "regresion"}, "problem_type: 'regresion', expected None or"),
    ],
)
def test_configurations_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GPT1Config(**values)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset: 'gpt5', expected one of gpt1, mini"):
        GPT1Config.preset("gpt5")


def test_a_configuration_survives_its_dictionary():
    values = {**config().to_dict(), "afn": "gelu", "n_special": 0, "id2label": {"0": "a", "1": "b"}}
    del values["num_labels"]
    c = GPT1Config.from_dict(values)
    assert c.num_labels == 2
    assert GPT1Config.from_dict({**values, "num_labels": 3}).num_labels == 3
    assert c.extra["n_special"] == 0
    assert GPT1Config.from_dict(c.to_dict()) == c
    aliases = {"num_hidden_layers": values.pop("n_layer"), "num_attention_heads": 4}
    assert GPT1Config.from_dict({**values, **aliases}).n_layer == c.n_layer
    assert (c.hidden_size, c.max_position_embeddings) == (c.n_embd, c.n_positions)
    assert (c.num_hidden_layers, c.num_attention_heads) == (c.n_layer, c.n_head)
    assert copy.deepcopy(c) == c
    c.num_hidden_layers = 7
    assert (c.n_layer, c.num_hidden_layers) == (7, 7)
    with pytest.raises(AttributeError, match="GPT1Config has no 'hidden_sizes'"):
        _ = c.hidden_sizes


def test_arguments_that_a_configuration_does_not_have_are_named(folder):
    with pytest.raises(TypeError, match="n_layers, tied: expected keys among afn, "):
        GPT1LMHeadModel.from_pretrained(folder, n_layers=3, tied=False)
    labels = dict.fromkeys(range(5), "x")
    model = GPT1ForSequenceClassification.from_pretrained(folder, id2label=labels)
    assert model.score.out_features == 5
    model = GPT1TaskModel.from_pretrained(folder, extra={HEAD_KEY: "choice"})
    assert (model.head, model.config.extra["model_type"]) == ("choice", "openai-gpt")
    read = pretrained.read_config(folder, extra={"architectures": []})
    assert read.extra["architectures"] == []


def test_the_dtype_is_that_of_the_weights(folder):
    for dtype, written in ((torch.bfloat16, "bfloat16"), (None, "float32")):
        model = GPT1LMHeadModel.from_pretrained(folder, dtype=dtype)
        assert (model.dtype, model.device.type) == (dtype or torch.float32, "cpu")
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["dtype"] == written
    model.half().save_pretrained(folder, is_main_process=False, save_function=torch.save)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_weights_are_rounded_to_no_dtype_but_the_one_asked_for(folder):
    edit(folder, lambda s: {k: torch.rand_like(x, dtype=torch.float64) for k, x in s.items()})
    model = GPT1LMHeadModel.from_pretrained(folder, dtype=torch.float64)
    assert torch.equal(model.state_dict()[FC], load_file(folder / "model.safetensors")[FC])


def test_a_model_without_memory_takes_no_weights(folder):
    with torch.device("meta"), pytest.raises(ValueError, match="model is on the meta device"):
        GPT1LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("summary_type", "first"),
        ("summary_use_proj", False),
        ("summary_activation", "tanh"),
        ("summary_proj_to_labels", False),
    ],
)
def test_another_multiple_choice_head_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}: {value!r}, expected"):
        GPT1DoubleHeadsModel(config(extra={key: value}))
