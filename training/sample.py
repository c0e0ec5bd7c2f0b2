"""Text from a model."""

from __future__ import annotations

import torch

from gpt1_kernels import GPT1LMHeadModel
from training.tokenizer import Tokenizer


def sample(
    model: GPT1LMHeadModel,
    tokenizer: Tokenizer,
    prompt: str,
    new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 40,
    top_p: float = 1.0,
    stop_token: int | None = None,
    seed: int | torch.Generator = 0,
) -> str:
    """The prompt and its continuation; the options and errors are those of `generate`.

    An empty prompt is taken as one unknown token.
    """
    ids = torch.tensor([tokenizer.encode(prompt).tolist() or [0]], device=model.device)
    text = model.generate(
        ids, max_new_tokens=new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop_token=stop_token, seed=seed,
    )  # fmt: skip
    return tokenizer.decode(text[0].cpu())
