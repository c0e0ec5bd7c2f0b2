"""Folders that `transformers` opens too: `model.safetensors` and `config.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt1_kernels.config import ALIASES, GPT1Config

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_BUFFER = re.compile(r"(h\.\d+\.attn\.bias|position_ids)$")  # of older releases of transformers
_TABLE = "transformer.tokens_embed.weight"
_HEADS = ("score.", "multiple_choice_head.", "classifier.")
_OVERRIDES = {f.name for f in fields(GPT1Config)} | ALIASES.keys() | {"id2label", "label2id"}


def read_config(folder: str | Path, **overrides) -> GPT1Config:
    """The configuration in a model folder; arguments and errors as of `from_pretrained`."""
    if unknown := overrides.keys() - _OVERRIDES:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: expected keys among {', '.join(sorted(_OVERRIDES))}"
        )
    values = config_values(folder)
    if "id2label" in overrides:
        values.pop("num_labels", None)
    extra = overrides.pop("extra", {})
    return GPT1Config.from_dict({**values, **extra, **overrides})


def config_values(folder: str | Path) -> dict[str, Any]:
    """The content of a model folder's `config.json`; errors as of `from_pretrained`."""
    file = _required(folder, CONFIG)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON, {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: {type(values).__name__}, expected an object")
    return values


def _required(folder: str | Path, name: str) -> Path:
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected a model folder")
    return file


class PretrainedMixin:
    """`from_pretrained` and `save_pretrained` on a local folder."""

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, **overrides: Any
    ) -> Self:
        """Opens a folder written by `save_pretrained` here or in `transformers`.

        Args:
            dtype: of the parameters; by default PyTorch's default, whatever that of the file.
            overrides: values that replace the configuration's; `extra`, those of other keys.

        Raises:
            TypeError: a value that no configuration has.
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, or a tensor is missing, left over or of another shape;
                the message names it.
        """
        config, weights = read_config(folder, **overrides), _required(folder, WEIGHTS)
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights}: not a whole safetensors file, {error}") from None
        model = cls(config).to(dtype=dtype)
        model.load_pretrained_state(state)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        is_main_process: bool = True,
        save_function: object = None,
    ) -> None:
        """Writes `model.safetensors` and `config.json`, creating the folder.

        Args:
            state_dict: weights to write instead of the model's own, such as a copy of earlier ones.
            is_main_process: of several processes, which write nothing otherwise.
            save_function: as `accelerate` passes it; nothing but safetensors writes.

        Raises:
            OSError: a file cannot be written; names it.
        """
        if not is_main_process:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = self.state_dict() if state_dict is None else state_dict
        state = {k: v.detach().contiguous().cpu() for k, v in state_dict.items()}
        try:
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS}: could not be written, {error}") from None
        config = {
            **self.config.to_dict(),
            "architectures": [self._architecture],
            "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def load_pretrained_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads weights named as in `transformers`, with or without the `transformer.` prefix.

        The tied table is accepted under either of its names; a backbone alone may be loaded into a
        model with a head of its own, whose weights then keep their values. A model without one
        leaves out the head of another.

        Raises:
            ValueError: as `from_pretrained`; or the model is on the meta device.
        """
        if self.device.type == "meta":
            raise ValueError("weights: the model is on the meta device, expected one with memory")
        own = self.state_dict()
        state = _canonical(state, prefixed=_TABLE in own)
        heads = {k for k in own if k.startswith(_HEADS)}
        if not heads:
            state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
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
        if _BUFFER.search(name):
            continue
        if name == "lm_head.weight":
            name = _TABLE
        if prefixed and not name.startswith(("transformer.", *_HEADS)):
            name = f"transformer.{name}"
        if not prefixed:
            name = name.removeprefix("transformer.")
        if name in renamed and not torch.equal(renamed[name], tensor):
            raise ValueError(f"{name}: two tensors that differ, expected one that the head shares")
        renamed[name] = tensor
    return renamed
