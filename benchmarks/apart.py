"""Runs a program in a process of its own, for a limited time; the JSON lines it wrote count.

A kernel that fails makes the GPU unusable for its whole process, and one that hangs never returns:
what must not take the rest down runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAST_LINES = 12  # of what a program that failed wrote to its standard error


@dataclass(frozen=True)
class Outcome:
    """What a program found, and why it found no more."""

    found: list[dict]
    problem: str | None
    seconds: float
    timed_out: bool = False


def end_with_parent() -> None:
    """Has this process killed when its parent ends, however that ends. Only on Linux.

    Otherwise it would run on beside whatever is timed on the machine next.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_apart(arguments: Sequence[str], seconds: float, cwd: Path) -> Outcome:
    """Runs Python with these arguments and the name of a file, to which it appends JSON objects.

    Args:
        seconds: after which it is killed, with the processes that it started.
    """
    start = time.monotonic()
    with (
        tempfile.NamedTemporaryFile("r") as lines,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        process = subprocess.Popen(
            [sys.executable, *arguments, lines.name],
            cwd=cwd, stderr=errors, start_new_session=True,
        )  # fmt: skip
        timed_out = False
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            problem, timed_out = f"it took longer than {seconds:.0f} s", True
        else:
            errors.seek(0)
            problem = _why(code, errors.read())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        whole = [line for line in lines if line.endswith("\n")]
    found = [json.loads(line) for line in whole]
    return Outcome(found, problem, time.monotonic() - start, timed_out)


def _why(code: int, errors: str) -> str | None:
    """Why a program failed, or None if it did not."""
    if code == 0:
        return None
    last = errors.rstrip().splitlines()[-LAST_LINES:]
    if code < 0 or not last:  # what it wrote then need not be the reason
        last.append(f"it ended by {signal.Signals(-code).name if code < 0 else f'exit({code})'}")
    return "\n".join(last)
