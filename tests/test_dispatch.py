"""Which backend serves a call, and what is said when one cannot."""

import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from gpt1_kernels import backend_report, backends, ops, use_backend
from tests.cases import DEVICE

IMPORT_SECONDS = 0.3


def python(code, **environment):
    """Runs code in a new interpreter, without Triton's interpreter mode unless asked for."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "GPT1"))}
    run = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, "PYTHONPATH": os.getcwd(), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip(), run.stderr


def layer_norm():
    x = torch.randn(3, 16, device=DEVICE)
    return ops.layer_norm(x, x[0], x[0])


def test_the_chosen_backend_runs_its_kernel(launches):
    with use_backend("triton"):
        layer_norm()
    assert launches["triton", "layer_norm_fwd_kernel"] == 1
    with use_backend("portable"):
        layer_norm()
    assert launches["portable", "layer_norm_fwd"] == 1
    assert launches["triton", "layer_norm_fwd"] == 1


def test_a_cpu_takes_the_portable_backend_by_itself(launches):
    x = torch.randn(3, 16)
    ops.layer_norm(x, x[0], x[0])
    assert set(launches) == {("portable", "layer_norm_fwd")}


def test_choices_nest_and_are_undone_after_an_error(launches):
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="inside"), use_backend("portable"):
            raise RuntimeError("inside")
        layer_norm()
    assert launches["triton", "layer_norm_fwd_kernel"] == 1


def test_backward_runs_where_forward_ran(launches):
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        y = ops.layer_norm(x, x[0].detach(), x[0].detach())
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert launches["triton", "layer_norm_bwd_kernel"] == 1


@pytest.mark.parametrize("backend", ["triton", "cuda", "cuda_host"])
def test_a_backend_without_a_kernel_says_so_and_does_not_fall_back(backend, monkeypatch):
    monkeypatch.setitem(backends.OPS, "layer_norm", "a_module_that_no_backend_has")
    monkeypatch.setattr(backends, "unavailable_reason", backends.unavailable_reason.__wrapped__)
    message = f"layer_norm: backend '{backend}' was asked for but it has no kernel for layer_norm"
    with use_backend(backend), pytest.raises(ValueError, match=message):
        layer_norm()


@pytest.mark.parametrize("head_size", [128, 129])
@pytest.mark.parametrize("packed", [False, True])
def test_a_backend_refuses_sizes_over_its_limit_and_says_why(packed, head_size):
    def call():
        qkv = torch.randn(1, 2, 3 * head_size, device=DEVICE)
        if packed:
            return ops.causal_attention_qkvpacked(qkv, 1)
        return ops.causal_attention(*qkv.view(1, 2, 3, 1, head_size).unbind(2))

    reason = "but it takes a head_size of at most 128, not 129"
    with use_backend("triton"):
        if head_size == 128:
            assert call().shape[:2] == (1, 2)
        else:
            with pytest.raises(ValueError, match=f"'triton' was asked for {reason}"):
                call()


@pytest.mark.parametrize(
    ("head_size", "dtype", "chosen", "reason"),
    [
        (128, torch.float16, "triton", None),
        (129, torch.float16, "portable", "it takes a head_size of at most 128, not 129"),
        (128, torch.float32, "portable", "it does not take torch.float32"),
    ],
)
def test_what_a_backend_refuses_falls_back(monkeypatch, caplog, head_size, dtype, chosen, reason):
    from gpt1_kernels.backends.triton import attention

    def unavailable_reason(backend, op, device):
        return "it is left out of this test" if backend == "cuda" else None

    monkeypatch.setattr(attention, "DTYPES", (torch.float16,), raising=False)
    monkeypatch.setattr(backends, "unavailable_reason", unavailable_reason)
    for function in (backends._takes_dtype, backends.log_once):
        monkeypatch.setattr(backends, function.__name__, function.__wrapped__)
    call = partial(backends.automatic_choice, "causal_attention", "cuda", dtype)
    assert call(head_size=head_size) == chosen
    logged = [record.getMessage() for record in caplog.records]
    refused = {"triton": reason, "cuda": "it is left out of this test"}  # never cuda_host
    assert logged == (
        []
        if reason is None
        else [f"causal_attention: not on backend {name}: {why}" for name, why in refused.items()]
    )


def test_a_fallback_is_logged_once(caplog):
    for _ in range(2):
        backends.log_once("a message of this test")
    assert len(caplog.records) == 1


def test_sizes_that_vary_are_compared_without_a_graph_break():
    def call(x):
        name = backends.automatic_choice("causal_attention", "cuda", x.dtype, head_size=x.shape[1])
        return x + backends.BACKENDS.index(name)

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for size in (16, 48, 128, 129, 300):
        x = torch.zeros(2, size)
        assert torch.equal(compiled(x), call(x))


def test_row25_a_cpu_tensor_for_a_gpu_backend():
    _, stderr = python(
        "import torch, gpt1_kernels as g; x = torch.ones(2, 8)\n"
        "with g.use_backend('triton'): g.ops.layer_norm(x, x[0], x[0])"
    )
    assert "ValueError: layer_norm: backend 'triton' was asked for" in stderr
    assert "Triton does not run on cpu tensors" in stderr
    assert "TRITON_INTERPRET=1" in stderr


def test_an_unknown_backend_is_refused():
    names = "triton, cuda, cuda_host, portable"
    with pytest.raises(ValueError, match=f"'cudnn', expected one of {names}"):
        use_backend("cudnn").__enter__()


def test_the_report_names_every_op_and_backend():
    report = backend_report()
    assert report.keys() == backends.OPS.keys()
    for op, answers in report.items():
        assert tuple(answers) == backends.BACKENDS, op
        assert answers["triton"] == answers["portable"] == "available", op


@pytest.mark.parametrize(("present", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_report_is_of_a_gpu_where_there_is_one(present, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    monkeypatch.setattr(backends, "unavailable_reason", lambda backend, op, device: device)
    assert set(backend_report()["layer_norm"].values()) == {device}


def test_the_least_gpu_is_served(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert backends.old_gpu_reason() is None


def test_row26_without_triton_it_imports_and_falls_back():
    out, stderr = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, gpt1_kernels as g; x = torch.ones(2, 8)\n"
        "print(g.ops.layer_norm(x, x[0], x[0]).shape)\n"
        "print(g.backend_report()['layer_norm']['triton'])"
    )
    assert out.startswith("torch.Size([2, 8])\nTriton cannot be imported"), stderr


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "PyTorch finds no GPU"), (1, "GPU 0 has compute capability 7.5, below 8.0")],
)
def test_row26_no_gpu_and_an_old_one_are_named(count, expected, monkeypatch):
    from gpt1_kernels.backends import triton as package

    monkeypatch.setattr(package, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert package.unavailable_reason("triton", "cuda") == expected


@pytest.mark.parametrize(
    ("value", "expected"), [*[(name, name) for name in backends.BACKENDS], ("auto", None)]
)
def test_the_environment_chooses(value, expected, monkeypatch):
    monkeypatch.setenv("GPT1_KERNELS_BACKEND", value)
    assert backends._environment_choice.__wrapped__() == expected


def test_the_environment_cannot_choose_what_is_not_there(monkeypatch):
    monkeypatch.setenv("GPT1_KERNELS_BACKEND", "nonsense")
    message = "^GPT1_KERNELS_BACKEND: 'nonsense', expected one of auto, triton, cuda, cuda_host"
    with pytest.raises(ValueError, match=message):
        backends._environment_choice.__wrapped__()


def test_importing_is_quick_and_leaves_triton_alone():
    """In one of three processes at least: another may have had to wait for a core."""
    code = (
        "import torch, sys, time; start = time.perf_counter(); import gpt1_kernels\n"
        "print(time.perf_counter() - start, 'triton' in sys.modules)"
    )

    def seconds() -> float:
        taken, triton = python(code)[0].split()
        assert triton == "False"
        return float(taken)

    assert any(seconds() < IMPORT_SECONDS for _ in range(3))
