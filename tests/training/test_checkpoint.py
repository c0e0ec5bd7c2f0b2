"""Checkpoints: bit for bit back, complete or not there, and refused once anything was changed."""

import errno
import pickle
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt1_kernels import GPT1LMHeadModel
from tests.models import randomised, tokens, with_dropout
from training import checkpoint as module
from training.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    Checkpoint,
    CheckpointWriter,
    checkpoints,
    newest,
)
from training.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from training.step import train_step
from training.tokenizer import Tokenizer

FILES = (
    "checkpoint.json", "config.json", "merges.txt", "model.safetensors", "optimizer.safetensors",
    "tokenizer.json", "tokenizer_config.json", "vocab.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the low, lower, lowest fence"], 40, at_most=True)


@pytest.fixture
def model():
    return randomised(GPT1LMHeadModel(with_dropout()))


@pytest.fixture
def optimizer(model):
    return make_optimizer(model, 1e-2, 0.1)


@pytest.fixture
def save(tmp_path, model, optimizer, tokenizer):
    """Makes an update and saves it: save(step, keep=0) → the folder of all."""

    def save(step: int, keep: int = 0):
        train_step(model, model.dropout_stream, optimizer, tokens(2, 8), step, 1e-2)
        writer = CheckpointWriter(tmp_path / "checkpoints", keep)
        writer.save(step, model, optimizer, tokenizer, {"note": step})
        writer.wait()
        return tmp_path / "checkpoints"

    return save


def test_weights_and_moments_come_back_bit_for_bit(save, model, optimizer):
    checkpoint = newest(save(7))
    assert (checkpoint.step, checkpoint.state) == (7, {"note": 7})
    other = randomised(GPT1LMHeadModel(with_dropout(initializer_range=0.5)))
    other_optimizer = make_optimizer(other, 1e-2, 0.1)
    checkpoint.restore(other, other_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    expected, actual = (
        optimizer_tensors(model, optimizer),
        optimizer_tensors(other, other_optimizer),
    )
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train_step(m, model.dropout_stream, o, tokens(2, 8), 8, 1e-2)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_it_opens_as_a_model_with_its_tokenizer(save, model, tokenizer):
    folder = save(1) / "step-00000001"
    assert {path.name for path in folder.iterdir()} == set(FILES)
    opened = GPT1LMHeadModel.from_pretrained(folder)
    assert torch.equal(
        opened(tokens(1, 5).cpu()).logits, model.cpu().eval()(tokens(1, 5).cpu()).logits
    )
    assert Tokenizer.open(folder).fingerprint == tokenizer.fingerprint


def test_updates_after_a_save_do_not_reach_what_is_being_written(
    tmp_path, model, optimizer, tokenizer, monkeypatch
):
    train_step(model, model.dropout_stream, optimizer, tokens(2, 8), 0, 1e-2)
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    writer, write = CheckpointWriter(tmp_path, 0), CheckpointWriter._write

    def late(*args):
        updated.wait()
        write(*args)

    updated = threading.Event()
    monkeypatch.setattr(CheckpointWriter, "_write", late)
    writer.save(1, model, optimizer, tokenizer, {})
    train_step(model, model.dropout_stream, optimizer, tokens(2, 8), 1, 1e-2)
    updated.set()
    writer.wait()
    saved = GPT1LMHeadModel.from_pretrained(tmp_path / "step-00000001").state_dict()
    for name, value in expected.items():
        assert torch.equal(saved[name].to(value.device), value), name


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3]), (1, [3]), (2, [2, 3])])
def test_the_newest_are_kept(save, keep, left):
    for step in (1, 2, 3):
        folder = save(step, keep)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:08d}" for n in left]


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    names = ["step-00000009", "step-00000010", "step-99999999", "step-100000000"]
    for name in reversed(names):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == names


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose(file):
    file.unlink()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def replace_by_a_pickle(file):
    file.write_bytes(pickle.dumps(Bomb()))


