"""A tensor that has not been read yet, and the element types checkpoints use."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convert.formats.files import HashedFile
from convert.formats.gguf_blocks import Blocks
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage import safetensors_header


@dataclass(frozen=True)
class Tensor:
    """shape and dtype as `load` gives them; nbytes to read; order: ascending along the files.

    blocks: of a matrix quantized in the file, its type's name and what reads it undequantized.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    load: Callable[[], np.ndarray]
    order: tuple[str, int]
    blocks: tuple[str, Callable[[], Blocks]] | None = None


DTYPES = {dtype.name: dtype for dtype in safetensors_header.DTYPES.values()}


def strided(
    file: HashedFile,
    start: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    swap: bool = False,
) -> Tensor:
    """A tensor whose first element lies at byte `start` of `file`; strides count elements."""
    count = span(shape, stride)

    def load() -> np.ndarray:
        flat = file.read(start, count * dtype.itemsize).view(dtype)
        if swap:
            flat = flat.byteswap()
        if stride == contiguous(shape):
            return flat.reshape(shape)
        steps = tuple(s * dtype.itemsize for s in stride)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, steps))

    nbytes = count * dtype.itemsize
    return Tensor(shape, dtype, nbytes, load, (str(file.path), start))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided tensor, inclusive."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def dtype_named(name: str, where: str) -> np.dtype:
    """NumPy's dtype for a name such as bfloat16. UserError for one that weights do not use."""
    if name not in DTYPES:
        raise UserError(f"{where}: element type {name!r} is not supported")
    return DTYPES[name]
