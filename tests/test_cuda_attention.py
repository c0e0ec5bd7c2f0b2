"""The CUDA kernels of causal attention on the checked CPU platform: what is chosen, and its bytes.

A fault of the platform, such as a missing barrier, fails these tests too. On the smallest chips, of
99 KB of shared memory, backward is two kernels; on large ones dQ of a head stays on the chip.
"""

from functools import partial

import pytest
import torch

from benchmarks import roofline
from gpt1_kernels import use_backend
from gpt1_kernels.backends.cuda import attention, dropout, extension
from tests.cases import (
    SEED,
    P,
    assert_same,
    backends_of,
    cast,
    causal_attention,
    check_parity,
    results,
    upstream,
)

if "cuda_host" not in backends_of("causal_attention"):
    pytest.skip("needs the CPU build of the CUDA kernels, and no GPU", allow_module_level=True)

platform = extension.module("cuda_host")
SMALL, LARGE = 99 * 1024, 227 * 1024
ONE, TWO = {"causal_attention_bwd"}, {"causal_attention_bwd_dq", "causal_attention_bwd_dkdv"}
KERNELS = {SMALL: TWO, LARGE: ONE}

HEADS_OF_64 = [
    causal_attention("one-key", 1, 1, 1, 1, 64),
    causal_attention("one-query-of-a-cache", 2, 1, 200, 1, 64, P),
    causal_attention("queries-astride-tiles-of-keys", 1, 100, 190, 1, 64, P),
    causal_attention("padding-ends-inside-tiles", 2, 150, 150, 1, 64, P, padding=[70, 149]),
    causal_attention("padding-fills-tiles", 2, 300, 300, 1, 64, padding=[256, 300]),
    causal_attention("padding-in-a-cache", 2, 70, 300, 1, 64, P, padding=[131, 250]),
    causal_attention("nothing-but-padding-in-a-cache", 2, 10, 128, 1, 64, P, padding=[0, 128]),
    causal_attention("negative-scale", 1, 40, 40, 1, 64, P, scale=-0.3),
    causal_attention("no-scale", 1, 40, 40, 1, 64, P, scale=0.0),
    causal_attention("columns-left-over", 1, 65, 65, 2, 40, P),
    causal_attention("most-queries-that-fit", 1, 512, 700, 1, 64, P),
    causal_attention("one-position-cached", 1, 129, 130, 1, 64, P),
    causal_attention("all-but-two-of-a-tile-cached", 1, 66, 128, 1, 64, P),
]


@pytest.fixture(params=[SMALL, LARGE], ids=["99KB", "227KB"])
def shared_memory(request):
    platform.set_shared_memory(request.param)
    yield request.param
    platform.set_shared_memory(SMALL)


def counted(function):
    """What the platform counted of each kernel that a call ran."""
    platform.count_traffic(True)
    try:
        function()
    finally:
        platform.count_traffic(False)
    return platform.traffic()


@pytest.mark.parametrize("dtype", attention.DTYPES, ids=str)
@pytest.mark.parametrize("case", HEADS_OF_64, ids=lambda case: case.name)
def test_parity_with_and_without_room_for_dq(case, dtype, shared_memory):
    ran = counted(lambda: check_parity(case, "cuda_host", dtype))
    assert {name for name in ran if "bwd" in name} == KERNELS[shared_memory]


@pytest.mark.parametrize(
    ("path", "T", "D"), [("more-queries-than-fit", 513, 64), ("head-too-wide", 9, 128)]
)
def test_two_kernels_where_dq_does_not_fit(path, T, D):
    case = causal_attention(path, 1, T, T, 1, D)
    platform.set_shared_memory(LARGE)
    try:
        ran = counted(lambda: check_parity(case, "cuda_host", torch.bfloat16))
    finally:
        platform.set_shared_memory(SMALL)
    assert set(ran) == {"causal_attention_fwd", *TWO}


