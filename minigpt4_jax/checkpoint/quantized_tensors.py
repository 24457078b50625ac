"""Tensors of a model directory, quantized one at a time as they are written or read."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

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
KEPT_RESULTS = 2  # matrices whose quantized rows are kept in case that more of them is requested
Quantized = tuple[np.ndarray, np.ndarray]  # levels and scale


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
    models whose output matrix and vision encoder were in int8. Several threads may read at once.
    """

    def __init__(self, tensors: ReadableTensors, scheme: str):
        self._tensors = tensors
        self._stored = set(tensors)
        self._names = list(self._stored)
        self._schemes: dict[str, str] = {}  # of the matrices to quantize
        self._lock = threading.Lock()
        # by matrix and rows: those being quantized and the last few; scales that were not requested yet
        self._results: dict[tuple[str, range], Future[Quantized]] = {}
        self._scales: dict[tuple[str, range], np.ndarray] = {}
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
        key = (weight, range(self._tensors.shape(weight)[0])[index[0]])
        if name == weight:
            rows, _ = self._quantized_rows(key)
        else:
            rows = self._scale(key)
        return rows[(slice(None), *index[1:])]

    def _scale(self, key: tuple[str, range]) -> np.ndarray:
        """The scale of some rows."""
        scale = self._scales.pop(key, None)
        if scale is None:
            _, scale = self._quantized_rows(key)
            self._scales.pop(key, None)
        return scale

    def _quantized_rows(self, key: tuple[str, range]) -> Quantized:
        """Levels and scale of some rows of a matrix. They are computed once for the threads that ask at the
        same time; the last results and the scales are kept, as what else is requested comes soon."""
        with self._lock:
            result = self._results.get(key)
            is_new = result is None
            if result is None:
                self._forget_results()
                result = self._results[key] = Future()
        if is_new:
            try:
                levels, scale = self._quantize(*key)
            except BaseException as e:
                result.set_exception(e)
            else:
                self._scales[key] = scale
                result.set_result((levels, scale))
        return result.result()

    def _forget_results(self) -> None:
        """Forget what is complete, but for the last results."""
        complete = [key for key, result in self._results.items() if result.done()]
        for key in complete[: len(complete) - KEPT_RESULTS + 1]:
            del self._results[key]

    def _quantize(self, name: str, rows: range) -> Quantized:
        part = slice(rows.start, rows.stop)
        weight, scale = self._tensors.part(name, (part, slice(None))), f"{name}_scale"
        if scale in self._stored:
            weight = dequantize(weight, self._tensors.part(scale, (part,)), np.float32, np)
        return quantize_in_chunks(weight, self._schemes[name])

    def shape(self, name: str) -> Shape:
        weight = name.removesuffix("_scale")
        if weight not in self._schemes:
            return self._tensors.shape(name)
        levels, scale = quantized_shapes(self._tensors.shape(weight), self._schemes[weight])
        return levels if name == weight else scale
