"""The parts of a report: each measures something and hands over what it finds, as it finds it.

    python -m benchmarks.report_parts layer_norm cuda SECONDS FILE

runs one and appends JSON objects to FILE. `benchmarks/gpu_report.py` runs them all, and ends one
that takes longer than its SECONDS.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from math import inf
from pathlib import Path

import torch

from benchmarks import cases, ceilings
from benchmarks.apart import end_with_parent
from benchmarks.cases import Case
from benchmarks.compare import compare
from benchmarks.compare_models import GPT1, Size, compare_models
from benchmarks.host_overhead import host_overhead
from benchmarks.peers import implementations
from benchmarks.timing import measure
from benchmarks.train_step import SIDES, Side, make_calls
from csrc.build import find_nvcc, is_outdated
from gpt1_kernels.backends import unavailable_reason
from gpt1_kernels.backends.cuda import extension

ROOT = Path(__file__).resolve().parents[1]
PARITY_TESTS = ROOT / "tests/test_parity.py"
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "liger-kernel", "flash-attn", "flash-attn-4",
    "quack-kernels", "cut-cross-entropy",
)  # fmt: skip

UPDATES = 5  # that follow one another
REASON = 300  # characters of what a peer raised
NO_TESTS = 5  # pytest's exit code where it selects none
BEGINNING = 2 / 3  # of a part's time: the rest is for what was begun by then

Emit = Callable[[dict], None]


@dataclass(frozen=True)
class Plan:
    """What is measured, and on what."""

    device: str
    dtype: str
    cases: list[Case]
    size: Size
    sides: dict[str, Side]
    captured_sides: dict[str, Side]
    """Updates as CUDA graphs, which keep their memory: they are measured apart."""
    backends: tuple[str, ...]
    """Ours, of which the host overhead is measured."""
    parity: tuple[str, ...]
    """Which of the parity tests: for each expression, in a pytest of its own."""
    parity_seconds: float
    """After which those that are not through are ended."""
    compiles: bool
    """Whether `torch.compile` is among the peers."""
    rounds: int
    step_rounds: int
    host_rounds: int
    until: float = inf
    """Of `time.monotonic`: later no other update is begun."""


BACKENDS = "triton", "cuda"
PARITY = "layer_norm", "causal_attention", "gelu_ffn", "embedding", "linear_cross_entropy"
DTYPES = "float32", "torch.float16", "not float32 and not torch.float16"
"""Of the parity tests; each has kernels of its own to compile."""

GPU = Plan(
    device="cuda", dtype="bf16", cases=cases.GPT1, size=GPT1,
    sides={
        **{f"gpt1_kernels, {b}": Side("gpt1_kernels", backend=b) for b in BACKENDS},
        **{name: side for name, side in SIDES.items() if name != "gpt1_kernels"},
    },
    captured_sides={
        f"gpt1_kernels, {b}, CUDA graph": Side("gpt1_kernels", backend=b, captured=True)
        for b in BACKENDS
    },
    backends=BACKENDS,
    parity=(
        *(f"cuda and {op}" for op in PARITY),
        *(f"triton and {op} and {dtype}" for op in PARITY for dtype in DTYPES),
    ),
    parity_seconds=110, compiles=True,
    rounds=30, step_rounds=15, host_rounds=600,
)  # fmt: skip
TINY = Plan(
    device="cpu", dtype="bf16",
    cases=[
        cases.CausalAttention(B=1, T=32, H=2, D=16),
        cases.CausalAttention(B=1, T=32, H=2, D=16, p=0.1),
        cases.DropoutMask(B=1, T=32, H=2),
        cases.DropoutAddLayerNorm(N=32, C=64, p=0.1),
        cases.LayerNorm(N=32, C=64),
        cases.GeluFFN(N=32, C=64, F=256),
        cases.LinearCrossEntropy(N=32, C=64, V=300),
        cases.Embedding(B=1, T=32, C=64, V=300, p=0.1),
    ],
    size=Size(
        "tiny", B=1, T=32,
        overrides={"vocab_size": 300, "n_positions": 32, "n_embd": 64, "n_layer": 1, "n_head": 2},
    ),
    sides={"gpt1_kernels, portable": Side("gpt1_kernels", backend="portable")}, captured_sides={},
    backends=("cuda_host",), parity=("portable and layer_norm and bfloat16",), parity_seconds=60,
    compiles=False, rounds=3, step_rounds=3, host_rounds=20,
)  # fmt: skip
PLANS = {"cuda": GPU, "cpu": TINY}


def build(plan: Plan, emit: Emit) -> None:
    """Compiles the CUDA kernels for this GPU, where nvcc is and they are not there, or outdated."""
    if plan.device == "cpu":
        return emit({"left_out": {"cuda": "needs a GPU"}})
    outdated = is_outdated("_cuda")  # first: what is loaded must not be written over
    reason = "its sources were changed since" if outdated else extension.absence("cuda")
    if reason is None:
        return emit({"built": "before"})
    if find_nvcc() is None:  # what is outdated is measured all the same
        reason += "; nvcc is not found"
        return emit({"wrong": [f"cuda: {reason}"]} if outdated else {"left_out": {"cuda": reason}})
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    command = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation"], cwd=ROOT, check=True,
        env={"TORCH_CUDA_ARCH_LIST": capability, **os.environ},
    )  # fmt: skip
    emit({"built": f"for {capability}"})


def machine(plan: Plan, emit: Emit) -> None:
    """Where and with what the report is made."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU; --device cpu --out FOLDER goes through all of it without")
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    facts = {"python": platform.python_version(), "packages": installed, "cpu": _cpu()}
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties()
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _output(
                "nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
            "nvcc": (_output(find_nvcc(), "--version") or "").rpartition("\n")[2] or None,
        }
    emit(facts)


