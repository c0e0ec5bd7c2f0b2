"""Batches of examples: padded to their own longest sequence, and made of examples of like length.

Padding is on the right, where a causal model needs no mask to ignore it: no real token attends to
it, it is no target, and the extract token is found by its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gpt1_kernels.heads import IGNORE_INDEX
from training.inputs import Encoded

PADDING = 0
POOL = 50  # batches that are filled from one part of an epoch, sorted by length


@dataclass(frozen=True, eq=False)
class Batch:
    """N sequences of B examples; those of an example follow each other."""

    input_ids: Tensor  # int64 (N, T)
    extract: Tensor  # int64 (N,), where the extract token is
    members: Tensor  # int64 (B, K), the sequences of each example; −1 where it has fewer
    lm_targets: Tensor  # int64 (N, T), the next token
    lm_weight: Tensor  # fp32 (N, T): a sequence weighs 1 / N, each of its targets alike
    labels: Tensor | None  # int64 (B,), or fp32 of a regression; None where one is not known

    def to(self, device: str) -> Batch:
        """On a device; to a GPU from pinned memory, so that the host need not wait for it."""
        if not device.startswith("cuda"):
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{
            name: None if x is None else x.pin_memory().to(device, non_blocking=True)
            for name, x in values.items()
        })  # fmt: skip

    def split(self, parts: int) -> Iterator[tuple[int, Batch]]:
        """Micro-batches of whole examples, each after the number of sequences before it.

        All keep the length and the weights of the whole batch, so that their sums are its own. To
        be called in host memory, for it looks at the numbers.

        Args:
            parts: at most as many as there are examples.
        """
        ends = (self.members >= 0).sum(1).cumsum(0).tolist()
        first = 0
        for examples in np.array_split(np.arange(len(ends)), parts):
            here = slice(first, ends[examples[-1]])
            members = self.members[examples]
            by_sequence = ("input_ids", "extract", "lm_targets", "lm_weight")
            part = replace(
                self,
                **{name: getattr(self, name)[here] for name in by_sequence},
                members=torch.where(members >= 0, members - first, -1),
                labels=None if self.labels is None else self.labels[examples],
            )
            yield first, part
            first = here.stop


def collate(examples: Sequence[Encoded], *, length: int | None = None) -> Batch:
    """One batch of encoded examples.

    Args:
        length: to pad to, by default the longest sequence's.
    """
    sequences = [s for example in examples for s in example.sequences]
    lengths = torch.tensor([len(s) for s in sequences])
    length = max(example.length for example in examples) if length is None else length
    input_ids = torch.full((len(sequences), length), PADDING)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence)

    predicts = torch.arange(length) < lengths[:, None] - 1
    weight = predicts / ((lengths[:, None] - 1) * len(sequences))
    counts = torch.tensor([len(example.sequences) for example in examples])
    place = torch.arange(int(counts.max()))
    first = counts.cumsum(0) - counts
    labels = [example.label for example in examples]
    return Batch(
        input_ids,
        extract=lengths - 1,
        members=torch.where(place < counts[:, None], first[:, None] + place, -1),
        lm_targets=torch.where(predicts, input_ids.roll(-1, 1), IGNORE_INDEX),
        lm_weight=weight.float(),
        labels=None if None in labels else torch.tensor(labels),
    )


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which examples are in the batch of an update: a pure function of (seed, step).

    An epoch shuffles the examples, leaves the last `n mod batch_size` out, as the released code
    does, sorts each stretch of 50 batches by length, cuts it into batches, and shuffles those.
    """

    lengths: np.ndarray  # (examples,)
    batch_size: int
    seed: int

    def __post_init__(self):
        if len(self.lengths) < self.batch_size:
            raise ValueError(
                f"--batch-size: {self.batch_size}, expected at most the {len(self.lengths)} "
                "examples to train on"
            )

    @property
    def per_epoch(self) -> int:
        """Updates in an epoch."""
        return len(self.lengths) // self.batch_size

    def batch(self, step: int) -> np.ndarray:
        """The examples of update `step`: int64 (batch_size,)."""
        epoch, index = divmod(step, self.per_epoch)
        return _epoch(self, epoch)[index]


@lru_cache(maxsize=2)
def _epoch(buckets: Buckets, epoch: int) -> np.ndarray:
    """The batches of an epoch in order: int64 (per_epoch, batch_size)."""
    rng = np.random.default_rng([buckets.seed, epoch])
    order = rng.permutation(len(buckets.lengths))[: buckets.per_epoch * buckets.batch_size]
    stretch = POOL * buckets.batch_size
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        order[start : start + stretch] = part[np.argsort(buckets.lengths[part], kind="stable")]
    return rng.permutation(order.reshape(-1, buckets.batch_size))


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[np.ndarray]:
    """All examples once, the shortest first, for evaluation: batches of their numbers."""
    order = np.argsort([example.length for example in examples], kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
