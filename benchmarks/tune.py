"""Candidates for the launch configurations of `gpt1_kernels/backends/triton/launch.py`.

    python -m benchmarks.tune attention_fwd

compiles a family of kernels at GPT-1's sizes with every configuration of its grid, for chips that
need not be here, and prints those that fit: nothing spilled, shared memory within the limit. Where
there is a GPU they are timed too, once they agree with the present choice (*), and sorted by time.
Nothing is chosen here or at run time: a person reads the table and edits `launch.py`.

    registers     of a thread; shared: KiB of shared memory of a program
    by registers  programs that a processor holds at once for its registers and warps, and
    by shared     for its shared memory; warps: those of the lesser number
    SASS          instructions in the main loop for each element of a tile (not counting BLOCK_D)

An op may launch several kernels of a family: the figures are the greatest, the time is the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from itertools import product
from math import inf, prod
from typing import Literal
from unittest import mock

import torch
import triton
import tyro
from torch.utils._pytree import tree_leaves
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from benchmarks.compiling import compiling, described
from benchmarks.families import FAMILIES, Family
from benchmarks.launchers import GPT1
from benchmarks.occupancy import CHIPS, Chip, resident_programs
from gpt1_kernels.backends.triton import launch
from gpt1_kernels.numerics import Error, allowed, error

MODULES = [
    import_module(f"gpt1_kernels.backends.triton.{name}")
    for name in ("attention", "dropout", "embedding", "ffn", "layer_norm", "linear_cross_entropy",
                 "matmul", "partials")
]  # fmt: skip
"""Where what `launch.py` chooses is used."""
TENSOR_MEMORY = 512  # columns of a program, from compute capability 10.0
FIGURES = "registers", "shared", "tensor", "stack", "local", "main_loop"


@dataclass(frozen=True)
class TuneConfig:
    """Prints candidates for the launch configuration of a family of kernels."""

    family: tyro.conf.Positional[Literal[tuple(FAMILIES)]]
    """The kernels."""
    capabilities: tuple[Literal[tuple(CHIPS)], ...] = ()
    """Compute capabilities, times ten; by default the GPU's, or 80 90 100 without one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the activations."""
    shared_memory: int = launch.SMALLEST_SHARED_MEMORY // 1024
    """KiB that a program may have."""


@contextmanager
def choosing(family: Family, change: dict[str, int]) -> Iterator[None]:
    """Inside, the fields in `change` replace what the family's heuristic chooses."""
    chosen = getattr(launch, family.heuristic)
    if callable(chosen):
        changed = lambda *args, **kwargs: replace(chosen(*args, **kwargs), **change)  # noqa: E731
    else:
        changed = replace(chosen, **change)
    with ExitStack() as patches:
        for module in MODULES:
            if hasattr(module, family.heuristic):
                patches.enter_context(mock.patch.object(module, family.heuristic, changed))
        yield


def compiled(family: Family, change: dict, capability: int, config: TuneConfig) -> tuple:
    """The configuration, and the greatest of each of FIGURES over its kernels."""
    found = {}

    def seen(kernel, constants, binary):
        if kernel.__name__ in family.kernels:
            found[binary.hash] = constants, binary

    with compiling(capability, config.shared_memory * 1024, seen), choosing(family, change):
        GPT1[family.op](getattr(torch, config.dtype))
    constants = next(iter(found.values()))[0]
    binaries = [binary for _, binary in found.values()]
    kernels = [
        code
        | {"shared": binary.metadata.shared, "tensor": getattr(binary.metadata, "tmem_size", 0)}
        for binary, code in zip(
            binaries, described([b.asm["cubin"] for b in binaries], capability), strict=True
        )
    ]
    tiles = family.tiles(**{f.name: constants[f.name] for f in fields(family.tiles)})
    return tiles, {figure: max(k[figure] or 0 for k in kernels) for figure in FIGURES}


def flaw(figures: dict[str, int], shared_memory: int) -> str | None:
    """Why a chip cannot run a kernel, or only slowly."""
    if figures["stack"] or figures["local"]:
        return "spill registers"
    if figures["shared"] > shared_memory * 1024:
        return f"need more than {shared_memory} KiB of shared memory"
    return "need more tensor memory" if figures["tensor"] > TENSOR_MEMORY else None