def parity(plan: Plan, emit: Emit) -> None:
    """The parity tests on this device; all at the same time, since kernels are compiled first."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    deadline = time.monotonic() + plan.parity_seconds
    with contextlib.ExitStack() as files:
        running = []
        for pattern in plan.parity:
            output = files.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            arguments = [PARITY_TESTS, "-k", pattern]
            process = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, stdout=output, preexec_fn=end_with_parent
            )
            running.append((pattern, process, output))
        for pattern, process, output in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            code = process.wait()
            output.seek(0)
            tests = re.findall(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", output.read(), re.M)
            wrong = [name for name, verdict in tests if verdict in ("FAILED", "ERROR")]
            none = {pattern: "there are no such tests here"} if code == NO_TESTS else {}
            emit(
                {
                    "tests": pattern,
                    **{v: sum(verdict == v for _, verdict in tests) for v in ("PASSED", "SKIPPED")},
                    "wrong": wrong,
                    "complete": code == (1 if wrong else 0) or code == NO_TESTS,
                    "ended": code,
                    "left_out": none,
                }
            )


def rehearse(*names: str) -> Callable[[Plan, Emit], None]:
    """A part: runs others once, so that what they compile is cached on disk before they are timed.

    Of the whole updates, only those that compile for long, and one that fits beside them.
    """

    def part(plan: Plan, emit: Emit) -> None:
        if not plan.compiles:
            return emit({"left_out": {"compiling ahead": "nothing of it is used on a CPU"}})
        sides = {n: s for n, s in plan.sides.items() if s.compiled or s.backend == "triton"}
        once = replace(plan, rounds=1, step_rounds=1, host_rounds=1, sides=sides, until=inf)
        for name in names:
            start = time.monotonic()
            PARTS[name].run(once, lambda found: None)
            emit({"rehearsed": name, "took": time.monotonic() - start})

    return part


def measure_ceilings(plan: Plan, emit: Emit) -> None:
    emit(asdict(ceilings.measured(plan.device, torch.bfloat16)))


def measure_op(op: str) -> Callable[[Plan, Emit], None]:
    """A part: an op's implementations against each other, at every size of the plan."""

    def part(plan: Plan, emit: Emit) -> None:
        for case in (case for case in plan.cases if case.op == op):
            candidates, left_out = [], {}
            for implementation in implementations(case):
                reason = implementation.absence(op, plan.device)
                if implementation.name == "torch.compile" and not plan.compiles:
                    reason = "takes a CPU too long"
                if reason is None:
                    candidates.append(implementation)
                else:
                    left_out[implementation.name] = reason
            comparison = compare(case, candidates, plan.device, torch.bfloat16, plan.rounds)
            for result in comparison.results:
                emit({"op": op, "dropout": case.p > 0, **asdict(result)})
            problems = comparison.problems | comparison.failures
            emit({"case": str(case)} | _left_out(left_out, problems, [*comparison.failures]))

    return part


def measure_steps(plan: Plan, emit: Emit) -> None:
    """Whole updates, ours against others'."""
    _compare_updates(plan, plan.sides, emit)


def measure_captured_steps(plan: Plan, emit: Emit) -> None:
    """Whole updates of ours as CUDA graphs."""
    if not plan.captured_sides:
        return emit({"left_out": {"CUDA graphs": "need a GPU"}})
    return _compare_updates(plan, plan.captured_sides, emit)


