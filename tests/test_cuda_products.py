"""The CUDA products and what comes with them against fp64, in every layout and on every path."""

import pytest
import torch

from gpt1_kernels import use_backend
from gpt1_kernels.backends import unavailable_reason
from gpt1_kernels.numerics import assert_close
from tests.cases import (
    DEVICE,
    cast,
    check_parity,
    gelu_ffn,
    linear_cross_entropy,
    oracle_of,
    results,
    upstream,
)

if all(unavailable_reason(name, "gelu_ffn", DEVICE) for name in ("cuda", "cuda_host")):
    pytest.skip("needs the compiled kernels", allow_module_level=True)

from gpt1_kernels.backends.cuda import extension, ffn
from gpt1_kernels.backends.cuda import linear_cross_entropy as lce
from gpt1_kernels.backends.cuda.matmul import _split, aligned, column_sums, matmul
from gpt1_kernels.backends.logits import padded_vocabulary

BACKEND = "cuda" if DEVICE == "cuda" else "cuda_host"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = [("row", "row"), ("row", "column"), ("column", "row")]
dtypes = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
layouts = pytest.mark.parametrize(
    ("a_layout", "b_layout"), LAYOUTS, ids=["-".join(pair) for pair in LAYOUTS]
)
on_host = pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU's version counts accesses")
CHIPS = ["every chip", "Hopper"] if DEVICE == "cpu" else ["this chip"]
ORDERS = ["forward", "reversed", "shuffled"] if DEVICE == "cpu" else ["the chip's"]


@pytest.fixture(params=ORDERS)
def order(request):
    """In which order threads run between two barriers."""
    if DEVICE == "cuda":
        yield
        return
    host = extension.module("cuda_host")
    host.set_order(request.param, 7)
    yield
    host.set_order("forward")


@pytest.fixture(params=CHIPS)
def chip(request):
    """Whose kernels multiply. Hopper gets so few processors that its blocks walk over tiles."""
    if request.param != "Hopper":
        yield
        return
    host = extension.module("cuda_host")
    host.set_hopper(True)
    host.set_processors(4)
    _split.cache_clear()
    yield
    host.set_hopper(False)
    host.set_processors(2)
    _split.cache_clear()


def operand(rows, columns, layout, dtype=BF16):
    """A random matrix: "row" or "column" says which axis is contiguous."""
    stored = torch.randn(*((rows, columns) if layout == "row" else (columns, rows)), device=DEVICE)
    return stored.to(dtype) if layout == "row" else stored.to(dtype).t()


def check(a, b, out_dtype=None, **options):
    """Compares scale · a b + bias, added to what `out` holds or not, and returns it."""
    bias, scale = options.get("bias"), options.get("scale")
    out = torch.randn(a.shape[0], b.shape[1], device=DEVICE).to(out_dtype or a.dtype)
    first = out.double() if options.get("accumulate") else 0.0

    def whole(product):
        product = product if scale is None else scale.to(product.dtype) * product
        return first + (product if bias is None else product + bias.to(product.dtype))

    plain, oracle = whole(a @ b), whole(a.double() @ b.double())
    matmul(a, b, out, **options)
    assert_close("out", out, plain.to(out.dtype), oracle, a.dtype)
    return out


@dtypes
@layouts
@pytest.mark.parametrize("out_dtype", [None, FP32], ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        pytest.param(8, 8, 8, id="one-vector"),
        pytest.param(136, 264, 72, id="tiles-that-are-not-full"),
        pytest.param(1096, 136, 40, id="second-group-of-rows"),
    ],
)
def test_sizes(M, N, K, a_layout, b_layout, out_dtype, dtype, chip):
    check(operand(M, K, a_layout, dtype), operand(K, N, b_layout, dtype), out_dtype)


@pytest.mark.parametrize("M", [1, 63, 65, 129])
def test_rows_around_a_tile(M, order, chip):
    check(operand(M, 40, "row"), operand(40, 24, "column"))


@pytest.mark.parametrize("K", [808, 1096], ids=["ping-pong", "cooperative"])
@pytest.mark.parametrize("chip", CHIPS[-1:], indirect=True)
def test_tiles_in_turn(K, chip, order):
    """Of one block; they have 13 or 18 steps, which are no multiple of the stages."""
    check(operand(520, K, "row"), operand(K, 136, "row"))


@dtypes
@pytest.mark.parametrize("K", [72, 4104])
@pytest.mark.parametrize("bias_dtype", [None, FP32], ids=str)
def test_a_bias_and_a_scale(bias_dtype, K, dtype, chip):
    """Of one epilogue, and of the sum of the parts of a long sum."""
    options = {
        "bias": torch.randn(40, device=DEVICE).to(bias_dtype or dtype),
        "scale": torch.tensor(0.37, device=DEVICE),
    }
    check(operand(24, K, "row", dtype), operand(K, 40, "row", dtype), **options)


@layouts
@pytest.mark.parametrize(("M", "N"), [(8, 8), (136, 264)], ids=["one-tile", "several-tiles"])
def test_long_sums_are_split(M, N, a_layout, b_layout, chip):
    check(operand(M, 4104, a_layout), operand(4104, N, b_layout))


def test_parts_are_summed_in_a_fixed_order(order, chip):
    a, b = operand(8, 4104, "column"), operand(4104, 8, "row")
    assert torch.equal(check(a, b), check(a, b))


@pytest.mark.parametrize("K", [40, 4104])
def test_accumulating_adds_to_what_is_there(K, chip):
    options = {"accumulate": True, "scale": torch.tensor(0.37, device=DEVICE)}
    check(operand(64, K, "column"), operand(K, 56, "row"), FP32, **options)


def test_rows_that_overlap_and_addresses_off_16_bytes(chip):
    a = operand(1, 72, "row").expand(40, 72)
    check(a, operand(1, 72 * 64 + 1, "row")[0, 1:].view(72, 64))
    check(operand(40, 73, "row")[:, :72], operand(72, 64, "row"))
    windows = operand(1, 76, "row")[0].unfold(0, 72, 1)  # both strides are 1
    check(windows, operand(72, 64, "row"))
    check(windows.t(), operand(5, 64, "row"))


def test_the_strides_of_a_single_row_or_column_mean_nothing(chip):
    check(operand(1, 72, "column"), operand(72, 64, "row"))
    check(operand(72, 1, "row"), operand(1, 64, "row"))


def test_only_rows_that_are_whole_aligned_and_apart_are_read_in_place():
    """The copy engine of Hopper refuses a stride below a row, as that of an expanded row."""
    x = operand(40, 80, "row")
    for in_place in (x, x[:, :72], x[::2]):
        assert aligned(in_place) is in_place
    for copied in (x[:1].expand(40, 80), x.as_strided((9, 80), (8, 1)), x[:, 1:], x.t()):
        rows = aligned(copied)
        assert torch.equal(rows, copied)
        assert rows.is_contiguous()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("R", "C"), [(1, 8), (511, 72), (513, 8), (1500, 136)])
def test_column_sums(R, C, dtype, order):
    x = torch.randn(R, C, device=DEVICE).to(dtype)
    sums = column_sums(x)
    assert sums.dtype == FP32
    assert_close("sums", sums, x.float().sum(0), x.double().sum(0), dtype)


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        gelu_ffn("orders", 391, 136, 72),
        linear_cross_entropy("orders", 7, 16, 1000, "sum"),
        linear_cross_entropy("orders-none", 7, 16, 1000, "none", ignored=2, weighted=True),
    ],
    ids=lambda case: case.name,
)
def test_threads_in_any_order(case, dtype, order, chip):
    check_parity(case, BACKEND, dtype)


@dtypes
@pytest.mark.parametrize("V", [15, 49300], ids=["a-vector-short-of-one", "beyond-shared-memory"])
def test_rows_of_logits(V, dtype, order):
    """What a row has beyond V is never used, what it has beyond 49152 logits is read again."""
    N = 2
    logits = torch.full((N, padded_vocabulary(V)), torch.nan, device=DEVICE).to(dtype)
    logits[:, :V] = 3 * torch.randn(N, V, device=DEVICE)
    targets = torch.tensor([7, V - 1], device=DEVICE)
    losses = torch.empty(N, device=DEVICE)
    leaf = logits[:, :V].double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    expected.sum().backward()

    extension.launch(
        "cross_entropy", logits, dtype,
        logits, *logits.shape, V, targets, None, None, losses, None, -100, True,
    )  # fmt: skip
    assert_close("losses", losses, expected.float(), expected, FP32)
    assert_close("gradient", logits[:, :V], leaf.grad.to(dtype), leaf.grad, dtype)
    assert not logits[:, V:].any()


@on_host
def test_column_sums_of_more_matrices_than_a_launch_takes_are_refused():
    x, total = torch.ones(1, 8), torch.empty(8)
    with pytest.raises(ValueError, match="column_sums: totals=4, expected at most 3"):
        extension.launch("column_sums", x, x.dtype, x, [total] * 4, 1)


NEEDS = {"x": (2, 0), "w_fc": (2, 0), "b_fc": (1, 1), "w_proj": (1, 0), "b_proj": (0, 1)}


@pytest.mark.parametrize("needed", NEEDS)
def test_the_backward_of_the_ffn_launches_what_is_needed(needed, launches):
    case = gelu_ffn("frozen", 20, 24, 40)
    inputs, dout = cast(case, BF16, BF16), upstream(case, BF16)
    needs = [name == needed for name in NEEDS]
    save = any(needs[:3]), needs[3]
    _, *saved = ffn.gelu_ffn_fwd(*inputs.values(), save)
    launches.clear()
    grads = ffn.gelu_ffn_bwd(dout, inputs["x"], *saved, inputs["w_fc"], inputs["w_proj"], needs)

    products = launches[BACKEND, "dgelu_product"] + launches[BACKEND, "matmul"]
    assert (products, launches[BACKEND, "column_sums"]) == NEEDS[needed]
    assert [grad.numel() > 0 for grad in grads] == needs
    plain = results(case.reference, inputs, dout)[needed]
    oracle = oracle_of(case, inputs, dout)[needed]
    actual = grads[needs.index(True)]
    assert_close(needed, actual, plain, oracle, BF16)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("needed", "products"), [((), 1), (("h",), 2), (("w",), 2), (("h", "w"), 3)]
)
def test_the_loss_launches_what_is_needed(needed, products, reduction, launches):
    case = linear_cross_entropy("frozen", 65, 16, 100, reduction)
    inputs = cast(case, BF16, BF16)
    leaves = {name: x.requires_grad_(name in needed) for name, x in inputs.items()}
    with use_backend(BACKEND):
        loss = case.fused(**leaves).sum()
        if needed:
            loss.backward()
    again = reduction == "none" and len(needed) > 0
    assert launches[BACKEND, "cross_entropy"] == 1 + again
    assert launches[BACKEND, "matmul"] == products + again
    scaled = 0 if reduction == "none" else len(needed)
    assert launches[BACKEND, "scale_gradient"] == scaled


@pytest.mark.parametrize("V", [8192, 30522, 40478, 50257])
def test_chunks_of_logits_are_whole_tiles_of_256_rows(V):
    """As tall as Hopper's, and two of the others'."""
    assert lce.chunk_rows(V, BF16) % 256 == 0
    assert lce.chunk_rows(V, BF16) * padded_vocabulary(V) * 2 <= lce.CHUNK_BYTES


@on_host
def test_bytes_and_bank_conflicts():
    """Each sector once, and no sector but those of the tensors; no conflicts."""
    host = extension.module("cuda_host")
    N, C, F, V = 192, 136, 264, 1000
    columns = padded_vocabulary(V)
    x, pre, w_fc, w_proj = (operand(*s, "row") for s in ((N, C), (N, F), (C, F), (F, C)))
    h, w, targets = operand(N, C, "row"), operand(V, C, "row"), torch.arange(N)
    b_fc, b_proj = torch.randn(F), torch.randn(C)

    def moved(function, *arguments):
        host.count_traffic(True)
        function(*arguments)
        host.count_traffic(False)
        counted = host.traffic()
        assert not any(kernel["bank_conflicts"] for kernel in counted.values())
        return {name: kernel["compulsory"] for name, kernel in counted.items()}

    products = 2 * (N * C + C * F + N * F)
    assert moved(ffn.gelu_ffn_fwd, x, w_fc, b_fc, w_proj, b_proj, [True] * 2) == {
        "gelu_product": products + 2 * N * F + 4 * F,
        "matmul": products + 4 * C,
    }
    assert moved(ffn.gelu_ffn_bwd, x, x, pre, pre, w_fc, w_proj, [True] * 5) == {
        "dgelu_product": products + 2 * N * F + 4 * F * N // 64,
        "matmul": 3 * products,
        "column_sums": 4 * F * N // 64 + 4 * F + 2 * N * C + 4 * C,
    }
    logits, products = 2 * N * columns, 2 * (3 * N * C + 2 * V * C)
    assert moved(lce.linear_cross_entropy_fwd, h, w, targets, None, -100, [True, True]) == {
        "matmul": 3 * logits + products + 4 * V * C,
        "cross_entropy": 2 * logits + 8 * N + 4 * N,
    }
