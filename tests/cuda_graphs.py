"""A stand-in for CUDA graphs on a CPU, which freezes what they freeze.

A capture keeps PyTorch's calls with their arguments as they were, tensors by their memory and
numbers by their value, and undoes what they wrote. A replay makes the calls again, from and to the
same memory, whatever Python does in between.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(values) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class Graph(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`; inside it, a capture."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        kwargs = kwargs or {}
        for given, argument in zip(args, function._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors(given):
                    self.before.setdefault(id(x), (x, x.detach().clone()))
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    @torch.no_grad()
    def end(self) -> None:
        for x, value in self.before.values():
            x.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def capture(graph: Graph, stream):
    with graph:
        yield
    graph.end()


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other) -> None:
        pass


def stand_in(monkeypatch) -> None:
    """Puts the stand-ins in the place of CUDA's graphs and streams."""
    for name, value in {
        "CUDAGraph": Graph, "graph": capture, "Stream": Stream,
        "stream": lambda stream: nullcontext(), "current_stream": Stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
