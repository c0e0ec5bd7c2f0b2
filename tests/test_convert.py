"""OpenAI's release and Hugging Face folders, tiny and random, to folders of ours."""

import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from gpt1_kernels import (
    GPT1DoubleHeadsModel,
    GPT1ForSequenceClassification,
    GPT1LMHeadModel,
    GPT1Model,
    GPT1TaskModel,
)
from gpt1_kernels.convert import convert, read_release, read_tokenizer
from tests.models import config, randomised

V, P, C, LAYERS = 11, 16, 128, 2
ENCODER, MERGES = "encoder_bpe_40000.json", "vocab_40000.bpe"
ENTRIES = ["<unk>", "t", "h", "e", "t</w>", "h</w>", "e</w>", "th", "the</w>", "th</w>", "\n</w>"]
RELEASED = Path(__file__).parents[2] / "shared" / "data" / "gpt1_bpe"


def released_shapes(c=C):
    layer = [[1, c, 3 * c], [3 * c], [1, c, c], [c], [c], [c]]
    layer += [[1, c, 4 * c], [4 * c], [1, 4 * c, c], [c], [c], [c]]
    return [[P, c], [V, c], *layer * LAYERS]


def write_release(folder, c=C):
    folder.mkdir()
    shapes = released_shapes(c)
    (folder / "params_shapes.json").write_text(json.dumps(shapes))
    generator = np.random.default_rng(0)
    arrays = [0.2 * generator.standard_normal(shape, dtype=np.float32) for shape in shapes]
    flat = np.concatenate([array.ravel() for array in arrays])
    for i, part in enumerate(np.array_split(flat, 10)):
        np.save(folder / f"params_{i}.npy", part)
    return arrays


def write_vocabulary(folder):
    (folder / ENCODER).write_text(json.dumps({token: i for i, token in enumerate(ENTRIES)}))
    (folder / MERGES).write_text("#version: 0.2\nt h\nth e</w>\nt h</w>\n")


@pytest.fixture
def release(tmp_path):
    write_release(tmp_path / "release")
    return tmp_path / "release"


def theirs_from_the_release(arrays):
    """OpenAI's model in `transformers`, filled by the names of TensorFlow's variables."""
    transformers = pytest.importorskip("transformers")
    model = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(
            vocab_size=V, n_positions=P, n_embd=C, n_layer=LAYERS, n_head=C // 64
        )
    )
    positions, table, *rest = [torch.from_numpy(array) for array in arrays]
    order = ["attn/c_attn", "attn/c_proj", "ln_1", "mlp/c_fc", "mlp/c_proj", "ln_2"]
    with torch.no_grad():
        model.transformer.positions_embed.weight.copy_(positions)
        model.transformer.tokens_embed.weight.copy_(table)
        for block in model.transformer.h:
            for path in order:
                module = block.get_submodule(path.replace("/", "."))
                module.weight.copy_(rest.pop(0).squeeze(0))
                module.bias.copy_(rest.pop(0))
    assert not rest
    return model.eval()


