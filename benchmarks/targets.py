"""The seven targets at GPT-1's training shape, and what a record says of each.

All are at B = 64, T = 512, bf16, dropout 0.1 unless it says without. Attention goes from qkv
(B, T, 3C) to its output and from its gradient to qkv's, with every copy and the dropout bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.ceilings import Ceilings
from benchmarks.roofline import Floor

OURS = "triton", "cuda"
MEMORY_BOUND = "dropout_add_layer_norm", "layer_norm", "embedding", "dropout_mask"


class Measured:
    """The figures of a record that targets are about; None for what was not measured."""

    def __init__(self, parts: dict[str, dict]):
        """Takes the record's parts (see `benchmarks/gpu_report.py`)."""
        found = [row for part in parts.values() for row in part["found"]]
        self._ops = {
            (row["op"], row["dropout"], row["direction"], row["implementation"]): row
            for row in found
            if "direction" in row
        }
        self._steps = {row["implementation"]: row for row in found if "flops" in row}
        self._ceilings = next((Ceilings(**row) for row in found if "bandwidth" in row), None)

    def seconds(self, op: str, direction: str, name: str, dropout: bool = False) -> float | None:
        row = self._ops.get((op, dropout, direction, name))
        return None if row is None else median(row["seconds"])

    def share_of_floor(self, op: str, direction: str, name: str, dropout: bool) -> float | None:
        row = self._ops.get((op, dropout, direction, name))
        if row is None or self._ceilings is None:
            return None
        floor = sum(self._ceilings.seconds(Floor(*floor)) for floor in row["floors"])
        return floor / median(row["seconds"])

    def peak_bytes(self, op: str, direction: str, name: str) -> int | None:
        row = self._ops.get((op, False, direction, name))
        return None if row is None else row["peak_bytes"]

    def tokens_per_second(self, name: str) -> float | None:
        row = self._steps.get(name)
        return None if row is None else row["tokens"] / median(row["seconds"])

    def steps(self) -> list[str]:
        """Our sides of the whole update."""
        return [name for name, row in self._steps.items() if row["kind"] == "ours"]


@dataclass(frozen=True)
class Target:
    """What a figure should be at least, or at most."""

    number: int
    text: str
    goal: float
    form: str
    """How figures are written."""
    values: Callable[[Measured], Iterator[tuple[str, float | None]]]
    """Whose, and the figure."""
    at_most: bool = False

    def best(self, measured: Measured) -> tuple[str, float] | None:
        """The best of those measured."""
        values = [(name, value) for name, value in self.values(measured) if value is not None]
        choose = min if self.at_most else max
        return choose(values, key=lambda pair: pair[1], default=None)

    def is_met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _faster(op: str, direction: str, peer: str, dropout: bool = False, peers_dropout=None):
    """How many times the peer's time ours would fit into."""
    peers_dropout = dropout if peers_dropout is None else peers_dropout

    def values(m: Measured):
        for name in OURS:
            ours = m.seconds(op, direction, name, dropout)
            yield name, _ratio(m.seconds(op, direction, peer, peers_dropout), ours)

    return values


def _slower(op: str, direction: str, yardstick: str):
    """Our time, in the yardstick's."""

    def values(m: Measured):
        for name in OURS:
            yield name, _ratio(m.seconds(op, direction, name), m.seconds(op, direction, yardstick))

    return values


def _cost_of_dropout(suffix: str):
    def values(m: Measured):
        for name in OURS:
            dropping = m.seconds("causal_attention", "both", name + suffix, dropout=True)
            ratio = _ratio(dropping, m.seconds("causal_attention", "both", name))
            yield name, None if ratio is None else ratio - 1

    return values


def _share(op: str, direction: str, dropout: bool):
    def values(m: Measured):
        for name in OURS:
            yield name, m.share_of_floor(op, direction, name, dropout)

    return values


def _memory(m: Measured):
    for name in OURS:
        peak = m.peak_bytes("linear_cross_entropy", "both", name)
        yield name, None if peak is None else 1e-6 * peak


def _less_memory(m: Measured):
    eager = m.peak_bytes("linear_cross_entropy", "both", "eager")
    for name in OURS:
        yield name, _ratio(eager, m.peak_bytes("linear_cross_entropy", "both", name))


