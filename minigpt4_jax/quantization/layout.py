"""The layout of matrices with groups (int4 and GGUF blocks), in a model directory and in memory.

A directory stores levels as [out, in], or packed [out, in / 2], and scales and offsets as [out, groups].
In memory the matrix of a linear map is grouped and transposed: levels [groups, group, out], or packed
[groups, group / 2, out], scales and offsets [groups, out]. A product can then multiply each nibble by
the input it belongs to as it reads the bytes, without rearranging them, and the 128 lanes of a TPU run
along the outputs. The embedding, which is looked up by rows, keeps the layout of the directory.

On a GPU the matrix is grouped, but not transposed: levels [out, groups, group], or packed
[out, groups, group / 2], scales and offsets [out, groups], so that a product sums along rows. A packed
level is held as level - 8 in two's complement, which is XLA's int4.
"""

import math

import numpy as np

from minigpt4_jax.quantization.schemes import Array, Shape
from minigpt4_jax.utils.platform import backend

SIGNS = 0x88  # flips the upper bit of both nibbles: level + 8 <-> two's complement


def outputs_first() -> bool:
    """Whether the layout in memory is that of a GPU."""
    return backend() == "gpu"


def group_matrix(levels: Array, groups: int) -> Array:
    """Levels [..., out, n] in storage layout -> in memory layout."""
    if outputs_first():
        signed = levels ^ SIGNS if levels.dtype == np.uint8 else levels
        return signed.reshape(*levels.shape[:-1], groups, -1)
    return group_and_transpose(levels, groups)


def group_and_transpose(levels: Array, groups: int) -> Array:
    """Levels [..., out, n] in storage layout -> [..., groups, n / groups, out]."""
    grouped = levels.reshape(*levels.shape[:-1], groups, -1)
    return grouped.swapaxes(-3, -2).swapaxes(-2, -1)


def transpose_scales(scales: Array) -> Array:
    """Scales or offsets [..., out, groups] in storage layout -> in memory layout."""
    return scales if outputs_first() else scales.swapaxes(-2, -1)


def is_grouped(name: str, rank: int) -> bool:
    """Whether a parameter (of one layer) with this many dimensions belongs to a linear map with groups."""
    levels = name.endswith(".weight") and rank == 3
    return levels or (name.endswith((".weight_scale", ".weight_offset")) and rank == 2)


def storage_shape(name: str, shape: Shape) -> Shape:
    """The shape in a directory of a parameter (of one layer) with this shape in memory."""
    if not is_grouped(name, len(shape)):
        return shape
    if outputs_first():
        return shape[0], math.prod(shape[1:])
    return shape[-1], math.prod(shape[:-1])


def to_storage_layout(name: str, array: np.ndarray) -> np.ndarray:
    """A parameter of one layer, from the memory layout to that of a directory."""
    if not is_grouped(name, array.ndim):
        return array
    if outputs_first():
        return _flip_signs(array).reshape(storage_shape(name, array.shape))
    return np.moveaxis(array, -1, 0).reshape(storage_shape(name, array.shape))


def to_memory_layout(name: str, array: np.ndarray, shape: Shape) -> np.ndarray:
    """The inverse of `to_storage_layout`; shape: that of the result."""
    if not is_grouped(name, len(shape)):
        return array
    if outputs_first():
        return _flip_signs(array).reshape(shape)
    return _transpose(array).reshape(shape)


def _flip_signs(array: np.ndarray) -> np.ndarray:
    """Packed levels as level + 8 <-> in two's complement; other arrays as they are."""
    return array ^ np.uint8(SIGNS) if array.dtype == np.uint8 else array


def _transpose(a: np.ndarray) -> np.ndarray:
    """A contiguous a.T of a matrix, in blocks that fit the cache: four times as fast for large ones."""
    b, block = np.empty(a.shape[::-1], a.dtype), 256
    for i in range(0, a.shape[0], block):
        for j in range(0, a.shape[1], block):
            b[j : j + block, i : i + block] = a[i : i + block, j : j + block].T
    return b
