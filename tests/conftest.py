"""Where there is no GPU, Triton's kernels run in its interpreter; memory starts out as NaN."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; a worker has one core

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

from gpt1_kernels import backends


def pytest_collection_modifyitems(items):
    """Leaves out what a backend refuses: fp32 products, of kernels with the matrix units alone."""
    items[:] = [item for item in items if not _is_refused(getattr(item, "callspec", None))]


def pytest_collection_finish():
    """What is imported is no garbage: each collection looked for it in all of PyTorch."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def _is_refused(callspec) -> bool:
    if callspec is None or not {"case", "backend", "dtype"} <= callspec.params.keys():
        return False
    case, backend, dtype = (callspec.params[name] for name in ("case", "backend", "dtype"))
    return not backends._takes_dtype(backend, case.op, dtype)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every `torch.empty` is filled with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches():
    """The launch counters, from zero."""
    backends.launches.clear()
    return backends.launches
