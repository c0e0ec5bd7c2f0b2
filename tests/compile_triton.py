"""Compiles Triton kernels without a GPU, in a process of its own, and prints what came out.

    python tests/compile_triton.py probes 90

prints for the kernels at the end of this file, and compute capability 9.0, what
`benchmarks.triton_code` prints for the ops'. And

    python tests/compile_triton.py compilations 90

prints how often each kernel of an op is compiled when lengths change, and

    python tests/compile_triton.py assertions 90

how many assertions TRITON_DEBUG=1 adds to the kernel that draws dropout bits.
"""

import json
import sys

import torch
import triton
import triton.language as tl

from benchmarks.compiling import compiling
from benchmarks.launchers import OVER_LENGTHS, dropout_mask
from benchmarks.triton_code import described
from gpt1_kernels.backends.triton.launch import SMALLEST_SHARED_MEMORY

LENGTHS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 255, 256, 257, 512, 1000)


def compilations(capability: int) -> dict[str, dict[str, int]]:
    """By op and kernel: the specialisations compiled for all of LENGTHS."""
    counts = {}
    for op in OVER_LENGTHS:
        found: dict[str, set] = {}

        def seen(kernel, constants, compiled, found=found):
            found.setdefault(kernel.__name__, set()).add(compiled)

        with compiling(capability, SMALLEST_SHARED_MEMORY, seen):
            for length in LENGTHS:
                op(length, torch.bfloat16)
        counts[op.__name__] = {
            name: len(specialisations) for name, specialisations in found.items()
        }
    return counts


def assertions(capability: int) -> int:
    """Of integers that must not overflow, for the most part."""
    count = 0

    def seen(kernel, constants, compiled):
        nonlocal count
        count += compiled.asm["ttir"].count("tt.assert")

    triton.knobs.runtime.debug = True
    with compiling(capability, SMALLEST_SHARED_MEMORY, seen):
        dropout_mask(64, torch.bfloat16)
    return count


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    """A product, which the matrix units must do."""
    m, n, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    c = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for first in range(0, K, BLOCK):
        a = tl.load(a_ptr + m[:, None] * K + first + k[None, :])
        b = tl.load(b_ptr + (first + k)[:, None] * BLOCK + n[None, :])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + m[:, None] * BLOCK + n[None, :], c.to(tl.bfloat16))


@triton.jit
def transposing_kernel(x_ptr, y_ptr, N, stride, BLOCK: tl.constexpr):
    """Reads 2 bytes at a time, and writes 16."""
    column = tl.arange(0, BLOCK)
    for row in range(0, N):
        tl.store(y_ptr + row * BLOCK + column, tl.load(x_ptr + column * stride + row))


@triton.jit
def crowded_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Holds more than a thread's registers."""
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    tl.debug_barrier()
    tl.store(y_ptr + index, x)


def probes(capability: int) -> list[dict]:
    """Kernels that show that the checks see."""
    x = torch.empty(1, dtype=torch.bfloat16)
    launches = [
        (product_kernel, (x, x, x, 256), {"BLOCK": 128}),
        (transposing_kernel, (x, x, 16, 7), {"BLOCK": 1024}),
        (crowded_kernel, (x.float(), x.float()), {"BLOCK": 65536}),
    ]
    found = []

    def seen(*kernel):
        found.append((*kernel, SMALLEST_SHARED_MEMORY))

    with compiling(capability, SMALLEST_SHARED_MEMORY, seen):
        for kernel, args, constants in launches:
            kernel[1,](*args, **constants)
    return described(found, capability)


if __name__ == "__main__":
    what, capability = sys.argv[1:]
    functions = {function.__name__: function for function in (assertions, compilations, probes)}
    print(json.dumps(functions[what](int(capability))))
