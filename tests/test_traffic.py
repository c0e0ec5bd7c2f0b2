"""The bytes that kernels move: as in the baseline, and within limits over their floors."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("bytes are counted on Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import baseline, traffic
from benchmarks.traffic import counting
from gpt1_kernels.backends.cuda import extension


class Limit(NamedTuple):
    """What the bytes may be over the floor, whatever the baseline has; None for no such limit."""

    issued: float | None
    compulsory: float | None = 1.02


LIMITS = {
    "layer_norm_fwd": {"triton": Limit(1.05), "cuda_host": Limit(1.05)},
    "layer_norm_bwd": {"triton": Limit(1.10), "cuda_host": Limit(1.10)},
    "dropout_add_layer_norm_fwd": {"triton": Limit(1.05), "cuda_host": Limit(1.05)},
    "dropout_add_layer_norm_bwd": {"triton": Limit(1.10), "cuda_host": Limit(1.10)},
    # A store fills half a sector with bits, and each draws from a seed that is read four times.
    "dropout_mask": {"triton": Limit(None), "cuda_host": Limit(None)},
    "embedding_fwd": {"triton": Limit(1.05), "cuda_host": Limit(1.05)},
    # One order of reading dout serves the positions, another the ids; and each table row that was
    # read is written twice, as zeros first. In CUDA a warp reads the seed with each four rows.
    "embedding_bwd": {"triton": Limit(None, None), "cuda_host": Limit(None, None)},
    # Each tile of queries reads the keys and values it sees. Triton's tiles of 64 queries issue
    # more than larger ones, and are faster on an H100: what they read again comes from the L2 cache
    # and costs less than fewer resident programs would (benchmarks/records/NOTES.md, rounds 1, 2).
    "causal_attention_qkvpacked_fwd": {"triton": Limit(3.05), "cuda_host": Limit(1.30)},
    # Triton: two launches, for dQ and for dK and dV, each read q, k, v, do and the bits, and the
    # first leaves lse and delta to the second; tiles as small as in forward, for the same reason.
    # CUDA: dQ stays on chip, so that one launch does it all; each tile of keys reads its queries.
    "causal_attention_qkvpacked_bwd": {"triton": Limit(3.55, None), "cuda_host": Limit(1.40)},
    # Two launches, which leave delta alone; larger tiles than Triton's.
    "causal_attention_qkvpacked_bwd in 99 KB": {"cuda_host": Limit(2.4, None)},
    # Each row or column of a product's tiles reads its operand again: in Triton x 12 times, gelu(u)
    # 3 times, a weight 256 times, in CUDA 24, 6 and 256 times. L2 is meant to serve them.
    "gelu_ffn_fwd": {"triton": Limit(None), "cuda_host": Limit(None)},
    # Likewise. Compulsory: two launches read du (for dW₁, dx), three read dy (for du, dW₂, db), and
    # the parts of the sums of two weights, five of each tile, are 47 MB each, written and read.
    "gelu_ffn_bwd": {"triton": Limit(None, None), "cuda_host": Limit(None, None)},
    # Likewise: x 2 or 4 times, gelu(u) once, a weight 256 times.
    "gelu_ffn_fwd of width 128": {"triton": Limit(None), "cuda_host": Limit(None)},
    # Likewise. The parts, 16 of each tile, are 4 or 8 MB for each of two weights.
    "gelu_ffn_bwd of width 128": {"triton": Limit(None, None), "cuda_host": Limit(None, None)},
    # Likewise. The floor has no logits; here they are written, read, overwritten and read twice.
    # And each chunk, of 128 rows where GPT-1 has 2816, reads w twice and adds to dW in memory.
    "linear_cross_entropy of width 128": {
        "triton": Limit(None, None),
        "cuda_host": Limit(None, None),
    },
}


BOTH = "triton", "cuda_host"

SLOW = {
    "embedding_fwd": ("triton",),
    "gelu_ffn_fwd": BOTH,
    "gelu_ffn_bwd": BOTH,
}
"""The others have each op in the default run, in one direction at least, on each backend."""


def counted(names):
    """Parameters (name, backend) of calls, on each backend on which they are counted."""

    def marks(name, backend):
        if backend in SLOW.get(name, ()):
            yield pytest.mark.slow
        if backend != "triton":
            absence = extension.absence(backend)
            yield pytest.mark.skipif(absence is not None, reason=f"{backend}: {absence}")

    return [
        pytest.param(name, backend, marks=tuple(marks(name, backend)))
        for name in names
        for backend in traffic.CALLS[name].counted_at
    ]


@pytest.mark.parametrize(("name", "backend"), counted(traffic.CALLS))
def test_traffic_of_gpt1(name, backend):
    """Counted bytes: the baseline's to the byte, and within the limits over the floor."""
    limit = LIMITS[name][backend]
    compulsory, issued, floor = traffic.measure(name, backend)
    baseline.check("bytes", traffic.row(name, backend))
    assert floor * 0.999 <= compulsory <= issued
    assert limit.compulsory is None or compulsory <= limit.compulsory * floor
    assert limit.issued is None or issued <= limit.issued * floor