@contextmanager
def allowing(shared_memory: int) -> Iterator[None]:
    """Inside, heuristics choose for a chip with so much shared memory, in KiB, for a program."""
    launch.product_tiles.cache_clear()
    with mock.patch.object(launch, "shared_memory", return_value=shared_memory * 1024):
        yield
    launch.product_tiles.cache_clear()


def called(
    family: Family, change: dict[str, int], dtype: torch.dtype, device: str
) -> tuple[list[torch.Tensor], list[Callable]]:
    """What the op returns for inputs always the same, and its launches of the family's kernels."""
    launches, start = [], KernelInterface.__getitem__

    def noting(kernel, grid):
        def run(*args, **constants):
            if kernel.__name__ in family.kernels:
                launches.append(partial(start(kernel, grid), *args, **constants))
            start(kernel, grid)(*args, **constants)

        return run

    torch.manual_seed(0)
    noted = mock.patch.object(KernelInterface, "__getitem__", noting)
    with torch.device(device), noted, choosing(family, change):
        results = GPT1[family.op](dtype)
    return tree_leaves(results), launches


def microseconds(
    family: Family, change: dict[str, int], dtype: torch.dtype, expected: list[torch.Tensor]
) -> float | None:
    """The time of the family's kernels in one call, or None if its results are not as expected."""
    results, launches = called(family, change, dtype, expected[0].device.type)
    limit = allowed(Error(inf, inf), dtype)
    errors = [error(*pair) for pair in zip(results, expected, strict=True)]
    if any(e.whole > limit.whole or e.worst_row > limit.worst_row for e in errors):
        return None
    return 1000 * triton.testing.do_bench(lambda: [f() for f in launches], return_mode="median")


def tune(family: Family, capability: int, config: TuneConfig, timed: bool) -> None:
    """Prints the table of one chip."""
    found, dropped, times = {}, Counter(), {}
    choices = (zip(family.grid, values, strict=True) for values in product(*family.grid.values()))
    for change in ({}, *map(dict, choices)):
        tiles, figures = compiled(family, change, capability, config)
        found.setdefault(tiles, (change, figures))
    present = next(iter(found))
    for tiles, (_, figures) in list(found.items()):
        if reason := flaw(figures, config.shared_memory):
            dropped[reason] += 1
            del found[tiles]
    if timed:
        driver.reset_active()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what need not be written
        dtype = getattr(torch, config.dtype)
        with allowing(config.shared_memory):  # as they were compiled, whatever this GPU has
            expected, _ = called(family, {}, dtype, "cuda")
            for tiles, (change, _) in found.items():
                times[tiles] = microseconds(family, change, dtype, expected)
    print(f"capability {capability / 10}, {config.dtype}")
    print("  " + "  ".join(columns(family, timed)))
    for tiles in sorted(found, key=lambda tiles: times.get(tiles) or inf):
        cells = row(tiles, found[tiles][1], CHIPS[capability])
        if timed:
            cells.append("differs" if times[tiles] is None else f"{times[tiles]:.1f}")
        aligned = map(str.rjust, cells, map(len, columns(family, timed)))
        print("* "[tiles != present] + " " + "  ".join(aligned))
    for reason, count in dropped.items():
        print(f"{count} of {len(found) + dropped.total()} {reason}")
    print(flush=True)


def columns(family: Family, timed: bool) -> list[str]:
    fixed = ["registers", "shared", "by registers", "by shared", "warps", "SASS"]
    return [f.name for f in fields(family.tiles)] + fixed + ["     µs"] * timed


def row(tiles, figures: dict[str, int], chip: Chip) -> list[str]:
    """The cells of a configuration."""
    warps, shared = tiles.num_warps, figures["shared"]
    resident = resident_programs(chip, warps, figures["registers"], shared)
    sizes = [n for name, n in vars(tiles).items() if "BLOCK" in name and name != "BLOCK_D"]
    sass = figures["main_loop"] * 32 * warps / prod(sizes)
    numbers = *vars(tiles).values(), figures["registers"], f"{shared / 1024:.1f}", *resident
    return [str(n) for n in (*numbers, min(resident) * warps, f"{sass:.3g}")]


def main(config: TuneConfig) -> None:
    gpu = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = 10 * major + minor
    for capability in config.capabilities or ((gpu,) if gpu else (80, 90, 100)):
        tune(FAMILIES[config.family], capability, config, timed=capability == gpu)


if __name__ == "__main__":
    main(tyro.cli(TuneConfig))
