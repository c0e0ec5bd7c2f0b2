"""Bytes that the kernels move, counted without a GPU: exact, so any change is a change.

    python -m benchmarks.traffic

Triton's interpreter executes the Triton kernels, and their CPU build the CUDA kernels where it is
there; every load and store reports the 32-byte sectors of global memory that it touches:

compulsory  distinct sectors of a launch, reads and writes apart: what must cross the memory bus
            even if the caches forget nothing within a launch and everything between two
issued      distinct sectors of each load or store of each program, in CUDA of each warp, summed:
            what the kernel asks for

Both are given in bytes and over the floor of `benchmarks.roofline`. Work that a launcher leaves to
PyTorch, such as zeros or sorting, counts as reading each input and writing each output once.

GPT-1's training shape is too large to interpret. Once there are enough rows to occupy the grid of
the chip, 132 processors, its size is constant, and more sequences only lengthen the programs'
loops: bytes are a + b · B exactly. They are counted at two small B and continued to B = 64.
Attention's programs each work on one head, so that a head or two are parts of a small B.

A product's tiles read their operands whatever program they fall to, so its bytes grow by the row of
tiles, from the first. Where sums are split (the weights' gradients of `gelu_ffn`), the cuts lie at
the same shares of all steps for 4096 · n rows, n ≤ 10: then the parts are equally many.

GPT-1's head is too large even so. `linear_cross_entropy` is counted with 798 of the 40478 tokens,
which end in the same fraction of a tile, and chunks of 256 rows; its first chunk makes dW and every
other adds to it, so bytes are linear in the chunks.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from benchmarks import roofline
from benchmarks.roofline import SECTOR, Floor
from gpt1_kernels.backends import kernel
from gpt1_kernels.backends.cuda import extension
from gpt1_kernels.backends.logits import padded_vocabulary
from gpt1_kernels.backends.triton import launch as launching
from gpt1_kernels.errors import error_record

PROCESSORS = 132
PROGRAMS = 8 * PROCESSORS  # of a LayerNorm's grid
CUDA_BLOCKS = 3 * PROCESSORS  # of its backward's
SHARED_MEMORY = 227 * 1024
BATCH, T, C, H, D, V = 64, 512, 768, 12, 64, 40478
F = 4 * C
V_COUNTED, CHUNK = 798, 256
DTYPE, S = torch.bfloat16, 2


@dataclass
class Traffic:
    """Bytes of the launches in a `counting` context."""

    compulsory: int = 0
    issued: int = 0
    _read: list[np.ndarray] = field(default_factory=list, repr=False)
    _written: list[np.ndarray] = field(default_factory=list, repr=False)

    def access(self, sectors: list[np.ndarray], pointers, mask) -> None:
        touched = np.unique(
            pointers.data[np.broadcast_to(mask.data, pointers.data.shape)] // SECTOR
        )
        sectors.append(touched)
        self.issued += SECTOR * touched.size

    def end_launch(self) -> None:
        for sectors in (self._read, self._written):
            self.compulsory += SECTOR * np.unique(np.concatenate([*sectors, []])).size
            sectors.clear()

    def moved(self, bytes: int) -> None:
        self.compulsory += bytes
        self.issued += bytes


class _AroundKernels(TorchDispatchMode):
    """Counts what PyTorch's own ops read and write; views and uninitialised memory cost nothing."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
        if "empty" not in name and all(alias.is_write for alias in aliases):
            made = "new_" in name or "_like" in name
            moved = tree_leaves([[] if made else args, [] if aliases else out])
            self.traffic.moved(sum(t.nbytes for t in moved if isinstance(t, torch.Tensor)))
        return out


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts, on the interpreter, the traffic of all launches inside."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run = GridExecutor.__call__

    # The further arguments, hints to a cache, differ between versions of Triton.
    def create_masked_load(self, pointers, mask, *rest, **hints):
        traffic.access(traffic._read, pointers, mask)
        return load(self, pointers, mask, *rest, **hints)

    def create_masked_store(self, pointers, value, mask, *rest, **hints):
        traffic.access(traffic._written, pointers, mask)
        return store(self, pointers, value, mask, *rest, **hints)

    def execute(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():  # for the interpreter's copies
            run(self, *args, **kwargs)
        traffic.end_launch()

    with (
        mock.patch.multiple(
            InterpreterBuilder,
            create_masked_load=create_masked_load,
            create_masked_store=create_masked_store,
        ),
        mock.patch.object(GridExecutor, "__call__", execute),
        _AroundKernels(traffic),
    ):
        yield traffic


@contextmanager
def counting_cuda() -> Iterator[Traffic]:
    """Counts, on the CPU build of the CUDA kernels for 132 processors, the traffic inside."""
    build, traffic = extension.module("cuda_host"), Traffic()
    build.set_processors(PROCESSORS)
    build.count_traffic(True)
    try:
        with _AroundKernels(traffic):
            yield traffic
    finally:
        build.count_traffic(False)
        build.set_processors(2)
    for of_kernel in build.traffic().values():
        traffic.compulsory += of_kernel["compulsory"]
        traffic.issued += of_kernel["issued"]


@contextmanager
def data_centre_chip() -> Iterator[None]:
    """Launches as on a chip of 132 processors with 227 KB of shared memory."""
    caches = launching.processors, launching.shared_memory, launching.product_tiles
    with mock.patch.multiple(
        launching, INTERPRETED_PROCESSORS=PROCESSORS, SMALLEST_SHARED_MEMORY=SHARED_MEMORY
    ):
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


@dataclass(frozen=True)
class Call:
    """A kernel-level call of an op.

    `prepare(B)` makes the inputs and returns what runs it; `floor(B)` is its floor. It is counted
    at two batch sizes from which on the grid grows no more, or only with the batch; an op of rows
    takes part of a sequence, attention some of its heads.
    """

    prepare: Callable[[float], Callable[[], object]]
    floor: Callable[[int], Floor]
    counted_at: tuple[float, float]


def _layer_norm(
    op: str, direction: str, *, dropout: bool, backend: str = "triton"
) -> Callable[[float], Callable]:
    def prepare(B: float):
        N = round(B * T)
        x, other = torch.randn(2, N, C, dtype=DTYPE)
        w, b, x_bias = torch.randn(3, C, dtype=DTYPE)
        mean, rstd = torch.ones(2, N)
        seed = torch.zeros(2, dtype=torch.int64)
        run = kernel(backend, op, f"{op}_{direction}")
        if direction == "fwd":
            args = (
                (x, other, w, b, x_bias, seed, 1e-5, 0.1, 0, True) if dropout else (x, w, b, 1e-5)
            )
        else:
            drops = (seed, 0.1, 0) if dropout else ()
            args = (x, other, w, mean, rstd, *drops, [True] * (5 if dropout else 3))
        return lambda: run(*args)

    return prepare


def _dropout_mask(B: int, backend: str = "triton"):
    run, seed = kernel(backend, "dropout_mask", "dropout_mask"), torch.zeros(2, dtype=torch.int64)
    return lambda: run(seed, (B, H, T, T), 0.1, 0, True)


def _embedding(direction: str, backend: str = "triton") -> Callable[[int], Callable]:
    """All ids differ, the most that can be asked of the tables."""

    def prepare(B: int):
        error_record("embedding", V, torch.device("cpu"))  # made once, not in every call
        ids = torch.randperm(V, generator=torch.Generator().manual_seed(0))[: B * T].view(B, T)
        seed = torch.zeros(2, dtype=torch.int64)
        run = kernel(backend, "embedding", f"embedding_{direction}")
        if direction == "fwd":
            tables = torch.randn(V, C, dtype=DTYPE), torch.randn(T, C, dtype=DTYPE)
            args = (ids, *tables, None, None, seed, 0.1, 0, DTYPE)
        else:
            dout = torch.randn(B, T, C, dtype=DTYPE)
            args = (dout, ids, None, None, seed, 0.1, 0, V, T, DTYPE, [True] * 2)

        def unchecked():  # a GPU does not check ids before the launch
            with mock.patch(f"{run.__module__}.check_ids"):
                run(*args)

        return unchecked

    return prepare


def _attention(direction: str) -> Callable[[float], Callable]:
    def prepare(B: float):
        heads = round(B * H)
        qkv = torch.randn(1, T, 3 * heads * D, dtype=DTYPE)
        bits = torch.zeros(1, heads, T, T // 32, dtype=torch.int32)
        options = bits, None, D**-0.5, 0.1
        run = kernel("triton", "causal_attention", f"causal_attention_qkvpacked_{direction}")
        if direction == "fwd":
            return lambda: run(qkv, heads, *options)
        dout, out = torch.randn(2, 1, T, heads * D, dtype=DTYPE)
        lse = torch.zeros(1, heads, T)
        return lambda: run(dout, qkv, heads, out, lse, *options)

    return prepare


def _gelu_ffn(direction: str) -> Callable[[float], Callable]:
    def prepare(B: float):
        N = round(B * T)
        x, dy = torch.randn(2, N, C, dtype=DTYPE)
        w_fc, w_proj = torch.randn(C, F, dtype=DTYPE), torch.randn(F, C, dtype=DTYPE)
        run = kernel("triton", "gelu_ffn", f"gelu_ffn_{direction}")
        if direction == "fwd":
            b_fc, b_proj = torch.randn(F, dtype=DTYPE), torch.randn(C, dtype=DTYPE)
            return lambda: run(x, w_fc, b_fc, w_proj, b_proj, True)
        pre = torch.randn(N, F, dtype=DTYPE)
        return lambda: run(dy, x, pre, w_fc, w_proj, [True] * 5)

    return prepare


def _linear_cross_entropy(B: float):
    error_record("linear_cross_entropy", V_COUNTED, torch.device("cpu"))
    N = round(B * T)
    h, w = torch.randn(N, C, dtype=DTYPE), torch.randn(V_COUNTED, C, dtype=DTYPE)
    targets = torch.arange(N) % V_COUNTED
    run = kernel("triton", "linear_cross_entropy", "linear_cross_entropy_fwd")
    chunk_bytes = CHUNK * padded_vocabulary(V_COUNTED) * S

    def unchecked():
        with (
            mock.patch("gpt1_kernels.backends.triton.linear_cross_entropy.check_ids"),
            mock.patch.object(launching, "CHUNK_BYTES", chunk_bytes),
        ):
            run(h, w, targets, None, -100, [True] * 2)

    return unchecked


CALLS = {
    "layer_norm_fwd": Call(
        _layer_norm("layer_norm", "fwd", dropout=False),
        lambda B: roofline.layer_norm_fwd(B * T, C, S, S),
        counted_at=(4.25, 4.375),
    ),
    "layer_norm_bwd": Call(
        _layer_norm("layer_norm", "bwd", dropout=False),
        lambda B: roofline.layer_norm_bwd(B * T, C, S, S, PROGRAMS),
        counted_at=(2.125, 2.25),
    ),
    "dropout_add_layer_norm_fwd": Call(
        _layer_norm("dropout_add_layer_norm", "fwd", dropout=True),
        lambda B: roofline.dropout_add_layer_norm_fwd(B * T, C, S, S),
        counted_at=(4.25, 4.375),
    ),
    "dropout_add_layer_norm_bwd": Call(
        _layer_norm("dropout_add_layer_norm", "bwd", dropout=True),
        lambda B: roofline.dropout_add_layer_norm_bwd(B * T, C, S, S, PROGRAMS),
        counted_at=(2.125, 2.25),
    ),
    "dropout_mask": Call(
        _dropout_mask, lambda B: roofline.dropout_mask(B, H, T), counted_at=(1, 2)
    ),
    "embedding_fwd": Call(
        _embedding("fwd"),
        lambda B: roofline.embedding_fwd(B * T, T, C, S, read=B * T),
        counted_at=(4, 5),
    ),
    "embedding_bwd": Call(
        _embedding("bwd"),
        lambda B: roofline.embedding_bwd(B * T, V, T, C, S),
        counted_at=(1, 2),
    ),
    "causal_attention_qkvpacked_fwd": Call(
        _attention("fwd"),
        lambda B: roofline.causal_attention_fwd(B, T, H, D, S),
        counted_at=(1 / H, 2 / H),
    ),
    "causal_attention_qkvpacked_bwd": Call(
        _attention("bwd"),
        lambda B: roofline.causal_attention_bwd(B, T, H, D, S),
        counted_at=(1 / H, 2 / H),
    ),
    "gelu_ffn_fwd": Call(
        _gelu_ffn("fwd"), lambda B: roofline.gelu_ffn_fwd(B * T, C, F, S, S), counted_at=(0.25, 0.5)
    ),
    "gelu_ffn_bwd": Call(
        _gelu_ffn("bwd"), lambda B: roofline.gelu_ffn_bwd(B * T, C, F, S, S), counted_at=(8, 16)
    ),
    f"linear_cross_entropy of {V_COUNTED} tokens": Call(
        _linear_cross_entropy,
        lambda B: roofline.linear_cross_entropy(B * T, C, V_COUNTED, S),
        counted_at=(0.5, 1),
    ),
}


CUDA_CALLS = {
    "layer_norm_fwd": Call(
        _layer_norm("layer_norm", "fwd", dropout=False, backend="cuda_host"),
        CALLS["layer_norm_fwd"].floor,
        counted_at=(5.25, 5.375),
    ),
    "layer_norm_bwd": Call(
        _layer_norm("layer_norm", "bwd", dropout=False, backend="cuda_host"),
        lambda B: roofline.layer_norm_bwd(B * T, C, S, S, CUDA_BLOCKS),
        counted_at=(3.125, 3.25),
    ),
    "dropout_add_layer_norm_fwd": Call(
        _layer_norm("dropout_add_layer_norm", "fwd", dropout=True, backend="cuda_host"),
        CALLS["dropout_add_layer_norm_fwd"].floor,
        counted_at=(5.25, 5.375),
    ),
    "dropout_add_layer_norm_bwd": Call(
        _layer_norm("dropout_add_layer_norm", "bwd", dropout=True, backend="cuda_host"),
        lambda B: roofline.dropout_add_layer_norm_bwd(B * T, C, S, S, CUDA_BLOCKS),
        counted_at=(3.125, 3.25),
    ),
    "dropout_mask": Call(
        partial(_dropout_mask, backend="cuda_host"), CALLS["dropout_mask"].floor, counted_at=(1, 2)
    ),
    "embedding_fwd": Call(
        _embedding("fwd", "cuda_host"), CALLS["embedding_fwd"].floor, counted_at=(4, 8)
    ),
    "embedding_bwd": Call(
        _embedding("bwd", "cuda_host"), CALLS["embedding_bwd"].floor, counted_at=(1, 2)
    ),
}


def _any_bits(seed, block, row, step, site, n_rounds):
    """Four words in the place of Philox's: drawing them moves no bytes, and takes the most time."""
    word = block + row
    return word, word, word, word


def _any_product(builder, a, b, accumulator, *options):
    """No bytes either, and no address depends on it."""
    return accumulator


@cache
def count(name: str, B: float, backend: str = "triton") -> tuple[int, int]:
    """(compulsory, issued) bytes of a call at a batch size, on a data-centre chip."""
    run = _call(name, backend).prepare(B)
    if backend == "cuda_host":
        with counting_cuda() as traffic:
            run()
        return traffic.compulsory, traffic.issued
    with (
        data_centre_chip(),
        mock.patch.object(tl, "philox", _any_bits),
        mock.patch.object(InterpreterBuilder, "create_dot", _any_product),
        counting() as traffic,
    ):
        run()
    return traffic.compulsory, traffic.issued


def measure(name: str, backend: str = "triton") -> tuple[int, int, int]:
    """(compulsory, issued, floor) bytes of a call at GPT-1's training shape, B = 64."""
    call = _call(name, backend)
    first, second = call.counted_at
    steps = round((BATCH - second) / (second - first))
    counts = zip(count(name, first, backend), count(name, second, backend), strict=True)
    compulsory, issued = (b + (b - a) * steps for a, b in counts)
    return compulsory, issued, call.floor(BATCH).bytes


def _call(name: str, backend: str) -> Call:
    return (CUDA_CALLS if backend == "cuda_host" else CALLS)[name]


def main() -> None:
    calls = [("triton", name) for name in CALLS]
    if extension.absence("cuda_host") is None:
        calls += [("cuda_host", name) for name in CUDA_CALLS]
    print(f"{'B = 64, T = 512':38}{'compulsory':>14}{'issued':>14}{'floor':>14}{'ratios':>16}")
    for backend, name in calls:
        compulsory, issued, floor = measure(name, backend)
        ratios = f"{compulsory / floor:8.4f}{issued / floor:8.4f}"
        print(f"{backend:10}{name:28}{compulsory:14,}{issued:14,}{floor:14,}{ratios}", flush=True)


if __name__ == "__main__":
    main()
