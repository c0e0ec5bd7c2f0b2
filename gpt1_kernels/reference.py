"""All of GPT-1 in plain PyTorch: the oracle of every parity test.

No fused op, no kernel, no shortcut; each function follows the paper's formula and runs in any
floating dtype (the tests use fp64). Dropout takes the same bits as the ops: `keep` is a bool tensor
of the dropped array's shape, True keeps, None for no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gpt1_kernels.config import GPT1Config
from gpt1_kernels.rng import (
    EMBEDDING_SITE,
    attention_site,
    keep_mask,
    keep_scale,
    residual_sites,
)


def dropout(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    return x if keep is None else torch.where(keep, x * keep_scale(p), 0)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * w + b


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    w: Tensor,
    b: Tensor,
    eps: float = 1e-5,
    keep: Tensor | None = None,
    p: float = 0.0,
    x_bias: Tensor | None = None,
) -> Tensor:
    branch = x if x_bias is None else x + x_bias
    return layer_norm(residual + dropout(branch, keep, p), w, b, eps)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_ffn(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor | None = None
) -> Tensor:
    y = gelu_tanh(x @ w_fc + b_fc) @ w_proj
    return y if b_proj is None else y + b_proj


def causal_attention(
    q: Tensor,  # (B, Tq, H, D)
    k: Tensor,  # (B, Tk, H, D)
    v: Tensor,
    scale: float | None = None,
    keep: Tensor | None = None,  # (B, H, Tq, Tk)
    p: float = 0.0,
    first_key: Tensor | None = None,  # (B,)
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    row = torch.arange(queries, device=q.device)[:, None] + keys - queries
    key = torch.arange(keys, device=q.device)
    visible = key <= row
    if first_key is not None:
        visible = visible & (key >= first_key[:, None, None, None])
    scores = (scale * (q @ k.mT)).masked_fill(~visible, -torch.inf)
    seen = visible.expand_as(scores).any(-1, keepdim=True)
    largest = scores.detach().amax(-1, keepdim=True).masked_fill(~seen, 0)
    probabilities = (torch.where(visible, scores, 0) - largest).exp().where(visible, 0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True).where(seen, 1)
    return (dropout(probabilities, keep, p) @ v).transpose(1, 2)


def cross_entropy(
    logits: Tensor,  # (N, V)
    targets: Tensor,  # (N,)
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
) -> Tensor:
    counted = targets != ignore_index
    weight = counted.to(logits.dtype) if token_weight is None else token_weight * counted
    target = targets.where(counted, 0)[:, None]
    losses = -weight * torch.log_softmax(logits, -1).gather(1, target).squeeze(1)
    if reduction == "none":
        return losses
    return losses.sum() / (weight.sum().clamp(min=1e-30) if reduction == "mean" else 1)


def hidden_states(
    parameters: Mapping[str, Tensor],
    config: GPT1Config,
    input_ids: Tensor,  # (B, T)
    seeds: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """The states after the last block: (B, T, C).

    Args:
        parameters: of `GPT1Model`, by name.
        seeds: int64 (sites, 2) for dropout, None for none.
        row_offset: tokens of the global batch that come before these.
    """
    batch, length = input_ids.shape
    heads, width = config.n_head, config.n_embd

    def keep(site: int, p: float, *shape: int) -> Tensor | None:
        if seeds is None or p == 0.0:
            return None
        rows, before = math.prod(shape[:-1]), row_offset * (heads if len(shape) == 4 else 1)
        return keep_mask(seeds[site], rows, shape[-1], p, before).view(shape)

    p = config.embd_pdrop
    h = parameters["tokens_embed.weight"][input_ids] + parameters["positions_embed.weight"][:length]
    h = dropout(h, keep(EMBEDDING_SITE, p, batch, length, width), p)
    for layer in range(config.n_layer):
        w = {n: parameters[f"h.{layer}.{n}"] for n in LAYER_PARAMETERS}
        first, second = residual_sites(layer)
        p = config.resid_pdrop

        qkv = h @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]
        q, k, v = qkv.view(batch, length, 3, heads, -1).unbind(2)
        bits = keep(attention_site(layer), config.attn_pdrop, batch, heads, length, length)
        a = causal_attention(q, k, v, keep=bits, p=config.attn_pdrop).flatten(2)
        a = a @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        n = dropout_add_layer_norm(
            a, h, w["ln_1.weight"], w["ln_1.bias"], config.layer_norm_epsilon,
            keep(first, p, batch, length, width), p,
        )  # fmt: skip
        m = gelu_ffn(
            n, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"],
            w["mlp.c_proj.weight"], w["mlp.c_proj.bias"],
        )  # fmt: skip
        h = dropout_add_layer_norm(
            m, n, w["ln_2.weight"], w["ln_2.bias"], config.layer_norm_epsilon,
            keep(second, p, batch, length, width), p,
        )  # fmt: skip
    return h


def language_model_loss(
    parameters: Mapping[str, Tensor],
    config: GPT1Config,
    input_ids: Tensor,
    seeds: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """Mean cross-entropy of every token but the first, given those before it."""
    h = hidden_states(parameters, config, input_ids, seeds, row_offset)
    logits = h[:, :-1] @ parameters["tokens_embed.weight"].t()
    return cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


LAYER_PARAMETERS = tuple(
    f"{module}.{kind}"
    for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    for kind in ("weight", "bias")
)
