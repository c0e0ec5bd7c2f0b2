"""The only dispatch: which backends exist, which one serves a call, and why.

A backend is a package of `gpt1_kernels.backends` with one module per op. It is chosen in an op's
public function, once, and then travels as a string argument of the low-level ops: backward runs
on another thread, where the state of `use_backend` is not seen.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps

import torch
from torch import Tensor

OPS = {
    "dropout_mask": "dropout",
    "causal_attention": "attention",
    "gelu_ffn": "ffn",
    "layer_norm": "layer_norm",
    "dropout_add_layer_norm": "layer_norm",
    "linear_cross_entropy": "linear_cross_entropy",
    "embedding": "embedding",
}
BACKENDS = ("triton", "cuda", "cuda_host", "portable")
# In the order of preference on a GPU; a CPU takes `portable`. `cuda_host` is for tests.
AUTOMATIC = ("triton", "cuda", "portable")
MINIMUM_CAPABILITY = (8, 0)
_PACKAGES = {name: name for name in BACKENDS} | {"cuda_host": "cuda"}

launches: Counter[tuple[str, str]] = Counter()
"""How often each op ran and each kernel was started, by (backend, name); tests assert on it.

An op and a kernel of the CUDA backends may share a name, which then counts for both.
"""


def _constant(function: Callable) -> Callable:
    """Caches the function, and makes its results constants to torch.compile."""
    cached = cache(function)

    @wraps(function)
    def constant(*args):
        return cached(*args)

    # This is what torch.compiler.assume_constant_result does, without importing the compiler (1 s).
    constant._dynamo_marked_constant = True
    return constant


_logger = logging.getLogger("gpt1_kernels")
_forced: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops called inside on one backend, or raises there with the reason why it cannot.

    The choice is process-wide while the context is open; it outranks `GPT1_KERNELS_BACKEND`.

    Raises:
        ValueError: `name` is not a backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r}, expected one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def resolve(op: str, tensor: Tensor, **sizes: int) -> str:
    """The backend that serves a call of `op`.

    Args:
        tensor: the activation, or whatever has the device and the dtype of the call.
        sizes: those that a backend's module may limit, by the names in its `MAX_SIZES`.

    Raises:
        ValueError: a backend asked for by name cannot serve the call; the message has the reason.
    """
    device, dtype = tensor.device.type, tensor.dtype
    name = _forced[-1] if _forced else _environment_choice()
    if name is None:
        return automatic_choice(op, device, dtype, **sizes)
    reason = unavailable_reason(name, op, device) or refusal(name, op, dtype, sizes)
    if reason is not None:
        raise ValueError(f"{op}: backend {name!r} was asked for but {reason}")
    return name


def backend_report(device: str | None = None) -> dict[str, dict[str, str]]:
    """For each op, what each backend answers for a device type: "available" or the reason why not.

    Args:
        device: "cpu" or "cuda"; by default "cuda" where a GPU is present.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {
        op: {name: unavailable_reason(name, op, device) or "available" for name in BACKENDS}
        for op in OPS
    }


def kernel(backend: str, op: str, name: str) -> Callable:
    """The function `name` of an op's module in a backend."""
    return getattr(_module(backend, op), name)


def count_launch(backend: str, name: str) -> None:
    """Called where an op runs on a backend, and where a backend starts a kernel."""
    launches[backend, name] += 1


@_constant
def unavailable_reason(backend: str, op: str, device: str) -> str | None:
    """Why a backend cannot serve an op on a device type, or None if it can."""
    if backend == "portable":
        return None
    package = f"gpt1_kernels.backends.{_PACKAGES[backend]}"
    if importlib.util.find_spec(f"{package}.{OPS[op]}") is None:
        return f"it has no kernel for {op}"
    return importlib.import_module(package).unavailable_reason(backend, device)


def old_gpu_reason() -> str | None:
    """Which GPU of this machine no kernel of ours is compiled for, or None."""
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < MINIMUM_CAPABILITY:
            found, needed = (".".join(map(str, c)) for c in (capability, MINIMUM_CAPABILITY))
            return f"GPU {index} has compute capability {found}, below {needed}"
    return None


def automatic_choice(op: str, device: str, dtype: torch.dtype, **sizes: int) -> str:
    """On a GPU the first of AUTOMATIC that can serve a call, else "portable".

    Why an earlier one cannot is logged once.
    """
    if device != "cuda":
        return "portable"
    for name in AUTOMATIC:
        reason = unavailable_reason(name, op, device) or refusal(name, op, dtype, sizes)
        if reason is None:
            return name
        log_once(f"{op}: not on backend {name}: {reason}")
    raise AssertionError("portable serves every op")


def refusal(backend: str, op: str, dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """Why a backend's kernels do not take a call, or None.

    A backend's module of an op may define `DTYPES` and `MAX_SIZES`. The comparison of sizes is
    traced by torch.compile, to which they may be symbols.
    """
    if not _takes_dtype(backend, op, dtype):
        return f"it does not take {dtype}"
    for name, size in sizes.items():
        limit = _max_size(backend, op, name)
        if limit is not None and size > limit:
            return f"it takes a {name} of at most {limit}, not {size}"
    return None


@_constant
def _takes_dtype(backend: str, op: str, dtype: torch.dtype) -> bool:
    return dtype in getattr(_module(backend, op), "DTYPES", (dtype,))


@_constant
def _max_size(backend: str, op: str, name: str) -> int | None:
    return getattr(_module(backend, op), "MAX_SIZES", {}).get(name)


@_constant
def log_once(message: str) -> None:
    """Logs a warning the first time that it is given; also where torch.compile traces."""
    _logger.warning("%s", message)


@_constant
def _environment_choice() -> str | None:
    name = os.environ.get("GPT1_KERNELS_BACKEND", "auto")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"GPT1_KERNELS_BACKEND: {name!r}, expected one of auto, {', '.join(BACKENDS)}"
        )
    return None if name == "auto" else name


@cache
def _module(backend: str, op: str):
    return importlib.import_module(f"gpt1_kernels.backends.{_PACKAGES[backend]}.{OPS[op]}")
