"""Compiles, without a GPU, the Triton kernels that the ops launch, and prints what they occupy.

    python tests/compile_triton.py 90

prints a JSON list of {kernel, config, dtype, registers, stack, shared, shared_limit, matrix} for
compute capability 9.0, `matrix` being the matrix instructions in its code. It runs in a process of
its own, because Triton's interpreter cannot be switched off once it is on.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gpt1_kernels.backends.triton import dropout, ffn, launch, layer_norm, matmul, partials

N, C, F, T, HEADS = 32768, 768, 3072, 512, 12
PROCESSORS = 132
SHARED_MEMORY = {80: (99,), 90: (99, 227), 100: (99, 227)}  # KiB, of a capability's chips
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


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


def launch_all(dtype: torch.dtype) -> None:
    """Calls every launcher on GPT-1's shapes."""
    x = torch.empty(N, C, dtype=dtype)
    w = torch.empty(C, dtype=dtype)
    stat, seed = torch.empty(N), torch.zeros(2, dtype=torch.int64)
    layer_norm.layer_norm_fwd(x, w, w, 1e-5)
    layer_norm.layer_norm_bwd(x, x, w, stat, stat, [True] * 3)
    layer_norm.dropout_add_layer_norm_fwd(x, x, w, w, w, seed, 1e-5, 0.1, 0, True)
    layer_norm.dropout_add_layer_norm_bwd(x, x, w, stat, stat, seed, 0.1, 0, [True] * 5)
    w_fc, w_proj = torch.empty(C, F, dtype=dtype), torch.empty(F, C, dtype=dtype)
    pre = torch.empty(N, F, dtype=dtype)
    ffn.gelu_ffn_fwd(x, w_fc, pre[0], w_proj, w, True)
    ffn.gelu_ffn_bwd(x, x, pre, w_fc, w_proj, [True] * 5)
    matmul.matmul(pre.t(), x, torch.empty(F, C), accumulate=True)
    dropout.dropout_mask(seed, (1, HEADS, T, T), 0.1, 0, True)


def inspected(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", "-sass", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    occupied = {
        name: int(re.search(rf"{key}:(\d+)", text)[1])
        for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }
    return {**occupied, "matrix": sorted(set(re.findall(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", text)))}


def main(capability: int) -> None:
    driver.set_active(NoGPU(capability))
    rows = []

    def compile_only(kernel, grid, config, *args, **constants):
        compiled = kernel.warmup(*args, grid=grid, **constants, **vars(config))
        rows.append(
            {
                "kernel": kernel.__name__,
                "config": f"{config} {constants}",
                "dtype": str(dtype),
                "shared": compiled.metadata.shared,
                "shared_limit": limit,
                **inspected(compiled.asm["cubin"]),
            }
        )

    for module in (dropout, layer_norm, matmul, partials):
        module.launch = compile_only
    launch.processors = lambda device: PROCESSORS
    launch.has_bulk_copies = lambda device: capability >= 90
    for limit in (KiB * 1024 for KiB in SHARED_MEMORY[capability]):
        launch.shared_memory = lambda device, limit=limit: limit
        launch.product_tiles.cache_clear()
        for dtype in (torch.bfloat16, torch.float32):
            launch_all(dtype)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
