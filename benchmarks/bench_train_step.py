"""The whole model and one update of it, against `transformers` and plain PyTorch.

On a GPU the paper's model and batch; on a CPU a small one, and with --full the paper's at B = 2.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from functools import cache

import pytest
import torch

from benchmarks import ceilings
from benchmarks.compare_models import GPT1, GPT1_ON_CPU, PASSES, PRODUCTS, SMALL, compare_models
from benchmarks.replay import clock
from benchmarks.table import MODEL_HEADER, model_cells, model_figures
from benchmarks.train_step import DTYPES, SIDES

pytest.importorskip("transformers")
pytestmark = pytest.mark.benchmark(timer=clock)

DEVICE, ROUNDS = "cpu", 5
KINDS = [("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.0), ("bf16", 0.1)]
RUNS = [
    (SMALL, "fp32", 0.1, PASSES, ()),
    *((GPT1_ON_CPU, *kind, ("step",), pytest.mark.full) for kind in KINDS),
]
if torch.cuda.is_available():
    DEVICE, ROUNDS = "cuda", 15
    RUNS = [(GPT1, "bf16", dropout, PASSES, ()) for dropout in (0.0, 0.1)]


def _lines():
    for size, dtype, dropout, passes, marks in RUNS:
        for each in passes:
            for name in [*SIDES, *[PRODUCTS] * (each == "step")]:
                yield pytest.param(
                    (size, dtype, dropout, passes), each, name, marks=marks,
                    id=f"{size.name}-{dtype}-dropout{dropout}-{each}-{name.replace(' ', '-')}",
                )  # fmt: skip


@cache
def compared(size, dtype, dropout, passes):
    return compare_models(size, dtype, dropout, DEVICE, passes, ROUNDS)


@pytest.mark.parametrize(("run", "each", "name"), list(_lines()))
def test_model(recorded, run, each, name):
    size, dtype, dropout, _ = run
    comparison = compared(*run)
    if problem := comparison.problems.get(name):
        if name == "gpt1_kernels":
            raise problem
        pytest.skip(f"{name}: {problem}")
    results = comparison.results[each]
    rate = ceilings.measured(DEVICE, DTYPES[dtype]).rate
    at = [r.implementation for r in results].index(name)
    line = model_figures(results, rate)[at]
    recorded(
        f"{size.name} B={size.B} T={size.T}, {dtype}, dropout {dropout}, {each}",
        MODEL_HEADER, model_cells(line), results[at].seconds, asdict(line),
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.skipif(DEVICE == "cuda", reason="in the tables of test_model")
@pytest.mark.parametrize(("dtype", "dropout"), KINDS)
def test_peak_memory_on_a_cpu(line, dtype, dropout):
    """In a process each, beyond parameters, gradients and optimizer state."""
    ours, theirs = (
        int(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.train_step", library, dtype, str(dropout)],
                stdout=subprocess.PIPE, text=True, check=True,
            ).stdout
        )
        for library in ("gpt1_kernels", "transformers")
    )  # fmt: skip
    line(
        "gpt1 B=2 T=512, peak memory beyond the model's state, MB",
        ("", "gpt1_kernels", "transformers", "of theirs"),
        (f"{dtype}, dropout {dropout}", str(ours), str(theirs), f"{ours / theirs:.0%}"),
    )
