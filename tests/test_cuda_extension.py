"""Loading the compiled extension, and what the launchers need from it."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from csrc.build import ARCHITECTURES, architecture_flags
from gpt1_kernels import ops, use_backend
from gpt1_kernels.backends import cuda
from gpt1_kernels.backends.cuda import extension
from tests.cases import PARITY, cast, results

IMPORT_WITHOUT_TORCH = """
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("gpt1_kernels.{name}", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*module.versions())
"""


CALL_WITHOUT_A_GPU = """
import pickle, sys
from gpt1_kernels import _cuda
for function, args in pickle.load(sys.stdin.buffer):
    try:
        getattr(_cuda, function)(*args, (0, 0))
    except RuntimeError as error:
        assert "CUDA driver" in str(error), error
        print(function)
"""


NO_LAUNCHERS = {
    "capabilities", "kernels", "layer_norm_bwd_blocks", "prepare", "split_of_matmul", "versions",
}  # fmt: skip


def built(backend):
    """The path of a compiled module; the test is skipped where it is absent."""
    if (reason := extension.absence(backend)) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    return extension.module(backend).__file__


@pytest.mark.parametrize(("backend", "oldest_runtime"), [("cuda", 12000), ("cuda_host", 0)])
def test_the_module_imports_without_torch(backend, oldest_runtime):
    code = IMPORT_WITHOUT_TORCH.format(name=f"_{backend}", path=built(backend))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    driver, runtime = map(int, run.stdout.split())
    assert driver >= 0
    assert runtime >= oldest_runtime


@pytest.mark.parametrize("backend", ["cuda", "cuda_host"])
def test_the_module_needs_no_cuda_library_and_no_torch(backend):
    path = built(backend)
    dynamic = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True)
    needed = [line for line in dynamic.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if any(lib in line for lib in ("cuda", "torch", "c10"))]


def test_the_runtime_inside_is_not_mixed_with_one_that_torch_loads():
    table = subprocess.run(
        ["readelf", "--dyn-syms", "-W", built("cuda")], capture_output=True, text=True, check=True
    ).stdout
    assert "PyInit__cuda" in table
    assert "cudaGetDevice" not in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_s_own_message_is_raised():
    built("cuda")
    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .*(driver|device)"):
        extension.module("cuda").prepare(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_launcher_comes_as_far_as_the_driver(monkeypatch):
    """nvcc lets the host call what only a GPU has, and the process ends there without a word."""
    built("cuda")
    built("cuda_host")
    host = extension.module("cuda_host")
    calls = []

    class Noting:
        def __getattr__(self, function):
            def noting(*args):
                calls.append((function, args[:-1]))
                return getattr(host, function)(*args)

            return noting if not function.endswith("blocks") else getattr(host, function)

    monkeypatch.setattr(extension, "_prepared", lambda backend, index: Noting())
    first_and_last = {c.op: c for c in reversed(PARITY)}, {c.op: c for c in PARITY}
    with use_backend("cuda_host"):
        ops.dropout_mask(torch.zeros(2, dtype=torch.int64), (2, 40), 0.1)
        for case in (case for of_ops in first_and_last for case in of_ops.values()):
            results(case.fused, cast(case, torch.bfloat16, torch.bfloat16))
    launchers = {name for name in dir(extension.module("cuda")) if not name.startswith("_")}
    assert {function for function, _ in calls} == launchers - NO_LAUNCHERS
    run = subprocess.run(
        [sys.executable, "-c", CALL_WITHOUT_A_GPU],
        input=pickle.dumps(calls), capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode().split() == [function for function, _ in calls]


def test_the_host_module_says_that_it_is_for_tests():
    built("cuda_host")
    assert "a tool for tests" in extension.module("cuda_host").__doc__


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which the backend `cuda` is available."""
    state = SimpleNamespace(
        driver=13020, runtime=13000, available=True, capability=(8, 0), compiled=ARCHITECTURES
    )
    compiled = SimpleNamespace(
        versions=lambda: (state.driver, state.runtime), capabilities=lambda: state.compiled
    )
    monkeypatch.setattr(extension, "absence", lambda backend: None)
    monkeypatch.setattr(extension, "module", lambda backend: compiled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: state.capability)
    return state


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("cuda", "cuda", None),
        ("cuda", "cpu", "it takes cuda tensors, not cpu ones"),
        ("cuda_host", "cpu", None),
        ("cuda_host", "cuda", "it takes cpu tensors, not cuda ones"),
    ],
)
def test_each_backend_takes_the_tensors_of_one_device(backend, device, reason, gpu):
    assert cuda.unavailable_reason(backend, device) == reason


