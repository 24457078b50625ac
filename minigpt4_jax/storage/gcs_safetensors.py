"""The tensors of a safetensors file in a bucket, read by ranges of its bytes.

The format: 8 bytes of little-endian length, a JSON header of that length with each tensor's dtype,
shape and place, and the bytes (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minigpt4_jax.storage.paths import read_bytes, size_of

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


class BucketTensors:
    """Has the methods of an opened safetensors file that model_dir.Tensors calls. ValueError: it is
    damaged or cut."""

    def __init__(self, path: Path):
        self._path = path
        length = int.from_bytes(read_bytes(path, 0, 8), "little")
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        self._begin = 8 + length
        self._header = json.loads(read_bytes(path, 8, self._begin))
        self._header.pop("__metadata__", None)
        end = max((one["data_offsets"][1] for one in self._header.values()), default=0)
        if self._begin + end != size_of(path):
            raise ValueError(f"{size_of(path)} bytes instead of {self._begin + end}")

    def keys(self) -> KeysView[str]:
        return self._header.keys()

    def get_slice(self, name: str) -> "_Tensor":
        return _Tensor(self._path, self._begin, self._header[name])

    def get_tensor(self, name: str) -> np.ndarray:
        return self.get_slice(name)[()]


class _Tensor:
    def __init__(self, path: Path, begin: int, entry: dict[str, Any]):
        self._path, self._entry = path, entry
        self._at = begin + entry["data_offsets"][0]

    def get_shape(self) -> list[int]:
        return list(self._entry["shape"])

    def get_dtype(self) -> str:
        return str(self._entry["dtype"])

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part of these slices, without steps; of the rows that it has all columns are fetched."""
        shape, dtype = self.get_shape(), np.dtype(DTYPES[self.get_dtype()])
        rows = range(shape[0])[index[0]] if index else range(shape[0] if shape else 1)
        row = math.prod(shape[1:]) * dtype.itemsize
        start, size = self._at + rows.start * row, len(rows) * row
        found = read_bytes(self._path, start, start + size) if size else b""
        if len(found) != size:
            raise ValueError(f"{len(found)} bytes where {size} are expected")
        array = np.frombuffer(found, dtype).reshape([len(rows), *shape[1:]] if shape else [])
        return array[(slice(None), *index[1:])] if len(index) > 1 else array
