"""bf16 in Triton's interpreter is that of a GPU: what the parity tests of every kernel rest on."""

import pytest
import torch
import triton
import triton.language as tl

import gpt1_kernels.backends.triton  # noqa: F401  (mends the interpreter)
from tests.cases import DEVICE, DTYPES


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(y_ptr + offset, tl.load(x_ptr + offset).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    tl.store(c_ptr + m * N + n, tl.dot(a, b, input_precision="ieee"))


def test_fp32_rounds_to_the_nearest_bf16():
    """Halfway cases go to the even neighbour; what overflows becomes infinite, NaN stays NaN."""
    halfway = 1 + torch.arange(8) / 256.0
    special = torch.tensor([3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40])
    x = torch.cat([halfway, special, torch.randn(112)]).to(DEVICE)
    y = torch.empty(len(x), dtype=torch.bfloat16, device=DEVICE)
    cast_kernel[(1,)](x, y, N=len(x))
    assert torch.equal(y.view(torch.int16)[~x.isnan()], x.bfloat16().view(torch.int16)[~x.isnan()])
    assert y[x.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot_multiplies_values_and_accumulates_in_fp32(dtype):
    a, b = (torch.randn(32, 32, device=DEVICE).to(dtype) for _ in range(2))
    c = torch.empty(32, 32, device=DEVICE)
    dot_kernel[(1,)](a, b, c, 32, 32, 32)
    exact = a.double() @ b.double()
    assert (c - exact).norm() <= 1e-6 * exact.norm()
