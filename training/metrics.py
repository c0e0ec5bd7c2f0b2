"""What a run is judged by: perplexities, bits per byte, speed."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt1_kernels import CausalSelfAttention, GPT1LMHeadModel
from gpt1_kernels.ops import linear_cross_entropy
from training.step import autocast

KNESER_NEY_DISCOUNT = 0.75
BLOCK = 10**7  # tokens that are counted at a time, in some 30 bytes each


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, and to TensorBoard where it is installed.

    Args:
        folder: of the run.
        first_step: TensorBoard forgets what an interrupted run logged beyond it. At it, the
            validation stays, which is not repeated, and the update, which is, may stand twice.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        self.path = folder / "metrics.jsonl"
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else 0
            )

    def write(self, step: int, **values: float) -> None:
        """Logs values by name; what is not finite is null, as JSON has it."""
        append(self.path, json.dumps({"step": step, **finite(values)}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values by name; None in place of what is not finite."""
    return {name: x if math.isfinite(x) else None for name, x in values.items()}


def append(path: Path, text: str) -> None:
    """Appends to a file.

    Raises:
        OSError: it cannot be written; names it, also where the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@torch.no_grad()
def mean_loss(
    model: GPT1LMHeadModel, windows: Tensor, batch_size: int, device: str, dtype: str
) -> float:
    """Mean negative log-likelihood in nats of windows[:, 1:], (count, T), without dropout."""
    model.eval()
    total = torch.zeros((), device=device)
    for part in windows.split(batch_size):
        part = part.to(device)
        with autocast(device, dtype):
            # Not through the head, which outside training returns logits of (B, T, V) too.
            h = model.transformer(part).last_hidden_state
            table = model.transformer.tokens_embed.weight
            total += linear_cross_entropy(h[:, :-1], table, part[:, 1:]) * len(part)
    model.train()
    return float(total) / len(windows)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats: infinite where no float is as large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Baselines:
    """Perplexities of two counted models on the same targets as the trained one."""

    unigram: float
    bigram: float


def baselines(train: np.ndarray, windows: np.ndarray, vocab_size: int) -> Baselines:
    """Unigram (add-one) and interpolated Kneser-Ney bigram perplexity of windows[:, 1:].

    The bigram is p(w|c) = max(n(c,w) − d, 0)/n(c) + d·t(c)/n(c) · q(w), with t(c) the number of
    distinct successors of c and q(w) proportional to the number of distinct predecessors of w, plus
    one, and d = 0.75 (Kneser & Ney 1995, interpolated as by Chen & Goodman 1999). A context never
    seen falls back to q.

    Args:
        train: int (tokens,), which may be a memory map: memory grows with its distinct pairs.
        windows: int64 (count, T); every token but a window's first is a target.
    """
    targets, contexts = windows[:, 1:].ravel(), windows[:, :-1].ravel()
    pairs, pair_counts = _pairs(train, vocab_size)
    followed = np.bincount(pairs // vocab_size, pair_counts, vocab_size)
    counts = followed + 1
    counts[train[-1]] += 1
    unigram = np.exp(-np.mean(np.log(counts[targets] / counts.sum())))

    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)
    continuation = np.bincount(pairs % vocab_size, minlength=vocab_size) + 1
    q = (continuation / continuation.sum())[targets]

    wanted = contexts * vocab_size + targets
    index = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    n_pair = np.where(pairs[index] == wanted, pair_counts[index], 0)
    n_context = followed[contexts]
    seen = np.maximum(n_context, 1)
    discounted = np.maximum(n_pair - KNESER_NEY_DISCOUNT, 0) / seen
    backoff = np.where(n_context > 0, KNESER_NEY_DISCOUNT * successors[contexts] / seen, 1.0)
    bigram = np.exp(-np.mean(np.log(discounted + backoff * q)))
    return Baselines(float(unigram), float(bigram))


def _pairs(train: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of neighbours, as first * vocab_size + second, and the counts of each."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, len(train) - 1, BLOCK):
        block = train[start : start + BLOCK + 1].astype(np.int64)
        found, often = np.unique(block[:-1] * vocab_size + block[1:], return_counts=True)
        pairs, places = np.unique(np.concatenate((pairs, found)), return_inverse=True)
        counts = np.bincount(places, np.concatenate((counts, often)))
    return pairs, counts


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """Bits a byte of a text of n_bytes that is tokens long, from the mean loss in nats a token.

    The bytes are those of the text as read. The model predicts it lower-cased and without its
    white space, so the number compares our runs with each other, not with a byte-level model.
    """
    return loss / math.log(2) * tokens / n_bytes


def flops_per_token(model: GPT1LMHeadModel) -> float:
    """Matrix arithmetic of forward and backward: 6 a weight, and the causal half of attention."""
    positions = model.transformer.positions_embed.weight  # looked up, not multiplied
    weights = sum(p.numel() for p in model.parameters() if p.dim() >= 2) - positions.numel()
    layers = sum(isinstance(module, CausalSelfAttention) for module in model.modules())
    return 6 * weights + 6 * layers * positions.numel()


def measured_peak(device: str, dtype: str) -> float:
    """FLOP/s of a bare product in the training dtype: the base of model FLOP utilisation."""
    size = 8192 if device.startswith("cuda") else 1024
    a = torch.randn(
        size, size, device=device, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16
    )
    best = math.inf
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
