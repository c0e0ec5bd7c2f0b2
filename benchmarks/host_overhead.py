"""What a call of an op costs the host, forward and backward, beyond an empty op of its kind.

    python -m benchmarks.host_overhead [triton | cuda_host | cuda]

The calls are tiny. On a CPU no kernel runs: what remains is what Python, PyTorch's dispatcher and
autograd, the allocator, and the launchers in C++ take; Triton's own launch, some microseconds, is
left out. On a GPU everything is in.

The empty op that is subtracted has as many tensors: one `torch.library` op for each of the op's
own, which does no more than allocate what that one returns, in one `autograd.Function`. Calls of
the two alternate, and their medians are compared.
"""

from __future__ import annotations

import argparse
import os

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from benchmarks.timing import no_garbage_collection
from gpt1_kernels import backends, ops, use_backend
from gpt1_kernels.backends.cuda import extension

B, T, C, H, V = 2, 16, 64, 2, 96
DTYPE, P = torch.bfloat16, 0.1
ROUNDS, WARMUP_ROUNDS = 600, 20

_LIBRARY = torch.library.Library("gpt1_kernels_empty", "DEF")
_numbers = count()


class Call(NamedTuple):
    """A call of an op: the function, and the tensors that it takes and that get gradients."""

    function: Callable[..., Tensor]
    leaves: Sequence[Tensor]


