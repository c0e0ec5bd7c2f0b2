"""An update that reads nothing but device memory, so that a CUDA graph can replay it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt1_kernels.errors import check_errors, raise_recorded
from gpt1_kernels.rng import DropoutStream
from training.step import Update, train_step

WARM_UP = 3


class StaticStep:
    """`train_step` on tensors that stay where they are.

    What changes from update to update is copied into them: the batch, the learning rate, and the
    number of the update, which selects the dropout bits. `update` reads nothing else from the host,
    and the host waits for nothing.

    Args:
        optimizer: a fused one.
        batch: the shape (B, T) of every batch.
        options: the keyword arguments of `train_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        dropout_stream: DropoutStream,
        optimizer: torch.optim.Optimizer,
        batch: tuple[int, int],
        **options: Any,
    ):
        self.model, self.dropout_stream, self.optimizer = model, dropout_stream, optimizer
        self.options = options
        device = dropout_stream.key.device
        self.input_ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        # AdamW's GPU kernel reads an fp32 rate; on a CPU fp64 keeps all bits of the Python float.
        precision = torch.float64 if device.type == "cpu" else torch.float32
        self.learning_rate = torch.zeros((), dtype=precision, device=device)

    def __call__(self, input_ids: Tensor, step: int, learning_rate: float) -> Update:
        """Makes update `step` on input_ids (B, T), which lie on the device or in pinned memory."""
        self.input_ids.copy_(input_ids, non_blocking=True)
        self.step.fill_(step)
        self.learning_rate.fill_(learning_rate)
        return self.make()

    def make(self) -> Update:
        """Makes the update that the tensors describe."""
        return self.update()

    def update(self) -> Update:
        return train_step(
            self.model, self.dropout_stream, self.optimizer, self.input_ids, self.step,
            self.learning_rate, **self.options,
        )  # fmt: skip


class CapturedStep(StaticStep):
    """A `StaticStep` on a GPU that is captured as a CUDA graph once, and replayed.

    The first updates run eagerly on the stream of the capture: they compile kernels, and allocate
    the optimizer's state and whatever else lasts. The next one is captured, which does not run it,
    and then replayed, as are all later ones.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.stream = torch.cuda.Stream(self.step.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.made: Update | None = None
        self.warmed_up = 0

    def make(self) -> Update:
        if self.warmed_up < WARM_UP:
            self.warmed_up += 1
            here = torch.cuda.current_stream(self.step.device)
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                made = self.update()
            here.wait_stream(self.stream)
        else:
            if self.graph is None:
                self._capture()
            raise_recorded()  # of the last update, since the ops' own checks are not replayed
            self.graph.replay()
            made = self.made
        return Update(*(x.clone() for x in made))  # the next update overwrites them

    def _capture(self) -> None:
        check_errors()  # now, since an op in a capture cannot wait to raise
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.made = self.update()
        self.graph = graph  # only here: a capture that failed must not be replayed
