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

ABSENCE = extension.absence("cuda_host")


class Pin(NamedTuple):
    """Bytes at GPT-1's training shape; what they may be over the floor, set by other reasons."""

    compulsory: int
    issued: int
    issued_limit: float
    compulsory_limit: float = 1.02


EXPECTED = {
    "layer_norm_fwd": Pin(100_928_512, 104_955_904, 1.05),
    "layer_norm_bwd": Pin(164_240_896, 167_696_384, 1.10),
    "dropout_add_layer_norm_fwd": Pin(201_593_376, 208_289_792, 1.05),
    "dropout_add_layer_norm_bwd": Pin(221_066_784, 226_619_392, 1.10),
    # A store fills half a sector with bits, and each draws from a seed that is read four times.
    "dropout_mask": Pin(18_874_400, 33_423_360, 1.78),
    "embedding_fwd": Pin(101_711_904, 105_381_888, 1.05),
    # One order of reading dout serves the positions, another the ids; and each table row that was
    # read is written twice, as zeros first.
    "embedding_bwd": Pin(216_609_792, 218_000_832, 1.93, 1.91),
    # Each tile of queries reads the keys and values that it sees, each tile of keys its queries.
    "causal_attention_qkvpacked_fwd": Pin(221_773_824, 328_728_576, 1.75),
    # Two launches, for dQ and for dK and dV, each read q, k, v, do and the bits.
    "causal_attention_qkvpacked_bwd": Pin(648_019_968, 1_020_788_736, 2.4, 1.53),
    # Each row or column of a product's tiles reads its operand again: x 12 times, gelu(u) 3 times,
    # a weight 256 times. L2 is meant to serve them.
    "gelu_ffn_fwd": Pin(714_087_936, 4_078_829_568, 5.72),
    # Likewise. Compulsory: two launches read du (for dW₁, dx), three read dy (for du, dW₂, db), and
    # the parts of split sums are 53 MB, written and read.
    "gelu_ffn_bwd": Pin(1_590_967_296, 8_074_312_704, 6.87, 1.353),
    # Likewise. The floor has no logits; here they are written, read, overwritten and read twice.
    # And each chunk, of 256 rows where GPT-1 has 2816, reads w twice and adds to dW in memory.
    "linear_cross_entropy of 798 tokens": Pin(1_363_056_640, 2_406_127_616, 22.95, 13.0),
}

EXPECTED_CUDA = {
    "layer_norm_fwd": Pin(100_928_512, 104_787_968, 1.05),
    "layer_norm_bwd": Pin(156_130_816, 158_572_544, 1.10),
    "dropout_add_layer_norm_fwd": Pin(201_593_376, 208_562_176, 1.05),
    "dropout_add_layer_norm_bwd": Pin(208_901_664, 213_440_512, 1.10),
    "dropout_mask": Pin(18_874_400, 33_423_360, 1.78),  # as above
    "embedding_fwd": Pin(101_711_904, 106_168_320, 1.05),
    # As above; and of each four rows that a warp reads it reads the seed.
    "embedding_bwd": Pin(216_609_792, 221_748_032, 1.96, 1.91),
}


SLOW = ("layer_norm_fwd", "layer_norm_bwd", "gelu_ffn_bwd")
"""A plain LayerNorm runs the kernels of a residual site; split sums need thousands of rows."""


def in_default_run(name: str):
    return pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("name", [in_default_run(name) for name in traffic.CALLS])
def test_traffic_of_gpt1(name):
    """Counted bytes over the floor: pinned exactly, and within the limits."""
    check(EXPECTED[name], *traffic.measure(name))


@pytest.mark.skipif(ABSENCE is not None, reason=f"cuda_host: {ABSENCE}")
@pytest.mark.parametrize("name", [in_default_run(name) for name in traffic.CUDA_CALLS])
def test_traffic_of_gpt1_in_cuda(name):
    check(EXPECTED_CUDA[name], *traffic.measure(name, "cuda_host"))


def check(pin: Pin, compulsory: int, issued: int, floor: int):
    assert (compulsory, issued) == (pin.compulsory, pin.issued)
    assert floor * 0.999 <= compulsory <= pin.compulsory_limit * floor
    assert compulsory <= issued <= pin.issued_limit * floor


@pytest.mark.parametrize("name", ["dropout_mask", "gelu_ffn_fwd"])
def test_bytes_are_linear_in_the_batch(name):
    first, second = traffic.CALLS[name].counted_at
    one, two, three = (traffic.count(name, B) for B in (first, second, 2 * second - first))
    assert three == tuple(2 * b - a for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_bytes_of_attention_are_linear_in_its_heads(direction):
    name = f"causal_attention_qkvpacked_{direction}"
    one, two, three = (traffic.count(name, heads / traffic.H) for heads in (1, 2, 3))
    assert three == tuple(2 * b - a for a, b in zip(one, two, strict=True))


@pytest.mark.skipif(ABSENCE is not None, reason=f"cuda_host: {ABSENCE}")
@pytest.mark.parametrize("name", ["dropout_add_layer_norm_bwd", "embedding_fwd"])
def test_bytes_of_cuda_are_linear_in_the_batch(name):
    first, second = traffic.CUDA_CALLS[name].counted_at
    sizes = (first, second, 2 * second - first)
    one, two, three = (traffic.count(name, B, "cuda_host") for B in sizes)
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
    with counting() as counted:
        copy_kernel[(triton.cdiv(N, 64),)](x, y, N, stride, reads, 64)
    return counted.compulsory, counted.issued


def test_a_planted_second_read_is_issued_twice_and_compulsory_once():
    assert copied(256, 1, reads=1) == (2048, 2048)
    assert copied(256, 1, reads=2) == (2048, 3072)


def test_whole_sectors_count_and_masked_elements_do_not():
    assert copied(66, 1, reads=1) == (2 * 9 * 32, 2 * 9 * 32)
    assert copied(64, 8, reads=1) == (64 * 32 + 256, 64 * 32 + 256)


def test_a_descriptor_counts_what_lies_inside_the_tensor():
    x, y = torch.ones(20, 32), torch.zeros(20, 32)
    with counting() as counted:
        tile = [32, 32]
        descriptors = (TensorDescriptor.from_tensor(t, tile) for t in (x, y))
        descriptor_kernel[(1,)](*descriptors, BLOCK=32)
    assert torch.equal(x, y)
    assert (counted.compulsory, counted.issued) == (2 * x.nbytes, 2 * x.nbytes)


def test_two_launches_share_nothing():
    x, y = torch.zeros(64), torch.zeros(64)
    with counting() as counted:
        for _ in range(2):
            copy_kernel[(1,)](x, y, 64, 1, 1, 64)
    assert counted.compulsory == 2 * (x.nbytes + y.nbytes)


def test_what_pytorch_does_around_a_kernel_counts():
    x = torch.ones(3, 8)
    with counting() as counted:
        x.new_empty(100)
        x.view(24)[2:]
        assert counted.issued == 0
        x.new_zeros(50)
        assert counted.issued == 200
        torch.cat([x, x])
        assert counted.issued == 200 + 2 * 2 * x.nbytes
        x.zero_()
    assert counted.issued == counted.compulsory == 200 + 5 * x.nbytes
