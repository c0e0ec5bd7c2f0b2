"""The bytes that kernels move, exactly: a kernel that moves more fails here, without a GPU."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("bytes are counted on Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import traffic
from benchmarks.traffic import counting
from gpt1_kernels.backends.cuda import extension


class Pin(NamedTuple):
    """Bytes at GPT-1's training shape; what they may be over the floor, set by other reasons."""

    compulsory: int
    issued: int
    issued_limit: float
    compulsory_limit: float = 1.02


EXPECTED = {
    "layer_norm_fwd": {
        "triton": Pin(100_928_512, 104_955_904, 1.05),
        "cuda_host": Pin(100_928_512, 104_787_968, 1.05),
    },
    "layer_norm_bwd": {
        "triton": Pin(164_237_824, 167_693_312, 1.10),
        "cuda_host": Pin(156_127_744, 158_569_472, 1.10),
    },
    "dropout_add_layer_norm_fwd": {
        "triton": Pin(201_593_376, 208_289_792, 1.05),
        "cuda_host": Pin(201_593_376, 208_562_176, 1.05),
    },
    "dropout_add_layer_norm_bwd": {
        "triton": Pin(221_060_640, 226_613_248, 1.10),
        "cuda_host": Pin(208_895_520, 213_434_368, 1.10),
    },
    # A store fills half a sector with bits, and each draws from a seed that is read four times.
    "dropout_mask": {
        "triton": Pin(18_874_400, 33_423_360, 1.78),
        "cuda_host": Pin(18_874_400, 33_423_360, 1.78),
    },
    "embedding_fwd": {
        "triton": Pin(101_711_904, 105_381_888, 1.05),
        "cuda_host": Pin(101_711_904, 106_168_320, 1.05),
    },
    # One order of reading dout serves the positions, another the ids; and each table row that was
    # read is written twice, as zeros first. In CUDA a warp reads the seed with each four rows.
    "embedding_bwd": {
        "triton": Pin(216_085_504, 217_476_544, 1.93, 1.91),
        "cuda_host": Pin(216_085_504, 221_223_744, 1.96, 1.91),
    },
    # Each tile of queries reads the keys and values that it sees.
    "causal_attention_qkvpacked_fwd": {
        "triton": Pin(221_773_824, 328_728_576, 1.75),
        "cuda_host": Pin(221_773_824, 284_688_384, 1.30),
    },
    # Triton: two launches, for dQ and for dK and dV, each read q, k, v, do and the bits, and the
    # first leaves delta to the second. CUDA: dQ stays on chip, so that one launch does it all; each
    # tile of keys reads its queries.
    "causal_attention_qkvpacked_bwd": {
        "triton": Pin(648_019_968, 1_020_788_736, 2.4, 1.53),
        "cuda_host": Pin(423_100_416, 586_678_272, 1.40),
    },
    # Two launches, as Triton's.
    "causal_attention_qkvpacked_bwd in 99 KB": {
        "cuda_host": Pin(648_019_968, 1_008_205_824, 2.4, 1.53),
    },
    # Each row or column of a product's tiles reads its operand again: in Triton x 12 times, gelu(u)
    # 3 times, a weight 256 times, in CUDA 24, 6 and 256 times. L2 is meant to serve them.
    "gelu_ffn_fwd": {
        "triton": Pin(714_087_936, 4_078_829_568, 5.72),
        "cuda_host": Pin(714_087_936, 5_288_755_200, 7.41),
    },
    # Likewise. Compulsory: two launches read du (for dW₁, dx), three read dy (for du, dW₂, db), and
    # the parts of split sums are 53 MB, written and read.
    "gelu_ffn_bwd": {
        "triton": Pin(1_590_967_296, 8_074_312_704, 6.87, 1.353),
    },
    # Likewise: x 2 or 4 times, gelu(u) once, a weight 256 times.
    "gelu_ffn_fwd of width 128": {
        "triton": Pin(117_703_936, 193_265_664, 1.65),
        "cuda_host": Pin(117_703_936, 210_370_560, 1.79),
    },
    # Likewise. The parts, of 16 steps each, are 8 or 17 MB for each of two weights.
    "gelu_ffn_bwd of width 128": {
        "triton": Pin(295_307_776, 404_097_536, 2.09, 1.53),
        "cuda_host": Pin(313_068_032, 455_412_224, 2.36, 1.62),
    },
    # Likewise. The floor has no logits; here they are written, read, overwritten and read twice.
    # And each chunk, of 128 rows where GPT-1 has 2816, reads w twice and adds to dW in memory.
    "linear_cross_entropy of width 128": {
        "triton": Pin(611_697_664, 745_391_104, 41.7, 34.2),
        "cuda_host": Pin(611_697_664, 748_536_832, 41.8, 34.2),
    },
}


BOTH = "triton", "cuda_host"

SLOW = {
    "layer_norm_fwd": BOTH,
    "dropout_add_layer_norm_bwd": BOTH,
    "embedding_fwd": ("triton",),
    "gelu_ffn_fwd": BOTH,
    "gelu_ffn_bwd": BOTH,
    "gelu_ffn_bwd of width 128": BOTH,
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
    """Counted bytes over the floor: pinned exactly, and within the limits."""
    pin = EXPECTED[name][backend]
    compulsory, issued, floor = traffic.measure(name, backend)
    assert (compulsory, issued) == (pin.compulsory, pin.issued)
    assert floor * 0.999 <= compulsory <= pin.compulsory_limit * floor
    assert compulsory <= issued <= pin.issued_limit * floor


LINEAR = (
    "dropout_add_layer_norm_bwd",
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
