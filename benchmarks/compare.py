"""Compares the implementations of a case: right first, then timed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.cases import Case, draw, oracle, results
from benchmarks.peers import YARDSTICKS, Implementation
from benchmarks.roofline import Floor
from benchmarks.timing import Timing, peak_memory, samples
from gpt1_kernels.numerics import CAPS, assert_close, error

PEER_FACTOR = 10
"""A peer's error on the whole tensor may be so many times the cap of `numerics`."""


@dataclass(frozen=True)
class Result:
    """An implementation of a case in one direction."""

    case: str
    direction: str
    implementation: str
    kind: str
    """"ours", "peer" or "yardstick"."""
    seconds: tuple[float, ...]
    """Of each round."""
    floors: tuple[Floor, ...]
    """Of the passes, one after the other."""
    peak_bytes: int | None

    @property
    def timing(self) -> Timing:
        return Timing.of(self.seconds)


@dataclass(frozen=True)
class Comparison:
    results: list[Result]
    problems: dict[str, Exception]
    """Of the peers that raised, or were wrong: they are not timed."""
    failures: dict[str, Exception]
    """The same of ours."""


# Else a compiled backward may overwrite what was saved for it, and can run only once.
@functorch_config.patch(donated_buffer=False)
def compare(
    case: Case, candidates: Sequence[Implementation], device: str, dtype: torch.dtype, rounds: int
) -> Comparison:
    """Checks implementations of a case, and times those that are right, and the yardstick."""
    torch.compiler.reset()  # else it stops compiling a function after a handful of shapes
    tensors = draw(case, device, dtype)
    check, right, problems, failures = Check(case, tensors), {}, {}, {}
    for implementation in candidates:
        name = implementation.name
        try:
            check(implementation)
        except Exception as problem:  # a peer may raise anything; the others are timed all the same
            (failures if implementation.ours else problems)[name] = without_frames(problem)
        else:
            right[name] = implementation

    floors = _floors(case, dtype, device)
    found = []
    for direction in case.directions:
        functions = {n: call(case, i.run, tensors, check.dout, direction) for n, i in right.items()}
        kinds = {n: "ours" if i.ours else "peer" for n, i in right.items()}
        if case.op in YARDSTICKS:
            name, make = YARDSTICKS[case.op]
            functions[name] = make(case, **{n: t.detach() for n, t in tensors.items()})[direction]
            kinds[name] = "yardstick"
        seconds = samples(functions, device, rounds)
        found += [
            Result(
                str(case), direction, name, kinds[name], tuple(seconds[name]), floors[direction],
                peak_memory(function, device),
            )
            for name, function in functions.items()
        ]  # fmt: skip
    return Comparison(found, problems, failures)


def without_frames(problem: Exception) -> Exception:
    """The exception with its traceback as a note, for its frames would keep their tensors."""
    problem.add_note("".join(traceback.format_exception(problem)))
    problem.__cause__ = problem.__context__ = None
    return problem.with_traceback(None)


class Check:
    """Holds the implementations of a case to its oracle."""

    def __init__(self, case: Case, tensors: dict[str, Tensor]):
        self.case, self.tensors = case, tensors
        self.device = next(iter(tensors.values())).device
        self.dtype = next((t.dtype for t in tensors.values() if t.requires_grad), torch.float32)
        self.dout = _upstream(case, self.device, self.dtype)
        self._expected: dict[Case, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def __call__(self, implementation: Implementation) -> None:
        """Raises AssertionError unless output and gradients are right.

        Ours have to obey the rule of the parity tests, with the reference's dropout bits. Peers
        draw others: they have to run, and are compared without dropout.
        """
        actual = self._run(implementation, self.case)
        if implementation.ours:
            exact, plain = self._of(self.case)
            for name, value in actual.items():
                assert_close(name, value, plain[name], exact[name], self.dtype)
            return
        if self.case.p:
            actual = self._run(implementation, self.case.without_dropout())
        exact, _ = self._of(self.case.without_dropout())
        for name, value in actual.items():
            if not (got := error(value, exact[name]).whole) <= PEER_FACTOR * CAPS[self.dtype]:
                raise AssertionError(f"{name} differs from the reference by {got:.2g}")

    def _run(self, implementation: Implementation, case: Case) -> dict[str, Tensor]:
        actual = results(partial(implementation.run, case), self.tensors, self.dout)
        return actual | {"out": case.comparable(actual["out"])}

    def _of(self, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if case not in self._expected:
            self._expected[case] = tuple(
                oracle(case, self.tensors, self.dout, dtype, self.device)
                for dtype in (torch.float64, self.dtype)
            )
        return self._expected[case]


def call(
    case: Case, run: Callable, tensors: dict[str, Tensor], dout: Tensor | None, direction: str
) -> Callable[[], object]:
    """A function of no arguments that goes in one direction."""
    leaves = [t for t in tensors.values() if t.requires_grad]
    # Of a loss that saves nothing: Liger asks the tensors, whatever the mode, who wants a gradient.
    evaluated = tensors if case.forward_saves else {n: t.detach() for n, t in tensors.items()}

    def forward():
        with torch.set_grad_enabled(case.forward_saves):
            return run(case, **evaluated)

    def both():
        return torch.autograd.grad(run(case, **tensors), leaves, dout)

    if direction != "backward":
        return {"forward": forward, "both": both}[direction]
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _upstream(case: Case, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if case.directions == ("forward",):
        return None
    if not case.out:  # a loss, in fp32
        return torch.ones((), device=device)
    return torch.randn(case.out, device=device).to(dtype)


def _floors(case: Case, dtype: torch.dtype, device: str) -> dict[str, tuple[Floor, ...]]:
    programs = 1
    if device == "cuda":
        programs = torch.cuda.get_device_properties().multi_processor_count
    floors = {name: (floor,) for name, floor in case.floors(dtype.itemsize, programs).items()}
    if "backward" in floors:
        floors["both"] = floors["forward"] + floors["backward"]
    return floors