@pytest.mark.parametrize(
    ("needed", "kernels"), [("q", {"dq"}), ("k", {"dq", "dkdv"}), ("v", {"dkdv"})]
)
def test_a_gradient_that_nobody_needs_costs_no_kernel(needed, kernels, shared_memory):
    case = causal_attention("needs", 1, 70, 70, 1, 64, P)
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    others = {name: x for name, x in inputs.items() if name != needed}
    with use_backend("cuda_host"):
        # Of the same kernels, which a chip with room for dQ would not run for all three.
        platform.set_shared_memory(SMALL)
        expected = results(case.fused, inputs, dout)[needed]
        platform.set_shared_memory(shared_memory)
        actual = {}
        ran = counted(
            lambda: actual.update(
                results(lambda **x: case.fused(**x, **others), {needed: inputs[needed]}, dout)
            )
        )
    assert {name for name in ran if "bwd" in name} == {f"causal_attention_bwd_{k}" for k in kernels}
    assert torch.equal(actual[needed], expected)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("case", [HEADS_OF_64[3], HEADS_OF_64[8]], ids=lambda case: case.name)
def test_the_order_of_threads_changes_no_bit(case, order, shared_memory):
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    with use_backend("cuda_host"):
        expected = results(case.fused, inputs, dout)
        platform.set_order(order, 5)
        try:
            actual = results(case.fused, inputs, dout)
        finally:
            platform.set_order("forward")
    assert_same(actual, expected)


def forward_and_backward(qkv, dout, H, bits, first_key=None):
    config = bits, first_key, 0.125, P
    o, lse = attention.causal_attention_qkvpacked_fwd(qkv, H, *config)
    return o, lse, attention.causal_attention_qkvpacked_bwd(dout, qkv, H, o, lse, *config)


@pytest.mark.parametrize("T", [200, 256])
def test_garbage_above_the_diagonal_is_never_used(T, shared_memory):
    """`dropout_mask(causal=True)` may leave words wholly above the diagonal unwritten."""
    qkv, dout = torch.randn(1, T, 192).bfloat16(), torch.randn(1, T, 64).bfloat16()
    bits = dropout.dropout_mask(SEED, (1, 1, T, T), P, 0, False)
    above = 32 * torch.arange(bits.shape[-1]) > torch.arange(T)[:, None]
    zeros, ones = (
        forward_and_backward(qkv, dout, 1, bits.masked_fill(above, garbage)) for garbage in (0, -1)
    )
    for one, other in zip(zeros, ones, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_in_padding_stay_there(bad, shared_memory):
    first_key = torch.tensor([0, 163], dtype=torch.int32)
    qkv, dout = torch.randn(2, 200, 192).bfloat16(), torch.randn(2, 200, 64).bfloat16()
    dirty_qkv, dirty_dout, clean_dout = qkv.clone(), dout.clone(), dout.clone()
    dirty_qkv[1, :163] = dirty_dout[1, :163] = bad
    clean_dout[1, :163] = 0
    bits = dropout.dropout_mask(SEED, (2, 1, 200, 200), P, 0, True)
    dirty = forward_and_backward(dirty_qkv, dirty_dout, 1, bits, first_key)
    clean = forward_and_backward(qkv, clean_dout, 1, bits, first_key)
    for one, other in zip(dirty, clean, strict=True):
        assert torch.equal(one, other)


ISSUED = {SMALL: 2.4, LARGE: 1.4}


def test_bytes_and_bank_conflicts_at_gpt1s_shape(shared_memory):
    """Of two heads of 512 positions: all others are the same."""
    shape = 1, 512, 2, 64
    qkv, dout = torch.randn(1, 512, 384).bfloat16(), torch.randn(1, 512, 128).bfloat16()
    bits = dropout.dropout_mask(SEED, (1, 2, 512, 512), P, 0, True)
    ran = counted(lambda: forward_and_backward(qkv, dout, 2, bits))
    assert not [kernel for kernel, counts in ran.items() if counts["bank_conflicts"]]

    def over_floor(kind, kernels, floor):
        return sum(ran[name][kind] for name in kernels) / floor(*shape, 2).bytes

    fwd = ["causal_attention_fwd"], roofline.causal_attention_fwd
    kernels = KERNELS[shared_memory]
    bwd = kernels, partial(roofline.causal_attention_bwd, launches=len(kernels))
    assert over_floor("compulsory", *fwd) <= 1.02
    assert over_floor("issued", *fwd) <= 1.3
    assert over_floor("issued", *bwd) <= ISSUED[shared_memory]
    if shared_memory == LARGE:
        assert over_floor("compulsory", *bwd) <= 1.02


def test_more_heads_than_a_grid_has_blocks_are_counted_right():
    sizes = (65536, 65536, 1, 1, 8)
    with pytest.raises(ValueError, match="4294967296 blocks"):
        platform.causal_attention_fwd(*[None] * 7, sizes, 1.0, 1.0, torch.bfloat16, (-1, 0))
