"""What Triton makes of the kernels that the ops launch at GPT-1's shapes, without a GPU.

    python -m benchmarks.triton_code 90 bfloat16

prints a JSON list of {op, kernel, constants, shared, shared_limit, registers, stack, local,
accesses, matrix_units, main_loop} for compute capability 9.0, as on a chip with little shared
memory and on one with much. It is a process of its own, because Triton's interpreter cannot be
switched off once it is on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import compiling
from benchmarks.launchers import GPT1
from benchmarks.sass import wide_share

SHARED_MEMORY = {80: (99,), 90: (99, 227), 100: (99, 227)}  # KiB, of a capability's chips
ROOT = Path(__file__).parents[1]


@cache
def compiled(capability: int, dtype: str) -> list[dict]:
    """What this file prints when it runs."""
    return without_interpreter("-m", "benchmarks.triton_code", str(capability), dtype)


def rows(capability: int) -> dict[str, dict[str, float]]:
    """In bf16: what the baseline keeps of each kernel."""
    found, seen = {}, Counter()
    for code in compiled(capability, "bfloat16"):
        kernel = f"{code['op']}, {code['kernel']}, {code['shared_limit'] // 1024} KiB"
        seen[kernel] += 1
        found[f"{capability / 10}: {kernel}, {seen[kernel]}"] = {
            **{quantity: code[quantity] for quantity in ("registers", "shared", "main_loop")},
            "wide share": wide_share(code["accesses"]),
        }
    return found


def versions() -> dict[str, str]:
    """What the code depends on beside its source."""
    return {"Triton": metadata.version("triton")}


def without_interpreter(*arguments: str) -> list | dict:
    """What a Python program prints as JSON, in a process without Triton's interpreter.

    Raises:
        RuntimeError: it failed; the message is its standard error.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *arguments], env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode != 0:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout)


def described(kernels: Sequence[tuple], capability: int) -> list[dict]:
    """Kernels as `benchmarks.compiling.compiling` hands them over, each with its `shared_limit`."""
    codes = compiling.described([binary.asm["cubin"] for *_, binary, _ in kernels], capability)
    return [
        {
            "kernel": kernel.__name__,
            "constants": str(constants),
            "shared": binary.metadata.shared,
            "shared_limit": shared_limit,
            **code,
        }
        for (kernel, constants, binary, shared_limit), code in zip(kernels, codes, strict=True)
    ]


def compile_all(capability: int, dtype: str) -> list[dict]:
    """Every kernel that the ops launch at GPT-1's shapes, once."""
    found = {}
    for limit in (KiB * 1024 for KiB in SHARED_MEMORY[capability]):
        for op, run in GPT1.items():

            def seen(kernel, constants, compiled, op=op, limit=limit):
                found.setdefault(compiled.hash, (op, (kernel, constants, compiled, limit)))

            with compiling.compiling(capability, limit, seen):
                run(getattr(torch, dtype))
    ops, kernels = zip(*found.values(), strict=True)
    rows = described(kernels, capability)
    return [{"op": op, **row} for op, row in zip(ops, rows, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("capability", type=int, choices=SHARED_MEMORY)
    parser.add_argument("dtype", choices=("bfloat16", "float16", "float32"))
    print(json.dumps(compile_all(**vars(parser.parse_args()))))