def calls() -> dict[str, Call]:
    """By op, as GPT-1 calls it in training."""

    def leaf(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    def vector(size: int) -> Tensor:
        return leaf(size, dtype=torch.float32)

    ids = torch.randint(V, (B, T))
    dropout = {"dropout_p": P, "seed": torch.tensor([1, 2])}

    def residual_site(x, residual, w, b, x_bias):
        return ops.dropout_add_layer_norm(x, residual, w, b, x_bias=x_bias, **dropout)

    x, table = leaf(B, T, C), leaf(V, C)
    return {
        "embedding": Call(
            lambda *tables: ops.embedding(ids, *tables, **dropout), [table, leaf(T, C)]
        ),
        "layer_norm": Call(ops.layer_norm, [x, vector(C), vector(C)]),
        "dropout_add_layer_norm": Call(
            residual_site, [x, leaf(B, T, C), vector(C), vector(C), vector(C)]
        ),
        "causal_attention": Call(
            lambda *qkv: ops.causal_attention(*qkv, **dropout),
            [leaf(B, T, H, C // H) for _ in range(3)],
        ),
        "causal_attention_qkvpacked": Call(
            lambda qkv: ops.causal_attention_qkvpacked(qkv, H, **dropout), [leaf(B, T, 3 * C)]
        ),
        "gelu_ffn": Call(ops.gelu_ffn, [x, leaf(C, 4 * C), vector(4 * C), leaf(4 * C, C)]),
        "linear_cross_entropy": Call(
            lambda h, w: ops.linear_cross_entropy(h, w, ids), [x, table]
        ),
    }  # fmt: skip


def host_overhead(backend: str, rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """By op: µs of a call, forward and backward, beyond those of an empty op; and those.

    Args:
        backend: triton, cuda_host or cuda; without a GPU, triton's interpreter must be on.
        rounds: the number of calls whose median is taken.
    """
    device = "cuda" if backend != "cuda_host" and torch.cuda.is_available() else "cpu"
    results = {}
    with torch.device(device):
        all_calls = calls()
    kernels = _launching_nothing(backend) if device == "cpu" else nullcontext()
    with use_backend(backend), kernels, no_garbage_collection():
        for name, call in all_calls.items():
            pair = call, _empty(call)
            douts = [torch.ones_like(function(*leaves)) for function, leaves in pair]
            times = [], []
            for _ in range(WARMUP_ROUNDS + rounds):
                for one, dout, of_one in zip(pair, douts, times, strict=True):
                    of_one.append(_microseconds(one, dout))
            ours, empty = (median(of_one[WARMUP_ROUNDS:]) for of_one in times)
            results[name] = ours - empty, empty
    return results


def _microseconds(call: Call, dout: Tensor) -> float:
    start = time.perf_counter_ns()
    torch.autograd.grad(call.function(*call.leaves), call.leaves, dout)
    return (time.perf_counter_ns() - start) / 1e3


@contextmanager
def _launching_nothing(backend: str) -> Iterator[None]:
    """Inside, no kernel starts, and nobody looks at ids."""

    # Plain functions: a mock would take more than what is measured.
    def nothing(*args, **kwargs) -> None:
        pass

    def not_started(kernel, grid) -> Callable:
        return nothing

    with ExitStack() as undone, unchecked_ids(backend):
        if backend == "cuda_host":
            host = extension.module(backend)
            host.set_launching(False)
            undone.callback(host.set_launching, True)
        else:
            undone.enter_context(mock.patch.object(KernelInterface, "__getitem__", not_started))
        yield


@contextmanager
def unchecked_ids(backend: str) -> Iterator[None]:
    """Inside, the host does not look at ids, as it does not on a GPU."""

    def unchecked(*args) -> None:
        pass

    with ExitStack() as patches:
        for op in ("embedding", "linear_cross_entropy"):
            module = backends._module(backend, op)
            patches.enter_context(mock.patch.object(module, "check_ids", unchecked))
        yield


class _LowLevelCalls(TorchDispatchMode):
    """Collects the tensors that our low-level ops take, and those that they return."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[list[Tensor], tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "gpt1_kernels":
            taken = [a.detach() for a in args if isinstance(a, Tensor)]
            self.calls.append((taken, (out,) if isinstance(out, Tensor) else out))
        return out


def _empty(call: Call) -> Call:
    """The empty op of a call's kind, on tensors of as many elements."""
    forward, backward = _LowLevelCalls(), _LowLevelCalls()
    with forward:
        out = call.function(*call.leaves)
    with backward:
        torch.autograd.grad(out, call.leaves, torch.ones_like(out))
    forward_ops = [_allocating(*tensors) for tensors in forward.calls]
    (_, *saved), gradients = backward.calls[-1]
    backward_op = _allocating(*backward.calls[-1])
    leaves = [torch.randn_like(g).requires_grad_() for g in gradients if g.numel() > 0]

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            for op, (taken, _) in zip(forward_ops, forward.calls, strict=True):
                out = op(*taken)
            ctx.save_for_backward(*saved)
            return out[0] if isinstance(out, tuple) else out

        @staticmethod
        def backward(ctx, dout):
            out = backward_op(dout, *ctx.saved_tensors)
            return tuple(g for g in out if g.numel() > 0) if isinstance(out, tuple) else out

    return Call(Empty.apply, leaves)


def _allocating(taken: Sequence[Tensor], made: Sequence[Tensor]) -> Callable:
    """A low-level op that takes as many tensors, and returns new ones like those made."""
    name = f"op{next(_numbers)}"
    arguments = ", ".join(f"Tensor x{i}" for i in range(len(taken)))
    returns = ", ".join(["Tensor"] * len(made))
    _LIBRARY.define(f"{name}({arguments}) -> ({returns})")

    def allocate(*taken):
        out = [torch.empty_like(like) for like in made]
        return tuple(out) if len(out) > 1 else out[0]

    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, allocate, device)
    return getattr(torch.ops.gpt1_kernels_empty, name).default


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    backends_of_kernels = ("triton", "cuda_host", "cuda")
    parser.add_argument("backend", nargs="?", choices=backends_of_kernels, default="triton")
    backend = parser.parse_args().backend
    title = f"{backend}, µs a call"
    print(f"{title:30}{'beyond empty':>14}{'empty':>10}")
    for op, (overhead, empty) in host_overhead(backend).items():
        print(f"{op:30}{overhead:14.1f}{empty:10.1f}")
