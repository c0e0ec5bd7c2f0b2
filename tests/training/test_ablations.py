"""The paper's analyses: what variants differ in, a sweep's folders, its tables and pictures."""

import json
import math
import os
import random
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
import tyro
from matplotlib.container import ErrorbarContainer
from safetensors.torch import load_file

from gpt1_kernels import GPT1Config, GPT1TaskModel
from tests.training.test_finetune import TASK_FILES, sentence
from training import ablations, finetune, lstm, plots
from training.ablations import AblationsConfig
from training.comparison import ABSENT, PAPER, ablations_table, compare, transfer_table
from training.tokenizer import Tokenizer

TASKS, SEEDS, N_LAYER = ("sst2", "openbookqa"), (7, 8), 2
VARIANTS = ("full", "no-lm", "scratch", "lstm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data of two tasks in `data`, and untrained models in `transformer` and `lstm`."""
    folder = tmp_path_factory.mktemp("ablations")
    for task in TASKS:
        (folder / "data" / task).mkdir(parents=True)
        TASK_FILES[task](folder / "data" / task, random.Random(task))
    texts = [sentence(random.Random(i), i % 2) for i in range(99)] + ["what of ?"]
    tokenizer = Tokenizer.train(texts, 80, at_most=True)
    shape = {
        "vocab_size": tokenizer.vocab_size, "n_positions": 24, "n_embd": 16, "n_head": 2,
    }  # fmt: skip
    shapes = {
        "transformer": GPT1Config(**shape, n_layer=N_LAYER),
        "lstm": GPT1Config(
            **shape, n_layer=1, extra={"model_type": lstm.MODEL_TYPE, lstm.UNITS: 24}
        ),
    }
    for name, config in shapes.items():
        torch.manual_seed(3)
        lstm.BACKBONES[name].language_model(config).save_pretrained(folder / name / "model")
        tokenizer.save(folder / name / "model")
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    """settings(**changes) → a configuration of two seeds and two updates a run."""

    def settings(**changes) -> AblationsConfig:
        chosen = {
            "tasks": TASKS, "data_dir": folder / "data", "model": folder / "transformer",
            "lstm": folder / "lstm", "seed": SEEDS[0], "seeds": len(SEEDS), "train_examples": 32,
            "batch_size": 16, "learning_rate": 5e-3, "epochs": 1, "device": "cpu",
            "backend": "portable", "out": folder / "out",
        }  # fmt: skip
        return AblationsConfig(**{**chosen, **changes})

    return settings


class Watched:
    """What the runs of a sweep start from, and whether they model language, by folder."""

    def __init__(self, patch: pytest.MonkeyPatch, out: Path):
        self.starts: dict[str, dict[str, torch.Tensor]] = {}
        self.language: dict[str, set[bool]] = defaultdict(set)
        make_model, forward = finetune.make_model, GPT1TaskModel.forward

        def made(config, setup):
            model = make_model(config, setup)
            self.now = str(config.out.relative_to(out))
            self.starts[self.now] = {k: v.clone() for k, v in model.state_dict().items()}
            return model

        def seen(model, input_ids, extract, members, lm_targets=None, *rest, **kwargs):
            if model.training:
                self.language[self.now].add(lm_targets is not None)
            return forward(model, input_ids, extract, members, lm_targets, *rest, **kwargs)

        patch.setattr(finetune, "make_model", made)
        patch.setattr(GPT1TaskModel, "forward", seen)


def sweep(config: AblationsConfig) -> Watched:
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(patch, config.out)
        patch.setattr(finetune, "plot_predictions", lambda *_: None)  # most of a small run's time
        ablations.main(config)
    return watched


@pytest.fixture(scope="module")
def watched(settings) -> Watched:
    return sweep(settings())


@pytest.fixture
def out(watched, folder, tmp_path) -> Path:
    """A copy of the folder that the sweep has left."""
    return Path(shutil.copytree(folder / "out", tmp_path / "out"))


def test_every_task_variant_and_seed_has_a_run_and_the_scores_are_theirs(watched, folder):
    out = folder / "out"
    runs = {f"{t}/{v}/seed-{s}" for t in TASKS for v in VARIANTS for s in SEEDS}
    assert watched.starts.keys() == runs
    assert {str(file.parent.relative_to(out)) for file in out.rglob("result.json")} == runs
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        "ablations.json", "ablations.md", "ablations.png",
    }  # fmt: skip
    report = json.loads((out / "ablations.json").read_text())
    assert report["seeds"] == list(SEEDS)
    for task, found in report["tasks"].items():
        results = {
            variant: [
                json.loads((out / task / variant / f"seed-{seed}" / "result.json").read_text())
                for seed in SEEDS
            ]
            for variant in VARIANTS
        }
        for split in ("validation", "training"):
            values = {v: [r[split]["accuracy"] for r in its] for v, its in results.items()}
            assert {v: x["values"] for v, x in found[split].items()} == values
        assert found["baseline"] == results["full"][0]["baseline"]["accuracy"]
        assert found["examples"] == {"training": 32, "validation": 40}
    assert report["tasks"].keys() == set(TASKS)


