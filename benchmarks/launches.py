"""Launches of a training step by the names of the kernels and of PyTorch's ops, without a GPU.

    python -m benchmarks.launches

One update of a small model in bf16, all dropout on, is run as `benchmarks.traffic` runs an op. A
model of two blocks launches more than one of a single block by what a block launches; the rest is
the embedding, the loss, the clip and the optimizer. An op of PyTorch's counts as one launch,
whatever it starts on a GPU; allocations and views count nothing. What scales with the batch, such
as the chunks of the loss, is here what one chunk takes.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from collections import Counter
from unittest import mock

import torch

from benchmarks import baseline
from benchmarks.traffic import COUNTING, SHARED_MEMORY, unchecked_ids
from gpt1_kernels import GPT1Config, GPT1LMHeadModel, use_backend
from gpt1_kernels.backends.cuda import extension
from gpt1_kernels.errors import error_record
from training.optim import make_optimizer
from training.step import train_step

B, T, C, HEADS, V = 2, 64, 64, 1, 97
LAYERS = 12  # of GPT-1
RATE, DECAY = 1e-3, 0.01


def of_update(backend: str, layers: int) -> Counter[str]:
    """Launches of the second update of a model, whose optimizer has its state."""
    torch.manual_seed(0)
    model = GPT1LMHeadModel(
        GPT1Config(vocab_size=V, n_positions=T, n_embd=C, n_head=HEADS, n_layer=layers)
    ).train()
    optimizer = make_optimizer(model, RATE, DECAY)
    input_ids = torch.randint(V, (B, T))

    def update(step: int) -> None:
        train_step(model, model.dropout_stream, optimizer, input_ids, step, RATE, dtype="bf16")

    update(0)
    for op in ("embedding", "linear_cross_entropy"):
        error_record(op, V, torch.device("cpu"))  # made once, not in every call
    with (
        use_backend(backend),
        unchecked_ids(backend),
        mock.patch("gpt1_kernels.ops._library.raise_recorded"),  # which reads host memory alone
        COUNTING[backend](SHARED_MEMORY) as traffic,
    ):
        update(1)
    return traffic.launches


def of_model(backend: str) -> dict[str, tuple[int, int]]:
    """By name: the launches of a block, and those beside the blocks; PyTorch's ops come last."""
    one, two = (of_update(backend, layers) for layers in (1, 2))
    names = sorted((name for name in two if two[name]), key=lambda name: (":" in name, name))
    return {name: (two[name] - one[name], 2 * one[name] - two[name]) for name in names}


def rows() -> dict[str, dict[str, int]]:
    """What the baseline keeps, of both backends."""
    found: dict[str, dict[str, int]] = {}
    for backend in COUNTING:
        for name, (of_block, besides) in of_model(backend).items():
            quantities = {f"{backend}, a block": of_block, f"{backend}, besides": besides}
            found.setdefault(name, {}).update(quantities)
    return found


def versions() -> dict[str, str]:
    """What the launches depend on beside our source."""
    return {"torch": baseline.release(torch.__version__)}


def main() -> None:
    for backend in COUNTING:
        if backend == "cuda_host" and extension.absence(backend) is not None:
            continue
        print(f"{backend:40}{'a block':>10}{'besides':>10}{'GPT-1':>10}")
        total = 0
        for name, (of_block, besides) in of_model(backend).items():
            total += (launched := LAYERS * of_block + besides)
            print(f"  {name:38}{of_block:10}{besides:10}{launched:10}")
        print(f"  {'all':38}{total:30}\n", flush=True)


if __name__ == "__main__":
    main()
