"""The key/value cache of a decoder: what attention has seen, in storage written in place."""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values of one layer.

    Args:
        capacity: n, the most positions that it can hold. The storage, two of (B, n, H, D), has the
            dtype and the device of the first keys and values.
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._k = self._v = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Copies k and v, (B, T, H, D), behind what is there; views of all of it, (B, Tk, H, D).

        Raises:
            ValueError: more than `capacity` positions.
        """
        start, end = self.length, self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"cache: {end} positions, expected at most its {self.capacity}")
        if self._k is None:
            shape = (k.shape[0], self.capacity, *k.shape[2:])
            self._k, self._v = k.new_empty(shape), v.new_empty(shape)
        self._k[:, start:end] = k
        self._v[:, start:end] = v
        self.length = end
        return self._k[:, :end], self._v[:, :end]


class KeyValueCache:
    """The cache of a whole model, for inference.

    Args:
        n_layer: number of layers.
        capacity: the most positions that it can hold.

    Attributes:
        length: positions seen so far.
        first_key: int32 (B,), each row's first position that is not padding, or None.
    """

    def __init__(self, n_layer: int, capacity: int):
        self.layers = [LayerCache(capacity) for _ in range(n_layer)]
        self.length = 0
        self.first_key: Tensor | None = None
