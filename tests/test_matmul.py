"""The product kernels of the Triton backend against fp64, in every layout and on every path."""

import sys
from threading import Thread

import pytest
import torch

from gpt1_kernels.backends import unavailable_reason
from gpt1_kernels.numerics import assert_close
from tests.cases import DEVICE, DTYPES

if unavailable_reason("triton", "layer_norm", DEVICE) is not None:
    pytest.skip("needs the Triton backend", allow_module_level=True)

from gpt1_kernels.backends.triton import launch as launching
from gpt1_kernels.backends.triton.matmul import matmul
from gpt1_kernels.backends.triton.partials import sum_partials

BF16 = torch.bfloat16
PATHS = pytest.mark.parametrize("bulk", [False, True], ids=["pointers", "descriptors"])


@pytest.fixture
def on_path(monkeypatch):
    """Chooses the load path as a chip without or with a bulk copy engine would."""

    def choose(bulk):
        if bulk and DEVICE == "cuda" and not launching.has_bulk_copies(torch.device(DEVICE)):
            pytest.skip("this chip has no bulk copy engine")
        monkeypatch.setattr(launching, "has_bulk_copies", lambda device: bulk)

    return choose


def operand(rows, columns, dtype, layout):
    """A random matrix: "row" or "column" says which axis is contiguous, "padded" leaves gaps."""
    order, _, padded = layout.partition(" ")
    rows_stored, columns_stored = (rows, columns) if order == "row" else (columns, rows)
    gap = 8 if padded else 0
    stored = torch.randn(rows_stored, columns_stored + gap, device=DEVICE).to(dtype)
    stored = stored[:, :columns_stored]
    return stored if order == "row" else stored.t()


def check(a, b, out_dtype=None):
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype, device=DEVICE)
    matmul(a, b, out)
    assert_close("out", out, a @ b, a.double() @ b.double(), a.dtype)
    return out


@PATHS
@pytest.mark.parametrize("b_layout", ["row", "column", "row padded", "column padded"])
@pytest.mark.parametrize("a_layout", ["row", "column", "row padded", "column padded"])
def test_layouts(a_layout, b_layout, bulk, on_path):
    """Two tiles a way, none of them full; every stride a multiple of 16 bytes."""
    on_path(bulk)
    check(operand(136, 72, BF16, a_layout), operand(72, 264, BF16, b_layout))


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        pytest.param(1, 1, 1, id="one-element"),
        pytest.param(1, 300, 33, id="one-row"),
        pytest.param(300, 1, 33, id="one-column"),
        pytest.param(37, 45, 1, id="one-term"),
        pytest.param(131, 129, 67, id="one-beyond-a-tile"),
        pytest.param(1100, 264, 16, id="second-group-of-rows-is-not-full"),
    ],
)
def test_sizes(M, N, K, dtype, bulk, on_path):
    on_path(bulk)
    check(operand(M, K, dtype, "row"), operand(K, N, dtype, "row"))
    check(operand(M, K, dtype, "column"), operand(K, N, dtype, "column"), torch.float32)


@PATHS
def test_rows_that_overlap_and_addresses_off_16_bytes(bulk, on_path):
    """What descriptors cannot read is read by pointers."""
    on_path(bulk)
    a = torch.randn(1, 72, device=DEVICE).bfloat16().expand(40, 72)
    check(a, torch.randn(72 * 64 + 1, device=DEVICE).bfloat16()[1:].view(72, 64))


def test_what_descriptors_read(on_path):
    """Rows that are whole, aligned and apart, of 16-bit numbers."""
    on_path(True)
    x = operand(40, 80, BF16, "row")
    overlapping = x[:1].expand(40, 80), x.as_strided((9, 80), (8, 1))
    for rows in (x, x[:, :75], x[::2]):
        assert launching.reads_in_bulk(rows, rows.shape[1], *rows.stride())
    for rows in (*overlapping, x[:, 1:], x[:, :75].contiguous(), x[:, ::2], x[:0], x.float()):
        assert not launching.reads_in_bulk(rows, rows.shape[1], *rows.stride())


@PATHS
def test_the_stride_of_a_single_column_means_nothing(bulk, on_path):
    on_path(bulk)
    a = torch.randn(40, 3, 7, device=DEVICE).bfloat16()[:, :1, 0]
    check(a, operand(1, 64, BF16, "row"))
    check(operand(64, 1, BF16, "row"), a.t())