def test_the_release_gives_the_logits_of_transformers(tmp_path):
    theirs = theirs_from_the_release(write_release(tmp_path / "release"))
    convert(tmp_path / "release", tmp_path / "ours")
    ours = GPT1LMHeadModel.from_pretrained(tmp_path / "ours")
    c = ours.config
    assert (c.vocab_size, c.n_positions, c.n_embd, c.n_layer, c.n_head) == (V, P, C, LAYERS, 2)
    ids = torch.randint(V, (2, P))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_transformers_opens_what_is_written(tmp_path, release):
    transformers = pytest.importorskip("transformers")
    write_vocabulary(release)
    convert(release, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(theirs, transformers.OpenAIGPTLMHeadModel)
    ours, ids = GPT1LMHeadModel.from_pretrained(tmp_path / "ours"), torch.randint(V, (2, P))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("The th het!")["input_ids"] == [8, 9, 2, 3, 4, 0]


def test_without_a_vocabulary_no_tokenizer_is_written(tmp_path, release):
    (tmp_path / "ours").mkdir()  # empty
    convert(release, tmp_path / "ours")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_heads_that_are_not_64_wide_are_asked_for(tmp_path):
    write_release(tmp_path / "release", c=48)
    with pytest.raises(ValueError, match=r"n_head: not given, and width 48 in .*params_shapes"):
        convert(tmp_path / "release", tmp_path / "ours")
    convert(tmp_path / "release", tmp_path / "ours", n_head=3)
    assert GPT1LMHeadModel.from_pretrained(tmp_path / "ours").config.n_head == 3


def test_no_heads_are_refused(tmp_path, release):
    """They were taken for heads that are not given."""
    with pytest.raises(ValueError, match="n_head: 0, expected an integer of at least 1"):
        convert(release, tmp_path / "ours", n_head=0)


def test_the_vocabulary_of_the_release():
    if not RELEASED.is_dir():
        pytest.skip("the released vocabulary is not at ../shared/data/gpt1_bpe")
    tokenizer = read_tokenizer(RELEASED, 40478)
    assert tokenizer.get_vocab_size() == 40478
    assert tokenizer.encode("The president is").ids == [481, 4735, 544]
    assert [tokenizer.token_to_id(t) for t in ("very</w>", "<unk>", "\n</w>")] == [963, 0, 40477]
    assert tokenizer.decode([481, 4735, 544]) == "the president is"


def reshape(i, shape):
    def damage(folder):
        file = folder / "params_shapes.json"
        shapes = json.loads(file.read_text())
        shapes[i] = shape
        file.write_text(json.dumps(shapes))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def save(name, array):
    return lambda folder: np.save(folder / name, array, allow_pickle=True)


def save_archive(name):
    def damage(folder):
        np.savez(folder / "archive.npz", np.zeros(3))
        (folder / "archive.npz").rename(folder / name)

    return damage


def change_length(name, by):
    def damage(folder):
        array = np.load(folder / name)
        np.save(folder / name, np.resize(array, len(array) + by))

    return damage


def cut(name):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (reshape(0, [P, C + 1]), "n_head: not given, and width 129 in .*params_shapes.json"),
        (reshape(1, [V, C + 64]), r"shapes.json: shape 1, tokens_embed.weight, is \[11, 192\]"
         r", expected \[11, 128\]"),
        (reshape(2, [1, C, C]), r"shape 2, h.0.attn.c_attn.weight, is \[1, 128, 128\], expected "
         r"\[1, 128, 384\]"),
        (reshape(20, [1, C, 2 * C]), r"shape 20, h.1.mlp.c_fc.weight, is"),
        (reshape(0, [P, 1, C]), "params_shapes.json: expected a list of shapes"),
        (reshape(3, 5), "params_shapes.json: expected a list of shapes"),
        (reshape(3, [-1]), "params_shapes.json: expected a list of shapes"),
        (write("params_shapes.json", b"[[16, 128], [11, 128], [3]]"), "params_shapes.json: expec"),
        (write("params_shapes.json", b"{}"), "params_shapes.json: expected a list of shapes"),
        (write("params_shapes.json", b"[[1,"), "params_shapes.json: not JSON"),
        (change_length("params_9.npy", -1), r"params_\*.npy: \d+ elements .*params_9 \d+.*exp"),
        (change_length("params_4.npy", 1), r"params_\*.npy: \d+ elements .*params_4 \d+.*expected"),
        (cut("params_3.npy"), "params_3.npy: not a whole .npy file"),
        (write("params_3.npy", b""), "params_3.npy: not a whole .npy file"),
        (write("params_3.npy", pickle.dumps(Bomb())), "params_3.npy: not a whole .npy file"),
        (save("params_3.npy", np.array([Bomb()], dtype=object)), "params_3.npy: not a whole"),
        (save("params_3.npy", np.zeros(3, dtype=np.int64)), r"params_3.npy: int64 \(3,\), exp"),
        (save_archive("params_3.npy"), "params_3.npy: an archive, expected one axis"),
        (save("params_3.npy", np.zeros((3, 1))), r"params_3.npy: float64 \(3, 1\), expected one"),
    ],
)  # fmt: skip
def test_row28_a_damaged_release_is_refused_by_name(tmp_path, release, damage, message):
    damage(release)
    with pytest.raises(ValueError, match=message):
        convert(release, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("params_7.npy", "params_7.npy: no such file"),
        ("params_shapes.json", "release: neither model.safetensors nor params_shapes.json in it"),
        (MERGES, f"{MERGES}: no such file"),
        (ENCODER, f"{ENCODER}: no such file"),
    ],
)
def test_a_missing_file_of_the_release_is_named(tmp_path, release, missing, message):
    write_vocabulary(release)
    (release / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert(release, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write(ENCODER, b'{"<unk>": 0, "a": 2}'), f"{ENCODER}: expected an object of tokens"),
        (write(ENCODER, b'["<unk>"]'), f"{ENCODER}: expected an object of tokens"),
        (write(ENCODER, b'{"<unk>": "0", "a": 1}'), f"{ENCODER}: expected an object of tokens"),
        (write(ENCODER, json.dumps({str(i): i for i in range(V + 1)}).encode()),
         f"{ENCODER}: 12 entries, expected at most the model's 11"),
        (write(MERGES, b"#version: 0.2\nx y\n"), f"{MERGES}: does not fit {ENCODER}"),
        (write(MERGES, b"#version: 0.2\nt h e\n"), f"{MERGES}: does not fit {ENCODER}"),
        (write(MERGES, b"\xff"), f"{MERGES}: not UTF-8"),
        (write("tokenizer.json", b"{}"), "tokenizer.json: not a tokenizer"),
    ],
)  # fmt: skip
def test_row28_a_damaged_vocabulary_is_refused_by_name(tmp_path, release, damage, message):
    write_vocabulary(release)
    if "12 entries" in message:
        (release / MERGES).write_text("#version: 0.2\n")
    damage(release)
    with pytest.raises(ValueError, match=message):
        convert(release, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("theirs_name", "ours_class"),
    [
        ("OpenAIGPTModel", GPT1Model),
        ("OpenAIGPTLMHeadModel", GPT1LMHeadModel),
        ("OpenAIGPTDoubleHeadsModel", GPT1DoubleHeadsModel),
        ("OpenAIGPTForSequenceClassification", GPT1ForSequenceClassification),
    ],
)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "not-stated"])
def test_a_hugging_face_folder_keeps_its_head(tmp_path, theirs_name, ours_class, stated):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, theirs_name)(
        transformers.OpenAIGPTConfig(
            vocab_size=V, n_positions=P, n_embd=24, n_layer=1, n_head=4, num_labels=3,
            pad_token_id=0,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    if not stated:
        file = tmp_path / "theirs" / "config.json"
        values = json.loads(file.read_text())
        del values["architectures"]
        file.write_text(json.dumps(values))
        if ours_class is GPT1Model:
            ours_class, theirs_name = GPT1LMHeadModel, "OpenAIGPTLMHeadModel"
    convert(tmp_path / "theirs", tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [theirs_name]
    ours = ours_class.from_pretrained(tmp_path / "ours")
    prefix = "" if ours_class is GPT1Model else "transformer."
    state = load_file(tmp_path / "ours" / "model.safetensors")
    assert state.keys() == ours.state_dict().keys()
    assert {name.removeprefix("transformer.") for name in theirs.state_dict()} - {
        "lm_head.weight"
    } == {name.removeprefix("transformer.") for name in state}
    for name, value in theirs.base_model.state_dict().items():
        assert torch.equal(state[prefix + name], value), name


def test_the_head_of_the_weights_outranks_the_configuration(tmp_path):
    model = randomised(GPT1ForSequenceClassification(config(num_labels=3)))
    model.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "architectures": ["OpenAIGPTLMHeadModel"]}))
    convert(tmp_path / "theirs", tmp_path / "ours", n_head=2)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["n_head"] == 2
    assert written["architectures"] == ["OpenAIGPTForSequenceClassification"]
    opened = GPT1ForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert torch.equal(opened.score.weight, model.score.weight.cpu())


