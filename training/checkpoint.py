"""Checkpoints that survive interruptions: written under another name, synced, renamed, verified.

    <run>/checkpoints/step-00001500/
        model.safetensors  config.json       opens with from_pretrained, here and in transformers
        tokenizer.json  tokenizer_config.json  vocab.json  merges.txt
        optimizer.safetensors                both moments of AdamW, by parameter name
        checkpoint.json                      the run's state, and the digest of every file

A checkpoint grows in `<name>.partial` and takes its name when all of it has reached the disk, so a
folder of that name is complete. `checkpoint.json` makes sure of it: a file that was cut short,
changed, added or removed since is noticed before anything is loaded. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt1_kernels.pretrained import WEIGHTS, PretrainedMixin
from training.optim import load_optimizer_tensors, optimizer_tensors
from training.store import sync
from training.tokenizer import Tokenizer

OPTIMIZER, MANIFEST = "optimizer.safetensors", "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    folder: Path
    step: int
    """Updates done."""
    state: dict[str, Any]
    """What the loop saved beside the tensors."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Verifies every file of a checkpoint.

        Raises:
            ValueError: it is not a checkpoint, not complete, or not as it was written; names what.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            step, state, files = (manifest[key] for key in ("step", "state", "files"))
            digest = manifest.pop("digest")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / MANIFEST}: not of a whole checkpoint, {error!r}") from None
        if digest != _digest_of_json(manifest):
            raise ValueError(f"{folder / MANIFEST}: not as it was written")
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != set(files):
            raise ValueError(f"{folder}: files {sorted(present)}, expected {sorted(files)}")
        for name, expected in files.items():
            if _digest_of_file(folder / name) != expected:
                raise ValueError(f"{folder / name}: not as it was written")
        return cls(folder, step, state)

    def restore(self, model: PretrainedMixin, optimizer: torch.optim.Optimizer) -> None:
        """Puts the weights and both moments back, bit for bit."""
        model.load_pretrained_state(load_file(self.folder / WEIGHTS))
        load_optimizer_tensors(model, optimizer, load_file(self.folder / OPTIMIZER))


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that is as it was written; None where there is none at all.

    Prints which newer ones it refuses, and why.

    Args:
        folder: the run's `checkpoints/`.

    Raises:
        ValueError: there are checkpoints, and not one can be used.
    """
    found = checkpoints(folder)
    for candidate in reversed(found):
        try:
            return Checkpoint.open(candidate)
        except ValueError as error:
            print(f"refused: {error}")
    if found:
        raise ValueError(f"{folder}: none of {len(found)} checkpoints can be used")
    return None


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time.

    Args:
        folder: where; created by the first.
        keep: how many of the newest stay; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    def save(
        self,
        step: int,
        model: PretrainedMixin,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        state: Mapping[str, Any],
    ) -> None:
        """Copies everything and returns; waits first for the checkpoint before this one.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        weights, moments = _copied(model.state_dict()), _copied(optimizer_tensors(model, optimizer))
        self._writing = self._thread.submit(
            self._write, step, model, weights, moments, tokenizer, dict(state)
        )

    def wait(self) -> None:
        """Until what was saved has reached the disk.

        Raises:
            OSError: it could not be written; names the folder. Older checkpoints are untouched.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, step, model, weights, moments, tokenizer, state) -> None:
        target = self.folder / f"step-{step:08d}"
        partial = target.with_suffix(".partial")
        try:
            for left_over in self.folder.glob("*.partial"):
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)
            model.save_pretrained(partial, weights)
            tokenizer.save(partial)
            save_file(moments, partial / OPTIMIZER)
            manifest = {
                "step": step,
                "state": state,
                "files": {path.name: _digest_of_file(path) for path in sorted(partial.iterdir())},
            }
            text = json.dumps({**manifest, "digest": _digest_of_json(manifest)}, indent=2)
            (partial / MANIFEST).write_text(text, encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                sync(path)
            if target.exists():  # it was refused by `newest`, else it would not be written again
                _remove(target)
            partial.rename(target)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"{target}: the checkpoint could not be written, {error}") from error
        found = checkpoints(self.folder)
        usable = found[: found.index(target) + 1]  # later ones were refused by `newest`
        for old in usable[: -self.keep] if self.keep else ():
            _remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's `checkpoints/`, not verified, the oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def _remove(checkpoint: Path) -> None:
    # Under its own name, a half-deleted checkpoint would look like a damaged one; `.partial` alone
    # may be the one that is to replace it.
    doomed = checkpoint.with_suffix(".removed.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which no later update changes."""
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_json(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
