"""A record as people read it: `README.md` and two pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.ceilings import Ceilings
from benchmarks.compare import Result
from benchmarks.compare_models import ModelResult
from benchmarks.record import RESULTS, failures, left_out
from benchmarks.report_pictures import draw_peers, draw_roofline
from benchmarks.roofline import Floor
from benchmarks.table import (
    HEADER,
    MODEL_HEADER,
    cells,
    figures,
    model_cells,
    model_figures,
    number,
    rate,
)
from benchmarks.targets import TARGETS, Measured

KERNELS = 40
"""Lines of the update's breakdown."""


def write_page(record: dict, folder: Path) -> None:
    """Writes `README.md`, and `roofline.png` and `peers.png` of what was measured."""
    results, ceilings = op_results(record), _ceilings(record)
    targets = _targets(record) if record["device"] == "cuda" else ""
    sections = [_title(record), _machine(record), targets, _failures(record)]
    if ceilings is not None and results:
        draw_roofline(results, ceilings, folder / "roofline.png")
        sections.append("![Roofline](roofline.png)")
    if results:
        draw_peers(results, folder / "peers.png")
        sections += ["![Times beside peers](peers.png)", _ops(results, ceilings)]
    sections += [_steps(record, ceilings), _breakdown(record), _host(record), _parity(record)]
    sections.append(_left_out(record))
    (folder / "README.md").write_text("\n\n".join(filter(None, sections)) + "\n")


def op_results(record: dict) -> list[Result]:
    """Of all ops, in the order of the parts."""
    return [
        Result(
            row["case"], row["direction"], row["implementation"], row["kind"],
            tuple(row["seconds"]), tuple(Floor(*floor) for floor in row["floors"]),
            row["peak_bytes"],
        )
        for row in _rows(record)
        if "direction" in row
    ]  # fmt: skip


def _rows(record: dict, part: str | None = None) -> list[dict]:
    parts = record["parts"] if part is None else {part: record["parts"].get(part, {"found": []})}
    return [row for each in parts.values() for row in each["found"]]


def _ceilings(record: dict) -> Ceilings | None:
    return next((Ceilings(**row) for row in _rows(record, "ceilings")), None)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell or ' ' for cell in line)} |" for line in lines)


def _title(record: dict) -> str:
    if record["device"] == "cuda":
        return f"# {record['machine']['gpu']}"
    return (
        "# A CPU\n\nMade without a GPU, at tiny sizes: it shows that everything runs, and nothing "
        "of its speed."
    )


def _machine(record: dict) -> str:
    facts = record["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    parts_of: dict[str, list[str]] = {}
    for name, part in record["parts"].items():
        other = _flat(part.get("machine", facts)).items() - _flat(facts).items()
        run = [f"commit {part['commit']}", part["date"], *sorted(f"{k} {v}" for k, v in other)]
        parts_of.setdefault(", ".join(run), []).append(name)
    rows = [(run, ", ".join(parts)) for run, parts in parts_of.items()]
    rows += [(k.replace("_", " "), str(v)) for k, v in facts.items() if k != "packages"]
    rows.append(("packages", packages))
    if (ceilings := _ceilings(record)) is not None:
        rows += [
            ("copy, read and written", f"{rate(ceilings.bandwidth)}B/s"),
            ("bf16 product of random matrices", f"{rate(ceilings.rate)}FLOP/s"),
        ]
    return markdown(("machine", ""), rows)


def _flat(facts: dict) -> dict[str, str | int | None]:
    """Facts of a machine with the versions of its packages among them."""
    return {k: v for k, v in facts.items() if k != "packages"} | facts["packages"]


def _targets(record: dict) -> str:
    measured, rows = Measured(record["parts"]), []
    for target in TARGETS:
        goal = f"{'≤' if target.at_most else '≥'} {target.form.format(target.goal)}"
        best = target.best(measured)
        if best is None:
            rows.append((str(target.number), target.text, goal, "not measured", "", ""))
            continue
        name, value = best
        met = "yes" if target.is_met(value) else "no"
        rows.append((str(target.number), target.text, goal, target.form.format(value), name, met))
    return "## Targets\n\n" + markdown(("#", "", "target", "measured", "of", "met"), rows)


def _failures(record: dict) -> str:
    rows = [(part, f"`{text.splitlines()[-1]}`") for part, text in failures(record)]
    return f"## What failed\n\n{markdown(('part', ''), rows)}" if rows else ""


def _ops(results: list[Result], ceilings: Ceilings | None) -> str:
    """A table for each case and direction."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.case, result.direction), []).append(result)
    tables = [
        f"{case}, {direction}\n\n{markdown(HEADER, map(cells, figures(group, ceilings)))}"
        for (case, direction), group in grouped.items()
    ]
    return "## Ops\n\n" + "\n\n".join(tables)


def _steps(record: dict, ceilings: Ceilings | None) -> str:
    rows = _rows(record, "step") + _rows(record, "captured_step")
    results = [ModelResult(**row) for row in rows if "flops" in row]
    if not results:
        return ""
    lines = map(model_cells, model_figures(results, ceilings and ceilings.rate))
    return f"## The whole update\n\n{markdown(MODEL_HEADER, lines)}"


def _breakdown(record: dict) -> str:
    rows = _rows(record, "profile")
    kernels = sorted((r for r in rows if "calls" in r), key=lambda r: -r["seconds"])
    if not kernels:
        return ""
    total, calls = sum(r["seconds"] for r in kernels), sum(r["calls"] for r in kernels)
    lines = [
        (f"`{r['name'][:80]}`", f"{r['calls']:g}", number(1e6 * r["seconds"]),
         f"{r['seconds'] / total:.1%}")
        for r in kernels[:KERNELS]
    ]  # fmt: skip
    lines.append(("all", f"{calls:g}", number(1e6 * total), ""))
    wall = next(r for r in rows if "wall_seconds" in r)
    text = (
        f"By the clock on the wall an update by {wall['implementation']} takes "
        f"{number(1e3 * wall['wall_seconds'])} ms, "
        f"{number(wall['tokens'] / wall['wall_seconds'])} tokens/s."
    )
    table = markdown(("", "calls", "µs", "of all"), lines)
    return f"## Where an update's time goes\n\n{text}\n\n{table}"


def _host(record: dict) -> str:
    lines = [
        (r["backend"], r["op"], number(r["beyond_µs"]), number(r["empty_µs"]))
        for r in _rows(record, "host")
        if "op" in r
    ]
    header = ("backend", "op", "µs beyond an empty op", "µs of that")
    return f"## The host's share of a call\n\n{markdown(header, lines)}" if lines else ""


def _parity(record: dict) -> str:
    lines = [
        (r["tests"], str(r["PASSED"]), str(len(r["wrong"])), str(r["SKIPPED"]))
        for r in _rows(record, "parity")
    ]
    header = ("", "passed", "failed", "skipped")
    return f"## Parity tests\n\n{markdown(header, lines)}" if lines else ""


def _left_out(record: dict) -> str:
    grouped: dict[tuple[str, str], dict[str, None]] = {}  # dicts without values are sets in order
    for part, what, why in left_out(record):
        grouped.setdefault((part, why.splitlines()[0]), {})[what] = None
    rows = [(part, ", ".join(names), why) for (part, why), names in grouped.items()]
    text = f"Every round of everything is in [{RESULTS}]({RESULTS})."
    return f"## Left out\n\n{markdown(('part', '', 'why'), rows)}\n\n{text}" if rows else text
