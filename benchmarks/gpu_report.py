"""One command that measures a GPU: correctness, ceilings, ops, whole updates, the host's share.

    python benchmarks/gpu_report.py
    python benchmarks/gpu_report.py --only attention step

takes eight minutes at most and writes a folder, benchmarks/records/<date>_<gpu>/: `results.json`
with every round of everything, `README.md` with the targets, tables and pictures. With --only what
is measured replaces what the folder has of it, unless time ran out and that was whole, or nothing
was found this time. A part that fails is reported, and the others run; whole updates that come too
late in theirs are named and left out. What compiles for long is compiled by rehearsals of the later
parts, beside the parity tests; with --only they are parts like the others.

It compiles the CUDA kernels if they are not there, or older than their sources (`pip install -e .
--no-deps --no-build-isolation`, for which nothing is fetched). It needs torch 2.11 or later, triton
3.6 or later, numpy, safetensors, pytest, ninja, pybind11, setuptools and matplotlib; `transformers`
and other peers are measured where they are installed.

    python benchmarks/gpu_report.py --device cpu --out FOLDER

goes through all of it without a GPU, at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import groupby, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a file that is run by its name

from benchmarks import record
from benchmarks.apart import Outcome, run_apart
from benchmarks.report_page import write_page
from benchmarks.report_parts import PARTS, PLANS, ROOT

RECORDS = ROOT / "benchmarks/records"
MINUTES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; 1 if one of them failed or found one of ours wrong, else 0."""
    options = _parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    machine = run("machine", options.device, PARTS["machine"].seconds)
    if machine.problem is not None:
        sys.exit(f"error: {machine.problem}")
    (facts,) = machine.found
    folder = options.out or RECORDS / f"{date.today()}_{_short(facts['gpu'])}"
    folder.mkdir(parents=True, exist_ok=True)
    results = record.read(folder)
    earlier, gpu = (each.get("gpu", "a CPU") for each in (results.get("machine", facts), facts))
    if earlier != gpu:
        sys.exit(f"error: {folder} is of {earlier}, and this is {gpu}")
    results |= {"device": options.device, "machine": facts}
    late = []
    for names in _groups(options.only or [name for name in PARTS if name != "machine"]):
        print(f"{', '.join(names)} …", flush=True)
        left = deadline - time.monotonic()
        if left <= 0:
            problem = f"nothing was left of {options.minutes:g} minutes"
            outcomes = dict.fromkeys(names, Outcome([], problem, 0.0, timed_out=True))
        else:
            outcomes = run_together(names, options.device, left)
        for name, outcome in outcomes.items():
            before = results["parts"].get(name)
            better = before and (
                before["problem"] is None or (before["found"] and not outcome.found)
            )
            if outcome.timed_out and better:
                late.append((name, f"{outcome.problem}, so its earlier results stay"))
                continue
            results["parts"][name] = {
                "commit": options.commit, "date": str(date.today()), "seconds": outcome.seconds,
                "problem": outcome.problem, "found": outcome.found, "machine": facts,
            }  # fmt: skip
        record.write(results, folder)
    write_page(results, folder)
    failures = late + record.failures(results)
    for name, failure in failures:
        print(f"{name}: {failure}", file=sys.stderr)
    print(folder)
    return int(bool(failures))


def _groups(names: Iterable[str]) -> Iterator[list[str]]:
    """Parts that time nothing together, the others one by one."""
    for timing, group in groupby(names, lambda name: PARTS[name].timing):
        members = list(group)
        yield from ([name] for name in members) if timing else [members]


def run_together(names: Sequence[str], device: str, left: float) -> dict[str, Outcome]:
    """Parts at the same time, none of them for longer than is `left`."""
    limits = [min(PARTS[name].seconds, left) for name in names]
    with ThreadPoolExecutor() as pool:
        outcomes = pool.map(run, names, repeat(device), limits)
    return dict(zip(names, outcomes, strict=True))


def run(name: str, device: str, seconds: float) -> Outcome:
    """A part; on a GPU in a process of its own."""
    if device == "cuda":
        arguments = ["-m", "benchmarks.report_parts", name, device, str(seconds)]
        return run_apart(arguments, seconds, ROOT)
    found, problem, start = [], None, time.monotonic()
    try:
        PARTS[name].run(PLANS[device], found.append)
    except Exception:
        problem = traceback.format_exc()
    return Outcome(found, problem, time.monotonic() - start)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = [name for name in PARTS if name != "machine"]
    parser.add_argument("--only", nargs="+", choices=parts, metavar="PART",
                        help=f"these parts alone, of {', '.join(parts)}")  # fmt: skip
    parser.add_argument("--out", type=Path,
                        help="folder, new or with an earlier record; by default "
                        "benchmarks/records/<date>_<gpu>")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=MINUTES,
                        help=f"limit of all parts together; by default {MINUTES}")  # fmt: skip
    parser.add_argument("--device", choices=PLANS, default="cuda",
                        help="by default cuda; on cpu no time means anything")  # fmt: skip
    parser.add_argument("--commit", default=_commit(),
                        help="what is measured, where this is no clone of git")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.out is None:
        parser.error("--device cpu: expected --out FOLDER, since this is no record of a GPU")
    return options


def _commit() -> str:
    """The commit of the working tree, and whether files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty= with changes"]
    try:
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # it is not installed
        return "unknown"
    return git.stdout.strip() or "unknown"


def _short(gpu: str) -> str:
    """ "h200" for "NVIDIA H200", "h100-80gb-hbm3" for "NVIDIA H100 80GB HBM3"."""
    return gpu.removeprefix("NVIDIA ").lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
