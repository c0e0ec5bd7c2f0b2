"""The head and the loss: chunks of rows, a vocabulary that fits no tile, what is not computed."""

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt1_kernels import check_errors, errors, ops, use_backend
from gpt1_kernels.backends import kernel
from gpt1_kernels.backends.cuda import extension
from gpt1_kernels.backends.cuda import linear_cross_entropy as cuda
from gpt1_kernels.backends.cuda import matmul as cuda_matmul
from gpt1_kernels.backends.portable import linear_cross_entropy as portable
from gpt1_kernels.ops.linear_cross_entropy import REDUCTIONS
from tests.cases import (
    DEVICE,
    DTYPES,
    UNORDERED,
    assert_same,
    backends_of,
    bf16_at_least,
    cast,
    check_ids_as_on_a_gpu,
    check_parity,
    check_repeatable,
    inputs_for,
    linear_cross_entropy,
    on_backends,
    results,
    upstream,
)

OP = "linear_cross_entropy"
GPT1_VOCABULARY = 40478
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
on_every_backend = pytest.mark.parametrize("backend", backends_of(OP))
on_triton = pytest.mark.skipif(
    "triton" not in backends_of(OP), reason="Triton's kernels cannot run"
)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 rows (Triton: 64 in fp32), or of 100 (portable, V = 100)."""
    monkeypatch.setattr(portable, "CHUNK_BYTES", 4 * 100 * 100)
    monkeypatch.setattr(cuda, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cuda, "TILE_ROWS", 128)
    if "triton" in backends_of(OP):
        from gpt1_kernels.backends.triton import launch

        monkeypatch.setattr(launch, "CHUNK_BYTES", 1)


@pytest.fixture
def long_steps(monkeypatch):
    """Products in long steps and whole tiles, of which the interpreter takes fewer."""
    if DEVICE == "cpu" and "triton" in backends_of(OP):
        from gpt1_kernels.backends.triton import launch, matmul

        tiles = launch.ProductTiles(256, 256, 256, GROUP_M=8, num_warps=8, num_stages=3)
        monkeypatch.setattr(matmul, "product_tiles", lambda *args: tiles)
        monkeypatch.setattr(matmul, "STRIP", type(matmul.STRIP)(tiles.BLOCK_N))


@pytest.fixture
def bf16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@on_every_backend
@pytest.mark.usefixtures("bf16_by_default")
def test_a_mean_does_not_depend_on_the_default_dtype(backend):
    h = torch.zeros(1001, 8, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.zeros(1001, dtype=torch.int64, device=DEVICE)
    with use_backend(backend):
        loss = ops.linear_cross_entropy(h, h[:16], targets)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(math.log(16), rel=1e-6)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_row08_weights_of_ignored_targets_are_not_read(backend, reduction, dtype):
    h = torch.randn(5, 8, device=DEVICE).to(dtype)
    targets = torch.tensor([1, 2, -100, 0, -100], device=DEVICE)
    weight = torch.tensor([0.5, 2.0, math.nan, 1.0, math.inf], device=DEVICE)
    loss = partial(ops.linear_cross_entropy, h, h, reduction=reduction)
    with use_backend(backend):
        actual = loss(targets, token_weight=weight)
        expected = loss(targets, token_weight=torch.where(targets < 0, 3.0, weight))
    assert torch.equal(actual, expected)


@bf16_at_least
@on_backends([linear_cross_entropy("gpt1-vocabulary", 3, 8, GPT1_VOCABULARY)])
def test_a_large_vocabulary(case, backend, dtype, long_steps):
    check_parity(case, backend, dtype)


@on_backends(
    [
        *(linear_cross_entropy(f"V{v}", 5, 16, v) for v in (2, 63, 64, 65)),  # the rows' padding
        *(linear_cross_entropy(f"V{v}", 5, 16, v) for v in (127, 128, 129)),  # a product's tile
        *(linear_cross_entropy(f"V{v}", 8, 16, v) for v in (8191, 8192, 8193)),  # a step of a row
    ]
)
def test_a_vocabulary_around_a_tile(case, backend):
    check_parity(case, backend, torch.bfloat16)


@dtypes
@on_backends(
    [
        linear_cross_entropy("full-chunks", 128, 16, 100, "sum"),
        linear_cross_entropy("last-chunk-of-one-row", 129, 16, 100, ignored=9, weighted=True),
        linear_cross_entropy("chunks-none", 131, 16, 100, "none", ignored=9, weighted=True),
    ]
)
def test_chunks_of_rows(case, backend, dtype, small_chunks):
    check_parity(case, backend, dtype)


def test_a_row_of_logits_may_be_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr(portable, "CHUNK_BYTES", 1)
    check_parity(linear_cross_entropy("large-rows", 3, 16, 100), "portable", torch.bfloat16)


@on_backends([linear_cross_entropy("chunks", 129, 16, 100)], UNORDERED)
def test_two_runs_over_chunks_are_bit_equal(case, backend, small_chunks):
    check_repeatable(case, backend)


@on_every_backend
def test_fp16_gradients_do_not_overflow_on_the_way(backend):
    """Under a loss scale, dlogits are beyond fp16's range where dh and dw are not."""
    case = linear_cross_entropy("loss-scale", 9, 16, 100, "none")
    case = replace(case, inputs={name: x / 64 for name, x in case.inputs.items()})
    check_parity(case, backend, torch.float16, dout=torch.full((9,), 2.0**17, device=DEVICE))


