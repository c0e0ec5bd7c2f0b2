"""Triton kernels: for NVIDIA GPUs from compute capability 8.0, or the interpreter on a CPU.

Importing this package does not import Triton; the modules of the ops do.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from gpt1_kernels.backends import old_gpu_reason

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

if INTERPRETED and importlib.util.find_spec("triton") is not None:
    from gpt1_kernels.backends.triton import interpreter  # noqa: F401


def unavailable_reason(backend: str, device_type: str) -> str | None:
    """Why "triton" cannot run on tensors of a device type ("cuda", "cpu", …), or None if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if INTERPRETED:
        return None
    if device_type != "cuda":
        return (
            f"Triton does not run on {device_type} tensors; for CPU tensors, its interpreter does: "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    return old_gpu_reason() if torch.cuda.device_count() > 0 else "PyTorch finds no GPU"
