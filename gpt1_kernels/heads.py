"""GPT-1 with its heads: language model, multiple choice, sequence classification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce_with_logits
from torch.nn.functional import cross_entropy, linear, mse_loss

from gpt1_kernels import ops
from gpt1_kernels.config import GPT1Config
from gpt1_kernels.generation import GenerationMixin
from gpt1_kernels.model import GPT1Model, check_shape
from gpt1_kernels.outputs import ModelOutput
from gpt1_kernels.pretrained import PretrainedMixin
from gpt1_kernels.rng import DropoutStream, dropout

IGNORE_INDEX = -100
SUMMARY = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
}
"""What `transformers` calls GPT-1's multiple-choice head; it has others."""


class Headed(nn.Module, PretrainedMixin):
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

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """See `GPT1Model.activation_checkpointing_enable`."""
        self.transformer.activation_checkpointing_enable()

    def activation_checkpointing_disable(self) -> None:
        """See `GPT1Model.activation_checkpointing_disable`."""
        self.transformer.activation_checkpointing_disable()

    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def resize_token_embeddings(self, vocab_size: int) -> nn.Embedding:
        """See `GPT1Model.resize_token_embeddings`; the tied output matrix follows."""
        return self.transformer.resize_token_embeddings(vocab_size)

    def _logits(self, h: Tensor) -> Tensor:
        return linear(h, self.transformer.tokens_embed.weight)

    def _language_model_loss(
        self, h: Tensor, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """Mean over the real labels[..., 1:], each predicted from the real token before it."""
        check_shape("labels", labels, h.shape[:-1])
        targets = torch.full_like(labels, IGNORE_INDEX)
        targets[..., :-1] = labels[..., 1:]
        if attention_mask is not None:
            padding = attention_mask == 0
            targets.masked_fill_(padding, IGNORE_INDEX)
            targets[..., :-1].masked_fill_(padding[..., 1:], IGNORE_INDEX)
        return ops.linear_cross_entropy(h, self.transformer.tokens_embed.weight, targets)


class GPT1LMHeadModel(Headed, GenerationMixin):
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
        check_shape("mc_token_ids", mc_token_ids, h.shape[:-2])
        if mc_token_ids is None:
            state = h[..., -1, :]
        else:
            index = mc_token_ids[..., None, None].expand(*mc_token_ids.shape, 1, h.shape[-1])
            state = h.gather(-2, index).squeeze(-2)
        p = self.dropout_p if self.training and seed is not None else 0.0
        return self.summary(dropout(state, p, seed, row_offset)).squeeze(-1)


class GPT1DoubleHeadsModel(Headed):
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
        drops = self.training and self.multiple_choice_head.dropout_p > 0
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


class GPT1ForSequenceClassification(Headed):
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
            ValueError: ids that are not (B, T), or a batch larger than 1 without a pad_token_id in
                the configuration.
        """
        output = self.transformer(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
            output_attentions, output_hidden_states, **kwargs,
        )  # fmt: skip
        h = output.last_hidden_state
        if h.dim() != 3:
            raise ValueError(f"input_ids: shape {tuple(h.shape[:-1])}, expected (B, T)")
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
