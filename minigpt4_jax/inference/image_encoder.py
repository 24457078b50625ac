"""Pixels of images -> projected visual tokens on the device, in batches."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.inference.preprocess import error_context
from minigpt4_jax.inference.requests import pad_rows
from minigpt4_jax.inference.shared_programs import shared_jit, shared_programs
from minigpt4_jax.models.minigpt import Instruction, MiniGpt
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain
from minigpt4_jax.processing.images import ImageSource, load_pixels
from minigpt4_jax.utils.rounding import next_power_of_two

ENCODE_BATCH = 8  # images through the vision encoder at a time


class ImageEncoder:
    """The compiled vision side of a model. `state` is the model's parameters (nnx.state)."""

    def __init__(self, graphdef: Any, config: ModelConfig, mesh: Mesh | None):
        self._config = config
        compiled = shared_programs(graphdef, mesh)
        self._encode = compiled(encode_pixels)
        self._encode_instructed = compiled(_encode_instructed)
        self._take = shared_jit(_take_image, mesh)

    def with_programs(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Self:
        """A copy that runs `wrap` of each program instead of it, and whose visual tokens are zeros."""
        wrapped = copy(self)
        for name in ("_encode", "_encode_instructed", "_take"):
            setattr(wrapped, name, wrap(getattr(self, name)))
        take = wrapped._take
        wrapped._take = lambda *args: jax.tree.map(_zeros, take(*args))
        return wrapped

    def encode(
        self,
        state: Any,
        pixels: Sequence[np.ndarray],
        instructions: Sequence[Sequence[int]] | None = None,
    ) -> list[jax.Array]:
        """Images [S, S, 3] of `load_pixels` -> visual tokens [P, D] float32 of each, on the device.

        instructions: ids of what the Q-Former reads with each image (`Instruction`)."""
        encoded: list[jax.Array] = []
        for start in range(0, len(pixels), ENCODE_BATCH):
            batch = pixels[start : start + ENCODE_BATCH]
            if instructions is None:
                visual = self._encode(state, pad_images(batch))
            else:
                texts = pad_rows(instructions[start : start + ENCODE_BATCH])
                visual = self._encode_instructed(state, pad_images(batch), *texts)
            # Arrays of their own, so that none keeps the others alive.
            encoded += [self._take(visual, i) for i in range(len(batch))]
        return encoded

    def to_host(self, visual: Sequence[jax.Array]) -> np.ndarray:
        """Visual tokens of B images -> [B, P, D] float32."""
        c = self._config
        stacked = np.empty((len(visual), c.visual_tokens, c.visual_width), np.float32)
        for target, tokens in zip(stacked, visual, strict=True):
            target[:] = tokens
        return stacked


def load_image_batches(
    images: Sequence[ImageSource], config: ModelConfig, *, exif: bool
) -> Iterator[list[np.ndarray]]:
    """Pixels [S, S, 3] of up to ENCODE_BATCH images at a time. UserError: an unreadable image."""
    for start in range(0, len(images), ENCODE_BATCH):
        pixels = []
        for i, image in enumerate(images[start : start + ENCODE_BATCH], start):
            with error_context(f"image {i}"):
                pixels.append(load_pixels(image, config.vision.image_size, exif=exif))
        yield pixels


def pad_images(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """Images [S, S, 3] -> [B, S, S, 3], padded to a power of two."""
    padding = next_power_of_two(len(pixels)) - len(pixels)
    return np.stack([*pixels, *[np.zeros_like(pixels[0])] * padding])


def encode_pixels(
    model: MiniGpt, pixels: jax.Array, instruction: Instruction | None = None
) -> jax.Array:
    """The compiled program: pixels [B, S, S, 3], split by rows -> [B, P, D], replicated."""
    pixels = constrain(pixels, BATCH_AXES)[:, None]
    return constrain(model.encode(pixels, instruction=instruction))


def _encode_instructed(
    model: MiniGpt, pixels: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    """As `encode_pixels`, of a Q-Former that reads instructions [B, T] of these lengths [B]."""
    qformer = model.config.qformer
    # without padding beyond the Q-Former's positions
    tokens = tokens[:, : qformer.max_positions] if qformer else tokens
    return encode_pixels(model, pixels, Instruction(tokens, lengths))


def _zeros(a: Any) -> jax.Array:
    """Zeros of a shape. Where programs are not run, the visual tokens of several images can be joined."""
    zeros: jax.Array = jax.device_put(np.zeros(a.shape, a.dtype), a.sharding)
    return zeros


def _take_image(visual: jax.Array, i: jax.Array) -> jax.Array:
    """visual [B, P, D] -> [P, D] of image i."""
    return constrain(jax.lax.dynamic_index_in_dim(visual, i, keepdims=False))
