"""Small models and batches that the tests of the modules share."""

import torch

from gpt1_kernels import GPT1Config
from tests.cases import DEVICE

V, T = 103, 24


def config(**overrides) -> GPT1Config:
    small = {"vocab_size": V, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    return GPT1Config(**{**small, **off, **overrides})


def with_dropout(**overrides) -> GPT1Config:
    return GPT1Config(
        **{**vars(config()), "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, **overrides}
    )


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model in training on the tests' device, its parameters far from their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE).train()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
