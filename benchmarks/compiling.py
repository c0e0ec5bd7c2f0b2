"""Triton's compiler without a GPU: what comes out for a chip that is not here.

Only where Triton's interpreter is off, which is decided when Triton is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from benchmarks.sass import (
    CUOBJDUMP,
    disassembled,
    loop_accesses,
    machine_code,
    main_loop,
    matrix_units,
)
from gpt1_kernels.backends.triton import launch

PROCESSORS = 132


class NoGPU:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # each chip has its own cache of kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int, shared_memory: int, seen: Callable) -> Iterator[None]:
    """Inside, a launch only compiles its kernel and calls `seen(kernel, constants, compiled)`.

    Triton's driver is still the absent chip's afterwards; `driver.reset_active()` ends that.

    Args:
        capability: of the chip that is compiled for, ten times its number.
        shared_memory: bytes of it that a program may have.
    """

    def compile_only(kernel, grid):
        return lambda *args, **constants: seen(
            kernel, constants, kernel.warmup(*args, grid=grid, **constants)
        )

    driver.set_active(NoGPU(capability))
    launch.product_tiles.cache_clear()
    with (
        mock.patch.object(KernelInterface, "__getitem__", compile_only),
        mock.patch.multiple(
            launch,
            processors=lambda device: PROCESSORS,
            has_bulk_copies=lambda device: capability >= 90,
            is_hopper=lambda device: capability // 10 == 9,
            shared_memory=lambda device: shared_memory,
        ),
    ):
        yield
    launch.product_tiles.cache_clear()


def described(cubins: Sequence[bytes], capability: int) -> list[dict]:
    """Registers, stack and local memory of kernels, and what `benchmarks.sass` reads from them."""
    codes = [code for cubin in cubins for _, code in machine_code(cubin)]
    texts = disassembled(codes, f"{capability}{'a' * (capability >= 90)}")
    return [
        _usage(cubin)
        | {
            "accesses": loop_accesses(text),
            "matrix_units": sorted(matrix_units(text)),
            "main_loop": main_loop(text),
        }
        for cubin, text in zip(cubins, texts, strict=True)
    ]


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: int(re.search(rf"{key}:(\d+)", usage)[1])
        for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }
