"""The tolerance rule notices the bugs that kernels have: each is planted, and must fail."""

import pytest
import torch

from gpt1_kernels.numerics import Error, allowed, assert_close, error
from tests.cases import (
    DTYPES,
    cast,
    causal_attention,
    dropout_add_layer_norm,
    gelu_ffn,
    layer_norm,
    linear_cross_entropy,
    oracle_of,
    results,
    upstream,
)

TILE = 16
ROWS = [
    layer_norm("planted", 300, 128),
    dropout_add_layer_norm("planted", 300, 128, 0.1),
    gelu_ffn("planted", 300, 48, 192),
    linear_cross_entropy("planted", 300, 48, 1000),
]
ATTENTION = causal_attention("planted", 2, 130, 130, 4, 32)


def without_last_row(x):
    x[-1] = 0


def without_last_tile(x):
    x[-TILE:] = 0


def with_stale_last_row(x):
    x[-1] = x[-2]


def without_last_head(x):
    x[:, :, -1] = 0


def with_swapped_heads(x):
    x[:, :, [0, 1]] = x[:, :, [1, 0]]


def with_last_position_missing(x):
    x[:, -1] = 0


def must_fail(case, name, value, dtype):
    """The unharmed tensor passes, the harmed one does not."""
    inputs, dout = cast(case, dtype, dtype), upstream(case, dtype)
    plain, oracle = results(case.reference, inputs, dout)[name], oracle_of(case, inputs, dout)[name]
    assert_close(name, oracle.to(dtype), plain, oracle, dtype)
    with pytest.raises(AssertionError, match=name):
        assert_close(name, value(oracle.clone()).to(dtype), plain, oracle, dtype)


def harmed(plant):
    def value(x):
        plant(x)
        return x

    return value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plant", [without_last_row, without_last_tile, with_stale_last_row])
@pytest.mark.parametrize("case", ROWS, ids=lambda c: c.op)
def test_a_missing_row_fails(case, plant, dtype):
    for name in (name for name, x in case.inputs.items() if x.dim() == 2):
        must_fail(case, name, harmed(plant), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["out", "q", "k", "v"])
@pytest.mark.parametrize(
    "plant", [without_last_head, with_swapped_heads, with_last_position_missing]
)
def test_a_wrong_head_or_position_fails(plant, name, dtype):
    must_fail(ATTENTION, name, harmed(plant), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_missing_last_key_fails(dtype):
    inputs, dout = cast(ATTENTION, dtype, dtype), upstream(ATTENTION, dtype)
    shorter = {"q": inputs["q"], "k": inputs["k"].clone(), "v": inputs["v"].clone()}
    shorter["k"][:, -1] = 0  # the score 0, not −∞, is what a tile padded with zeros gives
    shorter["v"][:, -1] = 0
    wrong = oracle_of(ATTENTION, shorter, dout)
    for name in ("out", "q", "k", "v"):
        must_fail(ATTENTION, name, lambda _, value=wrong[name]: value, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ROWS[:3], ids=lambda c: c.op)
def test_a_parameter_gradient_without_one_block_of_rows_fails(case, dtype):
    inputs, dout = cast(case, dtype, dtype), upstream(case, dtype)
    dout[-TILE:] = 0
    wrong = oracle_of(case, inputs, dout)
    for name in case.inputs:
        if name not in ("x", "residual"):
            must_fail(case, name, lambda _, value=wrong[name]: value, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_fails(bad):
    def value(x):
        x[1, 1] = bad
        return x

    must_fail(ROWS[0], "out", value, torch.bfloat16)


def test_the_errors_are_what_they_say():
    oracle = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    got = error(oracle + torch.tensor([[0.0, 0.0], [0.0, 0.01]]), oracle)
    assert got.whole == pytest.approx(0.01 / 5)
    assert got.worst_row == pytest.approx(0.01 / (0.1 * (25 / 2) ** 0.5))
    assert error(torch.full((2,), 1e-3), torch.zeros(2)).whole == pytest.approx(1e-3 * 2**0.5)
    assert error(torch.empty(0, 3), torch.empty(0, 3)) == Error(0.0, 0.0)
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(3,\)"):
        error(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize(
    ("dtype", "cap"), [(torch.bfloat16, 6e-3), (torch.float16, 8e-4), (torch.float32, 1e-6)]
)
def test_what_plain_pytorch_loses_is_capped(dtype, cap):
    limit = allowed(Error(1.0, 1.0), dtype)
    assert limit.whole == pytest.approx(2 * cap + 2e-6)
    assert limit.worst_row == pytest.approx(6 * cap + 2e-6)
    limit = allowed(Error(cap / 2, cap), dtype)
    assert limit.whole == pytest.approx(cap + 2e-6)
    assert limit.worst_row == pytest.approx(2 * cap + 2e-6)


def test_an_error_in_every_row_is_held_to_less_than_one_in_a_row():
    oracle = torch.randn(100, 8).double()
    plain = oracle.clone()
    plain[0] *= 1.01
    with pytest.raises(AssertionError, match="every"):
        assert_close("every", 1.005 * oracle, plain, oracle, torch.bfloat16)


def test_of_a_single_number_the_cap_decides():
    oracle = torch.ones(1).double()
    assert_close("number", 1.01 * oracle, oracle, oracle, torch.bfloat16)
    with pytest.raises(AssertionError, match="number"):
        assert_close("number", 1.02 * oracle, oracle, oracle, torch.bfloat16)
