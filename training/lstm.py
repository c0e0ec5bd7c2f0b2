"""The LSTM of the paper's ablations: one layer of it in place of the Transformer's blocks.

A baseline on plain PyTorch: its layer is `torch.nn.LSTM`, without a kernel of ours. What is around
it is GPT-1's: embeddings, dropout stream, tied output matrix and heads, so that it is pre-trained,
saved and fine-tuned by the same code. On a GPU, where cuDNN runs the layer, two runs need not be
equal to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt1_kernels import GPT1Config, GPT1LMHeadModel, GPT1Model, GPT1TaskModel
from gpt1_kernels.cache import LayerCache
from gpt1_kernels.pretrained import read_config
from gpt1_kernels.rng import dropout, residual_sites
from training.run import CHECKPOINTS, CONFIG, read_json

MODEL_TYPE, UNITS = "gpt1-lstm", "lstm_units"  # in config.json; transformers refuses the former


class LSTMBlock(nn.Module):
    """An LSTM layer, dropout, and a projection back to n_embd, with the interface of a `Block`."""

    def __init__(self, config: GPT1Config, layer: int):
        super().__init__()
        units = config.extra.get(UNITS)
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"{UNITS}: {units!r}, expected a whole number of at least 1")
        self.lstm = nn.LSTM(config.n_embd, units, batch_first=True)
        self.c_proj = nn.Linear(units, config.n_embd)
        self.dropout_p, self.site = config.resid_pdrop, residual_sites(layer)[0]

    @property
    def drops(self) -> bool:
        return self.dropout_p > 0.0

    def forward(
        self,
        h: Tensor,  # (B, T, C)
        residual: Tensor,
        seeds: Tensor | None,
        row_offset: int,
        first_key: Tensor | None,
        cache: LayerCache | None = None,
        keep_bits: None = None,
        fork: bool = False,
    ) -> tuple[Tensor, Tensor]:  # (B, T, C), both
        if first_key is not None:
            torch._assert_async(
                (first_key == 0).all(), "attention_mask: padding on the left, which an LSTM sees"
            )
        length = h.shape[1]
        if cache is not None:  # not worth a state of its own: the layer runs over all of it again
            h, _ = cache.append(h, h)
        # Autocast would run it in fp16 on a GPU, where most of its gradients are zero.
        with torch.autocast(h.device.type, enabled=False):
            y, _ = self.lstm(h.to(self.lstm.weight_ih_l0.dtype))
        y = y[:, -length:]
        if seeds is not None:
            y = dropout(y, self.dropout_p, seeds[self.site], row_offset)
        h = self.c_proj(y)
        return h, h


class LSTMModel(GPT1Model):
    """`GPT1Model` with LSTM layers for blocks.

    Args:
        config: with "lstm_units" in `extra`; see `shape`.
    """

    block_class = LSTMBlock


class LSTMLMHeadModel(GPT1LMHeadModel):
    """`GPT1LMHeadModel` on an LSTM."""

    backbone_class = LSTMModel


class LSTMTaskModel(GPT1TaskModel):
    """`GPT1TaskModel` on an LSTM."""

    backbone_class = LSTMModel
    _architecture = "LSTMTaskModel"


class Backbone(NamedTuple):
    """The models on a backbone."""

    bare: type[GPT1Model]
    language_model: type[GPT1LMHeadModel]
    task_model: type[GPT1TaskModel]


BACKBONES = {
    "transformer": Backbone(GPT1Model, GPT1LMHeadModel, GPT1TaskModel),
    "lstm": Backbone(LSTMModel, LSTMLMHeadModel, LSTMTaskModel),
}


def backbone_of(config: GPT1Config) -> Backbone:
    """That of a configuration."""
    return BACKBONES["lstm" if config.extra.get("model_type") == MODEL_TYPE else "transformer"]


def backbone_at(folder: Path) -> Backbone:
    """That of a model folder; raises as `read_config` does."""
    return backbone_of(read_config(folder))


def model_folder(path: Path) -> Path:
    """The model of a run, or the path itself, which then is a model's.

    Raises:
        FileNotFoundError: a run without a model, such as one that has not ended.
    """
    model = path / "model"
    if model.is_dir():
        return model
    if "resume" in (read_json(path / CONFIG) or {}):  # the options of a run, not a model's shape
        raise FileNotFoundError(
            f"{model}: no such folder, which a run has at its end; until then, "
            f"a folder in {path / CHECKPOINTS} serves as well"
        )
    return path


def shape(backbone: str, preset: str) -> GPT1Config:
    """A preset's shape; for the LSTM one layer, of 2048 units at width 768 and fewer below."""
    config = GPT1Config.preset(preset)
    if backbone == "transformer":
        return config
    extra = {"model_type": MODEL_TYPE, UNITS: 8 * round(config.n_embd * 2048 / 768 / 8)}
    return GPT1Config.preset(preset, n_layer=1, extra=extra)