ON_FEW = tuple(name for name, call in traffic.CALLS.items() if len(call.processors) > 1)

LINEAR = (
    *ON_FEW,
    "dropout_mask",
    "causal_attention_qkvpacked_fwd",
    "causal_attention_qkvpacked_bwd",
    "gelu_ffn_fwd",
    "gelu_ffn_fwd of width 128",
    "gelu_ffn_bwd of width 128",
    "linear_cross_entropy of width 128",
)


@pytest.mark.parametrize(("name", "backend"), counted(LINEAR))
def test_bytes_are_linear_in_the_batch(name, backend):
    first, second = traffic.CALLS[name].counted_at[backend]
    sizes = first, second, 2 * second - first
    one, two, three = (traffic.count(name, backend, B) for B in sizes)
    assert three == tuple(2 * b - a for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("name", "backend"), counted(ON_FEW))
def test_bytes_are_linear_in_the_processors_at_any_batch(name, backend):
    B, larger_B = traffic.CALLS[name].counted_at[backend]
    few, more = traffic.CALLS[name].processors

    def of_programs(B, processors):
        return np.subtract(
            traffic.count(name, backend, B, processors), traffic.count(name, backend, B)
        ).tolist()

    once = of_programs(B, more)
    assert of_programs(B, 2 * more - few) == [2 * n for n in once]
    assert of_programs(larger_B, more) == once


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, stride, READS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.static_range(READS):
        total += tl.load(x_ptr + index * stride, mask=mask, other=0.0)
    tl.store(y_ptr + index, total, mask=mask)


@triton.jit
def descriptor_kernel(x_desc, y_desc, BLOCK: tl.constexpr):
    y_desc.store([0, 0], x_desc.load([0, 0]))


def copied(N: int, stride: int, reads: int) -> tuple[int, int]:
    x, y = torch.zeros(N * stride), torch.zeros(N)
    with counting() as moved:
        copy_kernel[(triton.cdiv(N, 64),)](x, y, N, stride, reads, 64)
    return moved.compulsory, moved.issued


def test_a_planted_second_read_is_issued_twice_and_compulsory_once():
    assert copied(256, 1, reads=1) == (2048, 2048)
    assert copied(256, 1, reads=2) == (2048, 3072)


def test_whole_sectors_count_and_masked_elements_do_not():
    assert copied(66, 1, reads=1) == (2 * 9 * 32, 2 * 9 * 32)
    assert copied(64, 8, reads=1) == (64 * 32 + 256, 64 * 32 + 256)


def test_a_descriptor_counts_what_lies_inside_the_tensor():
    x, y = torch.ones(20, 32), torch.zeros(20, 32)
    with counting() as moved:
        tile = [32, 32]
        descriptors = (TensorDescriptor.from_tensor(t, tile) for t in (x, y))
        descriptor_kernel[(1,)](*descriptors, BLOCK=32)
    assert torch.equal(x, y)
    assert (moved.compulsory, moved.issued) == (2 * x.nbytes, 2 * x.nbytes)


def test_two_launches_share_nothing():
    x, y = torch.zeros(64), torch.zeros(64)
    with counting() as moved:
        for _ in range(2):
            copy_kernel[(1,)](x, y, 64, 1, 1, 64)
    assert moved.compulsory == 2 * (x.nbytes + y.nbytes)


def test_what_pytorch_does_around_a_kernel_counts():
    x = torch.ones(3, 8)
    with counting() as moved:
        x.new_empty(100)
        x.view(24)[2:]
        assert moved.issued == 0
        x.new_zeros(50)
        assert moved.issued == 200
        torch.cat([x, x])
        assert moved.issued == 200 + 2 * 2 * x.nbytes
        x.zero_()
    assert moved.issued == moved.compulsory == 200 + 5 * x.nbytes