@pytest.mark.parametrize("damage", [cut, flip, lose, replace_by_a_pickle])
@pytest.mark.parametrize("name", FILES)
def test_row28_a_damaged_file_is_refused_by_name_and_the_one_before_is_used(
    save, capsys, name, damage
):
    save(1)
    folder = save(2)
    damage(folder / "step-00000002" / name)
    assert newest(folder).step == 1
    refusal = capsys.readouterr().out
    assert refusal.startswith(f"refused: {folder / 'step-00000002'}")
    assert name in refusal
    damage(folder / "step-00000001" / name)
    with pytest.raises(ValueError, match="none of 2 checkpoints can be used"):
        newest(folder)


def test_row28_a_refused_checkpoint_is_written_again(save):
    save(1)
    folder = save(2)
    flip(folder / "step-00000002" / "model.safetensors")
    save(2)
    assert newest(folder).step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_row28_a_refused_checkpoint_is_none_of_those_that_are_kept(save):
    """A run that goes on from the one before, and is stopped before it comes as far again."""
    save(1)
    folder = save(3)
    flip(folder / "step-00000003" / "model.safetensors")
    save(2, keep=1)
    assert newest(folder).step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_row28_a_changed_state_is_refused(save):
    manifest = save(1) / "step-00000001" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"note": 1', '"note": 2'))
    with pytest.raises(ValueError, match=r"checkpoint\.json: not as it was written"):
        Checkpoint.open(manifest.parent)


def test_row28_a_file_too_many_is_refused(save):
    folder = save(1) / "step-00000001"
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        Checkpoint.open(folder)


def test_row28_a_foreign_folder_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path / "step-00000009")
    with pytest.raises(ValueError, match=r"step-00000009/checkpoint\.json: not of a whole"):
        Checkpoint.open(tmp_path / "step-00000009")


@pytest.mark.parametrize("n_layer", [1, 3])
def test_row28_moments_of_another_model_are_refused(save, n_layer):
    moments = load_file(newest(save(1)).folder / OPTIMIZER)
    other = randomised(GPT1LMHeadModel(with_dropout(n_layer=n_layer)))
    other_optimizer = make_optimizer(other, 1e-2, 0.1)
    with pytest.raises(ValueError, match=rf"exp_avg.*h\.{min(n_layer, 2)}\."):
        load_optimizer_tensors(other, other_optimizer, moments)


def test_row29_all_has_reached_the_disk_when_a_checkpoint_takes_its_name(save, monkeypatch):
    synced = []
    monkeypatch.setattr(module, "sync", lambda path: synced.append(path.name))
    folder = save(1)
    assert sorted(synced[:-1]) == sorted([*FILES, "step-00000001.partial"])
    assert synced[-1] == folder.name


def test_row29_what_a_killed_save_left_behind_is_no_checkpoint(save, tmp_path):
    left = tmp_path / "checkpoints" / "step-00000005.partial"
    left.mkdir(parents=True)
    assert newest(left.parent) is None
    assert newest(save(1)).step == 1
    assert not left.exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")],
    ids=["os", "safetensors"],
)
def test_row29_a_full_disk_leaves_the_checkpoint_before(save, monkeypatch, error):
    folder = save(1)

    def full(*_):
        raise error

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="step-00000002: the checkpoint could not") as raised:
        save(2, keep=1)
    assert str(error) in str(raised.value)
    assert newest(folder).step == 1
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_save_raises_that_the_one_before_was_not_written(
    tmp_path, model, optimizer, tokenizer, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    writer = CheckpointWriter(tmp_path, 0)
    writer.save(1, model, optimizer, tokenizer, {})
    with pytest.raises(OSError, match="step-00000001: the checkpoint could not"):
        writer.save(2, model, optimizer, tokenizer, {})


def test_what_is_not_whole_is_no_checkpoint(tmp_path):
    for name in ("step-00000003", "step-00000006.partial", "step-00000001.removed.partial"):
        (tmp_path / name).mkdir()
    assert module.checkpoints(tmp_path) == [tmp_path / "step-00000003"]


def test_a_checkpoint_whose_removal_is_interrupted_is_none(tmp_path, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    (tmp_path / "step-00000003").mkdir()
    monkeypatch.setattr(module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module._remove(tmp_path / "step-00000003")
    assert module.checkpoints(tmp_path) == []
