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

GPT-1's training shape is too large for either. Once there are enough rows to occupy the grid of
the chip, 132 processors, its size is constant, and more sequences only lengthen the programs'
loops: bytes are a + b · B exactly. They are counted at two small B and continued to B = 64.
Attention's programs each work on one head, and so do those of its mask: a head or two are parts of
a small B. What a program of a LayerNorm moves beside its rows, parameters and sums, is the same for
each: bytes are a + b · B + c · processors, counted on one and two and continued to 132.

A product's tiles read their operands whatever program they fall to, so its bytes grow by the row of
tiles, from the first. The sums of the weights' gradients of `gelu_ffn` are split, the longer the
more: they are counted with the chunks of B = 64, so that the parts are equally many.

GPT-1's head is too large even so. `linear_cross_entropy` is counted at the same width with 798 of
the 40478 tokens, which end in the same fraction of a tile, and chunks of 128 rows; its first chunk
makes dW and every other adds to it, so bytes are linear in the chunks. Only at GPT-1's vocabulary
are the sums of dh split: their parts are not in the count.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from benchmarks import roofline
from benchmarks.roofline import SECTOR, Floor
from gpt1_kernels.backends import kernel
from gpt1_kernels.backends.cuda import extension, linear_cross_entropy, matmul
from gpt1_kernels.backends.logits import padded_vocabulary
from gpt1_kernels.backends.triton import launch as launching
from gpt1_kernels.backends.triton import matmul as triton_matmul
from gpt1_kernels.backends.triton import philox
from gpt1_kernels.errors import error_record

PROCESSORS = 132
SHARED_MEMORY = 227 * 1024
PROGRAMS = {"triton": 8 * PROCESSORS, "cuda_host": 3 * PROCESSORS}  # of a LayerNorm's backward
BATCH, T, C, H, D, V = 64, 512, 768, 12, 64, 40478
F = 4 * C
NARROW = 128
V_COUNTED, CHUNK = 798, 128
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


def _any_bits(block, row, *of_stream):
    """Four words in the place of Philox's: drawing them moves no bytes, and takes the most time."""
    word = block + row
    return word, word, word, word


def _any_product(builder, a, b, accumulator, *options):
    """No bytes either, and no address depends on it."""
    return accumulator


@contextmanager
def _counting_triton(processors: int, shared_memory: int) -> Iterator[Traffic]:
    """`counting` as on a chip of so many processors."""
    caches = (
        launching.processors, launching.shared_memory, launching.product_tiles,
        launching.split_terms,
    )  # fmt: skip
    with (
        mock.patch.multiple(
            launching, INTERPRETED_PROCESSORS=processors, SMALLEST_SHARED_MEMORY=shared_memory
        ),
        mock.patch.object(philox, "philox4x32", _any_bits),
        mock.patch.object(InterpreterBuilder, "create_dot", _any_product),
        _forgotten(*caches),
        counting() as traffic,
    ):
        yield traffic


@contextmanager
def _counting_cuda(processors: int, shared_memory: int) -> Iterator[Traffic]:
    """The same on the CPU build of the CUDA kernels."""
    build, traffic = extension.module("cuda_host"), Traffic()
    build.set_processors(processors)
    build.set_shared_memory(shared_memory)
    build.count_traffic(True)
    try:
        with _forgotten(matmul._split), _AroundKernels(traffic):
            yield traffic
    finally:
        build.count_traffic(False)
        build.set_shared_memory(launching.SMALLEST_SHARED_MEMORY)
        build.set_processors(launching.INTERPRETED_PROCESSORS)
    for of_kernel in build.traffic().values():
        traffic.compulsory += of_kernel["compulsory"]
        traffic.issued += of_kernel["issued"]


COUNTING = {"triton": _counting_triton, "cuda_host": _counting_cuda}


@contextmanager
def _forgotten(*cached) -> Iterator[None]:
    """What these functions remember of a chip holds inside or outside, not in both."""
    for function in cached:
        function.cache_clear()
    try:
        yield
    finally:
        for function in cached:
            function.cache_clear()