def test_a_second_call_repeats_nothing(out, settings, capsys):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not sweep(settings(out=out)).starts
    assert capsys.readouterr().out.endswith((out / "ablations.md").read_text())
    for path, content in before.items():
        assert path.suffix == ".png" or path.read_bytes() == content, path


def test_an_interrupted_sweep_goes_on_where_it_stopped(out, settings):
    missing, before = (
        out / "openbookqa" / "scratch" / "seed-8",
        (out / "ablations.json").read_text(),
    )
    shutil.rmtree(missing)
    (out / "ablations.json").unlink()
    assert sweep(settings(out=out)).starts.keys() == {"openbookqa/scratch/seed-8"}
    assert (out / "ablations.json").read_text() == before


def test_a_signal_names_the_folder_of_the_sweep(settings, tmp_path, monkeypatch, capsys):
    original = finetune.apply_losses

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(finetune, "apply_losses", interrupted)
    with pytest.raises(SystemExit):
        ablations.main(settings(out=tmp_path))
    assert f"saved at step 1; --out {tmp_path} goes on there\n" in capsys.readouterr().out


def test_another_recipe_is_refused(out, settings):
    with pytest.raises(ValueError, match=r"another configuration: learning_rate 0.1 \(was 0.005\)"):
        ablations.main(settings(out=out, learning_rate=0.1))


def same_as(start: dict, folder: Path) -> set[str]:
    """Names of the matrices that a run took from a model; biases are 0 and gains 1 in any."""
    source = load_file(folder / "model" / "model.safetensors")
    matrices = {name: value for name, value in source.items() if value.dim() > 1}
    return {
        n
        for n, value in matrices.items()
        if n in start and torch.equal(start[n][: len(value)], value)
    }


def blocks_of(folder: Path, blocks: range) -> set[str]:
    source = load_file(folder / "model" / "model.safetensors")
    names = {name for name, value in source.items() if value.dim() > 1 and ".h." in name}
    return {name for name in names if int(name.split(".")[2]) in blocks}


