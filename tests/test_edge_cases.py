"""What breaks kernel libraries in the field: a test per row of the list, on every backend.

Rows that concern other files: 19 and 8 of the model in `test_model.py`, 21 and 22 in
`test_compile.py`, 26 in `test_dispatch.py`, 28 in `test_pretrained.py`, 31 in `training/`.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt1_kernels import errors, ops, reference, use_backend
from gpt1_kernels.backends import OPS, kernel
from gpt1_kernels.numerics import assert_close
from gpt1_kernels.rng import keep_mask
from tests.cases import (
    DEVICE,
    DTYPES,
    PARITY,
    SEED,
    Case,
    assert_same,
    backends_of,
    cast,
    causal_attention,
    causal_attention_qkvpacked,
    check_parity,
    dropout_add_layer_norm,
    embedding,
    gelu_ffn,
    inputs_for,
    layer_norm,
    linear_cross_entropy,
    on_backends,
    oracle_of,
    results,
    upstream,
    widest_dtype,
)

SMALL = [
    layer_norm("small", 37, 80),
    dropout_add_layer_norm("small", 37, 80, 0.1),
    causal_attention("small", 2, 21, 21, 2, 16, 0.1),
    causal_attention_qkvpacked("small", 2, 21, 2, 16, 0.1),
    gelu_ffn("small", 21, 32, 128),
    embedding("small", 2, 21, 50, 32, 0.1),
    linear_cross_entropy("small", 21, 32, 100),
    linear_cross_entropy("small-none", 21, 32, 100, "none"),
]
WITH_DROPOUT = [SMALL[i] for i in (1, 2, 3, 5)]
NOT_SCALAR = [case for case in SMALL if case.name != "linear_cross_entropy-small"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


class LowLevelCalls(TorchDispatchMode):
    """Notes the calls of our low-level ops, by name and arguments other than tensors."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gpt1_kernels":
            self.made.append((func.name(), [a for a in args if not isinstance(a, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


@needs_gpus
@on_backends(SMALL)
def test_row01_another_device_is_current(case, backend):
    inputs = cast(case, torch.bfloat16, torch.bfloat16)
    elsewhere = {k: x.to("cuda:1") for k, x in inputs.items()}
    keywords = {
        k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v
        for k, v in getattr(case.fused, "keywords", {}).items()
    }
    function = getattr(case.fused, "func", case.fused)
    arguments = [a.to("cuda:1") for a in getattr(case.fused, "args", ())]
    with use_backend(backend):
        expected = results(case.fused, inputs)
        actual = results(partial(function, *arguments, **keywords), elsewhere)
    assert_same({k: x.to("cuda:0") for k, x in actual.items()}, expected)


@needs_gpu
@on_backends(SMALL)
def test_row01_a_thread_that_has_launched_nothing_yet(case, backend):
    """Whose first launch may be a product, of which the driver makes tensor maps in a context."""
    inputs = {k: x.detach() for k, x in cast(case, torch.bfloat16, torch.bfloat16).items()}
    with use_backend(backend), ThreadPoolExecutor(1) as thread:
        expected = results(case.fused, inputs)
        actual = thread.submit(results, case.fused, inputs).result()
    assert_same(actual, expected)


@needs_gpu
@on_backends(SMALL)
def test_row02_a_replayed_graph_draws_new_bits(case, backend):
    inputs = {k: x.detach() for k, x in cast(case, torch.bfloat16, torch.bfloat16).items()}
    seed = SEED.clone()
    keywords = getattr(case.fused, "keywords", {})
    function = case.fused if case not in WITH_DROPOUT else partial(case.fused, seed=seed)
    with use_backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                results(function, inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(function, inputs)
        for _ in range(2):
            for x in inputs.values():
                x.mul_(0.9)
            if "seed" in keywords:
                seed[1] += 1
            graph.replay()
            assert_same(captured, results(function, inputs))


@on_backends(NOT_SCALAR)
def test_row03_upstream_gradient_is_not_contiguous(case, backend):
    """It is copied before backend and dtype matter."""
    dtype = widest_dtype(backend, case.op)
    inputs, dout = cast(case, dtype, dtype), upstream(case, dtype)
    with use_backend(backend):
        expanded = torch.ones((), dtype=dtype, device=DEVICE).expand_as(dout)
        assert_same(
            results(case.fused, inputs, expanded), results(case.fused, inputs, expanded.clone())
        )
        transposed = dout.mT.contiguous().mT if dout.dim() > 1 else dout.repeat_interleave(2)[::2]
        assert dout.numel() == 1 or not transposed.is_contiguous()
        assert_same(results(case.fused, inputs, transposed), results(case.fused, inputs, dout))


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "last stride not 1":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "row stride above its size":
        return torch.nn.functional.pad(x, (3, 5))[..., 3:-5]
    if layout == "first stride no multiple of 8":
        return torch.nn.functional.pad(x.flatten(1), (0, 12))[:, :-12].unflatten(1, x.shape[1:])
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def with_gaps(arguments: dict) -> dict:
    """The same arguments, of which the vectors lie in every second place in memory."""
    vectors = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.dim() == 1}
    return arguments | {k: torch.stack([x, ~x.int()], 1)[:, 0] for k, x in vectors.items()}


@on_backends([*SMALL, causal_attention("gaps", 2, 40, 40, 1, 16, 0.1, padding=[0, 9])])
def test_row04_vectors_with_gaps(case, backend):
    """Biases, gains, seeds, targets, first keys."""
    inputs, dout = inputs_for(backend, case), upstream(case, torch.float32)
    keywords = getattr(case.fused, "keywords", {})
    gaps = partial(case.fused, **with_gaps(keywords))
    with use_backend(backend):
        assert_same(results(gaps, with_gaps(inputs), dout), results(case.fused, inputs, dout))


@pytest.mark.parametrize(
    "layout",
    [
        "last stride not 1",
        "row stride above its size",
        "first stride no multiple of 8",
        "axes swapped in memory",
    ],
)
@on_backends(SMALL)
def test_row04_layouts(case, backend, layout):
    dtype = widest_dtype(backend, case.op)
    inputs, dout = cast(case, dtype, dtype), upstream(case, dtype)
    strided = {k: in_layout(x, layout) if x.dim() > 1 else x for k, x in inputs.items()}
    first = next(iter(inputs))
    mixed = {**strided, first: inputs[first]}
    oracle, plain = oracle_of(case, inputs, dout), results(case.reference, inputs, dout)
    with use_backend(backend):
        for arguments in (strided, mixed):
            actual = results(case.fused, arguments, dout)
            assert actual["out"].is_contiguous()
            for name, value in actual.items():
                assert_close(name, value, plain[name], oracle[name], dtype)


def off_16_bytes(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@on_backends(SMALL)
def test_row04_addresses_off_16_bytes(case, backend):
    """As of parameters that are parts of one flat tensor: one of them, or the upstream gradient."""
    dtype = widest_dtype(backend, case.op)
    for moved in case.inputs:

        def fused(moved=moved, **inputs):
            return case.fused(**{**inputs, moved: off_16_bytes(inputs[moved])})

        check_parity(replace(case, fused=fused), backend, dtype)
    check_parity(case, backend, dtype, dout=off_16_bytes(upstream(case, dtype)))


EMPTY = {
    layer_norm("empty", 0, 48): (0, 48),
    dropout_add_layer_norm("empty", 0, 48, 0.1): (0, 48),
    causal_attention("no-batch", 0, 5, 5, 2, 16, 0.1): (0, 5, 2, 16),
    causal_attention("no-positions", 2, 0, 0, 2, 16): (2, 0, 2, 16),
    causal_attention("no-queries", 2, 0, 5, 2, 16, 0.1): (2, 0, 2, 16),
    causal_attention_qkvpacked("no-batch", 0, 5, 2, 16): (0, 5, 32),
    causal_attention_qkvpacked("no-positions", 2, 0, 2, 16, 0.1): (2, 0, 32),
    gelu_ffn("empty", 0, 16, 64): (0, 16),
    embedding("no-batch", 0, 5, 10, 16, 0.1): (0, 5, 16),
    embedding("no-positions", 2, 0, 10, 16): (2, 0, 16),
    linear_cross_entropy("empty", 0, 16, 10): (),
    linear_cross_entropy("empty-none", 0, 16, 10, "none"): (0,),
}


@dtypes
@on_backends(EMPTY)
def test_row05_empty(case, backend, dtype):
    inputs = cast(case, dtype, dtype)
    with use_backend(backend):
        actual = results(case.fused, inputs)
    assert actual["out"].shape == EMPTY[case]
    assert not actual["out"].any()
    for name, x in inputs.items():
        assert actual[name].shape == x.shape
        assert not actual[name].any(), name


SIZES = [
    *(layer_norm(f"{n}x{c}", n, c) for n, c in ((1, 80), (63, 16), (65, 1000))),
    *(dropout_add_layer_norm(f"{n}x{c}", n, c, 0.1) for n, c in ((1, 17), (65, 100))),
    *(causal_attention(f"T{t}-D{d}", 1, t, t, 1, d, 0.1) for t, d in ((1, 80), (127, 5))),
    *(gelu_ffn(f"{n}x{c}x{f}", n, c, f) for n, c, f in ((1, 1, 1), (129, 33, 70))),
    *(embedding(f"T{t}-C{c}", 1, t, 9, c, 0.1) for t, c in ((1, 1), (65, 17))),
    *(linear_cross_entropy(f"V{v}", n, 9, v) for n, v in ((1, 2), (65, 131))),
]


@on_backends(SIZES)
def test_row06_sizes_that_fit_no_tile(case, backend):
    check_parity(case, backend, widest_dtype(backend, case.op))


@on_backends(SMALL[i] for i in (0, 1, 4))
def test_row06_one_row_without_leading_axes(case, backend):
    rows = {k: x[:1] if k in ("x", "residual") else x for k, x in inputs_for(backend, case).items()}
    one = {k: x[0] if k in ("x", "residual") else x for k, x in rows.items()}
    with use_backend(backend):
        expected, actual = results(case.fused, rows), results(case.fused, one)
    assert_same({k: x.view_as(expected[k]) for k, x in actual.items()}, expected)


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_row06_a_head_over_the_limit_is_right_or_refused(backend):
    case = causal_attention("over-the-limit", 1, 31, 31, 1, 300, 0.1)
    if backend == "portable":
        check_parity(case, backend, torch.float32)
    else:
        message = f"'{backend}' was asked for but it takes a head_size of at most .*, not 300"
        with use_backend(backend), pytest.raises(ValueError, match=message):
            case.fused(**inputs_for(backend, case))


@pytest.mark.parametrize("backend", backends_of("layer_norm"))
def test_row07_more_than_65535_rows(backend):
    rows = 65_600
    x, w = torch.randn(rows, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    with use_backend(backend):
        y = ops.layer_norm(x, w, w)
    last = slice(rows - 300, rows)
    torch.testing.assert_close(y[last], reference.layer_norm(x[last], w, w))


def huge(path, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector, on a CPU in a sparse file, so that what nobody touches takes no memory."""
    if DEVICE == "cuda":
        return torch.empty(size, dtype=dtype, device=DEVICE)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def far_apart(path, x: torch.Tensor) -> torch.Tensor:
    """A copy of x with its rows, along the first one or two axes, spread over 2**31 elements."""
    rows = x if x.dim() == 2 else x.flatten(0, 1)
    stride = 2**31 // (len(rows) - 1) // 8 * 8 + 8
    memory = huge(path, (len(rows) - 1) * stride + rows[0].numel(), x.dtype)
    spread = memory.as_strided(rows.shape, (stride, *rows.stride()[1:])).copy_(rows)
    return spread if x.dim() == 2 else spread.unflatten(0, x.shape[:2])


@on_backends(case for case in SMALL if case.op != "embedding")
def test_row07_offsets_beyond_32_bits(case, backend, tmp_path):
    """Of all inputs, which are read in place."""
    if backend == "triton" and DEVICE == "cpu" and case.op != "causal_attention":
        pytest.skip("the interpreter loses the type of a loop's variable, and counts in 32 bits")
    dtype = widest_dtype(backend, case.op)
    inputs, dout = cast(case, dtype, dtype), upstream(case, dtype)
    spread = {k: far_apart(tmp_path / k, x) if x.dim() > 1 else x for k, x in inputs.items()}
    oracle, plain = oracle_of(case, inputs, dout), results(case.reference, inputs, dout)
    with use_backend(backend):
        actual = results(case.fused, spread, dout)
    for name, value in actual.items():
        assert_close(name, value, plain[name], oracle[name], dtype)


@pytest.mark.parametrize(
    ("shape", "stride_b", "stride_t", "stride_h"),
    [
        pytest.param((3, 1, 1, 16), 2**30 + 8, 16, 16, id="batches"),
        pytest.param((1, 1, 3, 16), 48, 48, 2**30 + 8, id="heads"),
        pytest.param((1, 577, 1, 16), 16, 2**22 - 8, 16, id="tiles"),
        pytest.param((1, 3, 1, 16), 16, 2**30 + 8, 16, id="positions-of-a-tile"),
    ],
)
@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_row07_strides_below_2_31_whose_multiples_are_not(
    backend, shape, stride_b, stride_t, stride_h, tmp_path
):
    """Of a cache of keys and values, and of the gradients' own: the product is what overflows."""
    B, T, H, D = shape
    strides = stride_b, stride_t, stride_h, 1
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    dtype = widest_dtype(backend, "causal_attention")
    q, *near = (torch.randn(B, t, H, D, device=DEVICE).to(dtype) for t in (1, T, T))
    far = [
        huge(tmp_path / str(i), size, dtype).as_strided(shape, strides).copy_(x)
        for i, x in enumerate(near)
    ]
    with use_backend(backend):
        expected, actual = (
            results(ops.causal_attention, dict(zip("qkv", (q, *keys), strict=True)))
            for keys in (near, far)
        )
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", backends_of("embedding"))
def test_row07_a_table_of_more_than_2_31_elements(backend, tmp_path):
    C, last = 16, 2**31 // 16
    table = huge(tmp_path / "table", (last + 1) * C, torch.bfloat16).view(last + 1, C)
    table[[1, last]] = torch.randn(2, C, device=DEVICE).bfloat16()
    ids, positions = torch.tensor([[last, 1, last]], device=DEVICE), table.new_zeros(3, C)
    with use_backend(backend), torch.no_grad():
        assert torch.equal(ops.embedding(ids, table, positions), table[ids])


SLOW_WITHOUT_A_GPU = ("triton", "cuda_host") if DEVICE == "cpu" else ()


@pytest.mark.parametrize(
    "backend",
    [  # without a GPU so many programs take minutes
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_WITHOUT_A_GPU else [])
        for name in backends_of("causal_attention")
    ],
)
def test_row07_more_than_65535_heads(backend):
    dtype = widest_dtype(backend, "causal_attention")
    q, k, v = torch.randn(3, 300, 3, 256, 16, device=DEVICE).to(dtype).unbind()
    assert q.shape[0] * q.shape[2] > 65535
    with use_backend(backend):
        out = ops.causal_attention(q, k, v)
    last = [x[-2:] for x in (q, k, v)]
    plain = reference.causal_attention(*last)
    oracle = reference.causal_attention(*(x.double() for x in last))
    assert_close("out", out[-2:], plain, oracle, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_row08_bad_values_in_padding_stay_there(backend, bad):
    case = causal_attention("padded", 2, 40, 40, 2, 16, 0.1, padding=[0, 9])
    dout = upstream(case, torch.float32)
    inputs = inputs_for(backend, case)
    dirty = {k: x.clone() for k, x in inputs.items()}
    for x in (*dirty.values(), dout):
        x[1, :9] = bad
    clean_dout = dout.clone()
    clean_dout[1, :9] = 0
    with use_backend(backend):
        actual = results(case.fused, dirty, dout)
        expected = results(case.fused, inputs, clean_dout)
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_row09_left_padding_equals_the_unpadded_run(backend):
    pad = 13
    short = causal_attention("unpadded", 1, 40, 40, 2, 16)
    inputs = inputs_for(backend, short)
    padded = {
        k: torch.cat([torch.randn(1, pad, 2, 16, device=DEVICE).to(x.dtype), x], 1)
        for k, x in inputs.items()
    }
    first_key = torch.tensor([pad], dtype=torch.int32, device=DEVICE)
    dtype = widest_dtype(backend, short.op)
    dout = upstream(short, dtype)
    with use_backend(backend):
        actual = results(
            partial(ops.causal_attention, first_key=first_key), padded,
            torch.cat([torch.ones(1, pad, 2, 16, device=DEVICE), dout], 1),
        )  # fmt: skip
    plain, oracle = results(short.reference, inputs, dout), oracle_of(short, inputs, dout)
    for name, value in actual.items():
        assert_close(name, value[:, pad:], plain[name], oracle[name], dtype)
        assert not value[:, :pad].any(), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
def test_row10_all_labels_ignored(backend, reduction):
    case = linear_cross_entropy("all-ignored", 9, 16, 50, reduction, ignored=9)
    with use_backend(backend):
        actual = results(case.fused, inputs_for(backend, case))
    for value in actual.values():
        assert not value.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
def test_row10_no_token_has_a_weight(backend, rows, dtype):
    case = linear_cross_entropy("without-weight", rows, 16, 50)
    fused = partial(case.fused, token_weight=torch.zeros(rows, device=DEVICE))
    with use_backend(backend):
        actual = results(fused, cast(case, dtype, dtype))
    for value in actual.values():
        assert not value.any()


def out_of_range_calls():
    table, position = torch.randn(10, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    h, w = torch.randn(3, 16, device=DEVICE).bfloat16(), table.bfloat16()
    ids = torch.tensor([[0, 1, 2]], device=DEVICE)
    for value, bound in ((10, 10), (-1, 10)):
        bad = torch.tensor([[0, value, 2]], device=DEVICE)
        yield "embedding", value, bound, partial(ops.embedding, bad, table, position)
        yield (
            "linear_cross_entropy",
            value,
            bound,
            partial(ops.linear_cross_entropy, h, w, bad[0]),
        )
        yield (
            "embedding",
            value,
            bound,
            partial(ops.embedding, ids, table, position, token_type_ids=bad),
        )
    bad = torch.tensor([[0, 4, 2]], device=DEVICE)
    yield "embedding", 4, 4, partial(ops.embedding, ids, table, position, position_ids=bad)


@pytest.mark.parametrize(("op", "value", "bound", "call"), list(out_of_range_calls()))
def test_row11_ids_out_of_range(op, value, bound, call):
    message = re.escape(f"{op}: id {value} is out of range [0, {bound})")
    for backend in backends_of(op):
        with use_backend(backend):
            if DEVICE == "cpu":
                with pytest.raises(IndexError, match=message):
                    call()
            else:
                assert call().isnan().any()
                with pytest.raises(IndexError, match=message):
                    errors.check_errors()
        errors.check_errors()  # which has nothing more to say


@dtypes
@on_backends([linear_cross_entropy("uneven", 21, 32, 100, "none", ignored=3, weighted=True)])
def test_row12_uneven_upstream_gradient(case, backend, dtype):
    check_parity(case, backend, dtype)


@on_backends(SMALL)
def test_row13_no_grad_gives_the_same_output(case, backend, launches):
    inputs = inputs_for(backend, case)
    with use_backend(backend):
        expected = results(case.fused, inputs)["out"]
        launches.clear()
        with torch.no_grad():
            actual = case.fused(**inputs)
    assert torch.equal(actual, expected)
    assert not [name for _, name in launches if "bwd" in name or "scale_gradients" in name]


@on_backends(SMALL)
def test_row13_no_grad_of_parameters_does_the_work_of_no_gradient(case, backend):
    """Evaluation took as long as training: no_grad leaves a parameter's requires_grad as it is."""
    inputs = inputs_for(backend, case)
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    with use_backend(backend):
        with LowLevelCalls() as expected:
            case.fused(**inputs)
        with torch.no_grad(), LowLevelCalls() as actual:
            case.fused(**leaves)
    assert actual.made == expected.made


@on_backends(SMALL)
def test_row13_a_frozen_input_changes_no_other_gradient(case, backend):
    """One is frozen, or all but one."""
    inputs, dout = inputs_for(backend, case), upstream(case, torch.float32)
    with use_backend(backend):
        expected = results(case.fused, inputs, dout)
        for name in inputs:
            one, others = {name: inputs[name]}, {k: x for k, x in inputs.items() if k != name}
            # Of two inputs, to freeze one is to need the other alone.
            for needed, frozen in ((others, one), (one, others))[: len(inputs) - 1]:
                actual = results(partial(case.fused, **frozen), needed, dout)
                assert_same({**expected, **actual}, expected)


@on_backends([gelu_ffn("small", 21, 32, 128), gelu_ffn("padded", 21, 30, 125)])
def test_row13_of_a_frozen_weight_nobody_keeps_the_input(case, backend):
    """Fine-tuning with the FFN frozen kept an activation a layer that no backward read."""
    inputs, kept = inputs_for(backend, case), []
    leaves = {k: x.requires_grad_(k != "w_fc") for k, x in inputs.items()}
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda saved: saved)
    with use_backend(backend), hooks:
        case.fused(**leaves)
    assert leaves["w_proj"].data_ptr() in [x.data_ptr() for x in kept]
    assert leaves["x"].data_ptr() not in [x.data_ptr() for x in kept]


@on_backends(SMALL)
def test_row14_two_backwards_leave_the_inputs_unchanged(case, backend):
    inputs = inputs_for(backend, case)
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    with use_backend(backend):
        out = case.fused(**leaves)
        once = torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True)
        twice = torch.autograd.grad(out.sum() * 2, list(leaves.values()))
    for name, first, second in zip(leaves, once, twice, strict=True):
        torch.testing.assert_close(second, 2 * first, msg=name)
        assert torch.equal(leaves[name], inputs[name])


# Attention's backward reads its output, and PyTorch says so where that was changed.
@on_backends(
    [*(case for case in SMALL if case.op != "causal_attention"), gelu_ffn("padded", 21, 30, 125)]
)
def test_row14_an_output_may_be_changed_in_place(case, backend):
    inputs = inputs_for(backend, case)
    with use_backend(backend):
        expected = results(lambda **inputs: case.fused(**inputs) * 2, inputs)
        assert_same(results(lambda **inputs: case.fused(**inputs).mul_(2), inputs), expected)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("backend", backends_of("dropout_add_layer_norm"))
def test_row14_the_same_tensor_as_x_and_residual(backend, p):
    one = dropout_add_layer_norm("same-tensor", 9, 48, p, x_bias=False)

    def twice(function):
        return lambda x, w, b: function(x=x, residual=x, w=w, b=b)

    inputs = {k: x for k, x in one.inputs.items() if k != "residual"}
    case = Case("same-tensor", one.op, inputs, twice(one.fused), twice(one.reference))
    check_parity(case, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, "the autocast dtype"])
@on_backends([*SMALL, gelu_ffn("no-bias", 21, 32, 128, b_proj=False)])
def test_row15_autocast(case, backend, dtype, given):
    activations = {"x", "residual", "q", "k", "v", "qkv", "h"}
    inputs = {
        k: x.to(dtype) if k in activations and given != torch.float32 else x
        for k, x in case.inputs.items()
    }
    with use_backend(backend), torch.autocast(DEVICE, dtype):
        actual = results(case.fused, inputs)
    loss = case.op == "linear_cross_entropy"
    assert actual["out"].dtype == (torch.float32 if loss else dtype)
    rounded = {k: x.to(dtype) for k, x in inputs.items()}
    dout = torch.ones_like(actual["out"])
    plain, oracle = results(case.reference, rounded, dout), oracle_of(case, inputs, dout)
    for name, value in actual.items():
        if name != "out":
            assert value.dtype == inputs[name].dtype, name
        # The oracle knows the unrounded inputs, so their rounding counts for both sides.
        assert_close(name, value, plain[name], oracle[name], dtype)


@dtypes
@on_backends(linear_cross_entropy(f"confident-{r}", 24, 24, 24, r) for r in ("mean", "none"))
def test_row16_confident_tokens_and_logits_of_ten_thousand(case, backend, dtype):
    # Logits that every dtype holds exactly, so that what is tested is the loss.
    targets = case.fused.keywords["targets"]
    for gain in (8.0, 12.0, 9984.0, -9984.0):
        h = gain * torch.nn.functional.one_hot(targets, 24).float()
        case = replace(case, inputs={"h": h, "w": torch.eye(24, device=DEVICE)})
        loss_scale = 2.0**12 if 0 < gain < 100 else 1.0  # without it, fp16 gradients underflow
        dout = torch.full_like(case.reference(**case.inputs), loss_scale)
        check_parity(case, backend, dtype, dout=dout)


@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
def test_row16_the_loss_of_a_token_that_is_all_but_certain(backend):
    """A loss of which 1 plus the others' share keeps nothing."""
    w, targets = torch.eye(24, device=DEVICE).bfloat16(), torch.arange(24, device=DEVICE)
    with use_backend(backend):
        loss = ops.linear_cross_entropy(20 * w, w, targets, reduction="none")
    expected = torch.full_like(loss, math.log1p(23 * math.exp(-20)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@dtypes
@pytest.mark.parametrize("op", ["layer_norm", "dropout_add_layer_norm"])
def test_row17_huge_mean_and_tiny_variance(op, dtype):
    # Half of the elements above, half below a mean that every dtype, and every sum, holds exactly.
    step = {torch.float32: 0.0625, torch.float16: 0.5, torch.bfloat16: 4.0}[dtype]
    signs = torch.stack([torch.randperm(80) for _ in range(9)]) % 2 * 2 - 1
    case = (
        layer_norm("huge-mean", 9, 80)
        if op == "layer_norm"
        else dropout_add_layer_norm("huge-mean", 9, 80, 0.0, x_bias=False)
    )
    x = 512 + step * signs.to(DEVICE)
    inputs = {**case.inputs, "x": x}
    if "residual" in inputs:
        inputs["residual"] = torch.zeros_like(x)
    for backend in backends_of(op):
        check_parity(replace(case, inputs=inputs), backend, dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", ["layer_norm", "dropout_add_layer_norm"])
@pytest.mark.parametrize("backend", backends_of("layer_norm"))
def test_an_fp32_bias_beside_a_gain_in_bf16_has_an_fp32_gradient(backend, op, compiled):
    """It was rounded to the dtype of the gain."""
    case = next(case for case in SMALL if case.op == op)
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    inputs["b"] = case.inputs["b"]
    torch._dynamo.reset()
    fused = torch.compile(case.fused, backend="aot_eager") if compiled else case.fused
    with use_backend(backend):
        actual = results(fused, inputs, dout)
        expected = results(case.fused, inputs | {"w": inputs["w"].float()}, dout)
    assert_same(actual, expected | {"w": expected["w"].to(torch.bfloat16)})
    assert actual["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", backends_of("layer_norm"))
def test_row17_under_autocast_the_result_is_rounded_and_not_x(backend, dtype):
    x, w = 1e5 + torch.randn(9, 80, device=DEVICE), torch.ones(80, device=DEVICE)
    with use_backend(backend), torch.autocast(DEVICE, dtype):
        y = ops.layer_norm(x, w, torch.zeros_like(w))
    expected = reference.layer_norm(x.double(), w.double(), torch.zeros_like(w).double())
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype))


@dtypes
@pytest.mark.parametrize("backend", backends_of("layer_norm"))
def test_row17_constant_rows(backend, dtype):
    case = layer_norm("constant-rows", 9, 80)
    inputs = {**case.inputs, "x": torch.full((9, 80), 3.0, device=DEVICE)}
    inputs["x"][::2] = 0
    check_parity(replace(case, inputs=inputs), backend, dtype)


@pytest.mark.parametrize("constant", [777.777, 100.1])
@pytest.mark.parametrize("backend", backends_of("layer_norm"))
def test_row17_constants_whose_sums_are_rounded(backend, constant):
    x, w = torch.full((9, 768), constant, device=DEVICE), torch.ones(768, device=DEVICE)
    with use_backend(backend):
        assert ops.layer_norm(x, w, torch.zeros_like(w)).abs().max() < 1e-6


@pytest.mark.parametrize("backend", backends_of("layer_norm"))
def test_row17_a_mean_that_fp32_does_not_hold(backend):
    x = 1e4 + 0.01 * torch.randn(9, 768, device=DEVICE)
    w, b = torch.ones(2, 768, device=DEVICE)
    with use_backend(backend):
        y = ops.layer_norm(x, w, b)
    expected = reference.layer_norm(x.double(), w.double(), b.double())
    assert (y - expected).norm() < 1e-6 * expected.norm()
    _, mean, _ = kernel(backend, "layer_norm", "layer_norm_fwd")(x, w, b, 1e-5)
    assert torch.equal(mean, x.double().mean(-1).float())  # the nearest, for backward


@on_backends(SMALL[:2])
def test_eps_is_the_one_given(case, backend):
    fused, plain = partial(case.fused, eps=0.5), partial(case.reference, eps=0.5)
    check_parity(replace(case, fused=fused, reference=plain), backend, torch.float32)


@pytest.mark.parametrize("backend", backends_of("gelu_ffn"))
def test_inputs_of_gelu_whose_cubes_overflow(backend):
    dtype = widest_dtype(backend, "gelu_ffn")
    x = torch.tensor([[1e15], [-1e15]], dtype=dtype, device=DEVICE)
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    b = torch.zeros(1, dtype=dtype, device=DEVICE, requires_grad=True)
    with use_backend(backend):
        (db,) = torch.autograd.grad(ops.gelu_ffn(x, one, b, one).sum(), b)
    assert db == 1


@on_backends(WITH_DROPOUT)
def test_row18_dropout_at_zero_draws_nothing(case, backend, launches):
    inputs, without = inputs_for(backend, case), partial(case.fused, dropout_p=0.0)
    with use_backend(backend):
        assert_same(results(without, inputs), results(partial(without, seed=None), inputs))
    assert not [name for _, name in launches if "dropout_mask" in name]


@on_backends(WITH_DROPOUT)
def test_row18_a_new_step_draws_new_bits(case, backend):
    inputs, next_step = inputs_for(backend, case), SEED + torch.tensor([0, 1], device=DEVICE)
    with use_backend(backend):
        one = results(case.fused, inputs)
        other = results(partial(case.fused, seed=next_step), inputs)
    assert not torch.equal(one["out"], other["out"])


@pytest.mark.parametrize("p", [1.0, 1 - 1e-6])
@on_backends(WITH_DROPOUT)
def test_row18_everything_dropped(case, backend, p):
    inputs = inputs_for(backend, case)
    with use_backend(backend):
        actual = results(partial(case.fused, dropout_p=p), inputs)
        if case.op == "dropout_add_layer_norm":
            undropped = {k: inputs[k] for k in ("w", "b")}
            x = inputs["residual"]
            assert_same({"out": ops.layer_norm(x, **undropped)}, {"out": actual["out"]})
            assert not actual["x"].any()
            assert not actual["x_bias"].any()
        else:
            assert not any(value.any() for value in actual.values())


@on_backends(WITH_DROPOUT)
def test_row18_backward_uses_the_bits_of_forward(case, backend):
    """The oracle's gradient drops by the stream's own definition of the bits."""
    check_parity(case, backend, widest_dtype(backend, case.op))


@pytest.mark.parametrize("backend", backends_of("dropout_add_layer_norm"))
def test_row18_a_dropped_element_has_gradient_0_where_the_residual_overflows(backend):
    case = dropout_add_layer_norm("overflow", 9, 80, 0.5, x_bias=False)
    inputs = cast(case, torch.float16, torch.float32)
    small = {k: inputs[k] * 1e-3 for k in ("x", "residual")}  # so that 1 / σ is large
    with use_backend(backend):
        grads = results(case.fused, inputs | small, upstream(case, torch.float16) * 1000)
    dropped = ~keep_mask(SEED, 9, 80, 0.5)
    assert grads["residual"][dropped].isinf().any()
    assert (grads["x"][dropped] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "backend", [b for b in backends_of("dropout_add_layer_norm") if b != "portable"]
)
def test_row18_what_is_dropped_is_zero_whatever_it_was(backend, bad):
    """Of kernels, also in backward; portable multiplies, as PyTorch's dropout does."""
    case = dropout_add_layer_norm("bad", 9, 81, 0.5, x_bias=False)
    inputs, dout = inputs_for(backend, case), upstream(case, torch.float32)
    dropped = ~keep_mask(SEED, 9, 81, 0.5)
    dirty = inputs | {"x": inputs["x"].masked_fill(dropped, bad)}
    with use_backend(backend):
        assert_same(results(case.fused, dirty, dout), results(case.fused, inputs, dout))
        dx = results(case.fused, inputs, dout.fill_(bad))["x"]
    assert not dx[dropped].any()
    assert dx[~dropped].isnan().all()


@pytest.mark.parametrize("backend", [b for b in backends_of("embedding") if b != "portable"])
def test_row18_what_is_dropped_of_an_embedding_has_no_gradient(backend):
    case = embedding("bad", 3, 17, 50, 48, 0.5, offset=0)
    by_order = partial(case.fused, position_ids=None)
    inputs, dout = inputs_for(backend, case), upstream(case, torch.float32)
    dropped = ~keep_mask(SEED, 51, 48, 0.5).view(3, 17, 48)
    zero, bad = (dout.masked_fill(dropped, value) for value in (0.0, torch.nan))
    with use_backend(backend):
        for call in (case.fused, by_order):
            assert_same(results(call, inputs, bad), results(call, inputs, zero))


@on_backends(SMALL)
def test_row20_double_backward_names_the_op(case, backend):
    leaves = {k: x.clone().requires_grad_() for k, x in inputs_for(backend, case).items()}
    with use_backend(backend):
        out = case.fused(**leaves).sum()
        with pytest.raises(RuntimeError, match=f"{case.op}.* has no double backward"):
            torch.autograd.grad(out, list(leaves.values()), create_graph=True)


@pytest.mark.parametrize(
    "bad", [torch.float64, torch.int32, torch.complex64, "mixed", "sparse"], ids=str
)
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_row23_unsupported_dtypes_are_named(case, bad):
    for name in case.inputs:
        if bad == "mixed":
            if len(case.inputs.keys() - case.parameters) == 1 or name in case.parameters:
                continue
            wrong, named = case.inputs[name].half(), r"float16|float32"
        elif bad == "sparse":
            wrong, named = case.inputs[name].to_sparse(), "sparse_coo"
        else:
            wrong, named = case.inputs[name].to(bad), str(bad)
        with pytest.raises(TypeError, match=rf"{case.op}.*({named})"):
            case.fused(**{**case.inputs, name: wrong})


def test_row23_autocast_casts_no_fp64():
    x = torch.ones(2, 8, dtype=torch.float64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(TypeError, match="float64"):
        ops.layer_norm(x, x[0], x[0])


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_row24_wrong_ranks_and_sizes_are_named(case):
    for name, x in case.inputs.items():
        free = (name == "x" and case.op in ("layer_norm", "gelu_ffn")) or name == "qkv"
        for wrong in (x[..., :-1], x.unsqueeze(0)) if not free else (x[..., :-1],):
            if case.op == "embedding" and name == "w_position" and wrong.dim() == 2:
                wrong = wrong[:5, :-1]
            with pytest.raises(ValueError, match=r"(shape|width).*expected"):
                case.fused(**{**case.inputs, name: wrong})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.layer_norm(x.sum(), x[0], x[0]), r"x has shape \(\), expected \(..., C\)"),
        (
            lambda x: ops.causal_attention(x[None, :, None], x[None, :8, None], x[None, :8, None]),
            "q has 9 positions, expected at most k's 8",
        ),
        (lambda x: ops.causal_attention(*[x[None, :, None, :0]] * 3), "q has heads of size 0"),
        (lambda x: ops.causal_attention_qkvpacked(x[None], 5), "width 48.* 3 · 5 heads"),
        (lambda x: ops.causal_attention_qkvpacked(x[None], 0), "n_head is 0, expected at least 1"),
        (lambda x: ops.causal_attention_qkvpacked(x[None, :, :0], 1), "width 0, expected"),
        (lambda x: ops.layer_norm(x, None, x[0]), r"w is None, expected shape \(48,\)"),
        (lambda x: ops.gelu_ffn(None, x.t(), x[0], x), "x is None, expected a tensor"),
        (lambda x: ops.causal_attention_qkvpacked(None, 2), r"qkv is None, .* \(B, T, 3C\)"),
        (lambda x: ops.gelu_ffn(x, x.t(), None, x), r"b_fc is None, expected shape \(9,\)"),
        (lambda x: ops.gelu_ffn(x, None, x[0], x), r"w_fc is None, expected shape \(48, F\)"),
        (lambda x: ops.gelu_ffn(x, x.t(), x[:, 0], None), r"w_proj is None, .* shape \(9, C\)"),
        (lambda x: ops.linear_cross_entropy(x, x, None), r"targets is None, expected shape \(9,\)"),
        (lambda x: ops.causal_attention(*[x[None, :, None]] * 2, None), "v is None, expected"),
        (
            lambda x: ops.causal_attention(x[None, :, None], None, x[None, :, None]),
            r"k is None, expected shape \(1, Tk, 1, 48\)",
        ),
        (
            lambda x: ops.linear_cross_entropy(x, x, torch.arange(9), reduction="max"),
            "reduction is 'max', expected one of",
        ),
        (
            lambda x: ops.linear_cross_entropy(
                x, x, torch.arange(9), token_weight=torch.ones(9, requires_grad=True)
            ),
            "token_weight requires a gradient",
        ),
        (
            lambda x: ops.linear_cross_entropy(x, x, torch.arange(8)),
            r"targets has shape \(8,\), expected \(9,\)",
        ),
        (
            lambda x: ops.embedding(torch.zeros(1, 10, dtype=torch.int64), x, x),
            "ids has 10 positions, expected at most 9",
        ),
        (
            lambda x: ops.embedding(
                torch.zeros(2, 8, dtype=torch.int64), x, x, position_ids=torch.arange(7)
            ),
            r"position_ids has shape \(7,\), expected \(T,\), \(1, T\) or \(B, T\)",
        ),
        (lambda x: ops.dropout_mask(SEED.cpu(), (), 0.5), r"shape is \(\), expected \("),
        (lambda x: ops.dropout_mask(SEED.cpu(), (3, 5), 0.5, causal=True), r"is \(3, 5\), exp"),
        (lambda x: ops.dropout_mask(SEED.cpu(), (1, 1, 9, 3), 0.5, causal=True), "Tk ≥ Tq"),
        (lambda x: ops.dropout_mask(SEED.cpu(), (2, 3), 1.5), r"dropout_p is 1.5, expected"),
        (lambda x: ops.dropout_mask(SEED.cpu()[:1], (2, 3), 0.5), r"seed has shape \(1,\)"),
        (lambda x: ops.dropout_mask(SEED.cpu()[:1], (2, 3), 0.0), r"seed has shape \(1,\)"),
        (lambda x: ops.dropout_mask(None, (2, 3), 0.0), r"seed is None, expected shape \(2,\)"),
        (
            lambda x: ops.dropout_mask(SEED.cpu(), (2, 3), 0.5, row_offset=-1),
            "row_offset is negative, expected at least 0",
        ),
        (lambda x: ops.dropout_mask(SEED.cpu(), (2**32 + 1, 1), 0.5), "at most 4294967296"),
        (
            lambda x: ops.causal_attention_qkvpacked(
                x[None], 2, dropout_p=0.1, seed=SEED.cpu(), row_offset=2**31 - 8
            ),
            "row_offset . rows is 4294967298, expected at most 4294967296",
        ),
        (
            lambda x: ops.dropout_add_layer_norm(x, x, x[0], x[0], dropout_p=0.1),
            "seed is None, expected an int64 tensor",
        ),
        (
            lambda x: ops.dropout_add_layer_norm(x, x, x[0], x[0], dropout_p=0.1, seed=7),
            "seed is 7, expected an int64 tensor",
        ),
    ],
)  # fmt: skip
def test_row24_other_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(9, 48))


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_row25_tensors_on_two_devices_are_named(case):
    for name in list(case.inputs)[1:]:
        with pytest.raises(ValueError, match=rf"{case.op}: {name} is on meta.*{DEVICE}"):
            case.fused(**{**case.inputs, name: case.inputs[name].to("meta")})


def test_row25_a_seed_on_another_device():
    x = torch.randn(3, 16, device=DEVICE)
    with pytest.raises(ValueError, match="seed is on meta"):
        ops.dropout_add_layer_norm(x, x, x[0], x[0], dropout_p=0.1, seed=SEED.to("meta"))


@dtypes
@pytest.mark.parametrize("C", [48, 81])
@pytest.mark.parametrize("backend", backends_of("dropout_add_layer_norm"))
def test_a_fork_has_the_gradients_of_one_result_that_is_read_twice(backend, C, dtype):
    """Bit for bit: what backward adds is rounded as where autograd adds it."""
    case = dropout_add_layer_norm("fork", 9, C, 0.1)
    douts = torch.randn(2, 9, C, device=DEVICE).to(dtype)

    def gradients(fork):
        leaves = [x.requires_grad_() for x in cast(case, dtype, dtype).values()]
        with use_backend(backend):
            y = case.fused(**dict(zip(case.inputs, leaves, strict=True)), fork=fork)
            read = y if fork else (y.view_as(y), y.view_as(y))
            return torch.autograd.grad(read, leaves, list(douts))

    for forked, single in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(forked, single)


@pytest.mark.parametrize("backend", backends_of("dropout_add_layer_norm"))
def test_a_residual_site_is_the_layer_norm_of_the_rounded_sum(backend):
    """Bit for bit: backward reads the rounded sum, and the statistics have to be its own."""
    case = dropout_add_layer_norm("rounded", 9, 81, 0.0, x_bias=False)
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    with use_backend(backend):
        site = results(case.fused, inputs, dout)
        inputs["x"] = inputs["x"] + inputs.pop("residual")
        assert_same(site, results(ops.layer_norm, inputs, dout))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
def test_a_reduced_loss_is_the_reduction_of_the_token_losses(backend, reduction):
    case = linear_cross_entropy("reduced", 37, 48, 100, reduction, ignored=5, weighted=True)
    inputs = cast(case, torch.bfloat16, torch.bfloat16)
    with use_backend(backend):
        losses = case.fused(**inputs, reduction="none")
        loss = case.fused(**inputs)
    weight = case.fused.keywords["token_weight"][5:].sum() if reduction == "mean" else 1
    torch.testing.assert_close(loss, losses.sum() / weight)


def test_parity_covers_every_op():
    assert {case.op for case in PARITY} | {"dropout_mask"} == set(OPS)
