"""GPT-1 on the fused ops, under the parameter names of OpenAI's release and of `transformers`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce_with_logits
from torch.nn.functional import cross_entropy, embedding, linear, mse_loss
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from gpt1_kernels import ops
from gpt1_kernels.ahead import draw_ahead, draws_ahead
from gpt1_kernels.cache import KeyValueCache, LayerCache
from gpt1_kernels.config import GPT1Config
from gpt1_kernels.generation import GenerationMixin
from gpt1_kernels.layers import (
    CausalSelfAttention,
    DropoutAddLayerNorm,
    GeluFFN,
    product_and_bias,
)
from gpt1_kernels.pretrained import PretrainedMixin
from gpt1_kernels.rng import (
    EMBEDDING_SITE,
    DropoutStream,
    attention_site,
    keep_mask,
    keep_scale,
    residual_sites,
)

IGNORE_INDEX = -100
SUMMARY = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
}
"""What `transformers` calls GPT-1's multiple-choice head; it has others."""


class ModelOutput(OrderedDict):
    """What a model returns: values by attribute, by key, or by index among those not None.

    Others rebuild it from the values that are not None: accelerate by its type, FSDP1 key by key
    where it is an OrderedDict. What it does not hold is therefore known to the class.
    """

    _names = (
        "loss", "lm_loss", "mc_loss", "logits", "mc_logits", "last_hidden_state", "hidden_states"
    )  # fmt: skip

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any):
        values = {**dict(values), **more}
        super().__init__((k, v) for k, v in values.items() if v is not None)

    def __getattr__(self, name: str) -> Any:
        if name in self or name in self._names:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {self._names}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def to_tuple(self) -> tuple:
        """The values that are not None, in order."""
        return tuple(self.values())


def _flatten(output: ModelOutput) -> tuple[list[Any], tuple]:
    return list(output.values()), tuple(output)


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple], tuple]:
    values, keys = _flatten(output)
    return [(pytree.MappingKey(k), v) for k, v in zip(keys, values, strict=True)], keys


def _unflatten(values: Iterable[Any], keys: tuple) -> ModelOutput:
    return ModelOutput(zip(keys, values, strict=True))


# So that DDP(static_graph=True), torch.export and others find the tensors in an output.
pytree.register_pytree_node(
    ModelOutput, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="gpt1_kernels.ModelOutput",
)  # fmt: skip


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
        c = self.config
        return self.training and max(c.embd_pdrop, c.attn_pdrop, c.resid_pdrop) > 0.0

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
                a cache that is full, in training, or given with a later mask.
        """
        if output_attentions:
            raise ValueError("output_attentions: the fused attention never holds them in memory")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:-1]
        length = shape[-1]
        rows = prod(shape[:-1])  # Size.numel would make symbols of torch.export constants
        _check_shape("attention_mask", attention_mask, shape)
        _check_shape("token_type_ids", token_type_ids, shape)
        _check_shape("position_ids", position_ids, shape, (1, length), (length,))
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
            elif mask is not None and not mask[:, -1].all():
                raise ValueError("attention_mask: padding on the right, expected on the left")
            cache.first_key = first_key
        if past and position_ids is None:
            position_ids = torch.arange(past, past + length, device=self.tokens_embed.weight.device)
        if self.drops and dropout_seeds is None:
            dropout_seeds = self.dropout_stream.advance()
        seeds = dropout_seeds if self.drops else None

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
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                h, residual = block(
                    h, residual, seeds, row_offset, first_key, layer, keep_bits, fork
                )
            states.append(h)
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
        return _dropout(h, p, seed, row_offset)

    def _attention_bits(
        self, shape: torch.Size, seeds: Tensor | None, row_offset: int
    ) -> Iterable[Tensor | None]:
        """The dropout bits of each attention on (..., T) tokens, or None where it draws its own."""
        p, layers = self.config.attn_pdrop, range(len(self.h))
        # Drawn ahead, they would be kept for a block that is to keep nothing but its input.
        recomputed = self.gradient_checkpointing and self.training
        if seeds is None or p == 0.0 or recomputed or not draws_ahead(seeds):
            return [None for _ in layers]
        length = shape[-1]
        of_heads = shape[:-1].numel(), self.config.n_head, length, length
        return draw_ahead([seeds[attention_site(n)] for n in layers], of_heads, p, row_offset)

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Keeps only the blocks' inputs and recomputes the rest, whatever options are given."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keeps again what backward reads."""
        self.gradient_checkpointing = False

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