TABLES = {"transformer.tokens_embed.weight", "transformer.positions_embed.weight"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_variants_differ_in_what_they_say(watched, folder, task, seed):
    starts = {variant: watched.starts[f"{task}/{variant}/seed-{seed}"] for variant in VARIANTS}
    language = {v: watched.language[f"{task}/{v}/seed-{seed}"] for v in VARIANTS}
    assert language == {"full": {True}, "no-lm": {False}, "scratch": {True}, "lstm": {True}}
    everything = TABLES | blocks_of(folder / "transformer", range(N_LAYER))
    assert len(everything) == 2 + 4 * N_LAYER
    for variant, taken in (("full", everything), ("no-lm", everything), ("scratch", set())):
        assert same_as(starts[variant], folder / "transformer") == taken
    recurrent = blocks_of(folder / "lstm", range(1))
    assert len(recurrent) == 3
    assert same_as(starts["lstm"], folder / "lstm") == TABLES | recurrent
    for name, value in starts["full"].items():  # nothing else than what it says
        assert torch.equal(starts["no-lm"][name], value)
        assert starts["scratch"][name].shape == value.shape


def test_transfer_takes_exactly_so_many_blocks_and_shares_the_runs_of_both_ends(
    out, settings, folder
):
    config = settings(out=out, tasks=("sst2",), transfer=True)
    watched = sweep(config)
    assert watched.starts.keys() == {
        f"sst2/transfer-{k}/seed-{s}" for k in range(N_LAYER) for s in SEEDS
    }
    for k in range(N_LAYER):
        start = watched.starts[f"sst2/transfer-{k}/seed-7"]
        taken = same_as(start, folder / "transformer")
        assert taken == TABLES | blocks_of(folder / "transformer", range(k))
    found = json.loads((out / "transfer.json").read_text())["tasks"]["sst2"]
    assert list(found["validation"]) == ["scratch", "transfer-0", "transfer-1", "full"]
    lines = (out / "transfer.md").read_text().splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line[:1] == "|"}
    assert list(rows)[2:6] == ["nothing", "embeddings", "to block 1", "to block 2"]
    assert f"{found['training']['full']['mean']:.3f}" in rows["to block 2"]
    assert (out / "transfer.png").read_bytes().startswith(b"\x89PNG")


def results(**variants) -> dict[str, list[dict]]:
    """Made-up results with a baseline of 0.52."""
    return {
        name: [
            {"validation": {"f1": x}, "training": {"f1": x + 0.1}, "baseline": {"f1": 0.52}}
            for x in values
        ]
        for name, values in variants.items()
    }


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.60, 0.61, 0.62), "beats"),
        ((0.53, 0.60, 0.67), "no difference"),  # each above, and yet
        ((0.49, 0.52, 0.55), "no difference"),
        ((0.40, 0.41, 0.42), "worse"),
        ((0.52, 0.52, 0.52), "no difference"),  # the commonest class, always
        ((0.52 + 1e-6, 0.52 + 1e-6, 0.52 + 1e-6), "beats"),
    ],
)
def test_the_verdict_asks_whether_the_interval_excludes_the_baseline(values, verdict):
    found = compare("rte", "f1", {}, results(full=values)).validation["full"]
    assert found.verdict == verdict
    half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom
    assert found.interval == pytest.approx((np.mean(values) - half, np.mean(values) + half))


@pytest.mark.parametrize("value", [33 / 277, 57 / 277, 444 / 872])
@pytest.mark.parametrize("seeds", [2, 3, 12])
def test_equal_scores_are_no_difference_to_themselves(value, seeds):
    """The mean of 12 equal numbers may be rounded further away than their interval reaches."""
    made = [{"validation": {"f1": value}, "training": {"f1": 1}, "baseline": {"f1": value}}] * seeds
    assert compare("rte", "f1", {}, {"full": made}).validation["full"].verdict == "no difference"


def test_full_is_compared_with_the_others_seed_by_seed():
    """The seeds vary far more than the difference, which is the same in each."""
    scratch = np.array([0.5, 0.6, 0.7])
    found = compare(
        "rte", "f1", {},
        results(
            full=scratch + np.array([0.02, 0.021, 0.022]), scratch=scratch,
            lstm=scratch + np.array([0.1, 0.0, 0.0]),
        ),
    )  # fmt: skip
    assert found.full_against.keys() == {"scratch", "lstm"}
    assert found.full_against["scratch"].verdict == "beats"
    assert found.full_against["scratch"].mean == pytest.approx(0.021)
    assert found.full_against["lstm"].verdict == "no difference"