@pytest.mark.parametrize(
    ("difference", "reason"),
    [
        ({"driver": 13000, "runtime": 13020}, None),  # minor releases of CUDA are compatible
        ({"capability": (7, 5)}, "GPU 0 has compute capability 7.5, below 8.0"),
        (
            {"driver": 12080, "capability": (7, 5)},
            "the NVIDIA driver is for CUDA 12.8, older than the CUDA 13.0 that the kernels were "
            "compiled with",
        ),
        ({"available": False, "driver": 0, "capability": (7, 5)}, "PyTorch finds no GPU"),
    ],
)
def test_row26_what_keeps_a_gpu_from_running_is_named(difference, reason, gpu):
    vars(gpu).update(difference)
    assert cuda.unavailable_reason("cuda", "cuda") == reason


@pytest.mark.parametrize(
    ("compiled", "runs", "does_not"),
    [
        (ARCHITECTURES, [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], []),
        ("8.6 9.0", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0)]),
        ("7.5+PTX;9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 0)], []),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_row26_a_gpu_that_nothing_was_compiled_for_is_named(compiled, runs, does_not, gpu):
    """Of all backends this one was chosen, and the first launch failed."""
    for capability in runs + does_not:
        vars(gpu).update(compiled=compiled, capability=capability)
        reason = cuda.unavailable_reason("cuda", "cuda")
        assert (reason is None) == (capability in runs), (capability, reason)
    if does_not:
        major, minor = does_not[-1]
        assert reason == (
            f"GPU 0 has compute capability {major}.{minor}, and the kernels were compiled for "
            f"TORCH_CUDA_ARCH_LIST={compiled!r}"
        )


def test_the_module_says_what_it_was_compiled_for():
    built("cuda")
    assert architecture_flags(extension.module("cuda").capabilities())


@pytest.mark.parametrize(
    ("backend", "error", "reason"),
    [
        ("cuda", ModuleNotFoundError("no"), "installed without nvcc"),
        ("cuda_host", ModuleNotFoundError("no"), "installed without GPT1_KERNELS_BUILD_HOST=1"),
        ("cuda", ImportError("GLIBCXX_9 not found"), "does not load: GLIBCXX_9 not found"),
    ],
)
def test_row26_an_absent_extension_says_why(backend, error, reason, monkeypatch):
    def module(backend):
        raise error

    monkeypatch.setattr(extension, "module", module)
    monkeypatch.setattr(extension, "absence", extension.absence.__wrapped__)
    assert reason in cuda.unavailable_reason(backend, "cuda")


@pytest.mark.parametrize(
    ("index", "backend", "stream"), [(-1, "cuda_host", 0), (0, "cuda", 70), (1, "cuda", 71)]
)
def test_a_launch_goes_to_the_device_and_stream_of_the_tensor(
    index, backend, stream, monkeypatch, launches
):
    calls = []
    compiled = SimpleNamespace(
        prepare=lambda device: calls.append(("prepare", device)),
        kernel=lambda *args: calls.append(args),
    )
    monkeypatch.setattr(extension, "module", {backend: compiled}.get)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False
    )
    tensor = SimpleNamespace(get_device=lambda: index)
    extension._prepared.cache_clear()
    for size in (3, 4):
        extension.launch("kernel", tensor, size)
    extension._prepared.cache_clear()
    assert calls == [("prepare", index), (3, (index, stream)), (4, (index, stream))]
    assert launches == {(backend, "kernel"): 2}
