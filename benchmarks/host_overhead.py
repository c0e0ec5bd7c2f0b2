"""What an op call costs the host, forward and backward, above an empty op of the same kind.

    python -m benchmarks.host_overhead

The empty op is an `autograd.Function` over two functions of `torch.library`, as ours are, that
return uninitialised memory. On a GPU the kernels run too: of a few rows, so that the host is what
takes the time. Elsewhere they are left out, and the rest of the way is the same but for Triton's
and CUDA's own launches; `portable` computes. Rounds alternate, and the least time of each is taken:
what else the machine does only adds to it.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from benchmarks import baseline
from benchmarks.timing import samples
from benchmarks.traffic import unchecked_ids
from gpt1_kernels import ops, use_backend
from gpt1_kernels.backends import OPS, unavailable_reason
from gpt1_kernels.backends.cuda import extension

B, T, C, F, V = 1, 2, 64, 256, 97
DTYPE, P = torch.bfloat16, 0.1
ROUNDS = 60
EMPTY = "an empty op"
COMPARED = "triton", "cuda_host"  # with the baseline: `portable` computes, as fast as the machine

_library = torch.library.Library("gpt1_kernels_benchmarks", "DEF")
for _name in ("empty_fwd", "empty_bwd"):
    _library.define(f"{_name}(Tensor x, str backend) -> Tensor")
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, lambda x, backend: torch.empty_like(x), _device)


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.save_for_backward(x)
        ctx.backend = backend
        return torch.ops.gpt1_kernels_benchmarks.empty_fwd.default(x, backend)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        return torch.ops.gpt1_kernels_benchmarks.empty_bwd.default(x, ctx.backend), None


def calls(device: str) -> dict[str, Callable[[], object]]:
    """A call of each op, forward and backward, by the op's name, and the empty one."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(DTYPE).requires_grad_()

    seed = torch.zeros(2, dtype=torch.int64, device=device)
    ids = torch.zeros(B, T, dtype=torch.int64, device=device)
    x, residual, w, b, w_fc, b_fc = new(B, T, C), new(B, T, C), new(C), new(C), new(C, F), new(F)
    w_proj, qkv, table, positions = new(F, C), new(B, T, 3 * C), new(V, C), new(T, C)
    drops = {"dropout_p": P, "seed": seed}
    forward = {
        "causal_attention": (lambda: ops.causal_attention_qkvpacked(qkv, 1, **drops), [qkv]),
        "gelu_ffn": (
            lambda: ops.gelu_ffn(x, w_fc, b_fc, w_proj, b), [x, w_fc, b_fc, w_proj, b]
        ),
        "layer_norm": (lambda: ops.layer_norm(x, w, b), [x, w, b]),
        "dropout_add_layer_norm": (
            lambda: ops.dropout_add_layer_norm(x, residual, w, b, **drops), [x, residual, w, b]
        ),
        "embedding": (lambda: ops.embedding(ids, table, positions, **drops), [table, positions]),
        "linear_cross_entropy": (lambda: ops.linear_cross_entropy(x, table, ids), [x, table]),
        EMPTY: (lambda: _Empty.apply(x, "portable"), [x]),
    }  # fmt: skip

    def both(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        with torch.no_grad():
            dout = torch.ones_like(run())
        return lambda: torch.autograd.grad(run(), leaves, dout)

    mask = {"dropout_mask": lambda: ops.dropout_mask(seed, (B, 1, T, T), P, causal=True)}
    return mask | {name: both(*call) for name, call in forward.items()}


def measure(backend: str, device: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of a call of each op on a backend, and of the empty one."""
    with use_backend(backend), ExitStack() as stack:
        if device == "cpu" and backend != "portable":
            stack.enter_context(_without_launches(backend))
        functions = calls(device)
        seconds = samples(functions, "cpu", rounds)  # by the wall clock, of the host
    return {name: min(each) for name, each in seconds.items()}


def rows(backend: str) -> dict[str, dict[str, float]]:
    """What the baseline keeps, of a backend without its launches."""
    seconds = measure(backend, "cpu")
    return {
        f"{op} on {backend}": {"empty ops": round(seconds[op] / seconds[EMPTY], 2)} for op in OPS
    }


def versions() -> dict[str, str]:
    """What the ratios depend on beside our source."""
    return {"Python": baseline.python(), "torch": baseline.release(torch.__version__)}


@contextmanager
def _without_launches(backend: str) -> Iterator[None]:
    def launch(*args, **constants) -> int:
        return 1  # of CUDA's queries, which ask how many blocks a kernel has

    class Compiled:
        def __getattr__(self, function: str):
            return launch

    def start(kernel, grid):
        return launch

    def prepared(backend: str, index: int) -> Compiled:
        return compiled

    compiled = Compiled()
    with (
        unchecked_ids(backend),
        mock.patch.object(KernelInterface, "__getitem__", start),
        mock.patch.object(extension, "_prepared", prepared),
    ):
        yield


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for backend in ("triton", "cuda" if device == "cuda" else "cuda_host", "portable"):
        if (reason := unavailable_reason(backend, "layer_norm", device)) is not None:
            print(f"{backend}: {reason}")
            continue
        seconds = measure(backend, device)
        empty = seconds.pop(EMPTY)
        print(f"{backend}: {EMPTY} takes {1e6 * empty:.1f} µs on {device}; above it take")
        for name, s in seconds.items():
            print(f"  {name:26}{1e6 * (s - empty):8.1f} µs")


if __name__ == "__main__":
    main()
