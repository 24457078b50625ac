"""Tensors of a model directory, quantized one at a time as they are written or read."""

from collections.abc import Iterable, Iterator

import numpy as np

from minigpt4_jax.checkpoint.model_directory import ReadableTensors, Shape
from minigpt4_jax.quantization.schemes import (
    BlockFormat,
    dequantize,
    matrix_scheme,
    quantize,
    quantized_shapes,
)

CHUNK = 1 << 22  # elements that are quantized at a time


def quantize_in_chunks(weight: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """`quantize` of a host array [out, in], some rows at a time, to keep temporary arrays small."""
    rows = max(1, CHUNK // weight.shape[-1])
    chunks = [quantize(weight[i : i + rows], scheme) for i in range(0, len(weight), rows)]
    levels, scales = zip(*chunks, strict=True)
    return np.concatenate(levels), np.concatenate(scales)


def quantize_tensors(
    tensors: Iterable[tuple[str, np.ndarray]], scheme: str, block_formats: Iterable[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of a float model -> (name, array) of the model in `scheme`, one at a time.

    block_formats: as for `matrix_scheme`; arrays of these matrices are passed through.
    """
    for name, array in tensors:
        how = (
            matrix_scheme(name, scheme, array.shape[-1], block_formats) if array.ndim > 1 else None
        )
        if how is None or BlockFormat.parse(how):
            yield name, array
        else:
            levels, scale = quantize_in_chunks(array, how)
            yield name, levels
            yield f"{name}_scale", scale


class QuantizedTensors(ReadableTensors):
    """Lazy view of a directory's tensors in `scheme`: tensors stored as floats are quantized when read.

    A matrix that is stored in int8 and should be int4 is requantized: earlier versions wrote int4
    models whose output matrix and vision encoder were in int8.
    """

    def __init__(self, tensors: ReadableTensors, scheme: str):
        self._tensors = tensors
        self._stored = set(tensors)
        self._names = list(self._stored)
        self._schemes: dict[str, str] = {}  # of the matrices to quantize
        # The rows quantized last and their levels and scale.
        self._cached_rows: tuple[str, range] | None = None
        self._cached: tuple[np.ndarray, np.ndarray] | None = None
        for name in self._stored:
            how = matrix_scheme(name, scheme, (tensors.shape(name) or (0,))[-1])
            if how is None:
                continue
            if f"{name}_scale" not in self._stored:
                self._schemes[name] = how
                self._names.append(f"{name}_scale")
            elif how == "int4" and len(tensors.shape(f"{name}_scale")) == 1:
                self._schemes[name] = how

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, (slice(None),) * len(self.shape(name)))

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index]. Whole rows of a matrix to be quantized are read, as a scale needs them."""
        weight = name.removesuffix("_scale")
        if weight not in self._schemes:
            return self._tensors.part(name, index)
        levels, scale = self._quantized_rows(weight, index[0])
        return (levels if name == weight else scale)[(slice(None), *index[1:])]

    def _quantized_rows(self, name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Levels and scale of some rows. The last result is cached: the scale is requested after the
        levels, and several parts of the same rows may be requested in turn."""
        key = (name, range(self._tensors.shape(name)[0])[rows])
        if self._cached is None or key != self._cached_rows:
            self._cached = None  # before the next one is read, to hold one at a time
            weight, scale = self._tensors.part(name, (rows, slice(None))), f"{name}_scale"
            if scale in self._stored:
                weight = dequantize(weight, self._tensors.part(scale, (rows,)), np.float32, np)
            self._cached = quantize_in_chunks(weight, self._schemes[name])
            self._cached_rows = key
        return self._cached

    def shape(self, name: str) -> Shape:
        weight = name.removesuffix("_scale")
        if weight not in self._schemes:
            return self._tensors.shape(name)
        levels, scale = quantized_shapes(self._tensors.shape(weight), self._schemes[weight])
        return levels if name == weight else scale
