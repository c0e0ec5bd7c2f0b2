"""The CUDA kernels of rows on the checked CPU build: each path, in every order of threads."""

import pytest
import torch

from gpt1_kernels import errors, ops, use_backend
from gpt1_kernels.backends.cuda import embedding as embedding_launchers
from gpt1_kernels.rng import keep_mask, pack_bits
from tests.cases import (
    DTYPES,
    SEED,
    P,
    backends_of,
    cast,
    check_parity,
    dropout_add_layer_norm,
    embedding,
    layer_norm,
    results,
    upstream,
)

if "cuda_host" not in backends_of("layer_norm"):
    pytest.skip("the module of the CPU build is absent", allow_module_level=True)

from gpt1_kernels import _cuda_host

ORDERS = ("forward", "reversed", "shuffled")


@pytest.fixture(params=ORDERS)
def order(request):
    _cuda_host.set_order(request.param, 3)
    yield request.param
    _cuda_host.set_order("forward")


CASES = [
    layer_norm("fewer-columns-than-an-access", 3, 3),
    dropout_add_layer_norm("scalar-accesses", 19, 81, P),
    dropout_add_layer_norm("a-warp-has-eight-elements-a-lane", 50, 256, P),
    dropout_add_layer_norm("a-warp-has-24-elements-a-lane", 50, 768, P),
    dropout_add_layer_norm("24-elements-in-scalar-accesses", 9, 767, P),
    dropout_add_layer_norm("a-block-of-4-warps-has-a-row", 9, 1024, P),
    dropout_add_layer_norm("a-block-of-8-warps-has-a-row", 9, 1600, P),
    dropout_add_layer_norm("a-block-of-16-warps-has-a-row", 3, 2500, P),
    embedding("octets-in-two-blocks-of-a-position", 6, 2, 20, 1100, P),
    embedding("scalar-accesses", 6, 70, 20, 45, P, types=True, offset=1),
    embedding("a-run-of-many-chunks", 5, 97, 20, 264, P, ids=7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity_in_every_order_of_threads(case, dtype, order):
    check_parity(case, "cuda_host", dtype)


def test_the_widest_row_is_served_and_a_wider_one_refused():
    check_parity(layer_norm("widest", 2, 8192), "cuda_host", torch.bfloat16)
    x = torch.randn(2, 8193)
    with use_backend("cuda_host"), pytest.raises(ValueError, match="a width of at most 8192, not"):
        ops.layer_norm(x, x[0], x[0])


@pytest.mark.parametrize("C", [257, 769, 1025, 2049])
def test_one_column_more_than_a_layout_holds(C):
    check_parity(layer_norm("beyond-a-layout", 3, C), "cuda_host", torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_order_of_threads_changes_no_bit(case):
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    runs = []
    for name in ORDERS:
        _cuda_host.set_order(name, 5)
        with use_backend("cuda_host"):
            runs.append(results(case.fused, inputs, dout))
    _cuda_host.set_order("forward")
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name


def test_rows_of_any_stride_give_the_same():
    """An odd stride takes scalar accesses, whose registers hold the same columns."""
    wide = torch.randn(9, 801, dtype=torch.bfloat16)
    w, b = torch.randn(2, 768)
    x = wide[:, 5:773]
    with use_backend("cuda_host"):
        strided = ops.dropout_add_layer_norm(x, x, w, b, dropout_p=P, seed=SEED)
        packed = x.contiguous()
        expected = ops.dropout_add_layer_norm(packed, packed, w, b, dropout_p=P, seed=SEED)
    assert torch.equal(strided, expected)


def test_the_second_gradient_of_a_fork_may_lie_off_16_bytes():
    case = dropout_add_layer_norm("off-16-bytes", 9, 48, P)
    leaves = [x.bfloat16().requires_grad_() for x in case.inputs.values()]
    dy, aligned = torch.randn(2, 9, 48).bfloat16()
    off = torch.cat([aligned.new_zeros(1), aligned.flatten()])[1:].view(9, 48)
    with use_backend("cuda_host"):
        read = case.fused(**dict(zip(case.inputs, leaves, strict=True)), fork=True)
        one, other = (
            torch.autograd.grad(read, leaves, [dy, x], retain_graph=True) for x in (aligned, off)
        )
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(("rows", "columns"), [(30, 37), (130, 256), (33, 520)])
def test_dropout_bits_in_every_order_of_threads(rows, columns, order):
    with use_backend("cuda_host"):
        bits = ops.dropout_mask(SEED, (rows, columns), P, row_offset=11)
    assert torch.equal(bits, pack_bits(keep_mask(SEED, rows, columns, P, 11)))


def test_the_first_id_out_of_range_is_kept(monkeypatch):
    monkeypatch.setattr(embedding_launchers, "check_ids", lambda *_: None)
    table, ids = torch.randn(20, 48), torch.zeros(2, 9, dtype=torch.int64)
    for value in (77, 88):
        ids[1, 3] = value
        embedding_launchers.embedding_fwd(
            ids, table, table, None, None, None, 0.0, 0, torch.float32
        )
    with pytest.raises(IndexError, match=r"embedding: id 77 is out of range \[0, 20\)"):
        errors.check_errors()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [CASES[i] for i in (1, 3, 5, 6, 7, -1)], ids=lambda case: case.name
)
def test_no_two_lanes_meet_in_a_bank(case, dtype):
    inputs = cast(case, dtype, dtype)
    _cuda_host.count_traffic(True)
    with use_backend("cuda_host"):
        results(case.fused, inputs)
    _cuda_host.count_traffic(False)
    counted = _cuda_host.traffic().values()
    assert sum(kernel["shared_accesses"] for kernel in counted) > 0
    assert not any(kernel["conflicts_at"] for kernel in counted)
