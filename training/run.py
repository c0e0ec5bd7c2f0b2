"""The folder of a run: made, found again after an interruption, and never overwritten."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from training.checkpoint import MANIFEST, Checkpoint, newest
from training.config import PretrainConfig

if TYPE_CHECKING:
    from training.finetune_config import FinetuneConfig

CHECKPOINTS, CONFIG, RESULT = "checkpoints", "config.json", "result.json"
LOGS = ("metrics.jsonl", "samples.txt")

# What may change when a run goes on: how it runs and is watched, not what it computes. Where text
# and weights lie is free too, for their digests are part of the identity.
FREE = {
    "out", "resume", "data", "tokenizer", "text_column", "sentence_shuffled", "device", "backend",
    "compile", "cuda_graph", "accumulate", "eval_every", "sample_every", "checkpoint_every", "keep",
    "max_skipped", "data_dir", "custom", "skip_bad_rows", "model", "seeds",
}  # fmt: skip


def open_run(config: PretrainConfig | FinetuneConfig) -> Checkpoint | None:
    """Makes or finds the folder `config.out` and says where the run starts: None is update 0.

    Raises:
        FileExistsError: the folder holds something that is not an interrupted run.
        FileNotFoundError: there is no checkpoint at the path that --resume gives.
        NotADirectoryError, PermissionError: see `usable`.
        ValueError: no checkpoint is as it was written.
    """
    out = usable(config.out)
    checkpoint = newest(out / CHECKPOINTS)
    if config.resume == "auto" and checkpoint is not None:
        return checkpoint
    interrupted = config.resume == "auto" and (out / CONFIG).is_file()  # before any checkpoint
    if any(out.iterdir()) and not interrupted:
        raise FileExistsError(f"--out: {out} is not empty, expected a new folder")
    if config.resume in ("auto", "never"):
        return None
    return _at(Path(config.resume))


def usable(folder: Path) -> Path:
    """Creates a folder, or sees that it can be written to.

    Raises:
        NotADirectoryError: it, or a folder above it, is a file.
        PermissionError: it cannot be written to.
    """
    if folder.is_file():
        raise NotADirectoryError(f"--out: {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--out: {folder} cannot be written to")
    return folder


def identity(config: PretrainConfig | FinetuneConfig, **digests: str) -> dict[str, Any]:
    """What decides on the bits of a run, by name."""
    settings = {name: value for name, value in vars(config).items() if name not in FREE}
    return {**settings, **digests}


def require_same(checkpoint: Checkpoint, current: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs, unless the checkpoint's run has this identity."""
    saved = checkpoint.state["identity"]
    changed = [
        f"{name} {current.get(name)} (was {saved.get(name)})"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if changed:
        raise ValueError(
            f"{checkpoint.folder}: of a run with another configuration: {'; '.join(changed)}"
        )


def log_sizes(out: Path) -> dict[str, int]:
    """How long the logs of a run are now, in bytes."""
    return {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()}


def cut_logs(out: Path, sizes: Mapping[str, int]) -> None:
    """Takes from the logs what was written after a checkpoint, and is about to be again."""
    for name in LOGS:
        file, size = out / name, sizes.get(name, 0)
        if file.exists() and file.stat().st_size > size:
            os.truncate(file, size)


def read_result(out: Path) -> dict[str, Any] | None:
    """What a finished run ended with; None for one that has not finished."""
    file = out / RESULT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


class StopSignal:
    """Notices SIGTERM and Ctrl-C, so that the loop can save before it ends; a second one kills."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for caught in self._before:
            signal.signal(caught, signal.SIG_DFL)


def _at(path: Path) -> Checkpoint:
    if (path / MANIFEST).is_file():
        return Checkpoint.open(path)
    checkpoint = newest(path / CHECKPOINTS)
    if checkpoint is None:
        raise FileNotFoundError(
            f"--resume: {path} is no checkpoint and no run with one; "
            "expected auto, never, or the path of such"
        )
    return checkpoint
