"""Folders that `transformers` opens too: `model.safetensors` and `config.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt1_kernels.config import GPT1Config

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_STALE_MASK = re.compile(r"h\.\d+\.attn\.bias$")
_TABLE = "transformer.tokens_embed.weight"
_HEADS = ("score.", "multiple_choice_head.", "classifier.")


def read_config(folder: str | Path, **overrides) -> GPT1Config:
    """The configuration in a model folder; arguments and errors as of `from_pretrained`."""
    file = _required(folder, CONFIG)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON, {error}") from None
    return GPT1Config.from_dict({**values, **overrides})


def _required(folder: str | Path, name: str) -> Path:
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a model folder")
    return file


class PretrainedMixin:
    """`from_pretrained` and `save_pretrained` on a local folder."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides) -> Self:
        """Opens a folder written by `save_pretrained` here or in `transformers`.

        Args:
            overrides: values that replace the configuration's.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, or a tensor is missing, left over or of another shape;
                the message names it.
        """
        config, weights = read_config(folder, **overrides), _required(folder, WEIGHTS)
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights}: not a whole safetensors file, {error}") from None
        model = cls(config)
        model.load_pretrained_state(state)
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes `model.safetensors` and `config.json`, creating the folder.

        Args:
            state_dict: weights to write instead of the model's own, such as a copy of earlier ones.

        Raises:
            OSError: a file cannot be written; names it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = self.state_dict() if state_dict is None else state_dict
        state = {k: v.detach().contiguous().cpu() for k, v in state_dict.items()}
        try:
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS}: could not be written, {error}") from None
        text = json.dumps(
            {**self.config.to_dict(), "architectures": [self._architecture]}, indent=2
        )
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")

    def load_pretrained_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads weights named as in `transformers`, with or without the `transformer.` prefix.

        The tied table is accepted under either of its names; a backbone alone may be loaded into a
        model with a head of its own, whose weights then keep their values.
        """
        own = self.state_dict()
        state = _canonical(state, prefixed=_TABLE in own)
        heads = {k for k in own if k.startswith(_HEADS)}
        if not heads & set(state):
            state.update({k: own[k] for k in heads})
        missing, unexpected = sorted(own.keys() - state), sorted(state.keys() - own)
        if missing or unexpected:
            raise ValueError(f"weights: missing {missing}, unexpected {unexpected}")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{name}: shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)

    @property
    def _architecture(self) -> str:
        return type(self).__name__.replace("GPT1", "OpenAIGPT", 1)


def _canonical(state: Mapping[str, Tensor], prefixed: bool) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if _STALE_MASK.search(name):
            continue
        if name == "lm_head.weight":
            name = _TABLE
        if prefixed and not name.startswith(("transformer.", *_HEADS)):
            name = f"transformer.{name}"
        if not prefixed:
            if name.startswith(_HEADS):
                continue
            name = name.removeprefix("transformer.")
        renamed[name] = tensor
    return renamed
