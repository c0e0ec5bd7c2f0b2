"""Every backend of every op against fp64, output and all gradients, by the rule of `numerics`."""

import pytest
import torch

from gpt1_kernels import use_backend
from tests.cases import DTYPES, PARITY, cast, check_parity, on_backends, results, upstream


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(PARITY)
def test_parity(case, backend, dtype):
    check_parity(case, backend, dtype)


@on_backends(case for case in PARITY if case.parameters)
def test_fp32_parameters_beside_bf16_activations(case, backend):
    check_parity(case, backend, torch.bfloat16, torch.float32)


@on_backends(PARITY)
def test_two_runs_are_bit_equal(case, backend):
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    with use_backend(backend):
        first, second = (results(case.fused, inputs, dout) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
