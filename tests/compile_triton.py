"""Compiles, without a GPU, the Triton kernels that the ops launch, and prints what they occupy.

    python tests/compile_triton.py 90

prints a JSON list of {kernel, config, registers, stack, shared} for compute capability 9.0. It runs
in a process of its own, because Triton's interpreter cannot be switched off once it is on.
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

from gpt1_kernels.backends.triton import dropout, layer_norm, linear_cross_entropy, matmul, partials

N, C, T, HEADS, V = 32768, 768, 512, 12, 40478
N_HEAD = 4096  # two chunks of logits, or more
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
    dropout.dropout_mask(seed, (1, HEADS, T, T), 0.1, 0, True)
    of_head(x[:N_HEAD], torch.empty(V, C, dtype=dtype))


def of_head(h: torch.Tensor, w: torch.Tensor) -> None:
    """The loss with and without gradients, and the backward of reduction="none"."""
    targets, weight = torch.zeros(len(h), dtype=torch.int64), torch.empty(len(h))
    for gradients in ([True] * 2, [False] * 2):
        losses, lse, dh, dw = linear_cross_entropy.linear_cross_entropy_fwd(
            h, w, targets, None, -100, gradients
        )
        linear_cross_entropy.scale_gradients(dh, dw, losses[0], w.dtype)
    linear_cross_entropy.linear_cross_entropy_bwd(
        losses, h, w, targets, lse, weight, -100, [True] * 2
    )


def occupied(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        name: int(re.search(rf"{key}:(\d+)", text)[1])
        for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
    }


def main(capability: int) -> None:
    driver.set_active(NoGPU(capability))
    rows = []

    def compile_only(kernel, grid, config, *args, **constants):
        compiled = kernel.warmup(*args, grid=grid, **constants, **vars(config))
        rows.append(
            {
                "kernel": kernel.__name__,
                "config": str(config),
                "shared": compiled.metadata.shared,
                **occupied(compiled.asm["cubin"]),
            }
        )

    for module in (dropout, layer_norm, linear_cross_entropy, matmul, partials):
        module.launch = compile_only
    for dtype in (torch.bfloat16, torch.float32):
        launch_all(dtype)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
