"""New LoRA adapters for a model directory without them."""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from minigpt4_jax.checkpoint.model_directory import ReadableTensors, Shape


def initial_lora(name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Initial values of an adapter matrix, float32, as in peft: A [r, in] Kaiming-uniform with
    a = sqrt(5), B [out, r] zeros, so that the model's outputs are unchanged."""
    if name.endswith("lora_b"):
        return np.zeros(shape, np.float32)
    bound = shape[-1] ** -0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


class TensorsWithNewLora(ReadableTensors):
    """A model's tensors together with new adapters (name -> shape), initialized from the seed."""

    def __init__(self, tensors: ReadableTensors, adapters: Mapping[str, Shape], seed: int):
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
        return initial_lora(name, self._adapters[name], rng)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index]; no more than that is read from a file."""
        return self[name][index] if name in self._adapters else self._tensors.part(name, index)

    def shape(self, name: str) -> Shape:
        return self._adapters[name] if name in self._adapters else self._tensors.shape(name)