def test_a_fine_tuned_model_keeps_its_classifier(tmp_path):
    model = randomised(GPT1TaskModel(config(num_labels=3)))
    model.save_pretrained(tmp_path / "fine-tuned")
    convert(tmp_path / "fine-tuned", tmp_path / "ours", n_head=2)
    opened = GPT1TaskModel.from_pretrained(tmp_path / "ours")
    assert opened.config.n_head == 2
    assert torch.equal(opened.classifier.weight, model.classifier.weight.cpu())
    assert torch.equal(opened.classifier.bias, model.classifier.bias.cpu())


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab-and-merges"])
def test_a_hugging_face_vocabulary_is_kept(tmp_path, form):
    source = tmp_path / "theirs"
    randomised(GPT1LMHeadModel(config())).save_pretrained(source)
    write_vocabulary(source)
    if form == "tokenizer.json":
        read_tokenizer(source, V).save(str(source / "tokenizer.json"))
    else:
        shutil.move(source / ENCODER, source / "vocab.json")
        shutil.move(source / MERGES, source / "merges.txt")
    convert(source, tmp_path / "ours")
    tokenizer = Tokenizer.from_file(str(tmp_path / "ours" / "tokenizer.json"))
    assert tokenizer.encode("The th").ids == [8, 9]
    assert tokenizer.decode([8, 9]) == "the th"
    vocabulary, merges = ((tmp_path / "ours" / name) for name in ("vocab.json", "merges.txt"))
    assert json.loads(vocabulary.read_text()) == {token: i for i, token in enumerate(ENTRIES)}
    assert merges.read_text() == "#version: 0.2\nt h\nth e</w>\nt h</w>\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "checkpoint.pkl"])
def test_row28_a_pickle_is_refused_and_not_executed(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"{name}: a pickle, which can run any code"):
        convert(tmp_path, tmp_path / "ours")


def test_row28_a_damaged_hugging_face_folder_is_refused_by_name(tmp_path):
    randomised(GPT1LMHeadModel(config())).save_pretrained(tmp_path / "theirs")
    cut("model.safetensors")(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
        convert(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("occupied", ["folder", "file"])
def test_nothing_is_overwritten(release, occupied):
    target = release if occupied == "folder" else release / "params_0.npy"
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        convert(release, target)


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "gpt1_kernels.convert")
    runpy.run_module("gpt1_kernels.convert", run_name="__main__")


def test_the_command(tmp_path, release, monkeypatch):
    run_command(monkeypatch, release, tmp_path / "ours", "--n-head", 4)
    opened = GPT1LMHeadModel.from_pretrained(tmp_path / "ours")
    assert opened.config.n_head == 4
    expected = read_release(release).state_dict()
    assert all(torch.equal(opened.state_dict()[name], value) for name, value in expected.items())


def test_the_command_ends_with_one_line_about_an_error(release, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run_command(monkeypatch, release, release)
    # A string is what the interpreter prints before it exits with 1.
    assert end.value.code == f"error: {release}: expected a new or empty folder"
