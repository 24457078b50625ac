"""Lazy tensors of a checkpoint, and the element types that checkpoints use."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convert.formats.files import HashedFile
from convert.formats.gguf_blocks import UnpackedBlocks
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage import safetensors_header


@dataclass(frozen=True)
class QuantizedBlocks:
    """A matrix in GGUF's quantized blocks. gguf_type: a key of gguf_blocks.BLOCK_FORMATS."""

    gguf_type: str
    load: Callable[[], UnpackedBlocks]


@dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read yet.

    shape and dtype: of the array that `load` returns. nbytes: to be read. position: (file, byte), for
    reading in order. blocks: the same matrix without dequantizing it, if it is quantized in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    load: Callable[[], np.ndarray]
    position: tuple[str, int]
    blocks: QuantizedBlocks | None = None


DTYPES = {dtype.name: dtype for dtype in safetensors_header.DTYPES.values()}


def strided(
    file: HashedFile,
    start: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    swap: bool = False,
) -> Tensor:
    """A tensor whose first element is at byte `start` of `file`.

    stride: in elements. swap: the file has the other byte order.
    """
    count = span(shape, stride)

    def load() -> np.ndarray:
        flat = file.read(start, count * dtype.itemsize).view(dtype)
        if swap:
            flat = flat.byteswap()
        if stride == contiguous(shape):
            return flat.reshape(shape)
        byte_strides = tuple(s * dtype.itemsize for s in stride)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, byte_strides))

    nbytes = count * dtype.itemsize
    return Tensor(shape, dtype, nbytes, load, (str(file.path), start))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of elements from the first to the last of a strided tensor, inclusive."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def dtype_named(name: str, where: str) -> np.dtype:
    """The dtype of a name such as "bfloat16". UserError, which begins with `where`: unsupported."""
    if name not in DTYPES:
        raise UserError(f"{where}: element type {name!r} is not supported")
    return DTYPES[name]
