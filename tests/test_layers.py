"""The fused layers in a model that is not ours: pre-LN, `nn.Linear` weights, GPT-2 style."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from gpt1_kernels import (
    CausalSelfAttention,
    DropoutAddLayerNorm,
    GeluFFN,
    LayerNorm,
    LinearCrossEntropyLoss,
    layers,
    reference,
    rng,
)
from tests.cases import DEVICE, SEED

WIDTH, HEADS, V = 48, 4, 61


class PlainBlock(nn.Module):
    """A pre-LN block of plain PyTorch modules."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        a = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class FusedBlock(PlainBlock):
    """The same block, with the same parameters, on the fused layers."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(WIDTH), LayerNorm(WIDTH)
        self.attention = CausalSelfAttention(WIDTH, HEADS, c_attn=self.qkv, c_proj=self.out)
        self.ffn = GeluFFN(WIDTH, c_fc=self.up, c_proj=self.down)

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.ffn(self.ln_2(x))


class LanguageModel(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.table = nn.Embedding(V, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, ids, loss):
        h = self.table(ids)
        for block in self.blocks:
            h = block(h)
        return loss(h[:, :-1], self.table.weight, ids[:, 1:])


def plain_loss(h, weight, targets):
    return functional.cross_entropy((h @ weight.t()).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_pre_ln_model_on_fused_layers(autocast):
    plain, fused = LanguageModel(PlainBlock).to(DEVICE), LanguageModel(FusedBlock).to(DEVICE)
    fused.load_state_dict(plain.state_dict(), strict=False)
    for block in fused.blocks:
        assert block.attention.c_attn is block.qkv
    ids = torch.randint(V, (3, 17), device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        expected, actual = plain(ids, plain_loss), fused(ids, LinearCrossEntropyLoss())
    expected.backward()
    actual.backward()
    assert actual.dtype == torch.float32
    tolerance = 0.05 if autocast else 1e-5
    torch.testing.assert_close(actual, expected.float(), rtol=tolerance, atol=0)
    gradients = {n: p.grad for n, p in fused.named_parameters()}
    for name, parameter in plain.named_parameters():
        distance = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        # Softmax cannot see the keys' bias, so a third of that gradient is rounding noise.
        assert distance < tolerance * (3 if name.endswith("qkv.bias") else 1), name


def test_a_layer_norm_like_torchs():
    fused, plain = LayerNorm(WIDTH, eps=0.1), torch.nn.LayerNorm(WIDTH, eps=0.1)
    x = torch.randn(5, WIDTH, device=DEVICE)
    torch.testing.assert_close(fused.to(DEVICE)(x), plain.to(DEVICE)(x))


def test_a_residual_site():
    layer = DropoutAddLayerNorm(WIDTH, dropout_p=0.3).to(DEVICE)
    x, residual = torch.randn(2, 2, 5, WIDTH, device=DEVICE)
    keep = rng.keep_mask(SEED, 10, WIDTH, 0.3).view(2, 5, WIDTH)
    expected = reference.dropout_add_layer_norm(
        x, residual, layer.weight, layer.bias, keep=keep, p=0.3
    )
    torch.testing.assert_close(layer(x, residual, SEED), expected)
    expected = functional.layer_norm(x + residual, (WIDTH,), layer.weight, layer.bias)
    torch.testing.assert_close(layer.eval()(x, residual), expected)


def test_a_layer_used_alone_draws_from_the_default_generator():
    x = torch.randn(2, 9, WIDTH, device=DEVICE)
    attention = CausalSelfAttention(WIDTH, HEADS, dropout_p=0.5).to(DEVICE)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(attention(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    before = torch.get_rng_state()
    bits = torch.zeros(2, HEADS, 9, 1, dtype=torch.int32, device=DEVICE)
    attention.attend(x, keep_bits=bits)
    assert torch.equal(attention.eval()(x), attention(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_like_cross_entropy_loss(reduction):
    h, w = torch.randn(2, 5, WIDTH, device=DEVICE), torch.randn(V, WIDTH, device=DEVICE)
    targets = torch.randint(V, (2, 5), device=DEVICE)
    targets[0, 0] = 7
    loss = LinearCrossEntropyLoss(ignore_index=7, reduction=reduction)
    theirs = nn.CrossEntropyLoss(ignore_index=7, reduction=reduction)
    torch.testing.assert_close(loss(h, w, targets), theirs((h @ w.t()).mT, targets.view(2, 5)))
    weight = torch.rand(2, 5, device=DEVICE)
    losses = weight * LinearCrossEntropyLoss(ignore_index=7, reduction="none")(h, w, targets)
    total = losses.sum()
    expected = {"mean": total / weight[targets != 7].sum(), "sum": total, "none": losses}
    torch.testing.assert_close(loss(h, w, targets, weight), expected[reduction])


def test_projections_are_drawn_as_those_of_gpt1():
    attention, ffn = CausalSelfAttention(192, 4), GeluFFN(192, 100)
    assert ffn.c_fc.weight.shape == (192, 100)
    for projection in (attention.c_attn, attention.c_proj, ffn.c_fc, ffn.c_proj):
        assert float(projection.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not projection.bias.any()


class LowRank(nn.Linear):
    """A linear layer with an adapter, as LoRA has it."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.a, self.b = nn.Parameter(torch.randn(n_in, 2)), nn.Parameter(torch.randn(2, n_out))

    def forward(self, x):
        return super().forward(x) + x @ self.a @ self.b


