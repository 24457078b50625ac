"""Images -> projected visual tokens, in batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.inference.preprocess import ImageGroups, error_context, image_key
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain, with_mesh
from minigpt4_jax.processing.images import ImageSource, load_pixels
from minigpt4_jax.utils.rounding import next_power_of_two

ENCODE_BATCH = 8  # images through the vision encoder at a time


class ImageEncoder:
    """The compiled vision side of a model. `state` is the model's parameters (nnx.state)."""

    def __init__(self, graphdef: Any, config: ModelConfig, mesh: Mesh | None):
        self._config = config

        def encode(state: Any, pixels: jax.Array) -> jax.Array:
            return encode_pixels(nnx.merge(graphdef, state), pixels)

        self._encode = jax.jit(with_mesh(encode, mesh))

    def encode(
        self, state: Any, images: Sequence[ImageSource], names: Sequence[str], *, exif: bool
    ) -> np.ndarray:
        """Visual tokens [B, P, D] float32. names: what errors call the images. exif: see `open_image`."""
        size = self._config.vision.image_size
        encoded = self._empty(len(images))
        for start in range(0, len(images), ENCODE_BATCH):
            batch = range(start, min(start + ENCODE_BATCH, len(images)))
            pixels = []
            for i in batch:
                with error_context(names[i]):
                    pixels.append(load_pixels(images[i], size, exif=exif))
            encoded[batch.start : batch.stop] = self._encode_batch(state, pixels)
        return encoded

    def encode_pixels(self, state: Any, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """As `encode`, for images [S, S, 3] of `load_pixels`."""
        encoded = self._empty(len(pixels))
        for start in range(0, len(pixels), ENCODE_BATCH):
            batch = pixels[start : start + ENCODE_BATCH]
            encoded[start : start + len(batch)] = self._encode_batch(state, batch)
        return encoded

    def encode_groups(
        self, state: Any, groups: ImageGroups, *, exif: bool
    ) -> list[np.ndarray | None]:
        """Visual tokens [I * P, D] of each group, None without images. Repeated images are encoded
        once."""
        index: dict[str | int, int] = {}  # image key -> its place in `images`
        images: list[ImageSource] = []
        names: list[str] = []
        for i, group in enumerate(groups):
            for j, image in enumerate(group):
                if image_key(image) not in index:
                    index[image_key(image)] = len(images)
                    images.append(image)
                    names.append(f"image {i}" if len(group) == 1 else f"image {j} of prompt {i}")
        encoded = self.encode(state, images, names, exif=exif)
        rows = [[encoded[index[image_key(image)]] for image in group] for group in groups]
        return [np.concatenate(row) if row else None for row in rows]

    def _empty(self, num_images: int) -> np.ndarray:
        c = self._config
        return np.empty((num_images, c.visual_tokens, c.visual_width), np.float32)

    def _encode_batch(self, state: Any, pixels: Sequence[np.ndarray]) -> np.ndarray:
        padding = next_power_of_two(len(pixels)) - len(pixels)
        batch = np.stack([*pixels, *[np.zeros_like(pixels[0])] * padding])
        return np.asarray(self._encode(state, batch))[: len(pixels)]


def load_image_batches(
    images: Sequence[ImageSource], config: ModelConfig, *, exif: bool
) -> Iterator[tuple[np.ndarray, int]]:
    """(pixels [B, S, S, 3] padded to a power of two, images among them) of ENCODE_BATCH images each."""
    for start in range(0, len(images), ENCODE_BATCH):
        pixels = []
        for i in range(start, min(start + ENCODE_BATCH, len(images))):
            with error_context(f"image {i}"):
                pixels.append(load_pixels(images[i], config.vision.image_size, exif=exif))
        padding = next_power_of_two(len(pixels)) - len(pixels)
        yield np.stack([*pixels, *[np.zeros_like(pixels[0])] * padding]), len(pixels)


def encode_pixels(model: MiniGpt, pixels: jax.Array) -> jax.Array:
    """The compiled program: pixels [B, S, S, 3], split by rows -> [B, P, D], replicated."""
    return constrain(model.encode(constrain(pixels, BATCH_AXES)[:, None]))
