"""Visual tokens of recent images, by the content of the file."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from minigpt4_jax.inference.model import Model
from minigpt4_jax.serving.jobs import ImageInput


class ImageStore:
    """Encodes images and keeps the visual tokens of the most recently used ones."""

    def __init__(self, model: Model, max_bytes: int):
        """max_bytes: of visual tokens in the host's memory."""
        self._model, self._max_bytes = model, max_bytes
        self._encoded: OrderedDict[bytes, np.ndarray] = OrderedDict()

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

    def encode(self, images: Sequence[ImageInput], at_most: int) -> int:
        """Encode up to `at_most` of those that are not known: how many. Others make room, not these."""
        new = {image.digest: image.pixels for image in images}
        missing = [digest for digest in new if digest not in self._encoded][:at_most]
        if not missing:
            return 0
        visual = self._model.encode_pixels([new[digest] for digest in missing])
        for digest, tokens in zip(missing, visual, strict=True):
            self._encoded[digest] = tokens.copy()  # not a view that keeps the others alive
        while self.size > self._max_bytes:
            oldest = next((digest for digest in self._encoded if digest not in new), None)
            if oldest is None:
                break
            del self._encoded[oldest]
        return len(missing)
