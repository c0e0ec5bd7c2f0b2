"""The command line of the scripts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
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
    for option in _lists(config, "--"):
        given = sum(word.partition("=")[0] == option for word in sys.argv[1:])
        if given > 1:
            raise ValueError(f"{option}: given {given} times, expected once, with all values")


def _lists(config: type, prefix: str) -> Iterator[str]:
    for field in fields(config):
        option = prefix + field.name.replace("_", "-")
        if is_dataclass(field.default_factory):  # options within an option, as --custom.texts
            yield from _lists(field.default_factory, f"{option}.")
        elif str(field.type).startswith("tuple["):
            yield option
