"""The dropout stream: (seed, step, site, row) → bits, by Philox4x32 with 7 rounds.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". Element (r, j) of an
array of (rows, columns) draws from the block with counter (j // 8, r, step, site). A block has four
32-bit words, so eight 16-bit values: word k holds values 2k (low half) and 2k + 1 (high half).
Value j mod 8 keeps the element when it is at least `threshold(p)`.

`seed` is an int64 tensor of two elements on the device: seed[0] is the key, and
seed[1] = site · 2³² + step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROUNDS = 7
MAX_ROWS = 2**32
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

EMBEDDING_SITE = 0
CLASSIFIER_SITE = 1000

_WORD = 0xFFFFFFFF


def attention_site(layer: int) -> int:
    """The dropout site of the attention probabilities of a layer."""
    return 3 * layer + 1


def residual_sites(layer: int) -> tuple[int, int]:
    """The dropout sites of a layer's two residual branches: attention, feed-forward."""
    return 3 * layer + 2, 3 * layer + 3


def threshold(p: float) -> int:
    """The smallest 16-bit value that keeps an element: floor(p · 65536 + 0.5)."""
    return int(p * 65536 + 0.5)


def keep_scale(p: float) -> float:
    """What survivors are multiplied by: 1 / (1 − threshold / 65536), or 0 where none survives."""
    dropped = threshold(p)
    return 0.0 if dropped == 65536 else 65536 / (65536 - dropped)


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four 32-bit words of Philox4x32-7, each in an int64 tensor.

    Args:
        counter: four int64 tensors of values in [0, 2³²), broadcast against each other.
        key: the low and the high word of the key, likewise.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap, so all 64 bits are right; the mask undoes the shift's sign extension.
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (odd >> 32 & _WORD) ^ c1 ^ k0, (even >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = odd & _WORD, even & _WORD
        k0, k1 = k0 + KEY_INCREMENTS[0] & _WORD, k1 + KEY_INCREMENTS[1] & _WORD
    return [c0, c1, c2, c3]


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, row_offset: int = 0) -> Tensor:
    """The definition of every dropout mask, in plain PyTorch without a host sync.

    Args:
        seed: int64 (2,).
        row_offset: the row number of the first row.

    Returns:
        bool (rows, columns), True keeps.
    """
    rows_of_call = torch.arange(row_offset, row_offset + rows, device=seed.device)
    return keep_mask_of_rows(seed, rows_of_call, columns, p)


def keep_mask_of_rows(seed: Tensor, row_numbers: Tensor, columns: int, p: float) -> Tensor:
    """`keep_mask` for any row numbers: int64 (rows,) → bool (rows, columns)."""
    row, device = row_numbers.unsqueeze(1), seed.device
    block = torch.arange((columns + 7) // 8, device=device).unsqueeze(0)
    key = [seed[0] & _WORD, seed[0] >> 32 & _WORD]
    words = torch.stack(philox4x32([block, row, seed[1] & _WORD, seed[1] >> 32 & _WORD], key), -1)
    values = torch.stack([words & 0xFFFF, words >> 16], -1)  # (rows, blocks, 4, 2)
    return (values >= threshold(p)).flatten(1)[:, :columns]


def dropout(x: Tensor, p: float, seed: Tensor | None, row_offset: int) -> Tensor:
    """Dropout over the last axis of (..., C) with the stream's bits, outside any fused op."""
    if p == 0.0:
        return x
    keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p, row_offset)
    return torch.where(keep.view(x.shape), x * keep_scale(p), 0)


def pack_bits(mask: Tensor) -> Tensor:
    """Packs bool (..., columns) into int32 (..., ceil(columns / 32)); column j is bit j mod 32."""
    words = (mask.shape[-1] + 31) // 32
    padded = torch.nn.functional.pad(mask, (0, 32 * words - mask.shape[-1]))
    bits = padded.reshape(*mask.shape[:-1], words, 32).to(torch.int64)
    return (bits << torch.arange(32, device=mask.device)).sum(-1).to(torch.int32)


def unpack_bits(words: Tensor, columns: int) -> Tensor:
    """Undoes `pack_bits`: int32 (..., ceil(columns / 32)) → bool (..., columns)."""
    bits = words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32) & 1
    return bits.flatten(-2)[..., :columns].bool()


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's default generator, for a module used alone: int64 (2,).

    Raises:
        RuntimeError: in the capture of a CUDA graph, whose replays would draw none.
    """
    on_gpu = device.type == "cuda" and not torch.compiler.is_compiling()
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "seed: None in the capture of a CUDA graph, whose replays would all drop the same; "
            "expected an int64 tensor of 2 elements, to be changed in place between replays"
        )
    key = torch.randint(2**63 - 1, (1,))
    return torch.cat([key, torch.zeros_like(key)]).to(device, non_blocking=True)


class DropoutStream(nn.Module):
    """The dropout seeds of all sites of a model.

    The stream holds a key and a step in device memory, so that a replayed CUDA graph draws new
    bits. Neither is saved with the weights: a training loop restores them from its own state.

    Under `DistributedDataParallel` all ranks have the key and the step of rank 0, and so the same
    bits, unless each passes the number of tokens of the ranks before it as `row_offset`.

    Args:
        n_layer: number of transformer blocks.
    """

    def __init__(self, n_layer: int):
        super().__init__()
        self.n_layer = n_layer
        for name, shape in {"site_words": (3 * n_layer + 2,), "key": (), "step": ()}.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a key from torch's default generator, and goes back to step 0."""
        device = self.key.device
        sites = torch.tensor([*range(3 * self.n_layer + 1), CLASSIFIER_SITE], device=device)
        self.site_words.copy_(sites << 32)
        self.key.copy_(torch.randint(2**63 - 1, (), device=device))
        self.step.zero_()

    def _apply(self, *args, **kwargs):
        before = list(self.buffers())
        super()._apply(*args, **kwargs)
        # `to_empty` leaves them undefined, and no checkpoint has them.
        if before[0].is_meta and not self.key.is_meta:
            self.reset_parameters()
        elif not self.key.is_meta:
            for buffer, value in zip(self.buffers(), before, strict=True):
                if buffer is not value:
                    buffer.copy_(value)
        return self

    def set_key(self, key: int) -> None:
        """Sets the key, a signed 64-bit integer, and goes back to step 0."""
        self.key.fill_(key)
        self.step.zero_()

    def seeds(self, step: int | Tensor) -> Tensor:
        """The seeds of one update: int64 (sites, 2), sites 0 … 3 · n_layer and the classifier's."""
        words = self.site_words + step
        return torch.stack([self.key.expand_as(words), words], dim=1)

    def advance(self) -> Tensor:
        """The seeds of the stream's own step, which is then increased (no host sync).

        Raises:
            RuntimeError: in a backward, where a checkpointed model would draw other bits.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "dropout_stream: a forward in a backward would draw other dropout bits; a "
                "checkpointed model is to be given dropout_seeds=model.dropout_stream.advance()"
            )
        seeds = self.seeds(self.step)
        self.step.add_(1)
        return seeds
