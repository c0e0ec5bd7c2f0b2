"""Kernels that one update of GPT-1 starts, by name: those of a layer, and the others.

    python -m benchmarks.launches [triton | cuda_host]

They are counted without a GPU, on models of one and of two small layers, in bf16 autocast and with
every dropout on: our own on Triton's interpreter or in the CPU build of the CUDA kernels, PyTorch's
at its dispatcher. There a call counts once, though a sort, or a multi-tensor call on all of GPT-1's
parameters, starts several kernels.
"""

from __future__ import annotations

import argparse
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from benchmarks.host_overhead import unchecked_ids
from gpt1_kernels import GPT1Config, GPT1LMHeadModel, backends, use_backend
from gpt1_kernels.backends.cuda import extension
from gpt1_kernels.ops import _library
from gpt1_kernels.weight_cast import cast_once
from training import step as training_step
from training.optim import make_optimizer
from training.step import train_step

B, T, RATE, DECAY = 2, 16, 1e-3, 0.01
LAYERS = 12  # of GPT-1


def launches_of_update(backend: str, n_layer: int, dtype: str = "bf16") -> Counter[str]:
    """The kernels of an update that is not the first, by name; PyTorch's begin with `aten::`."""
    torch.manual_seed(0)
    config = GPT1Config(vocab_size=90, n_positions=T, n_embd=32, n_layer=n_layer, n_head=2)
    model = GPT1LMHeadModel(config).train()
    optimizer = make_optimizer(model, RATE, DECAY)
    input_ids = torch.randint(config.vocab_size, (B, T))

    def update(step: int) -> None:
        train_step(model, model.dropout_stream, optimizer, input_ids, step, RATE, dtype=dtype)

    with use_backend(backend), mock.patch.object(training_step, "weights_in", _weights_in):
        update(0)
        calls = _PyTorchCalls()
        with calls, seeing_into_our_ops(calls, backend), _counting(backend) as own:
            update(1)
    return own + calls.counts


def launches_by_layer(backend: str) -> dict[str, tuple[int, int]]:
    """By name: the launches of a layer, and those beside the layers."""
    one, two = (launches_of_update(backend, layers) for layers in (1, 2))
    return {name: (count - one[name], 2 * one[name] - count) for name, count in two.items()}


def _weights_in(model: nn.Module, dtype: str) -> AbstractContextManager:
    """`training.step.weights_in` as on a GPU."""
    return cast_once(model, torch.bfloat16 if dtype == "bf16" else torch.float32)


class _PyTorchCalls(TorchDispatchMode):
    """Counts the calls that start a kernel on a GPU: no views, no uninitialised memory."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, returns = function._schema.name, function._schema.returns
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        is_view = aliases or name == "aten::_unsafe_view"
        if function.namespace == "aten" and "empty" not in name and not is_view:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def seeing_into_our_ops(mode: TorchDispatchMode, backend: str) -> Iterator[None]:
    """Inside, the mode sees what our launchers leave to PyTorch, and nothing of the interpreter."""

    def kernel(*which):
        def run(*args):
            with mode:
                return backends.kernel(*which)(*args)

        return run

    def execute(self, *args, **kwargs):
        with _disable_current_modes():
            return execute_grid(self, *args, **kwargs)

    execute_grid = GridExecutor.__call__
    with (
        mock.patch.object(_library, "kernel", kernel),
        mock.patch.object(GridExecutor, "__call__", execute),
        unchecked_ids(backend),
    ):
        yield


@contextmanager
def _counting(backend: str) -> Iterator[Counter[str]]:
    """The launches inside of a backend's own kernels, by name."""
    counts: Counter[str] = Counter()
    backends.launches.clear()
    if backend == "cuda_host":
        extension.module(backend).count_traffic(True)
    yield counts
    if backend == "cuda_host":
        extension.module(backend).count_traffic(False)
        for name, counted in extension.module(backend).traffic().items():
            counts[name] += counted["launches"]
    else:
        for (_, name), count in backends.launches.items():
            if name.endswith("_kernel"):  # and not the name of a low-level op
                counts[name] += count


def table(backend: str) -> str:
    launches = launches_by_layer(backend)
    lines = [f"{'kernels of an update, ' + backend:45}{'a layer':>10}{'the rest':>10}"]
    for name in sorted(launches, key=lambda name: (name.startswith("aten"), name)):
        lines.append("{:45}{:10}{:10}".format(name, *launches[name]))
    of_layer, rest = map(sum, zip(*launches.values(), strict=True))
    lines.append(f"{'all':45}{of_layer:10}{rest:10}")
    lines.append(f"{f'an update of {LAYERS} layers':45}{LAYERS * of_layer + rest:20}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", nargs="?", choices=("triton", "cuda_host"), default="triton")
    print(table(parser.parse_args().backend))
