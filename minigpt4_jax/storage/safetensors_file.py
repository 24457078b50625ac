"""A safetensors file whose tensors are read by byte ranges, from the local disk or a bucket."""

import math
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from minigpt4_jax.storage.paths import file_size, is_remote, read_range
from minigpt4_jax.storage.safetensors_header import DTYPES, TensorEntry, read_header
from minigpt4_jax.utils.aligned import aligned_empty


class SafetensorsFile:
    """The tensors of a file, with the methods of `safetensors.safe_open`.

    Reading releases Python's interpreter lock, so several threads read at once (safe_open copies from a
    memory map and holds the lock), and no memory map keeps pages in the process. Nothing stays open.

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
        return TensorSlice(self._path, name, self._entries[name])

    def get_tensor(self, name: str) -> np.ndarray[Any, Any]:
        return self.get_slice(name)[()]


class TensorSlice:
    """A tensor whose parts are read by indexing."""

    def __init__(self, path: Path, name: str, entry: TensorEntry):
        self._path, self._name, self._entry = path, name, entry

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """The dtype's safetensors name, such as "BF16"."""
        return self._entry.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        """The part at these slices (step 1). From a bucket whole rows are fetched, then the columns are
        sliced."""
        shape, dtype = self._entry.shape, DTYPES[self._entry.dtype]
        rows = range(shape[0])[index[0]] if index else range(shape[0] if shape else 1)
        columns = zip(shape[1:], index[1:], strict=False)
        whole_rows = all(range(n)[part] == range(n) for n, part in columns)
        if not whole_rows and not is_remote(self._path):
            with safe_open(self._path, framework="np") as file:
                part: np.ndarray[Any, Any] = file.get_slice(self._name)[index]
                return part
        row_size = math.prod(shape[1:]) * dtype.itemsize
        start, size = self._entry.start + rows.start * row_size, len(rows) * row_size
        data = _read(self._path, start, size)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes where {size} are expected")
        array = np.frombuffer(data, dtype).reshape([len(rows), *shape[1:]] if shape else [])
        return array if whole_rows else array[(slice(None), *index[1:])]


def _read(path: Path, start: int, size: int) -> bytes | np.ndarray[Any, Any]:
    """`size` bytes of a file from `start`, fewer at its end. Those of a local file begin at a boundary of
    64 bytes: a CPU device can use them without a copy."""
    if not size:
        return b""
    if is_remote(path):
        return read_range(path, start, start + size)
    data = aligned_empty((size,), np.dtype(np.uint8))
    done = 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(data.data[done:]):  # one call reads 2 GiB at most
            done += count
    return data[:done]
