"""Visual tokens of recent images, by the content of the file."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from minigpt4_jax.inference.model import Model
from minigpt4_jax.serving.jobs import ImageInput


class _Started(NamedTuple):
    """Images that the device encodes."""

    digests: list[bytes]
    needed: frozenset[bytes]  # these, and those that are used with them
    result: Callable[[], np.ndarray]  # waits for their visual tokens


class ImageStore:
    """Encodes images and keeps the visual tokens of the most recently used ones.

    Images are encoded in two steps, `start` and `finish`, so that other work can be given to the device
    before the host waits for them.
    """

    def __init__(self, model: Model, max_bytes: int):
        """max_bytes: of visual tokens in the host's memory."""
        self._model, self._max_bytes = model, max_bytes
        self._encoded: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._started: _Started | None = None

    @property
    def size(self) -> int:
        """Bytes of all visual tokens."""
        return sum(visual.nbytes for visual in self._encoded.values())

    def get(self, images: Sequence[ImageInput]) -> list[np.ndarray] | None:
        """Visual tokens [P, D] of each image; None if one of them is not encoded."""
        for image in images:
            if image.digest not in self._encoded:
                return None
            self._encoded.move_to_end(image.digest)
        return [self._encoded[image.digest] for image in images]

    def start(self, images: Sequence[ImageInput], at_most: int) -> int:
        """Begin to encode up to `at_most` of those that are not known: how many. `finish` ends it."""
        new = {image.digest: image.pixels for image in images}
        missing = [digest for digest in new if digest not in self._encoded][:at_most]
        if missing:
            result = self._model.start_encoding([new[digest] for digest in missing])
            self._started = _Started(missing, frozenset(new), result)
        return len(missing)

    def finish(self) -> None:
        """Wait for what `start` began, and keep it. Others make room, not the images given to `start`."""
        if self._started is None:
            return
        digests, needed, result = self._started
        self._started = None
        for digest, tokens in zip(digests, result(), strict=True):
            self._encoded[digest] = tokens.copy()  # not a view that keeps the others alive
        while self.size > self._max_bytes:
            oldest = next((digest for digest in self._encoded if digest not in needed), None)
            if oldest is None:
                break
            del self._encoded[oldest]
