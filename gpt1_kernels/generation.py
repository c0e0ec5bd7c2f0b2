"""Text from a language model: decoding with a key/value cache, and the choice of a token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt1_kernels.cache import KeyValueCache


class GenerationMixin:
    """`generate` for a model that takes a cache and returns logits."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop_token: int | None = None,
        seed: int | torch.Generator | None = None,
    ) -> Tensor:  # (B, T + new)
        """Continues every row, by its likeliest token or by a draw.

        Args:
            input_ids: int64, a prompt of one token or more in each row.
            attention_mask: 1 for real tokens; padding is on the left, and positions count from a
                row's first real token.
            max_new_tokens: the most tokens to add, at least 1.
            temperature: the logits are divided by it; 0 takes the likeliest token.
            top_k: draws from the k likeliest tokens only.
            top_p: draws from the fewest likeliest tokens that hold this share of the probability
                (Holtzman et al. 2020), after top_k.
            stop_token: ends a row, which is filled up with it while others go on.
            seed: of the draws, or a generator on the model's device; by default torch's own.

        Returns:
            The prompts and what follows; shorter than T + max_new_tokens once all rows have ended.

        Raises:
            ValueError: prompt and new tokens exceed n_positions, a prompt is empty or padded
                elsewhere than on the left, or an argument is out of range.
        """
        _check_choice(temperature, top_k, top_p)
        mask = _checked_mask(input_ids, attention_mask)
        unpadded = int(mask.sum(-1).max()) if len(mask) else mask.shape[1]
        limit = self.config.n_positions
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {max_new_tokens}, expected at least 1")
        if unpadded + max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens: a prompt of {unpadded} tokens and {max_new_tokens} new ones are "
                f"{unpadded + max_new_tokens}, expected at most n_positions {limit}"
            )
        if isinstance(seed, int):
            seed = torch.Generator(input_ids.device).manual_seed(seed)

        # Columns in which every row is padding need not run.
        ids, mask = input_ids[:, -unpadded:], mask[:, -unpadded:]
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        cache = KeyValueCache(len(self.transformer.h), unpadded + max_new_tokens - 1)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        new = ids.new_empty(len(ids), max_new_tokens)
        with _evaluating(self):
            for i in range(max_new_tokens):
                logits = self(
                    ids, mask if i == 0 else None, position_ids=positions, logits_to_keep=1,
                    cache=cache,
                ).logits[:, -1]  # fmt: skip
                chosen = choose(logits, temperature, top_k, top_p, seed)
                if stop_token is not None:
                    chosen = chosen.masked_fill(ended, stop_token)
                    ended = chosen == stop_token
                new[:, i] = chosen
                if stop_token is not None and ended.all():
                    new = new[:, : i + 1]
                    break
                ids, positions = chosen[:, None], positions[:, -1:] + 1
        return torch.cat([input_ids, new], dim=1)


def choose(
    logits: Tensor,  # (B, V)
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B,)
    """One token a row; the arguments are those of `GenerationMixin.generate`."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    logits = logits.float()
    scores, candidates = (logits - logits.amax(-1, keepdim=True)) / temperature, None
    if top_k is not None or top_p < 1.0:
        width = scores.shape[-1]
        scores, candidates = scores.topk(width if top_k is None else min(top_k, width))
    p = scores.softmax(-1)
    if top_p < 1.0:
        # Kept while the likelier ones hold less than top_p: the likeliest always is.
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if candidates is None else candidates.gather(-1, drawn)).squeeze(-1)


def _check_choice(temperature: float, top_k: int | None, top_p: float) -> None:
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature: {temperature}, expected a finite number of at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k}, expected at least 1")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: {top_p}, expected a share in (0, 1]")


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool (B, T), True for real tokens."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: shape {tuple(input_ids.shape)}, expected (B, T) of at least one token"
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)}, "
            f"expected that of input_ids {tuple(input_ids.shape)}"
        )
    mask = attention_mask != 0
    misplaced = (mask[:, :-1] & ~mask[:, 1:]).any(-1) | ~mask[:, -1]
    if misplaced.any():
        row = int(misplaced.nonzero()[0])
        raise ValueError(f"attention_mask: row {row}, expected padding on the left of a prompt")
    return mask


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; afterwards each is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
