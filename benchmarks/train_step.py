"""One update of the paper's model by us and by `transformers`, for `bench_train_step.py`.

    python -m benchmarks.train_step gpt1_kernels bf16 0.1

prints the peak memory of one such update in MB, beyond parameters, gradients and optimizer state.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt1_kernels import GPT1Config, GPT1LMHeadModel
from training.optim import make_optimizer
from training.step import autocast, train_step

B, T = 2, 512
LEARNING_RATE, WEIGHT_DECAY, CLIP = 2.5e-4, 0.01, 1.0
SIDES = ("gpt1_kernels", "transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(dropout: float, **overrides: int) -> GPT1Config:
    """GPT-1 with every dropout at one probability."""
    names = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    return GPT1Config(**dict.fromkeys(names, dropout), **overrides)


def build(side: str, config: GPT1Config) -> nn.Module:
    """A language model in training, with the same weights on either side."""
    torch.manual_seed(0)
    ours = GPT1LMHeadModel(config).train()
    if side == "gpt1_kernels":
        return ours
    import transformers

    theirs = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**config.to_dict()))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return theirs.train()


def make_step(model: nn.Module, dtype: str) -> Callable[[Tensor], Tensor]:
    """A function that updates the model on input_ids (B, T) by fused AdamW; returns the loss."""
    optimizer = make_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
    if isinstance(model, GPT1LMHeadModel):
        stream, steps = model.dropout_stream, iter(range(sys.maxsize))
        return lambda input_ids: train_step(
            model, stream, optimizer, input_ids, next(steps), LEARNING_RATE, clip=CLIP, dtype=dtype
        )[0]

    def step(input_ids: Tensor) -> Tensor:
        with autocast("cpu", dtype):
            loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def bare_products(config: GPT1Config, dtype: str) -> Callable[[], None]:
    """A function that runs an update's matrix products, forward and backward, and nothing else.

    Attention's are those of whole squares, as plain PyTorch computes them.
    """
    c, rows, heads, size = config.n_embd, B * T, B * config.n_head, config.n_embd // config.n_head
    linear = [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)]
    x = {k: torch.randn(rows, k, dtype=DTYPES[dtype]) for k in (c, 3 * c, 4 * c, config.vocab_size)}
    w = {s: torch.randn(*s, dtype=DTYPES[dtype]) for s in [*linear, (c, config.vocab_size)]}
    q = torch.randn(heads, T, size, dtype=DTYPES[dtype])
    p = torch.randn(heads, T, T, dtype=DTYPES[dtype])

    def layer_product(k: int, n: int) -> None:
        x[k] @ w[k, n]
        x[n] @ w[k, n].t()
        x[k].t() @ x[n]

    def products() -> None:
        for _ in range(config.n_layer):
            for k, n in linear:
                layer_product(k, n)
            for _ in range(2):
                q @ q.mT
                p @ q
                p.mT @ q
        layer_product(c, config.vocab_size)

    return products


def peak_megabytes(side: str, dtype: str, dropout: float) -> float:
    """Peak memory of two updates in this process, beyond what lives from update to update."""
    imported = _peak_bytes()
    model = build(side, config(dropout))
    step = make_step(model, dtype)
    input_ids = torch.randint(model.config.vocab_size, (B, T))
    for _ in range(2):
        step(input_ids)
    lasting = 4 * sum(4 * p.numel() for p in model.parameters())  # fp32: p, its gradient, m, v
    return (_peak_bytes() - imported - lasting) / 1e6


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    side, dtype, dropout = sys.argv[1:]
    print(f"{peak_megabytes(side, dtype, float(dropout)):.0f}")
