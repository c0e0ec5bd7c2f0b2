"""The options of `finetune.py`; the defaults are the paper's recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.config import default_device, default_dtype, require, require_backend
from training.run import next_folder
from training.tasks import TASKS, Custom

CUSTOM = "custom"


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tunes GPT-1 on a task. The defaults are the paper's recipe."""

    task: str = "sst2"
    """cola, sst2, snli, mnli, qnli, scitail, rte, race, storycloze, mrpc, qqp, stsb, openbookqa, or
    custom."""
    data_dir: Path | None = None
    """Folder with the files of the task as they are distributed. Default: from Hugging Face,
    which has all but storycloze; `datasets` must be installed."""
    custom: Custom = field(default_factory=Custom)
    skip_bad_rows: bool = False
    """Leaves rows out that cannot be used, and names them. Default: the first stops the run."""
    train_examples: int | None = None
    """Trains on so many examples, always the same. Default: on all."""
    model: Path | None = None
    """A run of pretrain.py, one of its checkpoints, or a Hugging Face folder with its tokenizer.
    Default: none, a new model of shape --preset."""
    n_transfer: int | None = None
    """Takes the embeddings and so many blocks from --model and draws the rest anew; -1 takes
    nothing but shape and vocabulary. Default: everything."""
    preset: Annotated[Literal["gpt1", "mini"], tyro.conf.arg(metavar="{gpt1,mini}")] = "mini"
    """Shape of the model where --model is not given."""
    tokenizer: Path | None = None
    """Without --model: a tokenizer.json, or a folder with one or with OpenAI's two files. Default:
    one trained on the task's texts."""
    out: Path | None = None
    """Folder for everything that the run writes. Default: runs/<task>-N, a new one."""
    resume: str = "auto"
    """auto: from the newest checkpoint in --out, if there is one; never: --out must be new or
    empty. Or the path of a checkpoint, or of a run for its newest one, to start from while --out
    has none; of the same configuration."""
    epochs: int = 3
    """Passes over the training examples. The model after the best one is kept: by the task's first
    score over all validation examples, those of both subsets of MNLI and RACE together."""
    batch_size: int = 32
    """Examples in an update."""
    accumulate: int = 1
    """Micro-batches that an update is split into; the result is that of the whole batch."""
    learning_rate: float = 6.25e-5
    """Peak learning rate."""
    warmup: float = 0.002
    """Share of the updates until the peak."""
    lm_weight: float = 0.5
    """λ, the weight of the auxiliary language model; 0 leaves it out."""
    classifier_dropout: float = 0.1
    """Before the linear layer of the head."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on tensors of two or more dimensions."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    truncation: Annotated[
        Literal["longest", "released"], tyro.conf.arg(metavar="{longest,released}")
    ] = "longest"
    """How to cut what is longer than the model's positions: the longest part first, or every
    segment to half of the positions, as the released code does."""
    seed: int = 0
    """Of new weights, dropout and the order of the examples."""
    seeds: int = 1
    """Runs with so many seeds, from --seed on, and summarises them."""
    checkpoint_every: int | None = None
    """Updates between checkpoints. Default: an epoch."""
    keep: int = 1
    """How many of the newest checkpoints stay; 0 keeps all. The best epoch's model always does."""
    max_skipped: int = 10
    """An update whose loss or gradient is not finite is skipped; so many in a row, at a line of the
    log, stop the run."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: a GPU where there is one."""
    backend: str = "auto"
    """The kernels to run on: auto, or the name of a backend."""
    dtype: Annotated[Literal["fp32", "bf16"] | None, tyro.conf.arg(metavar="{fp32,bf16}")] = None
    """Of activations, by autocast. Default: bf16 on a GPU that multiplies in it, else fp32."""


def complete(config: FinetuneConfig) -> FinetuneConfig:
    """Fills what was not given, but for checkpoint_every, which needs the data.

    Raises:
        ValueError: a value out of range, an unknown name, or a GPU asked for and absent.
    """
    device = default_device(config.device)
    require(config, ("task",), {*TASKS, CUSTOM}.__contains__,
            f"one of {', '.join(TASKS)}, {CUSTOM}")  # fmt: skip
    config = replace(
        config,
        out=config.out or next_folder(config.task),
        device=str(device),
        dtype=config.dtype or default_dtype(device),
    )
    require(config, ("epochs", "batch_size", "accumulate", "seeds", "max_skipped"),
            lambda x: x >= 1, "at least 1")  # fmt: skip
    require(config, ("train_examples", "checkpoint_every"), lambda x: x is None or x >= 1,
            "at least 1")  # fmt: skip
    require(config, ("keep",), lambda x: x >= 0, "at least 0")
    require(config, ("learning_rate", "clip"), lambda x: 0 < x < math.inf, "above 0, and finite")
    require(config, ("lm_weight", "weight_decay"), lambda x: 0 <= x < math.inf,
            "at least 0, and finite")  # fmt: skip
    require(config, ("warmup", "classifier_dropout"), lambda x: 0 <= x < 1, "0 to less than 1")
    require(config, ("seed",), lambda x: 0 <= x < 2**63 - config.seeds, "0 to 2^63 - 1")
    require(config, ("accumulate",), lambda x: x <= config.batch_size,
            f"at most --batch-size {config.batch_size}")  # fmt: skip
    require(config, ("n_transfer",), lambda x: x is None or (x >= -1 and config.model is not None),
            "at least -1, with --model")  # fmt: skip
    require(config, ("tokenizer",), lambda x: x is None or config.model is None,
            "none beside --model, which has its own")  # fmt: skip
    require(config, ("resume",), lambda x: x in ("auto", "never") or config.seeds == 1,
            "auto or never with several --seeds")  # fmt: skip
    require(config, ("data_dir",), lambda x: x is None or config.task != CUSTOM,
            "none for --task custom, which has --custom.train")  # fmt: skip
    require_backend(config)
    return config