def test_the_first_score_of_the_task_is_the_one_that_is_compared(settings, monkeypatch):
    def prepare(config):
        return SimpleNamespace(
            task=finetune.TASKS[config.task], train=[], validation=[], shape=GPT1Config()
        )

    scores = {"f1": 0.5, "accuracy": 0.7}
    result = dict.fromkeys(("training", "validation", "baseline"), scores)
    monkeypatch.setattr(ablations, "prepare", prepare)
    monkeypatch.setattr(ablations, "finetune_seeds", lambda *_: [result] * 2)
    found = ablations.finetune_variants(settings(variants=("full",)), "mrpc")
    assert (found.score, found.baseline) == ("f1", 0.5)


def test_the_table_has_the_papers_numbers_beside_ours():
    made = results(full=(0.60, 0.61, 0.62), scratch=(0.49, 0.52, 0.55))
    examples = {"training": 5749, "validation": 1500}
    comparisons = {task: compare(task, "f1", examples, made) for task in ("rte", "openbookqa")}
    lines = ablations_table(comparisons).splitlines()
    rows = {row: cells for row, *cells in (line[2:-2].split(" | ") for line in lines[:9])}
    assert rows == {
        "": ["rte, f1", "openbookqa, f1"],
        "---": ["---", "---"],
        "full": ["0.610 (0.585 to 0.635), beats"] * 2,
        "scratch": ["0.520 (0.445 to 0.595), no difference"] * 2,
        "baseline": ["0.520"] * 2,
        "full against scratch": ["0.090 (0.040 to 0.140), beats"] * 2,
        "paper, full": ["0.560", ABSENT],
        "paper, scratch": ["0.538", ABSENT],
        "examples, training": ["5,749"] * 2,
    }


def test_the_papers_averages_are_those_of_its_columns():
    """Of its table 5, where the first column is the mean of the others, in per cent."""
    tasks = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
    printed = {"full": 74.7, "scratch": 59.9, "no-lm": 75.0, "lstm": 69.1}
    for variant, average in printed.items():
        assert 100 * np.mean([PAPER[task][variant] for task in tasks]) == pytest.approx(
            average, abs=0.07
        )