def without_bias(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


def pruned(n_in, n_out):
    return prune.l1_unstructured(nn.Linear(n_in, n_out), "weight", 0.5)


def hooked(n_in, n_out):
    projection = nn.Linear(n_in, n_out)
    projection.register_forward_hook(lambda module, args, out: 2 * out)
    return projection


def hooked_backward(n_in, n_out):
    projection = nn.Linear(n_in, n_out)
    projection.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))
    return projection


def prepared_backward(n_in, n_out):
    projection = nn.Linear(n_in, n_out)
    projection.register_full_backward_pre_hook(lambda module, dy: (3 * dy[0],))
    return projection


class Halves(torch.Tensor):
    """A weight that holds others, as quantised and sharded ones do, and is no use to a kernel."""

    @staticmethod
    def __new__(cls, low, high):
        shape = 2 * low.shape[0], low.shape[1]
        return cls._make_wrapper_subclass(cls, shape, dtype=low.dtype, device=low.device)

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __tensor_flatten__(self):
        return ["low", "high"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is functional.linear:
            x, weight, bias = args
            return functional.linear(x, torch.cat([weight.low, weight.high]), bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default  # by nn.Parameter
        return cls(args[0].low, args[0].high)


def patched(n_in, n_out):
    projection = nn.Linear(n_in, n_out)
    forward = projection.forward
    projection.forward = lambda x: 2 * forward(x)
    return projection


@pytest.mark.parametrize(
    "projection",
    [LowRank, without_bias, pruned, hooked, hooked_backward, prepared_backward, patched],
)
def test_projections_that_do_more_than_their_weight_says_are_called(projection, monkeypatch):
    logged = []
    monkeypatch.setattr(layers, "log_once", logged.append)
    c_fc, c_proj = projection(WIDTH, 2 * WIDTH).to(DEVICE), projection(2 * WIDTH, WIDTH).to(DEVICE)
    x = torch.randn(3, WIDTH, device=DEVICE, requires_grad=True)
    ffn = GeluFFN(WIDTH, c_fc=c_fc, c_proj=c_proj)
    for _ in range(2):  # what a hook prepares is for one update
        ffn(x).sum().backward()
    assert all(message.startswith("gelu_ffn: not fused: ") for message in logged)
    assert len(logged) == 2
    actual = [p.grad / 2 for p in ffn.parameters()]
    ffn.zero_grad()
    expected = c_proj(functional.gelu(c_fc(x), approximate="tanh"))
    expected.sum().backward()
    torch.testing.assert_close(ffn(x), expected)
    torch.testing.assert_close(actual, [p.grad for p in ffn.parameters()])
    with pytest.raises(ValueError, match="add_bias: False, expected"):
        ffn(x, add_bias=False)


def test_projections_whose_weight_holds_others_are_called():
    c_fc, c_proj = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
    ffn = GeluFFN(WIDTH, c_fc=c_fc, c_proj=c_proj).to(DEVICE)
    x = torch.randn(3, WIDTH, device=DEVICE)
    expected = ffn(x)
    for projection in (c_fc, c_proj):
        projection.weight = nn.Parameter(Halves(*projection.weight.detach().chunk(2)), False)
    torch.testing.assert_close(ffn(x), expected)


def test_a_share_of_the_projection_is_refused():
    """As of a `ColwiseParallel` c_attn: there would be as many heads, of another size."""
    attention = CausalSelfAttention(WIDTH, HEADS, c_attn=nn.Linear(WIDTH, 3 * WIDTH // 2))
    with pytest.raises(ValueError, match="c_attn: width 72, expected 3 · 48"):
        attention.to(DEVICE)(torch.randn(2, 5, WIDTH, device=DEVICE))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd: 48, expected a multiple of n_head 5"):
        CausalSelfAttention(48, 5)
