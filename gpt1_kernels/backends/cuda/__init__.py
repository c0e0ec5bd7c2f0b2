"""CUDA C++ kernels: the backend `cuda` on a GPU, and `cuda_host`, the same kernels on a CPU.

The modules of the ops serve both; `extension.launch` picks the compiled module by the tensor's
device. Importing this package loads neither.
"""

from __future__ import annotations

import torch

from gpt1_kernels.backends import old_gpu_reason
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
    driver, runtime = extension.module("cuda").versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver is for CUDA {_release(driver)}, older than the CUDA "
            f"{_release(runtime)} that the kernels were compiled with"
        )
    return old_gpu_reason()


def _release(version: int) -> str:
    """ "13.0" for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
