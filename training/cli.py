"""The command line of the scripts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import tyro


def run(main: Callable[[Any], None], config: type) -> None:
    """Calls main with the options of the command line.

    Ends the process with "error: …" where they, a file or the numbers are at fault, and without a
    traceback after Ctrl-C.
    """
    try:
        _require_lists_once(config)
        main(tyro.cli(config))
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _require_lists_once(config: type) -> None:
    """Raises ValueError where a list is given in two parts, of which the first would be lost."""
    for field in fields(config):
        option = f"--{field.name.replace('_', '-')}"
        given = sum(word.partition("=")[0] == option for word in sys.argv[1:])
        if str(field.type).startswith("tuple[") and given > 1:
            raise ValueError(f"{option}: given {given} times, expected once, with all values")
