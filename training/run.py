"""The folder of a run: made, found again after an interruption, and never overwritten."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from filelock import FileLock, Timeout

from training.checkpoint import MANIFEST, Checkpoint, checkpoints, newest
from training.store import sync

if TYPE_CHECKING:
    from training.config import PretrainConfig
    from training.finetune_config import FinetuneConfig

CHECKPOINTS, CONFIG, RESULT, LOCK = "checkpoints", "config.json", "result.json", ".lock"
LOGS = ("metrics.jsonl", "samples.txt")

# What may change when a run is resumed: how it runs and is watched, not what it computes. The paths
# of text and weights may change too, for the digests of their content are part of the identity.
FREE = {
    "out", "resume", "data", "tokenizer", "text_column", "sentence_shuffled", "device", "backend",
    "compile", "cuda_graph", "accumulate", "eval_every", "sample_every", "checkpoint_every", "keep",
    "max_skipped", "data_dir", "custom", "skip_bad_rows", "model", "seeds",
}  # fmt: skip


def open_run(config: PretrainConfig | FinetuneConfig) -> Checkpoint | None:
    """Makes or finds the folder `config.out` and says where the run starts: None is update 0.

    The folder is this run's until the process ends or opens another.

    Raises:
        FileExistsError: another process runs in the folder, or it holds something that is not an
            interrupted run.
        FileNotFoundError: there is no checkpoint at the path that --resume gives.
        NotADirectoryError, PermissionError: see `usable`.
        ValueError: no checkpoint is as it was written.
    """
    out = usable(config.out)
    goes_on = config.resume != "never"
    _require_free(out, goes_on)  # before a lock is written into a folder of something else
    if not _claim(out):
        raise FileExistsError(f"--out: {out} is in use by another run")
    _require_free(out, goes_on)  # a run may have begun and ended before the lock was ours
    if (checkpoint := newest(out / CHECKPOINTS)) is not None:
        return checkpoint
    return None if config.resume in ("auto", "never") else _at(Path(config.resume))


def next_folder(name: str) -> Path:
    """The first of runs/<name>-1, runs/<name>-2, … that is new or empty, and that no run is in."""
    for number in count(1):
        folder = usable(Path(f"runs/{name}-{number}"))
        if _is_new(folder) and _claim(folder) and _is_new(folder):  # as in `open_run`
            return folder


def usable(folder: Path) -> Path:
    """Creates a folder where there is none, and checks that it can be written to.

    Raises:
        NotADirectoryError: it, or a folder above it, is a file.
        PermissionError: it cannot be written to.
    """
    for path in (folder, *folder.parents):
        if path.is_file():
            raise NotADirectoryError(f"--out: {path} is a file, expected a folder")
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


def is_own(checkpoint: Checkpoint, out: Path) -> bool:
    """Whether it is of the run in a folder, not of one that this was forked from."""
    return checkpoint.folder.parent.parent == out


def require_rest(checkpoint: Checkpoint, out: Path, steps: int) -> None:
    """Raises ValueError where a run would start at the last step of another one."""
    if checkpoint.step == steps and not is_own(checkpoint, out):
        raise ValueError(
            f"--resume: {checkpoint.folder} is at the last of {steps} steps, expected one before"
        )


def cut_logs(out: Path, start: Checkpoint | None) -> None:
    """Cuts from the logs what was written after this start, and is about to be written again."""
    sizes = start.state["log_sizes"] if start is not None and is_own(start, out) else {}
    for name in LOGS:
        file, size = out / name, sizes.get(name, 0)
        if file.exists() and file.stat().st_size > size:
            os.truncate(file, size)


def read_result(out: Path) -> dict[str, Any] | None:
    """What a finished run ended with; None for one that has not finished."""
    return read_json(out / RESULT)


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or not a whole one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_json(file: Path, values: Mapping[str, Any] | list) -> None:
    """Writes under another name and renames, so that the file is whole or as it was.

    Raises:
        OSError: it cannot be written; names it, also where the disk is full.
    """
    beside = file.with_suffix(".partial")
    try:
        beside.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
        sync(beside)
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from None


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

    def end_process(self, step: int, out: Path) -> NoReturn:
        """Says where the run was saved and which --out continues it; the signal's exit status."""
        print(f"{self.received.name}: saved at step {step}; --out {out} goes on there")
        sys.exit(128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for caught in self._before:
            signal.signal(caught, signal.SIG_DFL)


_claimed: dict[Path, FileLock] = {}  # the folder of this process's run


def _claim(folder: Path) -> bool:
    """Locks a folder until this process ends or claims another; False if another process did.

    Where there are no locks, as in some network file systems, nothing is locked.
    """
    folder = folder.resolve()
    if folder not in _claimed:
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError:
            pass
        while _claimed:
            _claimed.popitem()[1].release()
        _claimed[folder] = lock
    return True


def _require_free(out: Path, goes_on: bool) -> None:
    interrupted = goes_on and (any(checkpoints(out / CHECKPOINTS)) or _stopped_early(out))
    if not (_is_new(out) or interrupted):
        raise FileExistsError(f"--out: {out} is not empty, expected a new folder")


def _is_new(folder: Path) -> bool:
    """Whether nothing is in a folder but what a run has left that was killed before it began."""
    left_over = {LOCK, "config.partial"}  # the latter by `write_json`
    return left_over.issuperset(path.name for path in folder.iterdir())


def _stopped_early(out: Path) -> bool:
    """Whether a run began here and neither saved nor finished: its options, and no result."""
    options = read_json(out / CONFIG)
    return options is not None and "resume" in options and not (out / RESULT).exists()


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
