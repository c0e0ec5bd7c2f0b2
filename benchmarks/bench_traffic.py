"""The bytes of kernels over their floor: exact, and no GPU is needed (see `benchmarks.traffic`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("bytes are counted on Triton's interpreter", allow_module_level=True)

from benchmarks import traffic
from gpt1_kernels.backends.cuda import extension

QUICK = {
    "triton": {"dropout_mask", "causal_attention_qkvpacked_fwd", "causal_attention_qkvpacked_bwd"},
    "cuda_host": traffic.CALLS.keys() - {"gelu_ffn_fwd", "gelu_ffn_bwd of width 128"},
}
"""What is counted in a few seconds; the rest takes up to half a minute each."""
COUNTED = [
    pytest.param(
        backend, name, marks=() if name in QUICK[backend] else pytest.mark.full,
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
