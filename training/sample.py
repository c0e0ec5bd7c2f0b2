"""Text from a model in training."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import nn


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    new_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 40,
) -> str:
    """The prompt and its continuation, drawn from the top_k likeliest tokens at a temperature.

    An empty prompt is taken as one unknown token.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids or [0]], device=device)
    model.eval()
    for _ in range(new_tokens):
        window = ids[:, -model.config.n_positions :]
        logits = model(window, logits_to_keep=1).logits[0, -1].float().cpu() / temperature
        likeliest, candidates = logits.topk(min(top_k, len(logits)))
        drawn = torch.multinomial(likeliest.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, candidates[drawn].to(device)[None]], dim=1)
    model.train()
    return tokenizer.decode(ids[0].tolist())
