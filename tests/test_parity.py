"""Every backend of every op against fp64, output and all gradients, by the rule of `numerics`."""

import pytest
import torch

from tests.cases import DTYPES, PARITY, UNORDERED, check_parity, check_repeatable, on_backends


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(PARITY)
def test_parity(case, backend, dtype):
    check_parity(case, backend, dtype)


@on_backends(case for case in PARITY if case.parameters)
def test_fp32_parameters_beside_bf16_activations(case, backend):
    check_parity(case, backend, torch.bfloat16, torch.float32)


@on_backends(PARITY, UNORDERED)
def test_two_runs_are_bit_equal(case, backend):
    check_repeatable(case, backend)