@dataclass(frozen=True)
class Call:
    """A kernel-level call of an op.

    `prepare(backend, B)` makes the inputs and returns what runs it; `floor(backend, B)` is its
    floor. On each backend it is counted at two batch sizes from which on the grid grows no more, or
    only with the batch; an op of rows takes part of a sequence, attention some of its heads.
    `processors` are those of the chip, or two smaller numbers from which bytes are continued to it.
    """

    prepare: Callable[[str, float], Callable[[], object]]
    floor: Callable[[str, int], Floor]
    counted_at: dict[str, tuple[float, float]]
    shared_memory: int = SHARED_MEMORY
    processors: tuple[int, ...] = (PROCESSORS,)


def _layer_norm(op: str, direction: str) -> Callable:
    dropout = op != "layer_norm"

    def prepare(backend: str, B: float):
        N = round(B * T)
        x, other = torch.randn(2, N, C, dtype=DTYPE)
        w, b, x_bias = torch.randn(3, C, dtype=DTYPE)
        dy_residual = torch.randn(N, C, dtype=DTYPE)
        mean, rstd = torch.ones(2, N)
        seed = torch.zeros(2, dtype=torch.int64)
        run = kernel(backend, op, f"{op}_{direction}")
        if direction == "fwd":
            args = (
                (x, other, w, b, x_bias, seed, 1e-5, 0.1, 0, True) if dropout else (x, w, b, 1e-5)
            )
        else:
            statistics = w, mean, rstd
            args = (
                (x, dy_residual, other, *statistics, seed, 0.1, 0, [True] * 5)
                if dropout
                else (x, other, *statistics, [True] * 3)
            )
        return lambda: run(*args)

    return prepare


def _dropout_mask(backend: str, B: float):
    run, seed = kernel(backend, "dropout_mask", "dropout_mask"), torch.zeros(2, dtype=torch.int64)
    return lambda: run(seed, (1, round(B * H), T, T), 0.1, 0, True)


def _embedding(direction: str) -> Callable:
    """All ids differ, the most that can be asked of the tables."""

    def prepare(backend: str, B: int):
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


