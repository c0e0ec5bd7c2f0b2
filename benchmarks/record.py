"""A record: what one machine measured, in a folder.

`results.json` has the `device` type, facts of the `machine` as it was last, and `parts` by name; a
part has the `commit`, `date` and `machine` of its run, its `seconds`, the `problem` that ended it
or null, and what it `found`, as the functions of `benchmarks.report_parts` hand it over.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

RESULTS = "results.json"


def read(folder: Path) -> dict:
    """The record in a folder; a new one where there is none."""
    path = folder / RESULTS
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def write(record: dict, folder: Path) -> None:
    """Writes under another name and renames, so that the file is whole or as it was."""
    beside = folder / f"{RESULTS}.partial"
    beside.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    beside.replace(folder / RESULTS)


def failures(record: dict) -> list[tuple[str, str]]:
    """(part, what went wrong): parts that did not end well, and results of ours that were wrong."""
    found = []
    for name, part in record["parts"].items():
        if part["problem"] is not None:
            found.append((name, part["problem"]))
        found += [(name, wrong) for row in part["found"] for wrong in row.get("wrong", ())]
        found += [
            (name, f"{row['tests']}: {_why_not_all(row)}")
            for row in part["found"]
            if row.get("complete") is False
        ]
    return found


def _why_not_all(tests: dict) -> str:
    """Why tests are not complete; the parts kill them at the end of their time."""
    code = tests.get("ended", -signal.SIGKILL)
    in_time = code == -signal.SIGKILL
    return "not all tests were through in time" if in_time else f"pytest ended with {code}"


def left_out(record: dict) -> list[tuple[str, str, str]]:
    """(part, what, why) of all that was not measured though it is known."""
    return [
        (name, what, why)
        for name, part in record["parts"].items()
        for row in part["found"]
        for what, why in row.get("left_out", {}).items()
    ]