class _Headed(nn.Module, PretrainedMixin):
    """What all models with a head share."""

    accepts_loss_kwargs = False
    """Tells the Trainer of `transformers` that the loss is a mean over its own micro-batch."""

    backbone_class: type[GPT1Model] = GPT1Model

    def __init__(self, config: GPT1Config):
        super().__init__()
        self.transformer = self.backbone_class(config)

    @property
    def config(self) -> GPT1Config:
        return self.transformer.config

    @property
    def dropout_stream(self) -> DropoutStream:
        return self.transformer.dropout_stream

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """See `GPT1Model.gradient_checkpointing_enable`."""
        self.transformer.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """See `GPT1Model.gradient_checkpointing_disable`."""
        self.transformer.gradient_checkpointing_disable()

    def resize_token_embeddings(self, vocab_size: int) -> nn.Embedding:
        """See `GPT1Model.resize_token_embeddings`; the tied output matrix follows."""
        return self.transformer.resize_token_embeddings(vocab_size)

    def _logits(self, h: Tensor) -> Tensor:
        return linear(h, self.transformer.tokens_embed.weight)

    def _language_model_loss(
        self, h: Tensor, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Mean over labels[..., 1:], each predicted from the real token before it."""
        targets = torch.full_like(labels, IGNORE_INDEX)
        targets[..., :-1] = labels[..., 1:]
        if attention_mask is not None:
            targets.masked_fill_(attention_mask == 0, IGNORE_INDEX)
        return ops.linear_cross_entropy(h, self.transformer.tokens_embed.weight, targets)


class GPT1LMHeadModel(_Headed, GenerationMixin):
    """GPT-1 with its language-model head, tied to the token table."""

    def _get_name(self) -> str:
        """By this name, the Trainer of `transformers` knows that the model shifts its labels."""
        return self._architecture

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        return_logits: bool = False,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """Runs the model; the arguments not named here are those of `GPT1Model.forward`.

        Args:
            labels: (..., T) int64, shifted inside; −100 is ignored.
            logits_to_keep: 0 for all positions, n for the last n, or an index tensor.
            return_logits: also in training with labels, where logits are None to save memory.

        Returns:
            loss (fp32 scalar, with labels), logits (..., T, V), hidden_states if asked for.
        """
        output = self.transformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, **kwargs,
        )  # fmt: skip
        h = output.last_hidden_state
        loss = None if labels is None else self._language_model_loss(h, labels, attention_mask)
        logits = None
        if return_logits or labels is None or not self.training:
            kept = logits_to_keep
            if isinstance(kept, int):
                kept = slice(-kept, None)  # of 0: everything
            logits = self._logits(h[..., kept, :])
        result = ModelOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result.to_tuple() if return_dict is False else result


class MultipleChoiceHead(nn.Module):
    """The state at the extract token, dropout, then a linear score."""

    def __init__(self, config: GPT1Config):
        super().__init__()
        for key, expected in SUMMARY.items():
            if config.extra.get(key, expected) != expected:
                raise ValueError(f"{key}: {config.extra[key]!r}, expected {expected!r}")
        self.dropout_p = config.summary_first_dropout
        self.summary = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.summary.weight, std=config.initializer_range)
        nn.init.zeros_(self.summary.bias)

    def forward(
        self, h: Tensor, mc_token_ids: Tensor | None, seed: Tensor | None, row_offset: int
    ) -> Tensor:
        """h (..., T, C), mc_token_ids (...) or None for the last position → scores (...)."""
        if mc_token_ids is None:
            state = h[..., -1, :]
        else:
            index = mc_token_ids[..., None, None].expand(*mc_token_ids.shape, 1, h.shape[-1])
            state = h.gather(-2, index).squeeze(-2)
        p = self.dropout_p if self.training and seed is not None else 0.0
        return self.summary(_dropout(state, p, seed, row_offset)).squeeze(-1)


class GPT1DoubleHeadsModel(_Headed):
    """GPT-1 with the language-model head and a multiple-choice head."""

    def __init__(self, config: GPT1Config):
        super().__init__(replace(config, num_labels=1))
        self.multiple_choice_head = MultipleChoiceHead(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        *,
        return_logits: bool = False,
        dropout_seeds: Tensor | None = None,
        row_offset: int = 0,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """Runs the model on (B, choices, T); see `GPT1Model.forward` and `GPT1LMHeadModel.forward`.

        Args:
            mc_token_ids: (B, choices), the position of the extract token; by default the last.
            mc_labels: (B,), the right choice.

        Returns:
            loss and mc_loss (with their labels), logits (B, choices, T, V), mc_logits (B, choices),
            hidden_states if asked for.
        """
        drops = self.training and (self.transformer.drops or self.config.summary_first_dropout > 0)
        if drops and dropout_seeds is None:
            dropout_seeds = self.dropout_stream.advance()
        output = self.transformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, dropout_seeds=dropout_seeds,
            row_offset=row_offset, **kwargs,
        )  # fmt: skip
        h = output.last_hidden_state
        seed = dropout_seeds[-1] if drops else None
        mc_logits = self.multiple_choice_head(h, mc_token_ids, seed, row_offset // h.shape[-2])
        mc_loss = None
        if mc_labels is not None:
            choices = mc_logits.reshape(-1, mc_logits.shape[-1])
            mc_loss = cross_entropy(choices.float(), mc_labels.flatten())
        keep_logits = return_logits or labels is None or not self.training
        result = ModelOutput(
            loss=None if labels is None else self._language_model_loss(h, labels, attention_mask),
            mc_loss=mc_loss,
            logits=self._logits(h) if keep_logits else None,
            mc_logits=mc_logits,
            hidden_states=output.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result


class GPT1ForSequenceClassification(_Headed):
    """GPT-1 with a linear score (no bias) of the last token that is not padding."""

    def __init__(self, config: GPT1Config):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """Runs the model; the arguments not named here are those of `GPT1Model.forward`.

        Args:
            labels: (B,) classes, (B,) values for regression (num_labels 1), or (B, num_labels)
                for multi-label classification.

        Returns:
            loss (with labels), logits (B, num_labels), hidden_states if asked for.

        Raises:
            ValueError: a batch larger than 1 without a pad_token_id in the configuration.
        """
        output = self.transformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, **kwargs,
        )  # fmt: skip
        h = output.last_hidden_state
        logits = self.score(h[torch.arange(h.shape[0], device=h.device), self._last(input_ids, h)])
        loss = None if labels is None else self._loss(logits, labels)
        result = ModelOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result.to_tuple() if return_dict is False else result

    def _last(self, input_ids: Tensor | None, h: Tensor) -> Tensor | int:
        pad = self.config.pad_token_id
        if pad is None and h.shape[0] != 1:
            raise ValueError(
                f"pad_token_id: None in the configuration, expected one for a batch of {h.shape[0]}"
            )
        if pad is None or input_ids is None:
            return -1
        positions = torch.arange(h.shape[1], device=h.device)
        return (positions * (input_ids != pad)).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        problem = self.config.problem_type
        if problem == "regression" or (problem is None and self.config.num_labels == 1):
            return mse_loss(logits.squeeze(-1), labels.view_as(logits.squeeze(-1)).float())
        if problem == "multi_label_classification" or (
            problem is None and labels.is_floating_point()
        ):
            return bce_with_logits(logits, labels.float())
        return cross_entropy(logits, labels.flatten())


def _bring_dropout_stream(model: GPT1Model, _: object) -> None:
    """After `load_state_dict(assign=True)` from the meta device: no checkpoint has the stream."""
    device = model.tokens_embed.weight.device
    if model.dropout_stream.key.is_meta and device.type != "meta":
        model.dropout_stream.to_empty(device=device)


def _check_shape(name: str, given: Tensor | None, *allowed: tuple[int, ...]) -> None:
    if given is not None and given.shape not in allowed:
        expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name}: shape {tuple(given.shape)}, expected {expected}")


def _first_key(mask: Tensor) -> Tensor | None:
    """(B, T) bool → int32 (B,) the first real token, or None where a CPU sees no left padding."""
    first_key = (mask.cumsum(-1) == 0).sum(-1, dtype=torch.int32)
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, 0]
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((starts <= 1).all(), "attention_mask: a hole between real tokens")
        return first_key
    if (starts > 1).any():
        row = int((starts > 1).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has a hole, expected padding at the ends only")
    return first_key if first_key.any() else None


def _dropout(x: Tensor, p: float, seed: Tensor | None, row_offset: int) -> Tensor:
    """Dropout over the last axis of (..., C) with the stream's bits, outside any fused op."""
    if p == 0.0:
        return x
    keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p, row_offset)
    return torch.where(keep.view(x.shape), x * keep_scale(p), 0)
