"""Writes .safetensors files in a stream: one tensor is in memory at a time, whatever the file's size."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt4_jax.storage.safetensors_header import DTYPES

_METADATA = {"format": "pt"}  # without it some versions of transformers refuse a file


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is read when it is written.

    dtype: a key of DTYPES. load: returns the array [*shape] in this dtype.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StreamedTensor],
    written: Callable[[int], object] = lambda size: None,
) -> None:
    """Write name -> tensor to a new file. written: is told the bytes of each tensor after it.

    ValueError: a tensor is not what was announced.
    """
    # wide types first, as the safetensors library writes them, so that all tensors are aligned
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = tensors[name].load()
            announced = DTYPES[tensors[name].dtype], tensors[name].shape
            if (array.dtype, array.shape) != announced:
                raise ValueError(f"{name}: {array.dtype} {array.shape}, announced as {announced}")
            file.write(array.reshape(-1).view(np.uint8).data)
            written(array.nbytes)


def split_shards(
    tensors: Mapping[str, StreamedTensor], limit: int
) -> list[dict[str, StreamedTensor]]:
    """The tensors in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    groups: list[dict[str, StreamedTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups
