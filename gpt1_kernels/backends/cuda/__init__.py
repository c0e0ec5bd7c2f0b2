"""CUDA C++ kernels: the backend `cuda` on a GPU, and `cuda_host`, the same kernels on a CPU.

The modules of the ops serve both; `extension.launch` picks the compiled module by the tensor's
device. Importing this package loads neither.
"""

from __future__ import annotations

import torch

from gpt1_kernels.backends import MINIMUM_CAPABILITY, old_gpu_reason
from gpt1_kernels.backends.cuda import extension

DEVICES = {"cuda": "cuda", "cuda_host": "cpu"}


def unavailable_reason(backend: str, device_type: str) -> str | None:
    """Why one of the two backends cannot run on tensors of a device type, or None if it can."""
    reason = extension.absence(backend)
    if reason is None and backend == "cuda":
        reason = _gpu_reason()
    if reason is None and device_type != DEVICES[backend]:
        reason = f"it takes {DEVICES[backend]} tensors, not {device_type} ones"
    return reason


def _gpu_reason() -> str | None:
    """Why the GPUs of this machine cannot run the compiled kernels, or None if they can."""
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    compiled = extension.module("cuda")
    driver, runtime = compiled.versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver is for CUDA {_release(driver)}, older than the CUDA "
            f"{_release(runtime)} that the kernels were compiled with"
        )
    return old_gpu_reason() or _other_gpu_reason(compiled.capabilities())


def _other_gpu_reason(capabilities: str) -> str | None:
    """Which GPU of this machine the kernels were not compiled for, or None."""
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_capability(index)
        if not any(_runs_on(gpu, compiled) for compiled in capabilities.replace(";", " ").split()):
            return (
                f"GPU {index} has compute capability {gpu[0]}.{gpu[1]}, and the kernels were "
                f"compiled for TORCH_CUDA_ARCH_LIST={capabilities!r}"
            )
    return None


def _runs_on(gpu: tuple[int, int], compiled: str) -> bool:
    """Whether a GPU runs what was compiled for a capability such as "9.0a" or "10.0+PTX"."""
    number, _, ptx = compiled.partition("+")
    own = tuple(map(int, number.rstrip("af").split(".")))
    if own < MINIMUM_CAPABILITY:  # left out by the build
        return False
    if number.endswith("a"):
        return own == gpu
    return own <= gpu and (own[0] == gpu[0] or (ptx != "" and not number.endswith("f")))


def _release(version: int) -> str:
    """ "13.0" for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
