"""The paper's analyses on your own checkpoint: `python training/ablations.py --model RUN …`.

Its table 5: what the auxiliary language model, pre-training and the Transformer are worth, each
taken out of an otherwise equal fine-tuning. With `--transfer` its figure 2, left: what every
pre-trained block is worth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tyro.conf import Suppress

from training import cli, finetune_config, run
from training.comparison import Comparison, ablations_table, compare, transfer_table
from training.config import require
from training.examples import form_of
from training.finetune import finetune_seeds, prepare, seeds_of
from training.finetune_config import FinetuneConfig
from training.lstm import BACKBONES, backbone_at, model_folder
from training.plots import plot_ablations, plot_transfer
from training.tasks import TASKS, Custom

Variant = Literal["full", "no-lm", "scratch", "lstm"]


@dataclass(frozen=True)
class AblationsConfig(FinetuneConfig):
    """Fine-tunes on every task, in every variant, with every seed, and compares the scores.

    A run has the folder <out>/<task>/<variant>/seed-N. The same command goes on where it was
    stopped, and repeats nothing. The recipe is that of finetune.py, with its options.
    """

    tasks: tuple[str, ...] = ("sst2", "snli", "stsb", "openbookqa")
    """By their names in finetune.py."""
    data_dir: Path | None = None
    """Folder with a folder of files for each task, of the task's name. Default: from Hugging Face,
    for which `datasets` must be installed."""
    model: Path | None = None
    """A run of pretrain.py, one of its checkpoints, or a Hugging Face folder with its tokenizer."""
    variants: tuple[Variant, ...] | None = None
    """full: the recipe; no-lm: without the auxiliary language model; scratch: without pre-training;
    lstm: from --lstm. Default: all, lstm where --lstm is given."""
    lstm: Path | None = None
    """A run of pretrain.py --backbone lstm."""
    transfer: bool = False
    """In place of the variants: takes nothing from --model, its embeddings, 1 block, 2, … all."""
    seeds: int = 3
    """Runs of each variant with so many seeds, from --seed on."""
    out: Path = Path("runs/ablations")
    """Folder for everything that the runs write, and for the comparison."""

    # Not to be chosen:
    task: Suppress[str] = "sst2"
    custom: Suppress[Custom] = field(default_factory=Custom)
    n_transfer: Suppress[int | None] = None
    preset: Suppress[str] = "mini"
    tokenizer: Suppress[Path | None] = None
    resume: Suppress[str] = "auto"


def main(config: AblationsConfig) -> None:
    config = complete(config)
    name, table_of, draw = (
        ("transfer", transfer_table, plot_transfer)
        if config.transfer
        else ("ablations", ablations_table, plot_ablations)
    )
    file = run.usable(config.out) / f"{name}.md"
    comparisons: dict[str, Comparison] = {}
    for task in config.tasks:
        comparisons[task] = finetune_variants(config, task)
        values = {
            "seeds": list(seeds_of(config)),
            "tasks": {k: asdict(c) for k, c in comparisons.items()},
        }
        run.write_json(file.with_suffix(".json"), values)
        file.write_text(table_of(comparisons), encoding="utf-8")
        draw(comparisons, file.with_suffix(".png"))
    print(file.read_text(encoding="utf-8"), end="")


def complete(config: AblationsConfig) -> AblationsConfig:
    """Fills what was not given.

    Raises:
        ValueError: a value out of range, an unknown name, a model on the wrong backbone, a GPU
            asked for and absent, or a task that Hugging Face does not have.
        FileNotFoundError: there are no files of a task, or no model.
    """
    config = finetune_config.complete(config)
    require(config, ("tasks",), lambda x: x and TASKS.keys() >= {*x}, f"some of {', '.join(TASKS)}")
    require(config, ("model",), lambda x: x is not None and stands_on(x, "transformer"),
            "a run of pretrain.py --backbone transformer")  # fmt: skip
    require(config, ("seeds",), lambda x: x >= 2, "at least 2, for an interval")
    require(config, ("variants",), lambda x: not (x and config.transfer), "none with --transfer")
    if not config.variants:
        possible = get_args(Variant)[: 3 if config.lstm is None else 4]
        config = replace(config, variants=() if config.transfer else possible)
    require(
        config, ("lstm",),
        lambda x: "lstm" not in config.variants if x is None else stands_on(x, "lstm"),
        "a run of pretrain.py --backbone lstm",
    )  # fmt: skip
    for task in config.tasks:
        form_of(TASKS[task], recipe(config, task).data_dir)
    return config


def stands_on(model: Path, backbone: str) -> bool:
    """Whether a model, or that of a run, has this backbone of `lstm.BACKBONES`."""
    return backbone_at(model_folder(model)) is BACKBONES[backbone]


def recipe(config: AblationsConfig, task: str, **changes: Any) -> FinetuneConfig:
    """The options of a fine-tuning on a task."""
    options = {f.name: getattr(config, f.name) for f in fields(FinetuneConfig)}
    folder = None if config.data_dir is None else config.data_dir / task
    return FinetuneConfig(**{**options, "task": task, "data_dir": folder, **changes})


def variants(config: AblationsConfig, n_layer: int) -> dict[str, dict[str, Any]]:
    """The options that each variant changes; those of --transfer are in the order of the blocks."""
    full, scratch = {}, {"n_transfer": -1}
    if config.transfer:
        blocks = {f"transfer-{k}": {"n_transfer": k} for k in range(n_layer)}
        return {"scratch": scratch, **blocks, "full": full}
    changes = {
        "full": full, "no-lm": {"lm_weight": 0.0}, "scratch": scratch,
        "lstm": {"model": config.lstm},
    }  # fmt: skip
    return {name: changes[name] for name in config.variants}


def finetune_variants(config: AblationsConfig, task: str) -> Comparison:
    """Runs what has not been run, and compares the results."""
    setups = {config.model: prepare(recipe(config, task))}
    if "lstm" in config.variants:
        setups[config.lstm] = prepare(recipe(config, task, model=config.lstm))
    setup, results = setups[config.model], {}
    for name, changes in variants(config, setup.shape.n_layer).items():
        own = recipe(config, task, out=config.out / task / name, **changes)
        results[name] = finetune_seeds(own, setups[own.model], config.out)
    examples = {"training": len(setup.train), "validation": len(setup.validation)}
    return compare(task, setup.task.scores[0], examples, results)


if __name__ == "__main__":
    cli.run(main, AblationsConfig)