def _tokens(m: Measured):
    for name in m.steps():
        yield name, m.tokens_per_second(name)


def _faster_steps(peer: str):
    def values(m: Measured):
        for name in m.steps():
            yield name, _ratio(m.tokens_per_second(name), m.tokens_per_second(peer))

    return values


def _triton_over_cuda(ops: tuple[str, ...]):
    """CUDA's time over Triton's: of several ops, the least, once all of them are measured."""

    def values(m: Measured):
        found = []
        for op in ops:
            for dropout in (False, True):
                for direction in ("forward", "both"):
                    times = [m.seconds(op, direction, name, dropout) for name in ("cuda", "triton")]
                    if (ratio := _ratio(*times)) is not None:
                        found.append((op, ratio))
        if {op for op, _ in found} == {*ops}:
            yield min(found, key=lambda pair: pair[1])

    return values


ATTENTION, SITE, LOSS = "causal_attention", "dropout_add_layer_norm", "linear_cross_entropy"
BARE = "bare products"

TARGETS = [
    Target(1, "attention, x SDPA flash", 2.0, "{:.2f}x",
           _faster(ATTENTION, "both", "SDPA flash", dropout=True)),
    Target(1, "attention, x SDPA cuDNN without dropout", 1.0, "{:.2f}x",
           _faster(ATTENTION, "both", "SDPA cuDNN", dropout=True, peers_dropout=False)),
    Target(1, "attention, x FlashAttention-4 without dropout", 1.0, "{:.2f}x",
           _faster(ATTENTION, "both", "FlashAttention-4", dropout=True, peers_dropout=False)),
    Target(2, "what dropout costs attention, bits drawn elsewhere", 0.10, "{:.0%}",
           _cost_of_dropout(" given bits"), at_most=True),
    Target(2, "what dropout costs attention, in line", 0.30, "{:.0%}",
           _cost_of_dropout(""), at_most=True),
    Target(3, "dropout + add + LayerNorm forward, of the copy's bandwidth", 0.90, "{:.0%}",
           _share(SITE, "forward", dropout=True)),
    Target(3, "backward with all gradients, of the copy's bandwidth", 0.85, "{:.0%}",
           _share(SITE, "backward", dropout=True)),
    Target(3, "forward, x torch.compile", 1.3, "{:.2f}x",
           _faster(SITE, "forward", "torch.compile", dropout=True)),
    Target(3, "backward, x torch.compile", 2.0, "{:.2f}x",
           _faster(SITE, "backward", "torch.compile", dropout=True)),
    Target(4, "GELU-FFN, in the time of its six bare products", 1.10, "{:.2f}x",
           _slower("gelu_ffn", "both", BARE), at_most=True),
    Target(4, "GELU-FFN, x torch.compile", 1.15, "{:.2f}x",
           _faster("gelu_ffn", "both", "torch.compile")),
    Target(5, "linear + cross-entropy, in the time of its three bare products", 1.15, "{:.2f}x",
           _slower(LOSS, "both", BARE), at_most=True),
    Target(5, "linear + cross-entropy, x Liger", 2.0, "{:.2f}x", _faster(LOSS, "both", "Liger")),
    Target(5, "linear + cross-entropy, peak memory, dh's 50 MB included", 450, "{:,.0f} MB",
           _memory, at_most=True),
    Target(5, "eager's peak memory, in ours", 20, "{:.1f}x", _less_memory),
    Target(6, "the whole update, tokens/s", 700_000, "{:,.0f}", _tokens),
    Target(6, "the whole update, x transformers", 5.0, "{:.2f}x", _faster_steps("transformers")),
    Target(6, "the whole update, x compiled transformers", 2.5, "{:.2f}x",
           _faster_steps("compiled transformers")),
    Target(6, "the whole update, x compiled plain PyTorch", 1.4, "{:.2f}x",
           _faster_steps("compiled plain PyTorch")),
    Target(7, "Triton, x CUDA where memory binds, the least", 0.95, "{:.2f}x",
           _triton_over_cuda(MEMORY_BOUND)),
    Target(7, "Triton, x CUDA in attention, the least", 0.8, "{:.2f}x",
           _triton_over_cuda((ATTENTION,))),
]  # fmt: skip
