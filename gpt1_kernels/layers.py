"""The fused layers, for GPT-1 and for other models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from gpt1_kernels import ops
from gpt1_kernels.backends import log_once
from gpt1_kernels.cache import LayerCache
from gpt1_kernels.rng import draw_seed


class Conv1D(nn.Module):
    """A linear layer with its weight stored (in, out), as OpenAI released it.

    Args:
        n_in, n_out: sizes of the last axis before and after.
    """

    cast: tuple[Tensor, Tensor] | None = None
    """Weight and bias as products read them inside `weight_cast.cast_once`."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(n_out))

    @property
    def product_weight(self) -> Tensor:
        return self.weight if self.cast is None else self.cast[0]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.cast or (self.weight, self.bias)
        return linear(x, weight.t(), bias)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with fused softmax and dropout.

    Args:
        n_embd: C, a multiple of n_head.
        n_head: number of heads.
        dropout_p: on the attention probabilities, in training.
        c_attn, c_proj: the projections C → 3C (queries, keys, values) and C → C; by default
            `Conv1D`, but any module will do, such as an `nn.Linear`.

    Raises:
        ValueError: n_embd is no multiple of n_head.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout_p: float = 0.0,
        c_attn: nn.Module | None = None,
        c_proj: nn.Module | None = None,
    ):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd: {n_embd}, expected a multiple of n_head {n_head}")
        self.n_embd, self.n_head, self.dropout_p = n_embd, n_head, dropout_p
        self.c_attn = Conv1D(n_embd, 3 * n_embd) if c_attn is None else c_attn
        self.c_proj = Conv1D(n_embd, n_embd) if c_proj is None else c_proj

    def forward(
        self,
        x: Tensor,
        seed: Tensor | None = None,
        row_offset: int = 0,
        first_key: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C); the arguments are those of `ops.causal_attention`.

        Raises:
            ValueError: the output of c_attn is not 3C wide.
        """
        return self.c_proj(self.attend(x, seed, row_offset, first_key))

    def attend(
        self,
        x: Tensor,
        seed: Tensor | None = None,
        row_offset: int = 0,
        first_key: Tensor | None = None,
        cache: LayerCache | None = None,
        keep_bits: Tensor | None = None,
    ) -> Tensor:
        """All but the output projection: (B, T, C) → (B, T, C).

        With a cache, x is what follows the positions in it: they are attended to, and x joins them.
        """
        p = self.dropout_p if self.training else 0.0
        if keep_bits is None:
            seed = _seed(seed, p, x)
        options = {
            "dropout_p": p, "seed": seed, "row_offset": row_offset, "first_key": first_key,
            "keep_bits": keep_bits,
        }  # fmt: skip
        qkv = self.c_attn(x)
        if qkv.shape[-1] != 3 * self.n_embd:  # a share of it, say, has heads of another size
            raise ValueError(f"c_attn: width {qkv.shape[-1]}, expected 3 · {self.n_embd}")
        if cache is None:
            return ops.causal_attention_qkvpacked(qkv, self.n_head, **options)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).unbind(2)
        return ops.causal_attention(q, *cache.append(k, v), **options).flatten(2)


class GeluFFN(nn.Module):
    """The feed-forward network C → F → C with a fused tanh-GELU.

    Args:
        n_embd: C.
        n_hidden: F, by default 4C.
        c_fc, c_proj: the two projections, by default `Conv1D`; the weight of an `nn.Linear` is
            read in place. If either is another module, has hooks or a weight that is no plain
            tensor, or if c_fc has no bias, both are called instead, with PyTorch's GELU between
            them, which is logged once.
    """

    def __init__(
        self,
        n_embd: int,
        n_hidden: int | None = None,
        c_fc: nn.Module | None = None,
        c_proj: nn.Module | None = None,
    ):
        super().__init__()
        n_hidden = 4 * n_embd if n_hidden is None else n_hidden
        self.c_fc = Conv1D(n_embd, n_hidden) if c_fc is None else c_fc
        self.c_proj = Conv1D(n_hidden, n_embd) if c_proj is None else c_proj

    @property
    def is_fused(self) -> bool:
        """Whether the fused op reads the projections, or else they are called."""
        return is_affine(self.c_fc) and is_affine(self.c_proj) and self.c_fc.bias is not None

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """(..., C) → (..., C); without add_bias the output bias is left to what follows.

        Raises:
            ValueError: the output bias cannot be left out of a projection that is called.
        """
        if not self.is_fused:
            called = (
                f"{type(self.c_fc).__name__} and {type(self.c_proj).__name__} with hooks, without "
                "a bias, with a forward of their own or a weight that is no plain tensor"
            )
            if not add_bias:
                raise ValueError(f"add_bias: False, expected weights to read, not {called}")
            log_once(f"gelu_ffn: not fused: {called}")
            return self.c_proj(gelu(self.c_fc(x), approximate="tanh"))
        bias = self.c_proj.bias if add_bias else None
        return ops.gelu_ffn(x, _in_out(self.c_fc), self.c_fc.bias, _in_out(self.c_proj), bias)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, fused; under autocast it returns the autocast dtype."""

    def __init__(self, n_embd: int, eps: float = 1e-5):
        super().__init__(n_embd, eps)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class DropoutAddLayerNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(x)): a post-LN residual site in one pass.

    Args:
        n_embd: C.
        dropout_p: on x, in training.
    """

    def __init__(self, n_embd: int, dropout_p: float = 0.0, eps: float = 1e-5):
        super().__init__(n_embd, eps)
        self.dropout_p = dropout_p

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        seed: Tensor | None = None,
        row_offset: int = 0,
        x_bias: Tensor | None = None,
        fork: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x and residual (..., C) → (..., C), twice if forked.

        The arguments are those of `ops.dropout_add_layer_norm`.
        """
        p = self.dropout_p if self.training else 0.0
        return ops.dropout_add_layer_norm(
            x, residual, self.weight, self.bias, self.eps, p, _seed(seed, p, x),
            row_offset=row_offset, x_bias=x_bias, fork=fork,
        )  # fmt: skip


