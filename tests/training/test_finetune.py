"""Fine-tuning from end to end: all kinds of tasks, the start it takes, interruptions, seeds."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt1_kernels import GPT1Config, GPT1DoubleHeadsModel, GPT1LMHeadModel, GPT1TaskModel
from gpt1_kernels import pretrained as pretrained_files
from training import checkpoint, finetune, run
from training.examples import chosen
from training.finetune_config import FinetuneConfig, complete
from training.inputs import encode
from training.optim import warmup_linear
from training.tasks import Custom
from training.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[2]
CLOCK = "examples_per_second"
NOUNS = ("film", "story", "cast", "song", "plot", "scene", "actor", "ending")
GOOD, BAD = ("lovely", "brilliant"), ("awful", "boring")


def sentence(rng: random.Random, good: bool) -> str:
    return f"the {rng.choice(NOUNS)} is {rng.choice(GOOD if good else BAD)}"


def write_classification(folder, rng):
    """As SST-2 in GLUE, with a test set."""
    for name, count in (("train", 96), ("dev", 40)):
        rows = (f"{sentence(rng, label)}\t{label:d}" for label in rng.choices((0, 1), k=count))
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    rows = (f"{i}\t{sentence(rng, i % 2)}" for i in range(6))
    (folder / "test.tsv").write_text("\n".join(["index\tsentence", *rows]) + "\n")


def write_entailment(folder, rng):
    """As RTE in GLUE: does one praise follow from another?"""
    for name, count in (("train", 128), ("dev", 40)):
        rows = (
            f"{i}\t{sentence(rng, True)}\t{sentence(rng, label)}\t"
            + ("entailment" if label else "not_entailment")
            for i, label in enumerate(rng.choices((0, 1), k=count))
        )
        header = "index\tsentence1\tsentence2\tlabel"
        (folder / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n")


def write_similarity(folder, rng):
    """As STS-B: how many of the two are praise, so that the order does not matter."""
    for name, count in (("train", 128), ("dev", 40)):
        rows = (
            f"g\tf\t2012\t{i}\t{2.0 * (a + b)}\t{sentence(rng, a)}\t{sentence(rng, b)}"
            for i, (a, b) in enumerate(zip(*(rng.choices((0, 1), k=count) for _ in "ab"),
                                           strict=True))
        )  # fmt: skip
        (folder / f"sts-{name}.csv").write_text("\n".join(rows) + "\n")


def write_choice(folder, rng):
    """As OpenBookQA, with two or three answers: which one is praise?"""
    for name, count in (("train", 96), ("dev", 40)):
        rows = []
        for i in range(count):
            choices = [sentence(rng, False) for _ in range(rng.randint(2, 3))]
            right = rng.randrange(len(choices))
            choices[right] = sentence(rng, True)
            named = [{"text": x, "label": "ABC"[j]} for j, x in enumerate(choices)]
            question = {"stem": f"what of the {rng.choice(NOUNS)} ?", "choices": named}
            rows.append(
                json.dumps({"id": f"q{i}", "question": question, "answerKey": "ABC"[right]})
            )
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


TASK_FILES = {
    "sst2": write_classification,
    "rte": write_entailment,
    "stsb": write_similarity,
    "openbookqa": write_choice,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of data for each of the four kinds of tasks."""
    root = tmp_path_factory.mktemp("tasks")
    for name, write in TASK_FILES.items():
        (root / name).mkdir()
        write(root / name, random.Random(name))
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A model that was not trained, as pre-training leaves it: `<run>/model`."""
    folder = tmp_path_factory.mktemp("run")
    texts = [sentence(random.Random(i), i % 2) for i in range(99)] + ["what of ?"]
    tokenizer = Tokenizer.train(texts, 80, at_most=True)
    torch.manual_seed(3)
    shape = GPT1Config(
        vocab_size=tokenizer.vocab_size, n_positions=24, n_embd=32, n_layer=2, n_head=2
    )
    GPT1LMHeadModel(shape).save_pretrained(folder / "model")
    tokenizer.save(folder / "model")
    return folder


@pytest.fixture
def settings(data, pretrained, tmp_path):
    """settings(**changes) → a configuration for the tiny model on SST-2's files."""

    def settings(**changes) -> FinetuneConfig:
        task = changes.get("task", "sst2")
        chosen = {
            "task": task, "data_dir": data / task, "model": pretrained, "out": tmp_path / "out",
            "batch_size": 16, "learning_rate": 5e-3, "epochs": 3, "device": "cpu",
            "backend": "portable",
        }  # fmt: skip
        return FinetuneConfig(**{**chosen, **changes})

    return settings