@pytest.fixture
def short_is_long(monkeypatch):
    """Splits sums of a few hundred terms; the interpreter is slow."""
    monkeypatch.setattr(launching, "LONG_SUM", 256)
    monkeypatch.setattr(launching, "PART_STEPS", 1)
    launching.split_terms.cache_clear()
    yield
    launching.split_terms.cache_clear()


@PATHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("tiles", [1, 3])
def test_long_sums_are_split(tiles, layout, dtype, bulk, on_path, short_is_long, launches):
    """A weight's gradient: the parts of one tile, and of several."""
    on_path(bulk)
    N = tiles * launching.product_tiles(dtype, torch.device(DEVICE)).BLOCK_N - 5
    a, b = operand(60, 300, dtype, layout), operand(300, N, dtype, "row")
    first = check(a, b)
    assert launches["triton", "split_matmul_kernel"] == launches["triton", "sum_parts_kernel"] == 1
    assert torch.equal(first, check(a, b))


@pytest.mark.parametrize("K", [40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulating_adds_to_what_is_there(dtype, K, short_is_long):
    """Once for each tile, of which every program has some."""
    a, b = operand(60, K, dtype, "column"), operand(K, 300, dtype, "row")
    out = torch.randn(60, 300, device=DEVICE)
    oracle = out.double() + a.double() @ b.double()
    plain = out + (a @ b).float()
    matmul(a, b, out, accumulate=True)
    assert_close("out", out, plain, oracle, dtype)


def test_the_last_chunk_of_a_sum_may_be_one_term(monkeypatch):
    monkeypatch.setattr(sys.modules[matmul.__module__], "split_terms", lambda *_: 64)
    check(operand(40, 129, BF16, "row"), operand(129, 50, BF16, "row"))


@PATHS
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize("K", [40, 300], ids=["whole", "split"])
def test_what_a_has_beyond_the_product_has_no_effect(K, layout, bulk, on_path, short_is_long):
    """The padding of a row that is no multiple of 16 bytes, read with it."""
    on_path(bulk)
    padded, b = operand(84, K + 24, BF16, layout), operand(K, 56, BF16, layout)
    a = padded[:60, :K]
    out = torch.empty(60, 56, dtype=BF16, device=DEVICE)
    matmul(padded, b, out)
    assert_close("out", out, a @ b, a.double() @ b.double(), BF16)


def test_out_with_gaps_between_its_rows_keeps_them():
    memory = torch.zeros(40, 100, device=DEVICE, dtype=BF16)
    a, b = operand(40, 48, BF16, "row"), operand(48, 70, BF16, "row")
    matmul(a, b, memory[:, :70])
    assert torch.equal(memory[:, :70], check(a, b))
    assert not memory[:, 70:].any()


@PATHS
def test_without_terms_the_product_is_zero(bulk, on_path):
    on_path(bulk)
    a = torch.empty(5, 0, dtype=BF16, device=DEVICE)
    b = torch.empty(0, 7, dtype=BF16, device=DEVICE)
    out = torch.ones(5, 7, device=DEVICE)
    matmul(a, b, out, accumulate=True)
    assert torch.equal(out, torch.ones_like(out))
    matmul(a, b, out)
    assert not out.any()


@pytest.mark.parametrize(("M", "N"), [(0, 7), (5, 0)])
def test_a_product_without_elements_launches_nothing(M, N, launches):
    check(torch.empty(M, 3, device=DEVICE), torch.empty(3, N, device=DEVICE))
    assert not launches


def test_more_partial_sums_than_are_added_at_a_time():
    """As a large chip's grid leaves them; integers add without rounding."""
    P, C = 2 * launching.PARTIAL_TILES.BLOCK_P + 1, launching.PARTIAL_TILES.BLOCK_C + 1
    partials = torch.randint(-9, 10, (2, P, C), device=DEVICE).float()
    totals = partials.new_empty(2, C)
    sum_partials(partials, totals.unbind())
    assert torch.equal(totals, partials.sum(1))


def test_each_thread_has_a_context_before_its_first_launch(monkeypatch):
    """Triton makes tensor maps before it sees to one; PyTorch binds it where a device is set."""
    bound = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    for _ in range(2):
        thread = Thread(target=lambda: [launching._current(0) for _ in range(3)])
        thread.start()
        thread.join()
    assert bound == [0, 0]
