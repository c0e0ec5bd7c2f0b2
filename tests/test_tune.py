"""The offline tuner: what it prints of a kernel that is compiled here, and its arithmetic."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from benchmarks.occupancy import CHIPS, resident_programs

pytest.importorskip("triton")

from benchmarks import launchers, tune
from gpt1_kernels.backends.triton import launch
from tests.cases import DEVICE

NARROWED = """
from benchmarks import tune
grid = {"BLOCK_R": (32, 256), "BLOCK_W": (8,), "num_warps": (2,)}
tune.FAMILIES["dropout_mask"] = tune.FAMILIES["dropout_mask"]._replace(grid=grid)
tune.main(tune.TuneConfig("dropout_mask", capabilities=(90,)))
"""
"""Beside the present choice, one that fits, and one with more words than a thread's registers."""


def test_prints_what_fits_and_drops_what_spills():
    # In a process of its own: Triton's interpreter cannot be switched off once it is on.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", NARROWED],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    title, header, *rows, dropped = run.stdout.strip().splitlines()
    assert title == "capability 9.0, bfloat16"
    assert header.split()[:4] == ["BLOCK_R", "BLOCK_W", "num_warps", "registers"]
    (mark, *present), other = (line.split() for line in rows)
    assert mark == "*"
    assert [int(n) for n in present[:3]] == list(vars(launch.BIT_TILES).values())
    assert other[:3] == ["32", "8", "2"]
    assert 0 < int(other[3]) <= 255
    assert dropped == "1 of 3 spill registers"


@pytest.mark.parametrize("name", tune.FAMILIES)
def test_a_family_names_what_exists(name):
    family = tune.FAMILIES[name]
    assert hasattr(launch, family.heuristic)
    assert any(hasattr(module, family.heuristic) for module in tune.MODULES)
    assert family.grid.keys() <= {field.name for field in fields(family.tiles)}
    for kernel in family.kernels:
        assert any(hasattr(module, kernel) for module in tune.MODULES)


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "programs"),
    [
        (80, 8, 128, 0, (2, 32)),  # 8 · 32 · 128 registers are half of what a processor has
        (80, 8, 129, 0, (1, 32)),  # and are allotted by the 8
        (90, 4, 32, 99 * 1024, (16, 2)),
        (89, 4, 32, 99 * 1024, (12, 1)),  # of 48 warps
        (90, 1, 16, 0, (32, 32)),
        (90, 1, 200, 0, (8, 32)),  # two for each of the four schedulers, which share no registers
    ],
)
def test_resident_programs(capability, warps, registers, shared, programs):
    assert resident_programs(CHIPS[capability], warps, registers, shared) == programs


def test_times_what_it_compiled_whatever_the_gpu_has(monkeypatch):
    """With the shared memory of its option, and not the 227 KiB of the chip that times."""
    timed = []

    def microseconds(family, change, dtype, expected):
        timed.append(launch.product_tiles(dtype, torch.device("cpu")))
        return 1.0

    monkeypatch.setattr(launch, "shared_memory", lambda device: 227 * 1024)
    figures = dict.fromkeys(tune.FIGURES, 0) | {"registers": 128, "main_loop": 64}
    monkeypatch.setattr(tune, "compiled", lambda *args: (launch.SMALL_TILES, figures))
    monkeypatch.setattr(tune, "called", lambda *args: ([torch.zeros(1)], []))
    monkeypatch.setattr(tune, "microseconds", microseconds)
    monkeypatch.setattr(tune.driver, "reset_active", lambda: None)
    launch.product_tiles.cache_clear()
    tune.tune(tune.FAMILIES["product"], 90, tune.TuneConfig("product"), timed=True)
    assert timed == [launch.SMALL_TILES]


@pytest.mark.parametrize("name", ["layer_norm_fwd", "partials"])  # a function, a constant
def test_times_what_agrees_with_the_present_choice(monkeypatch, name):
    op, field = "dropout_add_layer_norm", {"layer_norm_fwd": "BLOCK_N", "partials": "BLOCK_P"}[name]
    monkeypatch.setitem(tune.GPT1, op, lambda dtype: launchers.dropout_add_layer_norm(20, dtype))
    monkeypatch.setattr(launchers, "_new", lambda dtype, *shape: torch.randn(shape, dtype=dtype))
    monkeypatch.setattr(launchers, "C", 48)
    launched = []

    def do_bench(run, return_mode):
        launched.append(len(run()))
        return 0.25  # ms

    monkeypatch.setattr(tune.triton.testing, "do_bench", do_bench)
    family, change, dtype = tune.FAMILIES[name], {field: 2}, torch.bfloat16
    expected, _ = tune.called(family, {}, dtype, DEVICE)
    _, (again,) = tune.called(family, change, dtype, DEVICE)
    assert again.keywords[field] == 2
    assert tune.microseconds(family, change, dtype, expected) == 250
    expected[0][-1] += 1
    assert tune.microseconds(family, change, dtype, expected) is None
    assert launched == [1]