def log_of(out: Path) -> list[dict]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != CLOCK} for row in rows]


@pytest.mark.parametrize("task", TASK_FILES)
def test_each_kind_of_task_is_learned_well_beyond_its_baseline(settings, task, capsys):
    config = settings(task=task, epochs=16)
    finetune.main(config)
    result = json.loads((config.out / "result.json").read_text())
    score = "pearson" if task == "stsb" else "accuracy"
    assert result["validation"][score] > result["baseline"][score] + 0.25
    assert result["validation"].keys() == result["baseline"].keys()
    assert f"validation: {score} {result['validation'][score]:.3f}" in capsys.readouterr().out
    logged = [row[f"validation {score}"] for row in log_of(config.out)
              if f"validation {score}" in row]  # fmt: skip
    assert len(logged) == config.epochs
    assert result["validation"][score] == max(logged)
    assert logged.index(max(logged)) == result["best epoch"] - 1
    assert (config.out / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_the_training_score_is_of_as_many_examples_as_validate(settings, monkeypatch):
    """A model that knows all labels gets them right, if they are set against its own examples."""
    asked, models = [], []

    def knowing(model, examples, *_):
        asked.append(examples)
        models.append(model)
        return np.array([example.label for example in examples])

    def counted(task, train, examples):
        return {"train": len(train), "examples": len(examples)}

    monkeypatch.setattr(finetune, "predict", knowing)
    monkeypatch.setattr(finetune.scores, "baseline", counted)
    monkeypatch.setattr(finetune.submissions, "write", lambda *_: None)
    config = settings(epochs=1)
    finetune.main(config)
    assert run.read_result(config.out)["training"] == {"accuracy": 1.0}
    assert run.read_result(config.out)["baseline"] == {"train": 96, "examples": 40}
    assert [len(examples) for examples in asked] == [40, 40, 40, 6]  # of the epoch, at the end
    assert models[0] is not models[1] is models[2] is models[3]  # the best, whichever epoch's
    digests = [{example.sequences[0].tobytes() for example in its} for its in asked]
    assert digests[0] == digests[2] != digests[1]
    setup = finetune.prepare(complete(config))
    assert digests[1] <= {example.sequences[0].tobytes() for example in setup.train}


def test_a_run_leaves_a_model_predictions_and_a_log(settings, data):
    config = settings(checkpoint_every=5, keep=0)
    finetune.main(config)
    steps = sorted(int(path.name[5:]) for path in (config.out / "checkpoints").iterdir())
    assert steps == [5, 10, 15, 18]
    epochs = [row["step"] for row in log_of(config.out) if "validation accuracy" in row]
    assert epochs == [6, 12, 18]
    assert {path.name for path in config.out.iterdir()} >= {
        "metrics.jsonl", "config.json", "result.json", "predictions.png", "predictions", "model",
        "checkpoints",
    }  # fmt: skip
    tokenizer = Tokenizer.open(config.out / "model")
    model = GPT1TaskModel.from_pretrained(config.out / "model")
    assert model.config.vocab_size == tokenizer.vocab_size + 3
    assert model.config.extra["id2label"] == {"0": "0", "1": "1"}
    v, expected = tokenizer.vocab_size, ["index\tprediction"]
    for row in (data / "sst2" / "test.tsv").read_text().splitlines()[1:]:
        index, text = row.split("\t")
        ids = torch.tensor([[v, *tokenizer.encode(text).tolist(), v + 2]])
        logits = model(ids, torch.tensor([ids.shape[1] - 1]), torch.tensor([[0]])).logits
        expected.append(f"{index}\t{int(logits.argmax())}")
    assert (config.out / "predictions" / "SST-2.tsv").read_text().splitlines() == expected


def test_the_defaults_are_the_papers_recipe(tmp_path):
    config = complete(FinetuneConfig(out=tmp_path))
    assert (config.learning_rate, config.batch_size, config.epochs) == (6.25e-5, 32, 3)
    assert (config.lm_weight, config.classifier_dropout, config.warmup) == (0.5, 0.1, 0.002)
    assert (config.clip, config.weight_decay, config.truncation) == (1.0, 0.01, "longest")


def test_the_options_reach_the_updates(settings, monkeypatch):
    made, apply_losses, buckets = [], finetune.apply_losses, finetune.Buckets

    def watched(model, optimizer, losses, rate, *, clip):
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        seeds = torch.initial_seed(), int(model.dropout_stream.key), *orders
        made.append((rate, clip, decays, seeds, model.config.summary_first_dropout))
        return apply_losses(model, optimizer, losses, rate, clip=clip)

    def ordered(lengths, batch_size, seed):
        orders.append(seed)
        return buckets(lengths, batch_size, seed)

    monkeypatch.setattr(finetune, "apply_losses", watched)
    monkeypatch.setattr(finetune, "Buckets", ordered)
    config, orders = settings(epochs=2, seed=4, train_examples=50, warmup=0.25), []
    finetune.main(replace(config, clip=0.5, weight_decay=0.3, classifier_dropout=0.2))
    rates = [5e-3 * warmup_linear(step, 0.25, 6) for step in range(6)]
    assert made == [(rate, 0.5, [0.3, 0.0], (4, 4, 4), 0.2) for rate in rates]


def test_what_is_too_long_is_cut_by_the_rule_that_was_asked_for(settings, data, tmp_path):
    shutil.copytree(data / "sst2", tmp_path / "data")
    with (tmp_path / "data" / "train.tsv").open("a") as file:
        file.write("the film is lovely " * 9 + "\t1\n")
    for truncation, length in (("longest", 24), ("released", 24 // 2)):
        config = settings(truncation=truncation, data_dir=tmp_path / "data")
        assert finetune.prepare(complete(config)).train[-1].length == length


def test_the_loss_is_the_papers(settings):
    """L2 + λ · L1 of the first batch at rate 0, against its formula on the same model in fp64."""
    config = complete(settings(epochs=1, lm_weight=0.5))
    setup = finetune.prepare(config)
    torch.manual_seed(0)
    model = finetune.make_model(config, setup).eval()  # no dropout
    batch = finetune.collate(setup.train[:5])
    (loss,) = finetune.micro_losses(model, batch, None, config, setup.task)

    def states(sequence):
        return model.transformer(torch.from_numpy(sequence)[None]).last_hidden_state[0].double()

    table = model.transformer.tokens_embed.weight.double()
    classifier, language = [], []
    for example in setup.train[:5]:
        (sequence,) = example.sequences
        h = states(sequence)
        targets = torch.from_numpy(sequence)[1:]
        language.append(torch.nn.functional.cross_entropy(h[:-1] @ table.T, targets))
        logits = h[-1] @ model.classifier.weight.double().T + model.classifier.bias
        classifier.append(-torch.log_softmax(logits, 0)[example.label])
    expected = torch.stack(classifier).mean() + 0.5 * torch.stack(language).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("task", ["sst2", "openbookqa"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_give_the_loss_and_gradient_of_the_whole_batch(settings, task, accumulate):
    """5 examples do not split evenly, and those of multiple choice differ in their answers."""
    results = []
    for parts in (1, accumulate):
        config = complete(settings(task=task, accumulate=parts))
        setup = finetune.prepare(config)
        torch.manual_seed(0)
        model = finetune.make_model(config, setup).train()
        model.dropout_stream.set_key(0)
        batch, seeds = finetune.collate(setup.train[:5]), model.dropout_stream.seeds(0)
        total = 0.0
        for loss in finetune.micro_losses(model, batch, seeds, config, setup.task):
            loss.backward()
            total += loss.item()
        results.append((total, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (split_loss, split_gradients) = results
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        distance = (split_gradients[name] - gradient).norm()
        assert distance <= 1e-5 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("task", TASK_FILES)
def test_row15_in_bf16_losses_and_gradients_stay_fp32(settings, task):
    losses, gradients = [], []
    for dtype in ("fp32", "bf16"):
        config = complete(settings(task=task, dtype=dtype))
        setup = finetune.prepare(config)
        torch.manual_seed(0)
        model = finetune.make_model(config, setup).eval()
        batch = finetune.collate(setup.train[:5])
        (loss,) = finetune.micro_losses(model, batch, None, config, setup.task)
        loss.backward()
        assert {x.dtype for x in (loss, *(p.grad for p in model.parameters()))} == {torch.float32}
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_predictions_in_training_are_made_without_dropout(settings):
    config = complete(settings(classifier_dropout=0.5))
    setup = finetune.prepare(config)
    model = finetune.make_model(config, setup).train()
    finetune.predict(model, setup.validation, config, setup.task)
    assert model.training
    assert model.dropout_stream.step == 0


def test_without_the_auxiliary_language_model_the_loss_is_the_classifiers(settings):
    config = complete(settings(lm_weight=0.0))
    setup = finetune.prepare(config)
    model = finetune.make_model(config, setup).eval()
    batch = finetune.collate(setup.train[:5])
    (loss,) = finetune.micro_losses(model, batch, None, config, setup.task)
    logits = model(batch.input_ids, batch.extract, batch.members).logits
    assert loss == torch.nn.functional.cross_entropy(logits, batch.labels)


@pytest.mark.parametrize("layers", [None, 2, 1, 0, -1])
def test_n_transfer_takes_the_tables_and_so_many_blocks(settings, pretrained, layers):
    config = settings(n_transfer=layers)
    setup = finetune.prepare(config)
    torch.manual_seed(0)
    model = finetune.make_model(config, setup)
    source = load_file(pretrained / "model" / "model.safetensors")
    taken = {
        name
        for name, value in source.items()
        if value.dim() > 1  # biases are 0 and gains 1 at the start of either
        and torch.equal(model.state_dict()[name][: len(value)], value)
    }
    tables = {f"transformer.{kind}_embed.weight" for kind in ("tokens", "positions")}
    blocks = 2 if layers is None else layers
    expected = {n for n in source if source[n].dim() > 1 and n not in tables
                and int(n.split(".")[2]) < blocks}  # fmt: skip
    assert taken == (expected | tables if blocks >= 0 else set())
    specials = model.transformer.tokens_embed.weight[-3:]
    assert model.config.vocab_size == source["transformer.tokens_embed.weight"].shape[0] + 3
    assert 0.01 < float(specials.detach().std()) < 0.03  # N(0, 0.02)


def test_a_fine_tuned_model_can_be_fine_tuned_again(settings, tmp_path):
    first = settings(task="rte", epochs=1)
    finetune.main(first)
    config = settings(model=first.out, out=tmp_path / "second", epochs=1)
    setup = finetune.prepare(config)
    model = finetune.make_model(config, setup)
    old = GPT1TaskModel.from_pretrained(first.out / "model")
    assert torch.equal(
        model.transformer.tokens_embed.weight, old.transformer.tokens_embed.weight
    )  # with its special tokens
    assert old.config.extra["id2label"] == {"0": "entailment", "1": "not_entailment"}
    assert model.config.extra["id2label"] == {"0": "0", "1": "1"}
    config = settings(model=first.out, task="stsb")
    assert "id2label" not in finetune.make_model(config, finetune.prepare(config)).config.extra


def test_scratch_needs_no_model(settings):
    config = settings(model=None, epochs=1, train_examples=40)
    finetune.main(config)
    model = GPT1TaskModel.from_pretrained(config.out / "model")
    assert (model.config.n_embd, model.config.n_layer) == (128, 4)
    rows = [row for row in log_of(config.out) if "loss" in row]
    assert rows[-1]["step"] == 40 // 16 - 1


def test_multiple_choice_opens_as_the_double_heads_model(settings):
    """Also in transformers, where its own tokenizer and model predict what was predicted here."""
    transformers = pytest.importorskip("transformers")
    config = settings(task="openbookqa", epochs=1)
    finetune.main(config)
    folder = config.out / "model"
    ours = GPT1TaskModel.from_pretrained(folder)
    other = GPT1DoubleHeadsModel.from_pretrained(folder)
    assert ours.state_dict().keys() == other.state_dict().keys()

    theirs = transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer)  # then the delimiter and the extract token
    lines = ["index\tprediction"]
    for row in map(json.loads, (config.data_dir / "dev.jsonl").read_text().splitlines()):
        stem = tokenizer(row["question"]["stem"])["input_ids"]
        scores = []
        for choice in row["question"]["choices"]:
            answer = tokenizer(choice["text"])["input_ids"]
            ids = torch.tensor([[[start, *stem, start + 1, *answer, start + 2]]])
            scores.append(theirs(ids).mc_logits.item())
        lines.append(f"{row['id']}\t{'ABC'[int(np.argmax(scores))]}")
    assert (config.out / "predictions" / "OpenBookQA.tsv").read_text().splitlines() == lines


def test_a_pair_in_either_order_trains_to_the_same_bits(settings):
    """With dropout: the outputs, the losses and every gradient of a batch of similarity."""
    config = complete(settings(task="stsb", classifier_dropout=0.5))
    setup = finetune.prepare(config)
    torch.manual_seed(0)
    model = finetune.make_model(config, setup).train()
    model.dropout_stream.set_key(0)
    seeds = model.dropout_stream.seeds(0)

    def results(examples):
        encoded = [encode(x, "similarity", setup.tokenizer, 24) for x in examples]
        batch = finetune.collate(encoded)
        model.zero_grad()
        (loss,) = finetune.micro_losses(model, batch, seeds, config, setup.task)
        loss.backward()
        logits = model(batch.input_ids, batch.extract, batch.members, dropout_seeds=seeds).logits
        return [logits, loss, *(p.grad.clone() for p in model.parameters())]

    pairs = setup.data.train[:5]
    swapped = [replace(pair, texts=pair.texts[::-1]) for pair in pairs]
    assert all(pair.texts[0] != pair.texts[1] for pair in pairs)
    assert all(map(torch.equal, results(pairs), results(swapped)))


def assert_same_run(out: Path, whole: Path) -> None:
    checkpoints = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == checkpoints
    for name in (
        "model/model.safetensors", f"checkpoints/{checkpoints[-1]}/model.safetensors",
        f"checkpoints/{checkpoints[-1]}/optimizer.safetensors", "predictions/SST-2.tsv",
        "result.json",
    ):  # fmt: skip
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture
def whole(settings, tmp_path) -> Path:
    finetune.main(settings(out=tmp_path / "whole"))
    return tmp_path / "whole"


@pytest.mark.parametrize("call", [3, 6, 13], ids=["first-epoch", "epoch-end", "last-epoch"])
def test_row29_an_interrupted_run_goes_on_to_the_same_bits(
    settings, whole, monkeypatch, capsys, call
):
    config, original, calls = settings(), finetune.apply_losses, iter(range(99))

    def interrupted(*args, **kwargs):
        if next(calls) == call - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "apply_losses", interrupted)
        with pytest.raises(SystemExit) as stopped:
            finetune.main(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert "in fp32, backend portable, to" in printed
    assert f"SIGTERM: saved at step {call}" in printed
    finetune.main(config)
    assert f"resumed from step {call}" in capsys.readouterr().out
    assert_same_run(config.out, whole)
    logged = {row["step"]: row for row in log_of(config.out) if "loss" in row}
    assert all(logged[row["step"]] == row for row in log_of(whole) if "loss" in row)


def test_a_signal_in_the_last_update_lets_the_run_end(settings, monkeypatch):
    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    config, original = settings(epochs=1, train_examples=16), finetune.apply_losses
    monkeypatch.setattr(finetune, "apply_losses", interrupted)
    finetune.main(config)
    assert run.read_result(config.out)["best epoch"] == 1


@pytest.mark.parametrize(
    ("module", "folder"),
    [
        (pretrained_files, "model"),
        (checkpoint, "step-00000012"),
        (checkpoint, "step-00000018"),
    ],
    ids=["best-model", "checkpoint", "last-checkpoint"],
)
def test_row29_a_full_disk_stops_the_run_and_loses_nothing(
    settings, whole, monkeypatch, module, folder
):
    """In the first epoch's model, and in a later epoch's checkpoint, when its model is there."""
    config, original = settings(), module.save_file

    def full(tensors, path, *args, **kwargs):
        if folder in str(path):
            raise SafetensorError("No space left on device (os error 28)")
        original(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(OSError, match=f"{folder}.* could not be written, .*No space left"):
            finetune.main(config)
    finetune.main(config)
    assert_same_run(config.out, whole)


def test_row28_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(settings, whole, capsys):
    config = settings(keep=2)
    finetune.main(config)
    newest = config.out / "checkpoints" / "step-00000018"
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (config.out / "result.json").unlink()
    capsys.readouterr()
    finetune.main(settings(keep=1))
    printed = capsys.readouterr().out
    assert f"refused: {newest / 'model.safetensors'}: not as it was written" in printed
    assert "resumed from step 12" in printed
    assert_same_run(config.out, whole)
    assert log_of(config.out) == log_of(whole)


def test_a_finished_run_says_so_and_another_configuration_is_refused(
    settings, whole, data, tmp_path, capsys
):
    finetune.main(settings(out=whole))
    assert "finished already, at step 18 of 18" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another configuration: .*lm_weight 0.25 \(was 0.5\)"):
        finetune.main(settings(out=whole, lm_weight=0.25))
    with pytest.raises(ValueError, match=r"another configuration: inputs"):
        finetune.main(settings(out=whole, train_examples=90))
    shutil.copytree(data / "sst2", tmp_path / "data")
    with (tmp_path / "data" / "dev.tsv").open("a") as file:  # it would choose another epoch
        file.write("the film is lovely\t1\n")
    with pytest.raises(ValueError, match=r"another configuration: inputs"):
        finetune.main(settings(out=whole, data_dir=tmp_path / "data"))
    with pytest.raises(ValueError, match="step-00000018 is at the last of 18 steps"):
        finetune.main(settings(resume=str(whole)))


@pytest.mark.parametrize("changed", ["label", "text", "classes", "weights", "text to test on"])
def test_what_makes_another_run(settings, data, pretrained, tmp_path, changed):
    shutil.copytree(data / "sst2", tmp_path / "data")
    shutil.copytree(pretrained, tmp_path / "run")
    files = {split: tmp_path / "data" / f"{name}.tsv" for split, name in
             (("train", "train"), ("validation", "dev"), ("test", "test"))}  # fmt: skip
    own = Custom(**files, texts=("sentence",), labels=("0", "1"))
    config = settings(task="custom", data_dir=None, model=tmp_path / "run", custom=own)
    before = finetune.prepare(config).digest
    if changed == "classes":
        config = replace(config, custom=replace(own, labels=("0", "1", "2")))
    elif changed == "weights":
        model = GPT1LMHeadModel.from_pretrained(tmp_path / "run" / "model")
        torch.nn.init.ones_(model.transformer.h[0].ln_1.bias)
        model.save_pretrained(tmp_path / "run" / "model")
    else:
        file = files["test" if "test" in changed else "train"]
        header, first, rest = file.read_text().split("\n", 2)
        if changed == "label":
            first = f"{first[:-1]}{1 - int(first[-1])}"
        else:
            first = first.replace("the", "the film", 1)
        file.write_text("\n".join([header, first, rest]))
    assert (finetune.prepare(config).digest == before) == (changed == "text to test on")


def test_the_examples_to_train_on_are_drawn_from_all(settings):
    every = finetune.prepare(settings()).data.train
    assert finetune.prepare(settings(train_examples=10)).data.train == chosen(every, 10)
    assert chosen(every, 10) != every[:10]


def test_a_tokenizer_is_learned_from_answers_too(settings):
    setup = finetune.prepare(settings(task="openbookqa", model=None))
    assert all(
        setup.tokenizer.encode(answer).all()  # 0 is <unk>
        for example in setup.data.train
        for answer in example.answers
    )


def test_a_run_forked_past_its_best_epoch_keeps_the_best_of_its_own(
    settings, tmp_path, monkeypatch
):
    """The best epoch's model stays with the run that was forked."""
    evaluate, worse = finetune.scores.evaluate, iter((0.9, 0.8))

    def ever_worse(task, examples, predictions):
        found = evaluate(task, examples, predictions)
        return {name: next(worse, score) for name, score in found.items()}

    config = settings(epochs=2, keep=0)
    with monkeypatch.context() as patch:
        patch.setattr(finetune.scores, "evaluate", ever_worse)
        finetune.main(config)
    assert run.read_result(config.out)["best epoch"] == 1
    first, last = (config.out / "checkpoints" / f"step-{step:08d}" for step in (6, 12))
    fork = replace(config, resume=str(first), out=tmp_path / "fork")
    finetune.main(fork)
    assert run.read_result(fork.out)["best epoch"] == 2
    name = "model.safetensors"
    assert (fork.out / "model" / name).read_bytes() == (last / name).read_bytes()


def test_several_seeds_are_run_and_summarised(settings, capsys):
    config = settings(seeds=3, seed=5, epochs=1)
    finetune.main(config)
    values = []
    for seed in (5, 6, 7):
        result = json.loads((config.out / f"seed-{seed}" / "result.json").read_text())
        values.append(result["validation"]["accuracy"])
        assert run.read_json(config.out / f"seed-{seed}" / "config.json")["seed"] == seed
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["seeds"] == [5, 6, 7]
    assert summary["validation"]["accuracy"]["median"] == np.median(values)
    assert summary["validation"]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert "accuracy over 3 seeds: median" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "name", "then"),
    [
        (finetune, "apply_losses", "resumed from step 1 "),
        (finetune.scores, "baseline", "finished already, at step 6 of 6"),
    ],
    ids=["first-update", "end"],
)
def test_a_signal_in_a_seed_keeps_the_next_from_starting(
    settings, monkeypatch, capsys, module, name, then
):
    config, original = settings(seeds=2, epochs=1), getattr(module, name)

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(SystemExit) as stopped:
            finetune.main(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"--out {config.out} goes on there\n" in capsys.readouterr().out  # not that of the seed
    assert [path.name for path in config.out.iterdir()] == ["seed-0"]
    finetune.main(config)
    assert then in capsys.readouterr().out
    assert (config.out / "summary.json").is_file()


def test_a_custom_task_from_the_command_line(settings, pretrained, tmp_path, monkeypatch):
    rng = random.Random(0)
    rows = [f'"{sentence(rng, i % 2)}, they say",{("poor", "fine")[i % 2]}' for i in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(["review,verdict", *rows]) + "\n")
    command = [
        sys.executable, str(REPOSITORY / "training" / "finetune.py"), "--task", "custom",
        "--model", str(pretrained), "--epochs", "1", "--batch-size", "8", "--device", "cpu",
        "--custom.train", "own.csv", "--custom.texts", "review", "--custom.label", "verdict",
        "--out", "out",
    ]  # fmt: skip
    # Kernels in Triton's interpreter would take minutes: here as a user would, without.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "PYTHONPATH": str(REPOSITORY)}, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("baseline: accuracy ")
    lines = (tmp_path / "out" / "predictions" / "predictions.tsv").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines[1:]} <= {"fine", "poor"}

    monkeypatch.chdir(tmp_path)
    own = Custom(train=Path("own.csv"), texts=("body",), label="verdict")
    with pytest.raises(ValueError, match=r"^own.csv:2: no column 'body', it has review, verdict$"):
        finetune.main(settings(task="custom", data_dir=None, custom=own))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("task", "sst3", "one of cola, sst2"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("seeds", 0, "at least 1"),
        ("accumulate", 17, "at most --batch-size 16"),
        ("lm_weight", -0.5, "at least 0, and finite"),
        ("warmup", 1.0, "0 to less than 1"),
        ("classifier_dropout", -0.1, "0 to less than 1"),
        ("n_transfer", -2, "at least -1, with --model"),
        ("tokenizer", Path("x"), "none beside --model"),
        ("checkpoint_every", 0, "at least 1"),
        ("train_examples", 0, "at least 1"),
        ("backend", "fast", "one of auto"),
        ("learning_rate", float("inf"), "above 0, and finite"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(settings, option, value, expected):
    with pytest.raises(ValueError) as raised:
        finetune.main(settings(**{option: value}) if option != "task" else FinetuneConfig("sst3"))
    flag = "--" + option.replace("_", "-")
    assert str(raised.value).startswith(f"{flag}: {value}, expected {expected}")


def test_several_seeds_do_not_start_from_one_checkpoint(settings):
    with pytest.raises(ValueError, match="--resume: x, expected auto or never with several --seed"):
        finetune.main(settings(resume="x", seeds=2))


def test_more_blocks_than_the_model_has_are_refused(settings):
    with pytest.raises(ValueError, match=r"--n-transfer: 3, expected at most the model's 2"):
        finetune.main(settings(n_transfer=3))


def test_a_model_that_is_not_of_its_tokenizer_is_refused(settings, pretrained, tmp_path):
    GPT1LMHeadModel(GPT1Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "odd"
    )
    Tokenizer.open(pretrained / "model").save(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"--model: .*odd has 9 tokens, expected the \d+ of its"):
        finetune.main(settings(model=tmp_path / "odd"))


def test_row30_updates_that_are_not_finite_stop_the_run(settings, monkeypatch):
    def bad(*args):
        for loss in original(*args):
            yield loss * torch.nan

    original = finetune.micro_losses
    monkeypatch.setattr(finetune, "micro_losses", bad)
    with pytest.raises(FloatingPointError, match=r"updates 0 to 5 skipped.*: 6 in a row"):
        finetune.main(settings(max_skipped=6))


def test_row30_an_update_that_is_not_finite_is_skipped_and_counted(settings, monkeypatch):
    def bad(*args):
        factor = torch.nan if next(calls) == 3 else 1.0
        for loss in original(*args):
            yield loss * factor

    original, calls, config = finetune.micro_losses, iter(range(99)), settings(keep=0)
    monkeypatch.setattr(finetune, "micro_losses", bad)
    last = config.out / "checkpoints" / "step-00000018"
    for _ in ("run", "resumed from step 12"):
        shutil.rmtree(last, ignore_errors=True)
        finetune.main(config)
        skipped = {row["step"]: row["skipped"] for row in log_of(config.out) if "loss" in row}
        assert (skipped[0], skipped[5], skipped[17]) == (0, 1, 1)
    weights = load_file(last / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_custom_task_takes_no_data_dir(settings):
    with pytest.raises(ValueError, match=r"--data-dir: .*, expected none for --task custom"):
        finetune.main(settings(task="custom", data_dir=Path("x"), custom=Custom()))


def test_the_run_of_another_seed_is_another(settings, whole, tmp_path):
    finetune.main(settings(out=tmp_path / "other", seed=1))
    one, other = (load_file(folder / "model" / "model.safetensors")
                  for folder in (whole, tmp_path / "other"))  # fmt: skip
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert run.read_result(whole).keys() == run.read_result(tmp_path / "other").keys()
