"""GPT-1 on the fused ops, under the parameter names of OpenAI's release and of `transformers`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from gpt1_kernels import ops
from gpt1_kernels.ahead import draw_ahead, draws_ahead
from gpt1_kernels.cache import KeyValueCache, LayerCache
from gpt1_kernels.config import GPT1Config
from gpt1_kernels.layers import (
    CausalSelfAttention,
    Conv1D,
    DropoutAddLayerNorm,
    GeluFFN,
    product_and_bias,
)
from gpt1_kernels.outputs import ModelOutput
from gpt1_kernels.pretrained import PretrainedMixin
from gpt1_kernels.rng import (
    EMBEDDING_SITE,
    DropoutStream,
    attention_site,
    dropout,
    residual_sites,
)


class Block(nn.Module):
    """One post-LN transformer block: attention, then the feed-forward network."""

    def __init__(self, config: GPT1Config, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(config.n_embd, config.n_head, config.attn_pdrop)
        self.ln_1 = DropoutAddLayerNorm(
            config.n_embd, config.resid_pdrop, config.layer_norm_epsilon
        )
        self.mlp = GeluFFN(config.n_embd)
        self.ln_2 = DropoutAddLayerNorm(
            config.n_embd, config.resid_pdrop, config.layer_norm_epsilon
        )
        self.sites = (attention_site(layer), *residual_sites(layer))

    @property
    def drops(self) -> bool:
        """Whether it needs seeds in training."""
        return max(self.attn.dropout_p, self.ln_1.dropout_p, self.ln_2.dropout_p) > 0.0

    def forward(
        self,
        h: Tensor,  # (B, T, C)
        residual: Tensor,  # h, or its fork
        seeds: Tensor | None,
        row_offset: int,
        first_key: Tensor | None,
        cache: LayerCache | None = None,
        keep_bits: Tensor | None = None,  # drawn with the seed of the attention
        fork: bool = False,  # the result
    ) -> tuple[Tensor, Tensor]:  # (B, T, C), both
        s_attn, s_first, s_second = [None if seeds is None else seeds[s] for s in self.sites]
        a = self.attn.attend(h, s_attn, row_offset, first_key, cache, keep_bits)
        a, bias = product_and_bias(self.attn.c_proj, a)
        n, residual = self.ln_1(a, residual, s_first, row_offset, x_bias=bias, fork=True)
        fused = self.mlp.is_fused
        m, bias = self.mlp(n, add_bias=not fused), self.mlp.c_proj.bias if fused else None
        h = self.ln_2(m, residual, s_second, row_offset, x_bias=bias, fork=fork)
        return h if fork else (h, h)


class GPT1Model(nn.Module, PretrainedMixin):
    """The transformer without a head.

    Hooks on the embeddings and on `attn` do not run: their weights, or parts of them, are what the
    fused ops take.

    Args:
        config: the shape; weights are drawn N(0, initializer_range) from the default generator.

    Raises:
        TypeError: a configuration of `transformers`, whose activation could be another.
    """

    block_class: type[nn.Module] = Block

    def __init__(self, config: GPT1Config):
        super().__init__()
        if not isinstance(config, GPT1Config):
            raise TypeError(
                f"config: {type(config).__name__}, expected GPT1Config, such as "
                "GPT1Config.from_dict(config.to_dict())"
            )
        self.config = config
        self.tokens_embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions_embed = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(self.block_class(config, layer) for layer in range(config.n_layer))
        self.dropout_stream = DropoutStream(config.n_layer)
        self.gradient_checkpointing = False
        self.register_load_state_dict_post_hook(_bring_dropout_stream)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def drops(self) -> bool:
        """Whether a forward pass draws dropout bits now."""
        # Of the blocks as they are: without seeds, a recomputed one would draw another mask.
        return self.training and (
            self.config.embd_pdrop > 0.0 or any(getattr(b, "drops", True) for b in self.h)
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        *,
        dropout_seeds: Tensor | None = None,
        row_offset: int = 0,
        cache: KeyValueCache | None = None,
    ) -> ModelOutput | tuple:
        """Runs the blocks.

        Args:
            input_ids: (..., T) int64; or give inputs_embeds.
            attention_mask: (..., T), 1 for real tokens; padding on the left, the right or both.
            token_type_ids: (..., T) further rows of the token table to add.
            position_ids: (T,) or (..., T), by default 0 … T − 1, after those in the cache.
            inputs_embeds: (..., T, C) in place of looked-up tokens.
            dropout_seeds: int64 (sites, 2), by default the next of `dropout_stream`; a training
                loop passes the same to all micro-batches of an update.
            return_dict: False returns a tuple.
            row_offset: tokens of the update that come before these.
            cache: what the model has seen of these sequences; the T tokens follow it and join it.
                Padding is on the left, and its mask is given with the first tokens only.

        Returns:
            last_hidden_state (..., T, C) and, if asked for, hidden_states: the embeddings and each
            block's output.

        Raises:
            IndexError: on a CPU, an id out of range.
            ValueError: more than n_positions tokens, both or neither of input_ids and
                inputs_embeds, a mask with holes, output_attentions (they never exist in memory), or
                a cache that is full, of other layers, in training, or given with a later mask.
        """
        if output_attentions:
            raise ValueError("output_attentions: the fused attention never holds them in memory")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:-1]
        length = shape[-1]
        rows = prod(shape[:-1])  # Size.numel would make symbols of torch.export constants
        check_shape("inputs_embeds", inputs_embeds, (*shape, self.config.n_embd))
        check_shape("attention_mask", attention_mask, shape)
        check_shape("token_type_ids", token_type_ids, shape)
        check_shape("position_ids", position_ids, shape, (1, length), (length,))
        sites = self.dropout_stream.site_words.shape[0]
        check_shape("dropout_seeds", dropout_seeds, (sites, 2))
        past = 0 if cache is None else cache.length
        if past + length > self.config.n_positions:
            raise ValueError(
                f"input_ids: {past + length} positions, expected at most n_positions "
                f"{self.config.n_positions}"
            )
        if past and attention_mask is not None:
            raise ValueError(f"attention_mask: expected None after the {past} positions in cache")
        mask = None if attention_mask is None else attention_mask.reshape(rows, length) != 0
        first_key = None if mask is None else _first_key(mask)
        if cache is not None:
            if self.training:
                raise ValueError("cache: the model is in training, expected eval()")
            if past:
                first_key = cache.first_key
            elif mask is not None and not mask[:, -1:].all():
                raise ValueError("attention_mask: padding on the right, expected on the left")
            if len(cache.layers) != len(self.h):
                raise ValueError(f"cache: {len(cache.layers)} layers, expected {len(self.h)}")
            cache.first_key = first_key
        if past and position_ids is None:
            position_ids = torch.arange(past, past + length, device=self.tokens_embed.weight.device)
        seeds = None
        if self.drops:
            seeds = self.dropout_stream.advance() if dropout_seeds is None else dropout_seeds

        bits = self._attention_bits(shape, seeds, row_offset)
        h = self._embed(
            input_ids, inputs_embeds, token_type_ids, position_ids, rows, length, seeds,
            row_offset,
        )  # fmt: skip
        if mask is not None:
            h = torch.where(mask.unsqueeze(-1), h, 0)
        states, residual = [h], h
        fork = not output_hidden_states  # else a state would get only its own half of the gradient
        layers = [None] * len(self.h) if cache is None else cache.layers
        for block, layer, keep_bits in zip(self.h, layers, bits, strict=True):
            if self.gradient_checkpointing and self.training:
                h, residual = checkpoint(
                    block, h, residual, seeds, row_offset, first_key, None, keep_bits, fork,
                    use_reentrant=False, preserve_rng_state=_may_draw(block),
                )  # fmt: skip
            else:
                h, residual = block(
                    h, residual, seeds, row_offset, first_key, layer, keep_bits, fork
                )
            states.append(h)
        if cache is not None:
            cache.length += length
        if len(shape) != 2:  # else they stay the blocks' own tensors, which have gradients
            h, *states = (s.view(*shape, s.shape[-1]) for s in (h, *states))
        output = ModelOutput(
            last_hidden_state=h, hidden_states=tuple(states) if output_hidden_states else None
        )
        return output.to_tuple() if return_dict is False else output

    def _embed(
        self,
        input_ids,
        inputs_embeds,
        token_type_ids,
        position_ids,
        rows,
        length,
        seeds,
        row_offset,
    ) -> Tensor:  # (B, T, C)
        p = self.config.embd_pdrop if seeds is not None else 0.0
        seed = None if seeds is None else seeds[EMBEDDING_SITE]
        if position_ids is not None and position_ids.dim() > 1:
            position_ids = position_ids.flatten(0, -2)
        if token_type_ids is not None:
            token_type_ids = token_type_ids.reshape(rows, length)
        w_token, w_position = self.tokens_embed.weight, self.positions_embed.weight
        if input_ids is not None:
            return ops.embedding(
                input_ids.reshape(rows, length), w_token, w_position, position_ids=position_ids,
                token_type_ids=token_type_ids, dropout_p=p, seed=seed, row_offset=row_offset,
            )  # fmt: skip
        h = inputs_embeds.reshape(rows, length, self.config.n_embd)
        h = h + (
            w_position[:length] if position_ids is None else embedding(position_ids, w_position)
        )
        if token_type_ids is not None:
            h = h + embedding(token_type_ids, w_token)
        return dropout(h, p, seed, row_offset)

    def _attention_bits(
        self, shape: torch.Size, seeds: Tensor | None, row_offset: int
    ) -> Iterable[Tensor | None]:
        """The dropout bits of each attention on (..., T) tokens, or None where it draws its own."""
        # Drawn ahead, they would be kept for a block that is to keep nothing but its input.
        recomputed = self.gradient_checkpointing and self.training
        if seeds is None or recomputed or not draws_ahead(seeds):
            return [None for _ in self.h]
        # A block without attention, or that others wrapped, shows none and draws its own.
        probabilities = [block.attn.dropout_p for block in self.h if hasattr(block, "attn")]
        if not any(probabilities) or len(probabilities) < len(self.h):
            return [None for _ in self.h]
        length = shape[-1]
        of_heads = shape[:-1].numel(), self.config.n_head, length, length
        of_attention = [seeds[attention_site(layer)] for layer in range(len(self.h))]
        return draw_ahead(of_attention, of_heads, probabilities, row_offset)

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Keeps only the blocks' inputs and recomputes the rest, whatever options are given."""
        self.gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keeps again what backward reads."""
        self.gradient_checkpointing = False

    # Their older names in `transformers`, whose Trainer calls them until version 6.
    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def resize_token_embeddings(self, vocab_size: int) -> nn.Embedding:
        """Cuts the token table, or grows it by rows drawn N(0, initializer_range)."""
        config = replace(self.config, vocab_size=vocab_size)  # refuses what is no size
        old = self.tokens_embed.weight
        new = nn.Embedding(vocab_size, old.shape[1], device=old.device, dtype=old.dtype)
        nn.init.normal_(new.weight, std=self.config.initializer_range)
        kept = min(vocab_size, old.shape[0])
        with torch.no_grad():
            new.weight[:kept] = old[:kept]
        new.weight.requires_grad_(old.requires_grad)
        self.tokens_embed, self.config = new, config
        return new


_DRAW_NOTHING = {Block, CausalSelfAttention, Conv1D, DropoutAddLayerNorm, GeluFFN, nn.Linear}
"""Modules of a block whose only dropout bits are those of its seeds."""


def _may_draw(block: nn.Module) -> bool:
    """Whether others' modules or hooks in a block may draw from torch's generators."""
    return any(
        type(m) not in _DRAW_NOTHING
        or "forward" in m.__dict__
        or m._forward_pre_hooks
        or m._forward_hooks
        for m in block.modules()
    )


def _bring_dropout_stream(model: GPT1Model, _: object) -> None:
    """After `load_state_dict(assign=True)` from the meta device: no checkpoint has the stream."""
    if model.dropout_stream.key.is_meta:
        model.dropout_stream.to_empty(device=model.tokens_embed.weight.device)


def check_shape(name: str, given: Tensor | None, *allowed: tuple[int, ...]) -> None:
    """Raises ValueError if an argument is given, with none of the allowed shapes."""
    if given is not None and given.shape not in allowed:
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name}: shape {tuple(given.shape)}, expected {expected}")


def _first_key(mask: Tensor) -> Tensor | None:
    """(B, T) bool → int32 (B,) the first real token, or None where a CPU sees no left padding."""
    first_key = (mask.cumsum(-1) == 0).sum(-1, dtype=torch.int32)
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, :1].sum(-1)
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((starts <= 1).all(), "attention_mask: a hole between real tokens")
        return first_key
    if (starts > 1).any():
        row = int((starts > 1).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has a hole, expected padding at the ends only")
    return first_key if first_key.any() else None