def _attention(direction: str) -> Callable:
    def prepare(backend: str, B: float):
        heads = round(B * H)
        qkv = torch.randn(1, T, 3 * heads * D, dtype=DTYPE)
        bits = torch.zeros(1, heads, T, T // 32, dtype=torch.int32)
        options = bits, None, D**-0.5, 0.1
        run = kernel(backend, "causal_attention", f"causal_attention_qkvpacked_{direction}")
        if direction == "fwd":
            return lambda: run(qkv, heads, *options)
        dout, out = torch.randn(2, 1, T, heads * D, dtype=DTYPE)
        lse = torch.zeros(1, heads, T)
        return lambda: run(dout, qkv, heads, out, lse, *options)

    return prepare


def _gelu_ffn(direction: str, C: int, F: int) -> Callable:
    def prepare(backend: str, B: float):
        N = round(B * T)
        x, dy = torch.randn(2, N, C, dtype=DTYPE)
        w_fc, w_proj = torch.randn(C, F, dtype=DTYPE), torch.randn(F, C, dtype=DTYPE)
        run = kernel(backend, "gelu_ffn", f"gelu_ffn_{direction}")
        if direction == "fwd":
            b_fc, b_proj = torch.randn(F, dtype=DTYPE), torch.randn(C, dtype=DTYPE)
            return lambda: run(x, w_fc, b_fc, w_proj, b_proj, [True] * 2)
        pre, hidden = torch.randn(2, N, F, dtype=DTYPE)

        def in_chunks():
            assert N not in (C, F)  # sums over rows are told apart by their length
            with _split_as_the_batch(N):
                run(dy, x, pre, hidden, w_fc, w_proj, [True] * 5)

        return in_chunks

    return prepare


@contextmanager
def _split_as_the_batch(rows: int) -> Iterator[None]:
    """Sums over these rows are split into as many chunks as those over the rows of B = 64."""
    of_triton, of_cuda, all_rows = triton_matmul.split_terms, matmul._split, BATCH * T

    def split_terms(tiles: int, terms: int, config: launching.ProductTiles, device) -> int:
        if terms != rows:
            return of_triton(tiles, terms, config, device)
        chunks = launching.cdiv(all_rows, of_triton(tiles, all_rows, config, device))
        return launching.cdiv(terms, chunks * config.BLOCK_K) * config.BLOCK_K

    def split(M: int, N: int, terms: int, index: int) -> tuple[int, int]:
        return of_cuda(M, N, all_rows if terms == rows else terms, index)

    with (
        mock.patch.object(triton_matmul, "split_terms", split_terms),
        mock.patch.object(matmul, "_split", split),
    ):
        yield


def _linear_cross_entropy(backend: str, B: float):
    error_record("linear_cross_entropy", V_COUNTED, torch.device("cpu"))
    N = round(B * T)
    h, w = torch.randn(N, NARROW, dtype=DTYPE), torch.randn(V_COUNTED, NARROW, dtype=DTYPE)
    targets = torch.arange(N) % V_COUNTED
    run = kernel(backend, "linear_cross_entropy", "linear_cross_entropy_fwd")
    chunking = launching if backend == "triton" else linear_cross_entropy
    chunk_bytes = CHUNK * padded_vocabulary(V_COUNTED) * S

    def unchecked():
        with (
            mock.patch(f"{run.__module__}.check_ids"),
            mock.patch.object(chunking, "CHUNK_BYTES", chunk_bytes),
            mock.patch.object(linear_cross_entropy, "TILE_ROWS", CHUNK),  # of CUDA's chunks
        ):
            run(h, w, targets, None, -100, [True] * 2)

    return unchecked


ON_FEW = {"counted_at": dict.fromkeys(COUNTING, (3 / 16, 1 / 4)), "processors": (1, 2)}

CALLS = {
    "layer_norm_fwd": Call(
        _layer_norm("layer_norm", "fwd"),
        lambda _, B: roofline.layer_norm_fwd(B * T, C, S, S),
        **ON_FEW,
    ),
    "layer_norm_bwd": Call(
        _layer_norm("layer_norm", "bwd"),
        lambda backend, B: roofline.layer_norm_bwd(B * T, C, S, S, PROGRAMS[backend]),
        **ON_FEW,
    ),
    "dropout_add_layer_norm_fwd": Call(
        _layer_norm("dropout_add_layer_norm", "fwd"),
        lambda _, B: roofline.dropout_add_layer_norm_fwd(B * T, C, S, S),
        **ON_FEW,
    ),
    "dropout_add_layer_norm_bwd": Call(
        _layer_norm("dropout_add_layer_norm", "bwd"),
        lambda backend, B: roofline.dropout_add_layer_norm_bwd(
            B * T, C, S, S, PROGRAMS[backend], readers=2
        ),
        **ON_FEW,
    ),
    "dropout_mask": Call(
        _dropout_mask,
        lambda _, B: roofline.dropout_mask(B, H, T),
        counted_at=dict.fromkeys(COUNTING, (1 / H, 2 / H)),
    ),
    "embedding_fwd": Call(
        _embedding("fwd"),
        lambda _, B: roofline.embedding_fwd(B * T, T, C, S, read=B * T),
        counted_at={"triton": (4, 5), "cuda_host": (4, 8)},
    ),
    "embedding_bwd": Call(
        _embedding("bwd"),
        lambda _, B: roofline.embedding_bwd(B * T, V, T, C, S),
        counted_at=dict.fromkeys(COUNTING, (1, 2)),
    ),
    "causal_attention_qkvpacked_fwd": Call(
        _attention("fwd"),
        lambda _, B: roofline.causal_attention_fwd(B, T, H, D, S),
        counted_at=dict.fromkeys(COUNTING, (1 / H, 2 / H)),
    ),
    "causal_attention_qkvpacked_bwd": Call(
        _attention("bwd"),
        lambda backend, B: roofline.causal_attention_bwd(
            B, T, H, D, S, launches=2 if backend == "triton" else 1
        ),
        counted_at=dict.fromkeys(COUNTING, (1 / H, 2 / H)),
    ),
    "causal_attention_qkvpacked_bwd in 99 KB": Call(
        _attention("bwd"),
        lambda _, B: roofline.causal_attention_bwd(B, T, H, D, S, launches=2),
        counted_at={"cuda_host": (1 / H, 2 / H)},
        shared_memory=launching.SMALLEST_SHARED_MEMORY,
    ),
    "gelu_ffn_fwd": Call(
        _gelu_ffn("fwd", C, F),
        lambda _, B: roofline.gelu_ffn_fwd(B * T, C, F, S, S),
        counted_at=dict.fromkeys(COUNTING, (0.25, 0.5)),
    ),
    "gelu_ffn_bwd": Call(
        _gelu_ffn("bwd", C, F),
        lambda _, B: roofline.gelu_ffn_bwd(B * T, C, F, S, S),
        counted_at={"triton": (2.5, 3), "cuda_host": (4, 5)},
    ),
    f"gelu_ffn_fwd of width {NARROW}": Call(
        _gelu_ffn("fwd", NARROW, 4 * NARROW),
        lambda _, B: roofline.gelu_ffn_fwd(B * T, NARROW, 4 * NARROW, S, S),
        counted_at=dict.fromkeys(COUNTING, (0.25, 0.5)),
    ),
    f"gelu_ffn_bwd of width {NARROW}": Call(
        _gelu_ffn("bwd", NARROW, 4 * NARROW),
        lambda _, B: roofline.gelu_ffn_bwd(B * T, NARROW, 4 * NARROW, S, S),
        counted_at=dict.fromkeys(COUNTING, (2, 4)),
    ),
    f"linear_cross_entropy of width {NARROW}": Call(
        _linear_cross_entropy,
        lambda _, B: roofline.linear_cross_entropy(B * T, NARROW, V_COUNTED, S),
        counted_at=dict.fromkeys(COUNTING, (0.25, 0.5)),
    ),
}


@cache
def count(name: str, backend: str, B: float, processors: int | None = None) -> tuple[int, int]:
    """(compulsory, issued) bytes of a call at a batch size, on the fewest processors it names."""
    call = CALLS[name]
    run = call.prepare(backend, B)
    with COUNTING[backend](processors or call.processors[0], call.shared_memory) as traffic:
        run()
    return traffic.compulsory, traffic.issued


def measure(name: str, backend: str) -> tuple[int, int, int]:
    """(compulsory, issued, floor) bytes of a call at GPT-1's training shape, B = 64."""
    call = CALLS[name]
    B, larger_B = call.counted_at[backend]
    total = counted = np.array(count(name, backend, B))
    total = total + (count(name, backend, larger_B) - counted) * round((BATCH - B) / (larger_B - B))
    if len(call.processors) > 1:
        few, more = call.processors
        steps = round((PROCESSORS - few) / (more - few))
        total = total + (count(name, backend, B, more) - counted) * steps
    compulsory, issued = total.tolist()
    return compulsory, issued, call.floor(backend, BATCH).bytes


def row(name: str, backend: str) -> dict[str, dict[str, int]]:
    """What the baseline keeps of a call."""
    compulsory, issued, _ = measure(name, backend)
    return {f"{name} on {backend}": {"compulsory": compulsory, "issued": issued}}


def main() -> None:
    print(f"{'B = 64, T = 512':50}{'compulsory':>14}{'issued':>14}{'floor':>14}{'ratios':>16}")
    for backend in COUNTING:
        if backend == "cuda_host" and extension.absence(backend) is not None:
            continue
        for name in (name for name, call in CALLS.items() if backend in call.counted_at):
            compulsory, issued, floor = measure(name, backend)
            ratios = f"{compulsory / floor:8.4f}{issued / floor:8.4f}"
            print(
                f"{backend:10}{name:40}{compulsory:14,}{issued:14,}{floor:14,}{ratios}", flush=True
            )


if __name__ == "__main__":
    main()