def test_the_read_off_transfer_is_shown_as_such():
    made = results(scratch=(0.4, 0.5), full=(0.6, 0.7), **{"transfer-0": (0.5, 0.6)})
    made = {name: made[name] for name in ("scratch", "transfer-0", "full")}
    table = transfer_table({task: compare(task, "f1", {}, made) for task in ("race", "sst2")})
    row = next(line for line in table.splitlines() if line.startswith("| paper"))
    assert row == f"| paper | about 0.4 to 0.6 |  | {ABSENT} |  |"
    assert (
        "| to block 1 | 0.650 (0.015 to 1.285), no difference | 0.750 (0.115 to 1.385) |" in table
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, before they are closed."""
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(plots.plt, "close", drawn.append)
        yield drawn
    for figure in drawn:
        plots.plt.close(figure)


def test_bars_have_the_means_their_intervals_and_the_papers_numbers(figures, tmp_path):
    made = results(full=(0.60, 0.61, 0.62), scratch=(0.49, 0.52, 0.55))
    comparisons = {task: compare(task, "f1", {}, made) for task in ("rte", "openbookqa")}
    plots.plot_ablations(comparisons, tmp_path / "bars.png")
    (axis,) = figures[0].axes
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers if len(bars) == 2]
    assert heights[0] == pytest.approx([0.61, 0.61])
    assert heights[1] == pytest.approx([0.52, 0.52])
    bars = next(c for c in axis.containers if isinstance(c, ErrorbarContainer))
    assert bars.lines[2][0].get_segments()[0][:, 1] == pytest.approx([0.585, 0.635], abs=1e-3)
    markers = [line.get_ydata() for line in axis.lines if line.get_marker() == "o"]
    assert [m[0] for m in markers[:2]] == [0.56, 0.538]
    assert all(np.isnan(m[1]) for m in markers[:2])
    assert matplotlib.image.imread(tmp_path / "bars.png").std() > 0


def test_transfer_is_drawn_against_blocks_on_validation_and_training_examples(figures, tmp_path):
    made = results(scratch=(0.4, 0.5), a=(0.5, 0.6), b=(0.5, 0.7), full=(0.6, 0.7))
    plots.plot_transfer({"rte": compare("rte", "f1", {}, made)}, tmp_path / "transfer.png")
    (axis,) = figures[0].axes
    validation, training, baseline = axis.lines
    assert validation.get_xdata().tolist() == training.get_xdata().tolist() == [-1, 0, 1, 2]
    assert validation.get_ydata() == pytest.approx([0.45, 0.55, 0.6, 0.65])
    assert training.get_ydata() == pytest.approx([0.55, 0.65, 0.7, 0.75])
    assert set(baseline.get_ydata()) == {0.52}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["nothing", "0", "1", "2"]
    assert len(axis.collections) == 2
    assert matplotlib.image.imread(tmp_path / "transfer.png").std() > 0


def test_the_command_takes_the_options_of_finetune():
    config = tyro.cli(AblationsConfig, args=[
        "--model", "run", "--data-dir", "data", "--tasks", "sst2", "rte", "--seeds", "5",
        "--variants", "full", "lstm", "--lstm", "other", "--learning-rate", "1e-4", "--epochs", "2",
    ])  # fmt: skip
    assert (config.tasks, config.variants) == (("sst2", "rte"), ("full", "lstm"))
    own = ablations.recipe(config, "rte", n_transfer=1)
    assert (own.task, own.data_dir, own.model) == ("rte", Path("data/rte"), Path("run"))
    assert (own.learning_rate, own.epochs, own.n_transfer, own.lm_weight) == (1e-4, 2, 1, 0.5)
    with pytest.raises(SystemExit):
        tyro.cli(AblationsConfig, args=["--n-transfer", "1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("sst2", "sst3")}, r"--tasks: \('sst2', 'sst3'\), expected some of cola, sst2"),
        ({"tasks": ()}, r"--tasks: \(\), expected some of cola, sst2"),
        ({"model": None}, "--model: None, expected a run of pretrain.py"),
        ({"model": "lstm"}, "--model: .*lstm, expected a run of pretrain.py --backbone transf"),
        ({"lstm": "transformer"}, "--lstm: .*, expected a run of pretrain.py --backbone lstm"),
        ({"lstm": "gone"}, "gone.config.json: no such file"),
        ({"seeds": 1}, "--seeds: 1, expected at least 2, for an interval"),
        ({"variants": ("full", "lstm"), "lstm": None}, "--lstm: None, expected a run of pretrain"),
        ({"variants": ("full",), "transfer": True}, "--variants: .* expected none with --transfer"),
        ({"tasks": ("sst2", "rte")}, "rte is no folder"),
        ({"tasks": ("sst2", "storycloze"), "data_dir": None}, "--data-dir: .* not on Hugging Face"),
        ({"epochs": 0}, "--epochs: 0, expected at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_anything_runs(settings, folder, tmp_path, changes, message):
    changes = {k: folder / x if isinstance(x, str) else x for k, x in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ablations.main(settings(out=tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("lstm", "expected"), [(False, VARIANTS[:3]), (True, VARIANTS)], ids=["without", "with"]
)
@pytest.mark.parametrize("variants", [None, ()], ids=["not-given", "none"])
def test_by_default_all_variants_are_run_that_can_be(settings, folder, lstm, variants, expected):
    given = folder / "lstm" if lstm else None
    assert ablations.complete(settings(lstm=given, variants=variants)).variants == expected