@on_every_backend
@pytest.mark.parametrize(
    ("reduction", "unit"),
    [("mean", 2.0**-20), ("mean", 2.0**20), ("sum", 2.0**-20), ("sum", 2.0**20), ("sum", -1.0)],
)
def test_fp16_gradients_do_not_depend_on_the_unit_of_the_weights(backend, reduction, unit):
    """dh is in fp16 before the loss scale comes: by itself it was 0 or infinite."""
    case = linear_cross_entropy("unit", 9, 16, 100, reduction, ignored=2, weighted=True)
    case.fused.keywords["token_weight"].mul_(unit)
    scale = 2.0**10 if reduction == "mean" else 2.0**10 / unit
    check_parity(case, backend, torch.float16, dout=torch.full((), scale, device=DEVICE))


@pytest.mark.parametrize("backend", [b for b in backends_of(OP) if b != "portable"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_under_autocast_the_gradient_of_an_fp32_table_is_rounded_once(backend, reduction):
    """For "none" it was rounded on the way, as portable's are by PyTorch's products."""
    case = linear_cross_entropy("autocast", 21, 32, 100, reduction)
    with use_backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        dw = results(case.fused, case.inputs)["w"]
    assert dw.dtype == torch.float32
    assert not torch.equal(dw, dw.to(torch.bfloat16).float())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_token_of_weight_zero_takes_no_gradient_from_a_bad_loss(backend, dtype):
    case = linear_cross_entropy("zero-weight", 9, 16, 100, "none", ignored=2, weighted=True)
    case.fused.keywords["token_weight"][4] = 0
    dout = upstream(case, dtype).float()
    with use_backend(backend):
        expected = results(case.fused, cast(case, dtype, dtype), dout)
        dout[[0, 4]] = torch.nan
        actual = results(case.fused, cast(case, dtype, dtype), dout)
    assert_same(actual, expected)


@on_every_backend
def test_an_ignored_index_may_be_a_token(backend):
    case = linear_cross_entropy("padding-token", 21, 16, 50)
    targets = case.fused.keywords["targets"]
    targets[::2] = 0
    other = targets.where(targets != 0, -100)
    inputs = inputs_for(backend, case)
    with use_backend(backend):
        actual = results(partial(case.fused, ignore_index=0), inputs)
        expected = results(partial(case.fused, targets=other), inputs)
    assert_same(actual, expected)


@on_every_backend
def test_targets_and_weights_of_any_stride(backend):
    case = linear_cross_entropy("strided", 21, 16, 50, weighted=True)
    strided = {
        name: case.fused.keywords[name].repeat_interleave(2)[::2]
        for name in ("targets", "token_weight")
    }
    inputs = inputs_for(backend, case)
    with use_backend(backend):
        actual = results(partial(case.fused, **strided), inputs)
        expected = results(case.fused, inputs)
    assert_same(actual, expected)


@on_triton
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("needed", "products"), [((), 1), (("h",), 2), (("w",), 2), (("h", "w"), 3)]
)
def test_what_nobody_needs_is_not_computed(needed, products, reduction, small_chunks, launches):
    case = linear_cross_entropy("frozen", 65, 16, 100, reduction)
    leaves = {k: x.clone().requires_grad_(k in needed) for k, x in case.inputs.items()}
    with use_backend("triton"):
        loss = case.fused(**leaves).sum()
        if needed:
            loss.backward()
    chunks, again = 2, reduction == "none" and len(needed) > 0
    assert launches["triton", "cross_entropy_kernel"] == chunks * (1 + again)
    assert launches["triton", "matmul_kernel"] == chunks * (products + again)
    scaled = 0 if reduction == "none" else len(needed)
    assert launches["triton", "scale_gradients_kernel"] == scaled


@on_every_backend
@pytest.mark.parametrize(("first", "later"), [(50, -1), (-1, 50)])
def test_targets_out_of_range_are_recorded_by_the_kernel(first, later, backend, monkeypatch):
    """On a GPU nothing else looks at them; the first stays."""
    forward = kernel(backend, OP, "linear_cross_entropy_fwd")
    module = sys.modules[forward.__module__]
    monkeypatch.setattr(module, "check_ids", check_ids_as_on_a_gpu(backend))
    monkeypatch.setattr(errors, "_records", {})
    h, w = (torch.randn(n, 16, device=DEVICE).bfloat16() for n in (9, 50))
    targets = torch.tensor([1, -100, 0, 49, 2, 3, 4, 5, 6], device=DEVICE)

    def run():
        return forward(h, w, targets, None, -100, [True, True])

    expected = run()
    check_errors()
    targets[4] = first
    losses, dh, dw = run()
    targets[4] = later
    run()
    with pytest.raises(IndexError, match=rf"{OP}: id {first} is out of range \[0, 50\)"):
        check_errors()
    assert losses[4].isnan()
    assert not dh[4].any()
    others = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(losses[others], expected[0][others])
    assert torch.equal(dh[others], expected[1][others])
    assert dw.isfinite().all()


class Allocated(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made inside, views excepted."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and function._schema.returns[0].alias_info is None:
            self.bytes += out.nbytes
        return out


def check_workspace(forward, C, rows, dtype):
    """The memory of a chunk of GPT-1's logits, which the next uses again, is below 400 MB."""
    h = torch.empty(rows, C, dtype=dtype, device="meta")
    w = torch.empty(GPT1_VOCABULARY, C, dtype=dtype, device="meta")
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    with Allocated() as allocated:
        losses, dh, _ = forward(h, w, targets, None, -100, [True] * 2)
    workspace = allocated.bytes - losses.nbytes - dh.nbytes
    assert (dtype.itemsize * rows + 4 * C) * GPT1_VOCABULARY < workspace < 400e6


CHIPS = [60, 82, 84, 108, 114, 128, 132, 148, 160, 188]  # processors


@pytest.fixture(params=CHIPS)
def processors(request):
    if (reason := extension.absence("cuda_host")) is not None:
        pytest.skip(reason)
    host = extension.module("cuda_host")
    host.set_processors(request.param)
    cuda_matmul._split.cache_clear()
    yield request.param
    host.set_processors(2)
    cuda_matmul._split.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpt1_needs_less_than_400_megabytes_on_every_chip(monkeypatch, dtype, processors):
    """How many parts a sum is split into depends on the processors."""
    for module in (cuda, cuda_matmul):
        monkeypatch.setattr(module, "launch", lambda *args: None)
    monkeypatch.setattr(cuda, "check_ids", lambda *args: None)
    rows = cuda.chunk_rows(GPT1_VOCABULARY, dtype)
    check_workspace(cuda.linear_cross_entropy_fwd, 768, rows, dtype)


@pytest.fixture
def triton_chip(monkeypatch):
    """Makes Triton's launchers, which start nothing, choose for a chip."""
    from gpt1_kernels.backends.triton import launch, matmul
    from gpt1_kernels.backends.triton import linear_cross_entropy as kernels

    cached = launch.product_tiles, launch.split_terms
    for module in (kernels, matmul):
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    monkeypatch.setattr(kernels, "check_ids", lambda *args: None)

    def choose(count, kilobytes):
        monkeypatch.setattr(launch, "processors", lambda device: count)
        monkeypatch.setattr(launch, "shared_memory", lambda device: kilobytes * 1024)
        for function in cached:
            function.cache_clear()
        return launch, kernels

    yield choose
    for function in cached:
        function.cache_clear()


shared_memory = pytest.mark.parametrize("kilobytes", [99, 227], ids="{} KB".format)


@on_triton
@shared_memory
@pytest.mark.parametrize(
    ("count", "dtype"),
    [*((count, torch.bfloat16) for count in CHIPS), (132, torch.float16)],  # fp16: a scaled dh too
)
def test_gpt1_needs_less_than_400_megabytes_on_every_chip_in_triton(
    triton_chip, count, kilobytes, dtype
):
    launch, kernels = triton_chip(count, kilobytes)
    rows = launch.chunk_rows(768, GPT1_VOCABULARY, dtype, torch.device("meta"))
    check_workspace(kernels.linear_cross_entropy_fwd, 768, rows, dtype)


@on_triton
@shared_memory
def test_gpt1_fills_132_processors(triton_chip, kilobytes):
    launch, _ = triton_chip(132, kilobytes)
    C, V, dtype, device = 768, GPT1_VOCABULARY, torch.bfloat16, torch.device("meta")
    tiles = launch.product_tiles(dtype, device)
    rows = launch.chunk_rows(C, V, dtype, device)
    count = rows // tiles.BLOCK_M * -(-C // tiles.BLOCK_N)
    chunks = launch.cdiv(V, launch.split_terms(count, V, tiles, device))
    assert count * chunks == 132
