"""One update of a GPT-1 by us, by `transformers` and on plain PyTorch, for `bench_train_step.py`.

    python -m benchmarks.train_step gpt1_kernels bf16 0.1

prints the peak memory of two updates on a CPU in MB, beyond parameters, gradients and optimizer
state.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.plain_model import PlainLMHeadModel, loss_of
from gpt1_kernels import GPT1Config, GPT1LMHeadModel, use_backend
from gpt1_kernels.backends.logits import padded_vocabulary
from training.optim import make_optimizer
from training.static_step import WARM_UP, CapturedStep
from training.step import autocast, train_step

LEARNING_RATE, WEIGHT_DECAY, CLIP = 2.5e-4, 0.01, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Side:
    """Whose model it is, and how it runs."""

    library: str
    compiled: bool = False
    backend: str | None = None
    """Of ours, by name; by default the automatic choice."""
    captured: bool = False
    """Whether the update is a CUDA graph; of ours, and on a GPU."""


SIDES = {
    "gpt1_kernels": Side("gpt1_kernels"),
    "compiled transformers": Side("transformers", compiled=True),
    "compiled plain PyTorch": Side("plain PyTorch", compiled=True),
    "transformers": Side("transformers"),  # last: it takes what memory there is
}


def config(dropout: float, **overrides: int) -> GPT1Config:
    """GPT-1 with every dropout at one probability."""
    names = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    return GPT1Config(**dict.fromkeys(names, dropout), **overrides)


def build(library: str, config: GPT1Config, device: str = "cpu") -> nn.Module:
    """A language model in training, with the same weights whoever's it is.

    They are drawn where they stay: a CPU takes seconds for those of GPT-1.
    """
    torch.manual_seed(0)
    with torch.device(device):
        ours = GPT1LMHeadModel(config)
        if library == "gpt1_kernels":
            return ours.train()
        if library == "plain PyTorch":
            model = PlainLMHeadModel(config)
        else:
            import transformers

            of_theirs = transformers.OpenAIGPTConfig(**config.to_dict())
            model = transformers.OpenAIGPTLMHeadModel(of_theirs)
    model.load_state_dict(ours.state_dict(), strict=False)
    return model.train()


def make_calls(
    side: Side, config: GPT1Config, dtype: str, input_ids: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Functions that return the loss of input_ids (B, T), by what else they do.

    "forward" keeps what backward needs, "model" runs both and keeps the gradients, "step" updates
    the model by fused AdamW with its gradient clipped.
    """
    model = build(side.library, config, input_ids.device.type)
    optimizer = make_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
    called = torch.compile(model, dynamic=False) if side.compiled else model

    def forward() -> Tensor:
        with autocast(input_ids.device.type, dtype), _on(side.backend):
            return loss_of(called, input_ids)

    def both() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        loss = both()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if side.library == "gpt1_kernels":
        step = _our_step(side, model, optimizer, dtype, input_ids)
    return {"forward": forward, "model": both, "step": step}


def _our_step(
    side: Side, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: str, input_ids: Tensor
) -> Callable[[], Tensor]:
    steps, of_model = itertools.count(), (model, model.dropout_stream, optimizer)
    options = {"clip": CLIP, "dtype": dtype}
    if side.captured:
        update = CapturedStep(*of_model, tuple(input_ids.shape), **options)
    else:
        update = partial(train_step, *of_model, **options)

    def step() -> Tensor:
        with _on(side.backend):
            return update(input_ids, next(steps), LEARNING_RATE).loss

    if side.captured:
        for _ in range(WARM_UP + 1):
            step()
    return step


def _on(backend: str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if backend is None else use_backend(backend)


def loss_and_gradients(
    side: Side, config: GPT1Config, dtype: str, input_ids: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a side makes of input_ids with its first weights; not compiled, which takes too long."""
    model = build(side.library, config, input_ids.device.type)
    with autocast(input_ids.device.type, dtype), _on(side.backend):
        loss = loss_of(model, input_ids)
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def bare_products(config: GPT1Config, dtype: str, input_ids: Tensor) -> Callable[[], None]:
    """A function that runs an update's matrix products, forward and backward, and nothing else.

    Attention's are those of whole squares, as plain PyTorch computes them.
    """
    (B, T), c, heads = input_ids.shape, config.n_embd, config.n_head
    linear = [(c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)]
    V = padded_vocabulary(config.vocab_size)  # rows that are no whole 16 bytes are slow

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=input_ids.device, dtype=DTYPES[dtype])

    x = {k: random(B * T, k) for k in (c, 3 * c, 4 * c, V)}
    w = {s: random(*s) for s in [*linear, (c, V)]}
    q, p = random(B * heads, T, c // heads), random(B * heads, T, T)

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
        layer_product(c, V)

    return products


def peak_megabytes(library: str, dtype: str, dropout: float, B: int = 2, T: int = 512) -> float:
    """Peak memory of two updates in this process, beyond what lives from update to update."""

    def update_twice(size: GPT1Config, B: int, T: int) -> None:
        input_ids = torch.randint(size.vocab_size, (B, T))
        step = make_calls(Side(library), size, dtype, input_ids)["step"]
        for _ in range(2):
            step()

    # What an update imports is no memory of a model.
    update_twice(config(dropout, vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8), 1, 8)
    imported, full = _peak_bytes(), config(dropout)
    update_twice(full, B, T)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT1LMHeadModel(full).parameters())
    return (_peak_bytes() - imported - 4 * 4 * parameters) / 1e6  # fp32: p, its gradient, m, v


def _peak_bytes() -> int:
    # `getrusage` would tell of the process that started this one, if that was larger.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Peak memory of two updates on a CPU, in MB.")
    parser.add_argument("library", choices=sorted({side.library for side in SIDES.values()}))
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("dropout", type=float)
    print(f"{peak_megabytes(**vars(parser.parse_args())):.0f}")
