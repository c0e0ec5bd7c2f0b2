"""GPT-1 with the heads that its fine-tuning adds, and the auxiliary language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpt1_kernels import ops
from gpt1_kernels.config import GPT1Config
from gpt1_kernels.heads import Headed, MultipleChoiceHead
from gpt1_kernels.outputs import ModelOutput
from gpt1_kernels.rng import dropout

Head = Literal["sum", "choice"]
HEAD_KEY = "task_head"


class GPT1TaskModel(Headed):
    """The fine-tuned GPT-1 of the paper's section 3.3: dropout, then a linear layer with a bias.

    Head `sum` adds the states at the extract tokens of an example (one sequence, or the two orders
    of a pair) and maps the sum to num_labels outputs. Head `choice` maps the state of each answer
    to one score.

    The folder of `choice` opens as `GPT1DoubleHeadsModel`, in `transformers` too. That of `sum`
    opens there as the backbone, `OpenAIGPTModel`, beside which `classifier.weight` (num_labels, C)
    and `classifier.bias` are the head; `OpenAIGPTForSequenceClassification` would draw a new one,
    for its `score` has no bias.

    Args:
        config: its num_labels outputs, its summary_first_dropout before the linear layer, and the
            head under the key "task_head" of `extra`, by default `sum`.
    """

    def __init__(self, config: GPT1Config):
        head = config.extra.get(HEAD_KEY, "sum")
        if head not in ("sum", "choice"):
            raise ValueError(f"{HEAD_KEY}: {head!r}, expected 'sum' or 'choice'")
        super().__init__(replace(config, num_labels=1) if head == "choice" else config)
        self.head: Head = head
        if head == "choice":
            self.multiple_choice_head = MultipleChoiceHead(config)
        else:
            self.classifier = nn.Linear(config.n_embd, config.num_labels)
            nn.init.normal_(self.classifier.weight, std=config.initializer_range)
            nn.init.zeros_(self.classifier.bias)

    @property
    def _architecture(self) -> str:
        return "OpenAIGPTDoubleHeadsModel" if self.head == "choice" else type(self).__name__

    def forward(
        self,
        input_ids: Tensor,
        extract: Tensor,
        members: Tensor,
        lm_targets: Tensor | None = None,
        lm_weight: Tensor | None = None,
        *,
        dropout_seeds: Tensor | None = None,
        first_sequence: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple:
        """Runs the model on N sequences of B examples, padded on the right.

        Args:
            input_ids: (N, T) int64.
            extract: (N,) int64, the position of each extract token.
            members: (B, K) int64, the sequences of each example; −1 where one of head `choice` has
                fewer than K.
            lm_targets: (N, T) int64, what each position predicts; −100 is ignored.
            lm_weight: (N, T) fp32, the share of each prediction in lm_loss.
            dropout_seeds: see `GPT1Model.forward`.
            first_sequence: sequences of the update that come before these.
            return_dict: False returns a tuple.
            kwargs: those of `GPT1Model.forward`.

        Returns:
            lm_loss (with lm_targets): Σ weight · loss, fp32; logits: (B, num_labels), or (B, K) of
            head `choice`, where −∞ stands for an answer that is not there; hidden_states if asked
            for.
        """
        choice = self.head == "choice"
        p = self.multiple_choice_head.dropout_p if choice else self.config.summary_first_dropout
        drops = self.training and p > 0
        if drops and dropout_seeds is None:
            dropout_seeds = self.dropout_stream.advance()
        output = self.transformer(
            input_ids, dropout_seeds=dropout_seeds,
            row_offset=first_sequence * input_ids.shape[-1], **kwargs,
        )  # fmt: skip
        h = output.last_hidden_state
        lm_loss = None
        if lm_targets is not None:
            lm_loss = ops.linear_cross_entropy(
                h, self.transformer.tokens_embed.weight, lm_targets, reduction="sum",
                token_weight=lm_weight,
            )  # fmt: skip
        seed = dropout_seeds[-1] if drops else None
        if choice:
            scores = self.multiple_choice_head(h, extract, seed, first_sequence)  # (N,)
            logits = scores[members].masked_fill(members < 0, -torch.inf)
        else:
            states = h[torch.arange(len(h), device=h.device), extract]  # (N, C)
            summed = states[members].sum(1)  # (B, C)
            if seed is not None:
                summed = dropout(summed, p, seed, first_sequence // members.shape[1])
            logits = self.classifier(summed)
        result = ModelOutput(lm_loss=lm_loss, logits=logits, hidden_states=output.hidden_states)
        return result.to_tuple() if return_dict is False else result
