"""The compiled extension: loads it, says why it is absent, calls its functions.

A function of the extension takes tensors (None for an absent one), dtypes and plain numbers, and
last a pair: the index of a device and a stream on it.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from gpt1_kernels.backends import count_launch

NOT_BUILT = {
    "cuda": "it was installed without nvcc, or with GPT1_KERNELS_BUILD_CUDA=0",
    "cuda_host": "it was installed without GPT1_KERNELS_BUILD_HOST=1",
}
NARROW_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes of the kernels on the tensor cores."""
VECTOR = 8  # elements of a narrow dtype in 16 bytes


@cache
def module(backend: str) -> ModuleType:
    """The compiled module of a backend.

    Raises:
        ImportError: it was not built, or does not load on this machine.
    """
    return importlib.import_module(f"gpt1_kernels._{backend}")


@cache
def absence(backend: str) -> str | None:
    """Why the compiled module of a backend is not there, or None if it is."""
    try:
        module(backend)
    except ModuleNotFoundError:
        return NOT_BUILT[backend]
    except ImportError as error:
        return f"its extension does not load: {error}"
    return None


def launch(function: str, tensor: Tensor, *args) -> None:
    """Calls a function of the extension where a tensor lies: on its GPU's current stream, or here.

    Raises:
        RuntimeError: CUDA refused the launch.
    """
    index = tensor.get_device()  # -1 on a CPU
    stream = 0 if index < 0 else torch._C._cuda_getCurrentRawStream(index)
    count_launch(backend_of(index), function)
    getattr(_prepared(backend_of(index), index), function)(*args, (index, stream))


def query(function: str, tensor: Tensor, *args) -> int:
    """What a function of the extension says of launches where a tensor lies, such as their grid."""
    index = tensor.get_device()
    return getattr(_prepared(backend_of(index), index), function)(*args, index)


def backend_of(index: int) -> str:
    """The backend that serves a device, -1 for the CPU."""
    return "cuda_host" if index < 0 else "cuda"


@cache
def _prepared(backend: str, index: int) -> ModuleType:
    compiled = module(backend)
    compiled.prepare(index)
    return compiled
