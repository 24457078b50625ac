"""Tensors that are checked for NaN and infinity as they are read."""

from collections.abc import Iterator

import numpy as np

from minigpt4_jax.checkpoint.model_directory import ReadableTensors, Shape
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.finite import count_nonfinite


class FiniteTensors(ReadableTensors):
    """A view of tensors that raises UserError when a value that is read is not finite."""

    def __init__(self, tensors: ReadableTensors, label: object):
        self._tensors, self._label = tensors, label

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        return check_finite(self._tensors[name], f"{self._label}: {name}")

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index], reading no more than that."""
        return check_finite(self._tensors.part(name, index), f"{self._label}: {name}")

    def shape(self, name: str) -> Shape:
        return self._tensors.shape(name)


def check_finite(array: np.ndarray, label: str) -> np.ndarray:
    """The array itself. UserError, with its label and the numbers, if a value is NaN or infinite."""
    if count := count_nonfinite(array):
        raise UserError(
            f"{label}: {count:,} of {array.size:,} values are NaN or infinite; the file is damaged, or its "
            "training diverged (--allow-nonfinite uses it all the same)"
        )
    return array