def _compare_updates(plan: Plan, sides: dict[str, Side], emit: Emit) -> None:
    absent = {
        name: reason
        for name, side in sides.items()
        if side.backend and (reason := unavailable_reason(side.backend, "layer_norm", plan.device))
    }
    present = {name: side for name, side in sides.items() if name not in absent}
    found = compare_models(
        plan.size, plan.dtype, 0.1, plan.device, ("step",), plan.step_rounds, present, plan.until
    )
    for result in found.results["step"]:
        emit(asdict(result))
    wrong = [name for name in found.problems if name.startswith("gpt1_kernels")]
    emit(_left_out(absent, found.problems, wrong))


def profile(plan: Plan, emit: Emit) -> None:
    """What an update of ours spends its time on, by kernel, or by op on a CPU; and all of it.

    Updates follow one another here, and the clock on the wall has the host's share too.
    """
    (name, side), input_ids = next(iter(plan.sides.items())), plan.size.draw(plan.device)
    update = make_calls(side, plan.size.config(0.1), plan.dtype, input_ids)["step"]
    on_gpu = plan.device == "cuda"

    def updates() -> None:
        for _ in range(UPDATES):
            update()
        if on_gpu:
            torch.cuda.synchronize()

    wall = measure({"updates": updates}, "cpu", plan.step_rounds)["updates"].median / UPDATES
    emit({"implementation": name, "wall_seconds": wall, "tokens": input_ids.numel()})
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiled:
        updates()
    for event in profiled.key_averages():
        µs = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if µs > 0:
            calls, seconds = event.count / UPDATES, 1e-6 * µs / UPDATES
            emit({"name": event.key, "calls": calls, "seconds": seconds})


def host(plan: Plan, emit: Emit) -> None:
    """What a call of an op costs the host beyond an empty op of its kind."""
    for backend in plan.backends:
        if reason := unavailable_reason(backend, "layer_norm", plan.device):
            emit({"left_out": {backend: reason}})
            continue
        for op, (beyond, empty) in host_overhead(backend, plan.host_rounds).items():
            emit({"backend": backend, "op": op, "beyond_µs": beyond, "empty_µs": empty})


@dataclass(frozen=True)
class Part:
    run: Callable[[Plan, Emit], None]
    seconds: float
    """That it may take on a GPU."""
    timing: bool = True
    """Whether it needs the machine for itself; the others run beside their neighbours."""


OPS = {
    "linear_cross_entropy": Part(measure_op("linear_cross_entropy"), 60),
    "dropout_add_layer_norm": Part(measure_op("dropout_add_layer_norm"), 40),
    "gelu_ffn": Part(measure_op("gelu_ffn"), 45),
    "attention": Part(measure_op("causal_attention"), 75),
    "embedding": Part(measure_op("embedding"), 40),
    "layer_norm": Part(measure_op("layer_norm"), 40),
    "dropout_mask": Part(measure_op("dropout_mask"), 30),
}
PARTS = {
    "build": Part(build, 150),
    "machine": Part(machine, 90),
    "parity": Part(parity, 125, timing=False),
    "rehearse_step": Part(rehearse("step"), 125, timing=False),
    "rehearse_ops": Part(rehearse(*OPS), 125, timing=False),
    "rehearse_host": Part(rehearse("host"), 125, timing=False),
    "ceilings": Part(measure_ceilings, 20),
    "captured_step": Part(measure_captured_steps, 60),
    "step": Part(measure_steps, 180),
    **OPS,
    "host": Part(host, 40),
    "profile": Part(profile, 40),
}
"""In the order in which they run: what targets depend on comes first."""


def _left_out(reasons: dict[str, str], problems: dict[str, Exception], wrong: list[str]) -> dict:
    """What was not timed and why; `wrong` are those of ours that should have been."""
    lines = {name: f"{type(p).__name__}: {p}"[:REASON] for name, p in problems.items()}
    return {"left_out": reasons | lines, "wrong": wrong}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def _output(*command: str | None) -> str | None:
    """What a program prints, or None if it is not there or fails."""
    if command[0] is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(name: str, device: str, seconds: str, file: str) -> None:
    until = time.monotonic() + BEGINNING * float(seconds)

    def emit(found: dict) -> None:
        with open(file, "a") as lines:
            lines.write(json.dumps(found) + "\n")

    PARTS[name].run(replace(PLANS[device], until=until), emit)


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
