"""Causal attention: the paths of its kernels by length, head size, layout, cache and padding."""

import pytest
import torch

from gpt1_kernels import ops, use_backend
from gpt1_kernels.backends import kernel
from gpt1_kernels.backends import launches as counts
from gpt1_kernels.backends.portable import attention as portable
from tests.cases import (
    DEVICE,
    DTYPES,
    SEED,
    UNORDERED,
    P,
    assert_same,
    backends_of,
    bf16_at_least,
    cast,
    causal_attention,
    causal_attention_qkvpacked,
    check_parity,
    check_repeatable,
    inputs_for,
    on_backends,
    results,
    upstream,
    widest_dtype,
)

SHORT = [
    causal_attention("one-key", 1, 1, 1, 1, 16),
    causal_attention("less-than-one-word-of-bits", 1, 17, 17, 2, 16, P),
    causal_attention("head-no-power-of-two", 1, 65, 65, 1, 80, P),
    causal_attention("widest-head", 1, 70, 70, 1, 128, P),
    causal_attention("one-query-of-a-cache", 2, 1, 200, 1, 16, P),
    causal_attention("queries-astride-tiles-of-keys", 1, 100, 190, 1, 16, P),
    causal_attention("one-position-cached", 1, 129, 130, 1, 16, P),
    causal_attention("all-but-two-of-a-tile-cached", 1, 66, 128, 1, 16, P),
    causal_attention("padding-ends-inside-tiles", 2, 150, 150, 1, 16, P, padding=[70, 149]),
    causal_attention("padding-ends-a-word-of-bits-early", 2, 100, 100, 1, 16, P, padding=[31, 63]),
    causal_attention("padding-fills-tiles", 2, 300, 300, 1, 16, padding=[256, 300]),
    causal_attention("padding-in-a-cache", 2, 5, 140, 1, 16, P, padding=[65, 138]),
    causal_attention("first-key-below-zero", 2, 40, 40, 1, 16, P, padding=[-100, 7]),
    causal_attention("negative-scale", 1, 40, 40, 1, 16, P, scale=-0.3),
    causal_attention("scale-of-zero", 1, 40, 40, 1, 16, P, scale=0.0),
    causal_attention("all-dropped", 1, 40, 40, 1, 16, 1.0),
    causal_attention_qkvpacked("head-no-power-of-two", 1, 65, 2, 80, P),
    causal_attention_qkvpacked("less-than-eight-columns", 1, 40, 3, 5, P),
]
LONG = [
    causal_attention_qkvpacked("last-row-of-a-tile-missing", 1, 511, 1, 16, P),
    causal_attention_qkvpacked("whole-tiles", 1, 512, 1, 64, P),
    causal_attention_qkvpacked("last-tile-of-one-row", 1, 513, 1, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends(SHORT)
def test_parity(case, backend, dtype):
    check_parity(case, backend, dtype)


@bf16_at_least
@on_backends([*LONG, causal_attention("many-whole-tiles", 1, 1024, 1024, 1, 16, P)])
def test_parity_of_many_tiles(case, backend, dtype):
    check_parity(case, backend, dtype)


@on_backends(LONG, UNORDERED)
def test_two_runs_are_bit_equal(case, backend):
    check_repeatable(case, backend)


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_packed_and_separate_give_the_same_bits(backend):
    dtype = widest_dtype(backend, "causal_attention")
    qkv = torch.randn(2, 70, 3 * 2 * 32, device=DEVICE).to(dtype)
    dout = torch.randn(2, 70, 2 * 32, device=DEVICE)

    def separate(qkv):
        q, k, v = qkv.unflatten(2, (3, 2, 32)).unbind(2)
        return ops.causal_attention(q, k, v, dropout_p=P, seed=SEED).flatten(2)

    def packed(qkv):
        return ops.causal_attention_qkvpacked(qkv, 2, dropout_p=P, seed=SEED)

    with use_backend(backend):
        expected, actual = (results(f, {"qkv": qkv}, dout) for f in (separate, packed))
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_a_head_of_one_column_is_a_head_with_zeros_beside_it(backend):
    """Parity says little of rows of one number, many of which are next to 0."""
    case = causal_attention("one-column", 1, 33, 33, 1, 1, P, scale=0.7)
    inputs, dout = inputs_for(backend, case), upstream(case, torch.float32)
    wide, wide_dout = (
        {name: torch.nn.functional.pad(x, (0, 15)) for name, x in tensors.items()}
        for tensors in (inputs, {"dout": dout})
    )
    with use_backend(backend):
        actual = results(case.fused, inputs, dout)
        expected = results(case.fused, wide, wide_dout["dout"])
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value[..., :1])


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_positions_may_be_far_apart_in_memory(backend):
    case = causal_attention("far-apart", 1, 3, 3, 1, 16)
    near = inputs_for(backend, case)
    far = {name: x.new_empty(3, 2**23)[:, :16].view(x.shape).copy_(x) for name, x in near.items()}
    with use_backend(backend):
        expected, actual = (results(case.fused, inputs) for inputs in (near, far))
    assert_same(actual, expected)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_a_row_that_sees_one_key_has_no_gradient_of_its_scores(backend, p):
    """In the rounding of O its dS would be 2⁻⁹ of dP, with nothing beside it."""
    case = causal_attention("one-key-a-row", 2, 300, 300, 1, 64, p, padding=[0, 37])
    inputs, dout = cast(case, torch.bfloat16, torch.bfloat16), upstream(case, torch.bfloat16)
    with use_backend(backend):
        dq = results(case.fused, inputs, dout)["q"].float()
    rms = dq.square().mean().sqrt()
    assert dq[0, 0].abs().max() <= 1e-5 * rms
    assert dq[1, 37].abs().max() <= 1e-5 * rms


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_the_log_sum_exp_of_the_scores(backend):
    case = causal_attention("lse", 2, 40, 70, 1, 16)
    q, k, v = inputs_for(backend, case).values()
    first_key = torch.tensor([0, 33], dtype=torch.int32, device=DEVICE)
    forward = kernel(backend, "causal_attention", "causal_attention_fwd")
    _, lse = forward(q, k, v, None, first_key, 0.5, 0.0)
    scores = 0.5 * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
    key, position = torch.arange(70, device=DEVICE), torch.arange(30, 70, device=DEVICE)[:, None]
    hidden = (key > position) | (key < first_key[:, None, None, None])
    expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    assert expected[1].isinf().sum() == 3
    torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_bits_given_with_gaps_between_words(backend):
    q, k, v = torch.randn(3, 1, 70, 1, 16, device=DEVICE).bfloat16()
    bits = ops.dropout_mask(SEED, (1, 1, 70, 70), P, causal=True)
    with_gaps = bits.repeat_interleave(2, -1)[..., ::2]
    with use_backend(backend):
        one, other = (
            ops.causal_attention(q, k, v, dropout_p=P, keep_bits=b) for b in (bits, with_gaps)
        )
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_a_score_that_overflows_reaches_no_query_before_it(backend):
    q, k, v = torch.ones(3, 1, 40, 1, 16, device=DEVICE).half()
    with use_backend(backend):
        expected = ops.causal_attention(100 * q, k, v)
        k[:, -1] = 6e4
        assert torch.equal(ops.causal_attention(100 * q, k, v)[:, :-1], expected[:, :-1])


def test_sums_over_blocks_of_queries_are_in_fp32(monkeypatch):
    monkeypatch.setattr(portable, "QUERIES_PER_BLOCK", 1)
    check_parity(causal_attention("blocks", 1, 300, 300, 1, 16), "portable", torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", backends_of("causal_attention"))
def test_bad_values_in_padding_that_fills_tiles_stay_there(backend, bad):
    case = causal_attention("bad-tiles", 2, 300, 300, 1, 16, P, padding=[0, 263])
    dout = upstream(case, torch.float32)
    inputs = inputs_for(backend, case)
    dirty = {name: x.clone() for name, x in inputs.items()}
    for x in (*dirty.values(), dout):
        x[1, :263] = bad
    with use_backend(backend):
        actual = results(case.fused, dirty, dout)
        expected = results(case.fused, inputs, dout.nan_to_num(0, 0, 0))
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("needed", "kernels"),
    # dq's leaves lse and delta to the other, whether or not it computes dQ
    [("q", {"dq"}), ("k", {"dq", "dkdv"}), ("v", {"dq", "dkdv"}), ("qkv", {"dq", "dkdv"})],
)
@pytest.mark.skipif("triton" not in backends_of("causal_attention"), reason="needs Triton")
def test_a_gradient_that_nobody_needs_costs_no_kernel(needed, kernels):
    case = causal_attention("needs", 1, 20, 20, 1, 16, P)
    inputs = {n: x.detach().requires_grad_(n in needed) for n, x in case.inputs.items()}
    with use_backend("triton"):
        out = case.fused(**inputs)
        counts.clear()
        out.sum().backward()
    ran = {kernel for backend, kernel in counts if backend == "triton"}
    assert ran - {"causal_attention_bwd"} == {f"causal_attention_bwd_{k}_kernel" for k in kernels}


@pytest.mark.skipif("triton" not in backends_of("causal_attention"), reason="needs Triton")
def test_garbage_above_the_diagonal_is_never_used():
    """`dropout_mask(causal=True)` may leave words wholly above the diagonal unwritten."""
    from gpt1_kernels.backends.triton import attention

    q, k, v, dout = torch.randn(4, 1, 200, 2, 16, device=DEVICE).unbind()
    bits = ops.dropout_mask(SEED, (1, 2, 200, 200), P)
    row = torch.arange(200, device=DEVICE)[:, None]
    above = 32 * torch.arange(bits.shape[-1], device=DEVICE) > row
    outcomes = []
    for garbage in (0, -1):
        harmed = bits.masked_fill(above, garbage)
        o, lse = attention.causal_attention_fwd(q, k, v, harmed, None, 0.25, P)
        grads = attention.causal_attention_bwd(
            dout, q, k, v, o, lse, harmed, None, 0.25, P, [True] * 3
        )
        outcomes.append((o, lse, *grads))
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)
