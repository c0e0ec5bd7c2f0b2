"""What was measured without a GPU when it was last accepted, and how a new measurement differs.

`baseline.json` has parts; a part has the versions that its numbers depend on, and named rows of
quantities. `benchmarks.guard` writes it. A number is there and nowhere else: tests compare what
they measure with it, and state beside only what holds whatever a kernel is made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_suffix(".json")
MORE_IS_BETTER = {"wide share"}
NOISE = {"host": 1.5}
"""By part, the factor up to which two measurements count as equal; 1 for the others."""

VERDICTS = "worse", "new", "gone", "better"

Rows = Mapping[str, Mapping[str, float]]


class Difference(NamedTuple):
    """A row's quantities that are not as they were: (was, is), None where a side lacks one."""

    row: str
    quantities: dict[str, tuple[float | None, float | None]]

    @property
    def verdict(self) -> str:
        """The first of VERDICTS that holds of a quantity."""
        return min((_verdict(n, *pair) for n, pair in self.quantities.items()), key=VERDICTS.index)

    def __str__(self) -> str:
        texts = [_text(name, was, now) for name, (was, now) in self.quantities.items()]
        return f"{self.verdict:7}{self.row}: {'; '.join(texts)}"


class BaselineError(AssertionError):
    """Something is worse than in the baseline, or better and not yet in it."""


def check(part: str, rows: Rows, whole: bool = False) -> None:
    """Compares rows with the baseline's.

    Args:
        whole: the rows are all of the part, and one that they lack is a difference too.

    Raises:
        BaselineError: they differ; the message has each quantity, what it was and what it is.
    """
    if found := sorted(differences(part, rows, whole), key=lambda d: VERDICTS.index(d.verdict)):
        raise BaselineError(
            f"{part}, beside {FILE.name}:\n"
            + "\n".join(f"  {difference}" for difference in found)
            + "\nMend what is worse, or say in benchmarks/records/NOTES.md what it bought. "
            f"To accept all of it:\n  python -m benchmarks.guard --update --parts {part}"
        )


def differences(part: str, rows: Rows, whole: bool = False) -> Iterator[Difference]:
    """Those beyond the part's noise."""
    before = read().get(part, {}).get("rows", {})
    for row in [*rows, *(before.keys() - rows.keys() if whole else ())]:
        was, now = before.get(row, {}), rows.get(row, {})
        pairs = {quantity: (was.get(quantity), now.get(quantity)) for quantity in was | now}
        if unequal := {name: pair for name, pair in pairs.items() if not _equal(part, *pair)}:
            yield Difference(row, unequal)


def mismatch(part: str, versions: Mapping[str, str]) -> str | None:
    """Why numbers made by these versions cannot be compared with the baseline's, or None."""
    before = read().get(part, {}).get("versions", versions)
    if before == versions:
        return None
    names = [" and ".join(f"{k} {v}" for k, v in each.items()) for each in (before, versions)]
    return f"the baseline was made by {names[0]}, this by {names[1]}"


def update(part: str, rows: Rows, versions: Mapping[str, str]) -> None:
    """Writes a whole part; a quantity that differs by noise keeps its number."""
    parts = read()
    before = parts.get(part, {}).get("rows", {}) if mismatch(part, versions) is None else {}
    kept = {
        row: {
            quantity: was if _equal(part, was := before.get(row, {}).get(quantity), now) else now
            for quantity, now in quantities.items()
        }
        for row, quantities in sorted(rows.items())
    }
    parts[part] = {"versions": dict(versions), "rows": kept}
    FILE.write_text(_lines(parts))


def read() -> dict[str, dict]:
    """The parts of the file."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def _equal(part: str, was: float | None, now: float | None) -> bool:
    if was is None or now is None:
        return was is now
    noise = NOISE.get(part, 1.0)
    return was <= noise * now and now <= noise * was


def _verdict(quantity: str, was: float | None, now: float | None) -> str:
    if was is None or now is None:
        return "new" if was is None else "gone"
    return "better" if (now > was) is (quantity in MORE_IS_BETTER) else "worse"


def _text(quantity: str, was: float | None, now: float | None) -> str:
    if was is None or now is None:
        return f"{quantity} {'is' if was is None else 'was'} {now or was or 0:,}"
    change = f" ({now / was - 1:+.1%})" if was else ""
    return f"{quantity} was {was:,}, is {now:,}{change}"


def _lines(parts: Mapping[str, dict]) -> str:
    """JSON with one row a line, so that changes of different rows merge."""
    texts = []
    for name, part in sorted(parts.items()):
        rows = (f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in part["rows"].items())
        texts.append(
            f'  {json.dumps(name)}: {{\n    "versions": {json.dumps(part["versions"])},\n'
            '    "rows": {\n' + ",\n".join(rows) + "\n    }\n  }"
        )
    return "{\n" + ",\n".join(texts) + "\n}\n"
