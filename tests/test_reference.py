"""The oracle itself, against PyTorch's own functions in fp64."""

import pytest
import torch
from torch.nn import functional

from gpt1_kernels import reference


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_layer_norm():
    x, w, b = draw(5, 48), draw(48), draw(48)
    torch.testing.assert_close(
        reference.layer_norm(x, w, b), functional.layer_norm(x, (48,), w, b), rtol=1e-12, atol=0
    )


def test_gelu():
    x = draw(1000)
    torch.testing.assert_close(
        reference.gelu_tanh(x), functional.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("queries", [1, 5, 17])
def test_causal_attention_sees_no_future(queries):
    q, k, v = draw(2, queries, 3, 16), draw(2, 17, 3, 16), draw(2, 17, 3, 16)
    mask = torch.ones(queries, 17, dtype=torch.bool).tril(17 - queries)
    expected = functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
    )
    actual = reference.causal_attention(q, k, v)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-12, atol=1e-15)
    k[:, -1], v[:, -1] = 1e9, 1e9
    changed = reference.causal_attention(q, k, v)
    assert torch.equal(changed[:, :-1], actual[:, :-1])  # to the bit: the mask is −∞


def test_a_row_without_keys_is_zero_and_has_no_gradient():
    q, k, v = (draw(1, 4, 1, 8).requires_grad_() for _ in range(3))
    out = reference.causal_attention(q, k, v, first_key=torch.tensor([2]))
    assert not out[0, :2].any()
    out.sum().backward()
    for t in (q, k, v):
        assert t.grad.isfinite().all()
        assert not t.grad[0, :2].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    logits, targets = draw(9, 30), torch.randint(30, (9,))
    targets[3] = -100
    torch.testing.assert_close(
        reference.cross_entropy(logits, targets, reduction=reduction),
        functional.cross_entropy(logits, targets, reduction=reduction),
    )


def test_dropout_scales_the_survivors():
    x, keep = draw(4, 8), torch.rand(4, 8) < 0.5
    dropped = reference.dropout(x, keep, 0.5)
    assert not dropped[~keep].any()
    torch.testing.assert_close(dropped[keep], 2 * x[keep])


def test_a_residual_site():
    """The bias is dropped with what it is added to."""
    x, residual, w, b, x_bias = draw(5, 48), draw(5, 48), draw(48), draw(48), draw(48)
    keep = torch.rand(5, 48) < 0.75
    site = reference.dropout_add_layer_norm(x, residual, w, b, 0.1, keep, 0.25, x_bias)
    total = residual + (x + x_bias) * keep / 0.75
    expected = functional.layer_norm(total, (48,), w, b, 0.1)
    torch.testing.assert_close(site, expected, rtol=1e-12, atol=1e-12)


def test_a_feed_forward_network():
    x, w_fc, b_fc, w_proj, b_proj = draw(5, 8), draw(8, 32), draw(32), draw(32, 8), draw(8)
    hidden = functional.gelu(functional.linear(x, w_fc.t(), b_fc), approximate="tanh")
    torch.testing.assert_close(
        reference.gelu_ffn(x, w_fc, b_fc, w_proj, b_proj),
        functional.linear(hidden, w_proj.t(), b_proj),
    )


def test_attention_with_padding_a_scale_and_dropout():
    q, k, v = draw(2, 5, 3, 16), draw(2, 9, 3, 16), draw(2, 9, 3, 16)
    first_key, keep = torch.tensor([2, 4], dtype=torch.int32), torch.rand(2, 3, 5, 9) < 0.75
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    mask = mask & (torch.arange(9) >= first_key[:, None, None, None])
    probabilities = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), torch.eye(9).double().expand(2, 3, 9, 9),
        attn_mask=mask, scale=0.3,
    )  # fmt: skip
    expected = (probabilities * keep / 0.75) @ v.transpose(1, 2)
    actual = reference.causal_attention(q, k, v, 0.3, keep, 0.25, first_key)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_weights_of_tokens():
    """A mean by the weights of the tokens that count, as the classes' weights of PyTorch give."""
    logits, targets, of_class = draw(9, 30), torch.randperm(30)[:9], torch.rand(30).double()
    weight = of_class[targets]
    targets[3] = 77
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            reference.cross_entropy(logits, targets, 77, reduction, weight),
            functional.cross_entropy(
                logits, targets, of_class, ignore_index=77, reduction=reduction
            ),
        )
