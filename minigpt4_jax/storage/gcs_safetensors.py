"""Tensors of a safetensors file in a bucket, read by byte ranges."""

import math
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.storage.paths import file_size, read_range
from minigpt4_jax.storage.safetensors_header import DTYPES, TensorEntry, read_header


class GcsSafetensors:
    """An open file with the methods of `safetensors.safe_open` that the model directory uses.

    ValueError: the file is damaged or truncated.
    """

    def __init__(self, path: Path):
        self._path = path
        self._entries, _ = read_header(
            lambda start, stop: read_range(path, start, stop), file_size(path)
        )

    def keys(self) -> KeysView[str]:
        return self._entries.keys()

    def get_slice(self, name: str) -> "TensorSlice":
        return TensorSlice(self._path, self._entries[name])

    def get_tensor(self, name: str) -> np.ndarray[Any, Any]:
        return self.get_slice(name)[()]


class TensorSlice:
    """A tensor whose parts are fetched by indexing."""

    def __init__(self, path: Path, entry: TensorEntry):
        self._path, self._entry = path, entry

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """The dtype's safetensors name, such as "BF16"."""
        return self._entry.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        """The part at these slices (step 1). Whole rows are fetched, then the columns are sliced."""
        shape, dtype = self._entry.shape, DTYPES[self._entry.dtype]
        rows = range(shape[0])[index[0]] if index else range(shape[0] if shape else 1)
        row_size = math.prod(shape[1:]) * dtype.itemsize
        start, size = self._entry.start + rows.start * row_size, len(rows) * row_size
        data = read_range(self._path, start, start + size) if size else b""
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes where {size} are expected")
        array = np.frombuffer(data, dtype).reshape([len(rows), *shape[1:]] if shape else [])
        return array[(slice(None), *index[1:])] if len(index) > 1 else array