class LinearCrossEntropyLoss(nn.Module):
    """The cross-entropy of a linear layer's output, without its logits in memory.

    Args:
        ignore_index, reduction: as in `nn.CrossEntropyLoss`.
    """

    def __init__(self, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(
        self, h: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor | None = None
    ) -> Tensor:
        """h (..., C), weight (V, C), targets (...) → fp32 scalar, or (...) for "none"."""
        return ops.linear_cross_entropy(
            h, weight, targets, ignore_index=self.ignore_index, reduction=self.reduction,
            token_weight=token_weight,
        )  # fmt: skip


def product_and_bias(projection: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x W and b, for b to be fused into what follows; None for b if the projection is called."""
    if not is_affine(projection):
        return projection(x), None
    return linear(x, _in_out(projection).t()), projection.bias


def is_affine(projection: nn.Module) -> bool:
    """Whether it is x W + b and nothing more, unlike with LoRA, pruning or quantisation."""
    forwards = (Conv1D.forward, nn.Linear.forward)
    replaced = "forward" in projection.__dict__ or type(projection).forward not in forwards
    return not (
        replaced
        or projection._forward_pre_hooks
        or projection._forward_hooks
        or projection._backward_pre_hooks
        or projection._backward_hooks
        # A tensor around others, quantised or sharded; a parametrised weight is not computed here.
        or hasattr(type(projection._parameters.get("weight")), "__tensor_flatten__")
    )


def _in_out(projection: nn.Module) -> Tensor:
    if isinstance(projection, Conv1D):
        return projection.product_weight
    return projection.weight.t()


def _seed(seed: Tensor | None, p: float, x: Tensor) -> Tensor | None:
    return draw_seed(x.device) if seed is None and p > 0.0 else seed
