"""Every op against its peers and its floor: GPT-1's sizes and a sweep, on a CPU small ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from functools import cache

import pytest
import torch

from benchmarks import cases, ceilings
from benchmarks.compare import Comparison, compare
from benchmarks.peers import YARDSTICKS, Implementation, implementations
from benchmarks.replay import clock
from benchmarks.table import HEADER, cells, figures, rate

DEVICE, DTYPE, ROUNDS = "cpu", torch.float32, 11
CASES = [*cases.SMALL, *cases.SMALL_SWEEP]
if torch.cuda.is_available():
    DEVICE, DTYPE, ROUNDS = "cuda", torch.bfloat16, 30
    CASES = [*cases.GPT1, *cases.SWEEP]

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of SDPA, saying why it raises
]


def _why_not(case: cases.Case, implementation: Implementation) -> str | None:
    if implementation.name == "torch.compile" and case in cases.SMALL_SWEEP:
        return "compiles for seconds, so not in a CPU's sweep"
    return implementation.absence(case.op, DEVICE)


def _candidates(case: cases.Case) -> list[Implementation]:
    return [i for i in implementations(case) if _why_not(case, i) is None]


def _id(*parts) -> str:
    """A name that pytest's -k can pick: layer_norm-N1024-C256-forward-portable."""
    return "-".join(map(str, parts)).replace(" ", "-").replace("=", "")


def _lines():
    """(case, direction, name) of every line."""
    for case in CASES:
        names = [implementation.name for implementation in _candidates(case)]
        if case.op in YARDSTICKS:
            names.append(YARDSTICKS[case.op][0])
        for direction in case.directions:
            for name in names:
                yield pytest.param(case, direction, name, id=_id(case, direction, name))


def _left_out():
    """Each reason why something is not timed, with what it is."""
    reasons = defaultdict(dict)  # of dicts without values: sets in order
    for case in CASES:
        for implementation in implementations(case):
            if reason := _why_not(case, implementation):
                reasons[reason][implementation.name] = None
    if DEVICE == "cpu":
        reasons["needs a GPU"][f"GPT-1's own sizes and {len(cases.SWEEP)} around them"] = None
    for reason, names in reasons.items():
        yield pytest.param(f"{reason}: {', '.join(names)}", id=reason)


def _dtype() -> str:
    return str(DTYPE).removeprefix("torch.")


@cache
def compared(case: cases.Case) -> Comparison:
    return compare(case, _candidates(case), DEVICE, DTYPE, ROUNDS)


def test_ceilings(line):
    found = ceilings.measured(DEVICE, DTYPE)
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "this CPU"
    line(
        "ceilings, measured: the floors are at these",
        ("", "copy, bytes/s", "product, FLOP/s"),
        (f"{machine}, {_dtype()}", rate(found.bandwidth), rate(found.rate)),
    )


@pytest.mark.parametrize(("case", "direction", "name"), list(_lines()))
def test_op(recorded, case, direction, name):
    comparison = compared(case)
    if name in comparison.failures:
        raise comparison.failures[name]
    if name in comparison.problems:
        pytest.skip(f"{name}: {comparison.problems[name]}")
    results = [r for r in comparison.results if r.direction == direction]
    at = [r.implementation for r in results].index(name)
    line = figures(results, ceilings.measured(DEVICE, DTYPE))[at]
    recorded(
        f"{case}, {_dtype()}, {direction}", HEADER, cells(line), results[at].seconds, asdict(line)
    )


@pytest.mark.parametrize("reason", list(_left_out()))
def test_left_out(reason):
    pytest.skip(reason)
