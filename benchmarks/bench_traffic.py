"""The bytes of kernels over their floor: exact, and no GPU is needed (see `benchmarks.traffic`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("bytes are counted on Triton's interpreter", allow_module_level=True)

from benchmarks import traffic
from gpt1_kernels.backends.cuda import extension

LONG = {
    "triton": {"embedding_fwd", "embedding_bwd", "gelu_ffn_fwd", "gelu_ffn_bwd"},
    "cuda_host": {"gelu_ffn_fwd", "gelu_ffn_bwd"},
}
"""What takes up to minutes; the rest is counted in a few seconds each."""
COUNTED = [
    pytest.param(
        backend, name, marks=pytest.mark.full if name in LONG[backend] else (),
        id=f"{backend}-{name.replace(' ', '-')}",
    )
    for backend in traffic.COUNTING
    for name, call in traffic.CALLS.items()
    if backend in call.counted_at
]  # fmt: skip


@pytest.mark.parametrize(("backend", "name"), COUNTED)
def test_bytes(line, backend, name):
    if reason := backend == "cuda_host" and extension.absence(backend):
        pytest.skip(reason)
    compulsory, issued, floor = traffic.measure(name, backend)
    kernels = {"triton": "Triton", "cuda_host": "CUDA"}[backend]
    line(
        "bytes of kernels at B = 64, T = 512, over the floor",
        ("", "floor, MB", "compulsory", "issued"),
        (f"{kernels} {name}", f"{1e-6 * floor:.1f}", f"{compulsory / floor:.3f}",
         f"{issued / floor:.3f}"),
    )  # fmt: skip
