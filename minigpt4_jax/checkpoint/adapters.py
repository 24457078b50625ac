"""LoRA in model directories: new adapters for a model without, and adapters merged into weights."""

import zlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Readable(Protocol):
    """Tensors by name, of which shapes are known before they are read."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> np.ndarray: ...
    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...
    def shape(self, name: str) -> Shape: ...


def first_values(name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """What a new adapter begins with, float32: A [r, in] Kaiming-uniform with a = sqrt(5), B
    [out, r] zeros, as in peft, so that the model is the one it was."""
    if name.endswith("lora_b"):
        return np.zeros(shape, np.float32)
    bound = shape[-1] ** -0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


class WithNewLora(Mapping[str, np.ndarray]):
    """A model's tensors, and new adapters of the given names and shapes; those depend on the seed."""

    def __init__(self, tensors: Readable, adapters: Mapping[str, Shape], seed: int):
        self._tensors, self._adapters, self._seed = tensors, adapters, seed
        self._names = [*tensors, *adapters]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._adapters:
            return self._tensors[name]
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        return first_values(name, self._adapters[name], rng)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index], of which no more is read where there is a file."""
        return self[name][index] if name in self._adapters else self._tensors.part(name, index)

    def shape(self, name: str) -> Shape:
        return self._adapters[name] if name in self._adapters else self._tensors.shape(name)
