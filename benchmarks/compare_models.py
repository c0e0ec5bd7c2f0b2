"""Compares whole models and updates of them: right first, then timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from benchmarks.compare import without_frames
from benchmarks.roofline import model_flops
from benchmarks.timing import Timing, peak_memory, samples
from benchmarks.train_step import (
    SIDES,
    Side,
    bare_products,
    build,
    config,
    loss_and_gradients,
    make_calls,
)
from gpt1_kernels import GPT1Config, reference

PASSES = ("forward", "model", "step")
PRODUCTS = "bare products"
ROOM = {"cuda": 1 << 30, "cpu": 0}
"""By device type, the bytes that a side must leave free for what is allocated between its runs."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Of the vector of all gradients."""


@dataclass(frozen=True, eq=False)
class Size:
    """A model and its batch."""

    name: str
    B: int
    T: int
    overrides: dict[str, int] = field(default_factory=dict)
    """Fields of `GPT1Config` other than the paper's."""

    def config(self, dropout: float) -> GPT1Config:
        return config(dropout, **self.overrides)

    def draw(self, device: str) -> Tensor:
        return torch.randint(self.config(0.0).vocab_size, (self.B, self.T), device=device)


GPT1 = Size("gpt1", B=64, T=512)
GPT1_ON_CPU = Size("gpt1", B=2, T=512)
SMALL = Size(
    "small", B=2, T=128, overrides={"vocab_size": 4096, "n_embd": 256, "n_layer": 1, "n_head": 4}
)


@dataclass(frozen=True)
class ModelResult:
    """A side in one pass."""

    implementation: str
    kind: str
    """"ours", "peer" or "yardstick"."""
    seconds: tuple[float, ...]
    """Of each round."""
    tokens: int
    flops: int
    """That the model needs, whatever a side does."""
    peak_bytes: int | None

    @property
    def timing(self) -> Timing:
        return Timing.of(self.seconds)


@dataclass(frozen=True)
class ModelComparison:
    results: dict[str, list[ModelResult]]
    """By pass."""
    problems: dict[str, Exception]
    """Of the sides that raised, were wrong, or came too late: they are not timed."""


def compare_models(
    size: Size,
    dtype: str,
    dropout: float,
    device: str,
    passes: tuple[str, ...],
    rounds: int,
    sides: Mapping[str, Side] = SIDES,
    until: float = inf,
) -> ModelComparison:
    """Checks every side, and times those that are right.

    Args:
        until: of `time.monotonic`; later no side is begun, and no round but the first.
    """
    torch.compiler.reset()
    input_ids, full, plain = size.draw(device), size.config(dropout), size.config(0.0)
    expected = oracle(plain, input_ids[:2])
    products = bare_products(full, dtype, input_ids)  # before those that take what memory there is
    calls, tokens, problems = {}, {PRODUCTS: input_ids.numel()}, {}
    for name, side in sides.items():
        try:
            if time.monotonic() > until:
                raise TimeoutError("the sides before it took all of the time")
            check(side, plain, dtype, input_ids[:2], expected)
            calls[name], tokens[name] = _fitting_calls(side, full, dtype, input_ids, passes[-1])
        except Exception as problem:  # a peer may raise anything; the others are timed all the same
            problems[name] = without_frames(problem)
    results, captured = {}, {name for name, side in sides.items() if side.captured}

    def flops(name: str, each: str) -> int:
        all_of_it = model_flops(tokens[name], size.T, full.n_embd, full.vocab_size, full.n_layer)
        return all_of_it // 3 if each == "forward" else all_of_it

    for each in passes:
        functions = {name: call[each] for name, call in calls.items()}
        if each == "step":
            functions[PRODUCTS] = products
        seconds = samples(functions, device, rounds, until)
        results[each] = [
            ModelResult(
                name, _kind(sides.get(name)), tuple(seconds[name]), tokens[name],
                flops(name, each),
                # A CUDA graph allocates nothing: its memory is kept.
                None if name in captured else peak_memory(function, device),
            )
            for name, function in functions.items()
        ]  # fmt: skip
    return ModelComparison(results, problems)


def _fitting_calls(
    side: Side, config: GPT1Config, dtype: str, input_ids: Tensor, largest: str
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """The calls on the sequences that fit the memory, all or half or a quarter; their tokens."""
    device = input_ids.device
    room = torch.empty(ROOM[device.type], dtype=torch.uint8, device=device)
    while True:
        try:
            calls = make_calls(side, config, dtype, input_ids)
            for _ in range(2):  # the first makes the optimizer's state, when most is free again
                calls[largest]()
        except torch.OutOfMemoryError:
            if len(input_ids) == 1:
                raise
        else:
            del room
            return calls, input_ids.numel()
        input_ids = input_ids[: len(input_ids) // 2]
        gc.collect()


def check(
    side: Side,
    config: GPT1Config,
    dtype: str,
    input_ids: Tensor,
    expected: tuple[Tensor, dict[str, Tensor]],
) -> None:
    """Holds a side's loss and gradients to the `oracle`.

    Raises:
        AssertionError: they differ by more than the tolerances above.
    """
    loss, gradients = loss_and_gradients(side, config, dtype, input_ids)
    expected_loss, expected = expected
    relative = abs(loss.double() - expected_loss) / expected_loss
    assert relative <= LOSS_TOLERANCE[dtype], f"the loss differs by {relative:.2g}"
    assert gradients.keys() == expected.keys(), f"gradients of {gradients.keys()}"
    difference = sum((gradients[n].double() - g).square().sum() for n, g in expected.items())
    relative = (difference / sum(g.square().sum() for g in expected.values())).sqrt()
    assert relative <= GRADIENT_TOLERANCE[dtype], f"the gradients differ by {relative:.2g}"


def oracle(config: GPT1Config, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The fp64 reference's loss, and its gradients by the names of `GPT1LMHeadModel`."""
    model = build("gpt1_kernels", config, input_ids.device.type)
    parameters = {
        name: p.detach().to(torch.float64).requires_grad_() for name, p in model.named_parameters()
    }
    loss = reference.language_model_loss(
        {name.removeprefix("transformer."): p for name, p in parameters.items()}, config, input_ids
    )
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}


def _kind(side: Side | None) -> str:
    if side is None:
        return "yardstick"
    return "ours" if side.library == "gpt1_kernels" else "peer"
