"""What the models return."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict):
    """What a model returns: values by attribute, by key, or by index among those not None.

    Others rebuild it from the values that are not None: accelerate by its type, FSDP1 key by key
    where it is an OrderedDict. What it does not hold is therefore known to the class.
    """

    _names = (
        "loss", "lm_loss", "mc_loss", "logits", "mc_logits", "last_hidden_state", "hidden_states"
    )  # fmt: skip

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any):
        values = {**dict(values), **more}
        super().__init__((k, v) for k, v in values.items() if v is not None)

    def __getattr__(self, name: str) -> Any:
        if name in self or name in self._names:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {self._names}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def to_tuple(self) -> tuple:
        """The values that are not None, in order."""
        return tuple(self.values())


def _flatten(output: ModelOutput) -> tuple[list[Any], tuple]:
    return list(output.values()), tuple(output)


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple], tuple]:
    values, keys = _flatten(output)
    return [(pytree.MappingKey(k), v) for k, v in zip(keys, values, strict=True)], keys


def _unflatten(values: Iterable[Any], keys: tuple) -> ModelOutput:
    return ModelOutput(zip(keys, values, strict=True))


# So that DDP(static_graph=True), torch.export and others find the tensors in an output.
pytree.register_pytree_node(
    ModelOutput, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="gpt1_kernels.ModelOutput",
)  # fmt: skip
