"""Compiles, without a GPU, the Triton kernels that the ops launch, and prints what came out.

    python tests/compile_triton.py code 90 bfloat16

prints a JSON list of {kernel, config, shared, shared_limit, registers, stack, local, accesses,
matrix_units} for compute capability 9.0, as on a chip with little shared memory and on one with
much; `probes` instead of `code` compiles the kernels at the end of this file. And

    python tests/compile_triton.py compilations 90

prints how often each kernel of an op is compiled when lengths change. It runs in a process of its
own, because Triton's interpreter cannot be switched off once it is on.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gpt1_kernels.backends import kernel as function_of
from tests.sass import loop_accesses, matrix_units

N, C, F, T, V, HEADS = 32768, 768, 3072, 512, 40478, 12
N_HEAD = 4096  # rows: two chunks of logits, or more
PROCESSORS = 132
SHARED_MEMORY = {80: (99,), 90: (99, 227), 100: (99, 227)}  # KiB, of a capability's chips
LENGTHS = (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 255, 256, 257, 512, 1000)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SEED = torch.zeros(2, dtype=torch.int64)


class NoGPU:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def call(op: str, name: str, *args) -> None:
    function_of("triton", op, name)(*args)


def layer_norm(rows: int, dtype: torch.dtype) -> None:
    x, w, stat = torch.empty(rows, C, dtype=dtype), torch.empty(C, dtype=dtype), torch.empty(rows)
    call("layer_norm", "layer_norm_fwd", x, w, w, 1e-5)
    call("layer_norm", "layer_norm_bwd", x, x, w, stat, stat, [True] * 3)


def dropout_add_layer_norm(rows: int, dtype: torch.dtype) -> None:
    x, w, stat = torch.empty(rows, C, dtype=dtype), torch.empty(C, dtype=dtype), torch.empty(rows)
    op, dropout = "dropout_add_layer_norm", (0.1, rows)
    call(op, f"{op}_fwd", x, x, w, w, w, SEED, 1e-5, *dropout, True)
    call(op, f"{op}_bwd", x, x, w, stat, stat, SEED, *dropout, [True] * 5)


def dropout_mask(length: int, dtype: torch.dtype) -> None:
    call("dropout_mask", "dropout_mask", SEED, (1, HEADS, length, length), 0.1, length, True)


def causal_attention(length: int, dtype: torch.dtype, batch: int = 2) -> None:
    qkv = torch.empty(batch, length, 3 * C, dtype=dtype)
    out, lse = torch.empty(batch, length, C, dtype=dtype), torch.empty(batch, HEADS, length)
    bits = torch.empty(batch, HEADS, length, (length + 31) // 32, dtype=torch.int32)
    options = bits, None, (C // HEADS) ** -0.5, 0.1
    op = "causal_attention"
    call(op, f"{op}_qkvpacked_fwd", qkv, HEADS, *options)
    call(op, f"{op}_qkvpacked_bwd", out, qkv, HEADS, out, lse, *options)


def gelu_ffn(rows: int, dtype: torch.dtype) -> None:
    x, pre = torch.empty(rows, C, dtype=dtype), torch.empty(rows, F, dtype=dtype)
    w_fc, w_proj = torch.empty(C, F, dtype=dtype), torch.empty(F, C, dtype=dtype)
    b_fc, b_proj = torch.empty(F, dtype=dtype), torch.empty(C, dtype=dtype)
    call("gelu_ffn", "gelu_ffn_fwd", x, w_fc, b_fc, w_proj, b_proj, True)
    call("gelu_ffn", "gelu_ffn_bwd", x, x, pre, w_fc, w_proj, [True] * 5)


def embedding(length: int, dtype: torch.dtype, batch: int = 2) -> None:
    ids = torch.zeros(batch, length, dtype=torch.int64)
    table, positions = torch.empty(V, C, dtype=dtype), torch.empty(1000, C, dtype=dtype)
    dout = torch.empty(batch, length, C, dtype=dtype)
    dropout = SEED, 0.1, length
    for given in (None, ids):  # positions by order, and given; no types, and types
        call("embedding", "embedding_fwd", ids, table, positions, given, given, *dropout, dtype)
        call(
            "embedding", "embedding_bwd", dout, ids, given, given, *dropout, V, 1000, dtype,
            [True] * 2,
        )  # fmt: skip


def linear_cross_entropy(rows: int, dtype: torch.dtype, vocabulary: int = 1000) -> None:
    """With gradients, without, and the backward of "none"."""
    h, w = torch.empty(rows, C, dtype=dtype), torch.empty(vocabulary, C, dtype=dtype)
    targets, weight = torch.zeros(rows, dtype=torch.int64), torch.empty(rows)
    op = "linear_cross_entropy"
    for gradients in ([True] * 2, [False] * 2):
        call(op, f"{op}_fwd", h, w, targets, None, -100, gradients)
    call(op, f"{op}_bwd", weight, h, w, targets, weight, weight, -100, [True] * 2)
    call(op, "scale_gradients", h, torch.empty(vocabulary, C), weight[0], dtype)


GPT1 = {
    "layer_norm": lambda dtype: layer_norm(N, dtype),
    "dropout_add_layer_norm": lambda dtype: dropout_add_layer_norm(N, dtype),
    "dropout_mask": lambda dtype: dropout_mask(T, dtype),
    "causal_attention": lambda dtype: causal_attention(T, dtype, N // T),
    "gelu_ffn": lambda dtype: gelu_ffn(N, dtype),
    "embedding": lambda dtype: embedding(T, dtype, N // T),
    "linear_cross_entropy": lambda dtype: linear_cross_entropy(N_HEAD, dtype, V),
}
OVER_LENGTHS = [
    layer_norm, dropout_add_layer_norm, dropout_mask, causal_attention, gelu_ffn, embedding,
    linear_cross_entropy,
]  # fmt: skip


def disassembled(cubin: bytes) -> dict:
    """Registers, stack and local memory of a kernel, and what `tests.sass` reads from it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            command = [CUOBJDUMP, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, text = dump("-res-usage"), dump("-sass")
    return {
        name: int(re.search(rf"{key}:(\d+)", usage)[1])
        for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    } | {"accesses": loop_accesses(text), "matrix_units": sorted(matrix_units(text))}


def described(kernel, config, compiled, shared_limit: int = 99 * 1024) -> dict:
    return {
        "kernel": kernel.__name__,
        "config": str(config),
        "shared": compiled.metadata.shared,
        "shared_limit": shared_limit,
        **disassembled(compiled.asm["cubin"]),
    }


def compiling(capability: int, shared_memory: int, seen: Callable) -> None:
    """From here on, a launch compiles a kernel and calls `seen(kernel, config, compiled)`."""
    from gpt1_kernels.backends.triton import launch

    def compile_only(kernel, grid, config, *args, **constants):
        seen(kernel, config, kernel.warmup(*args, grid=grid, **constants, **vars(config)))

    # The ops' modules are imported at their first call, and find this in the place of `launch`.
    launch.launch = lambda *args, **constants: launch.compile_only(*args, **constants)
    launch.compile_only = compile_only
    launch.processors = lambda device: PROCESSORS
    launch.has_bulk_copies = lambda device: capability >= 90
    launch.shared_memory = lambda device: shared_memory
    launch.product_tiles.cache_clear()


def code(capability: int, dtype: str) -> list[dict]:
    """Every kernel that the ops launch at GPT-1's shapes, once."""
    found = {}
    for limit in (KiB * 1024 for KiB in SHARED_MEMORY[capability]):
        compiling(
            capability, limit,
            lambda *what, limit=limit: found.setdefault(what[-1].hash, (*what, limit)),
        )  # fmt: skip
        for run in GPT1.values():
            run(getattr(torch, dtype))
    return [described(*what) for what in found.values()]


def compilations(capability: int) -> dict[str, dict[str, int]]:
    """By op and kernel: the specialisations compiled for all of LENGTHS."""
    launched = set()
    compiling(capability, 99 * 1024, lambda kernel, *_: launched.add(kernel))
    counts = {}
    for op in OVER_LENGTHS:
        for kernel in launched:
            kernel.device_caches.clear()
        launched.clear()
        for length in LENGTHS:
            op(length, torch.bfloat16)
        counts[op.__name__] = {
            kernel.__name__: sum(len(cache) for cache, *_ in kernel.device_caches.values())
            for kernel in launched
        }
    return counts


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
    return [
        described(kernel, constants, kernel.warmup(*args, grid=(1,), **constants))
        for kernel, args, constants in launches
    ]


if __name__ == "__main__":
    what, capability, *dtype = sys.argv[1:]
    driver.set_active(NoGPU(int(capability)))
    functions = {"code": code, "compilations": compilations, "probes": probes}
    print(json.dumps(functions[what](int(capability), *dtype)))
