"""The feed-forward network, beyond the calls that all ops are tested with."""

from dataclasses import replace

import pytest
import torch

from gpt1_kernels import backends, ops, use_backend
from gpt1_kernels.backends.portable.sums import column_sums
from tests.cases import (
    DTYPES,
    backends_of,
    cast,
    check_parity,
    gelu_ffn,
    on_backends,
)

SMALL = gelu_ffn("small", 20, 24, 40)
SHAPES = [
    gelu_ffn("no-multiple-of-a-tile", 131, 67, 201),
    gelu_ffn("one-row", 1, 96, 384),
    gelu_ffn("two-tiles-of-rows", 130, 96, 384, b_proj=False),
    gelu_ffn("rows-beyond-a-chunk-of-their-sum", 300, 24, 40),
]
GPT1_WIDTH = gelu_ffn("gpt1-width", 33, 768, 768, b_proj=False)


def column_major(w):
    """As the weight of an `nn.Linear` is through `.t()`."""
    return w.t().contiguous().t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(SHAPES)
def test_shapes(case, backend, dtype):
    check_parity(case, backend, dtype)


@on_backends([GPT1_WIDTH])
def test_gpt1_width(case, backend):
    check_parity(case, backend, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [("w_fc",), ("w_proj",), ("w_fc", "w_proj")], ids="+".join)
@on_backends([SMALL])
def test_weights_of_linear_layers_are_read_through_t(case, backend, transposed, dtype):
    def fused(**inputs):
        for name in transposed:
            inputs[name] = column_major(inputs[name])
        return ops.gelu_ffn(**inputs)

    check_parity(replace(case, fused=fused), backend, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to the right infinity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 30.0])
@on_backends([SMALL])
def test_gelu_keeps_its_digits_near_zero_and_where_it_saturates(case, backend, scale, dtype):
    scaled = {k: x * scale if k in ("x", "b_fc") else x for k, x in case.inputs.items()}
    check_parity(replace(case, inputs=scaled), backend, dtype)


@pytest.mark.parametrize("backend", backends_of("gelu_ffn"))
@pytest.mark.parametrize("save", [(False, False), (False, True), (True, False), (True, True)])
def test_forward_keeps_what_backward_needs(backend, save):
    inputs = cast(SMALL, torch.bfloat16, torch.float32).values()
    forward = backends.kernel(backend, "gelu_ffn", "gelu_ffn_fwd")
    (y, *kept), (expected, *both) = forward(*inputs, save), forward(*inputs, (True, True))
    assert torch.equal(y, expected)
    for saved, tensor, whole in zip(save, kept, both, strict=True):
        assert torch.equal(tensor, whole) if saved else tensor.numel() == 0
    pre, hidden = both  # the GELU is that of the rounded u, which backward reads
    gelu = torch.nn.functional.gelu(pre.double(), approximate="tanh").to(hidden.dtype)
    assert (hidden != gelu).float().mean() < 0.02


@pytest.mark.skipif("triton" not in backends_of("gelu_ffn"), reason="needs the Triton backend")
@pytest.mark.parametrize(
    ("needed", "products", "sums"),
    [
        ("x", 2, 0),
        ("w_fc", 2, 0),
        ("b_fc", 1, 1),
        ("w_proj", 1, 0),
        ("b_proj", 0, 1),
        ("x w_fc b_fc w_proj b_proj", 4, 2),
    ],
)
def test_backward_launches_what_is_needed(needed, products, sums, launches):
    inputs = {k: x.clone().requires_grad_(k in needed.split()) for k, x in SMALL.inputs.items()}
    with use_backend("triton"):
        y = ops.gelu_ffn(**inputs)
        assert launches.pop(("triton", "matmul_kernel")) == 2
        y.sum().backward()
    assert launches["triton", "matmul_kernel"] == products
    assert launches["triton", "sum_partials_kernel"] == sums
    assert launches["triton", "sum_rows_kernel"] == ("b_proj" in needed)


def test_sums_over_blocks_of_rows_are_in_fp32():
    x = torch.randn(300, 16).bfloat16()
    torch.testing.assert_close(column_sums(x), x.float().sum(0))
