"""Images of prompts, read and encoded shortly before they are needed.

So the memory of a call does not depend on how many images it has. Threads read the next images while
those before are encoded and used.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.image_encoder import ENCODE_BATCH
from minigpt4_jax.inference.preprocess import error_context, image_key
from minigpt4_jax.inference.visual_tokens import VisualTokens, concatenate_visual
from minigpt4_jax.processing.images import ImageSource

READER_THREADS = 8
MAX_KEPT = 32  # encoded images that are kept because later prompts have them too
MAX_GROUP = 64  # prompts without images that are looked at together

Images = Sequence[ImageSource]  # of one prompt
Encoded = dict[str | int, jax.Array | UserError]  # visual tokens [P, D] by image_key, or the error


class ImageFailure(NamedTuple):
    """An image of a prompt that cannot be read."""

    number: int  # of the image in the prompt
    several: bool  # whether the prompt has others
    error: UserError

    def message(self) -> str:
        """The error, which says which image it is if the prompt has several."""
        text = str(self.error)
        if self.several:
            return f"image {self.number} of the prompt: {text.removeprefix('image ')}"
        return text

    def raise_for(self, prompt: int) -> NoReturn:
        """Raise a UserError that names the image and the number of the prompt."""
        name = f"image {self.number} of prompt {prompt}" if self.several else f"image {prompt}"
        with error_context(name):
            raise self.error


def encode_ahead(
    prompts: Sequence[Images],
    load_pixels: Callable[[ImageSource], np.ndarray],
    encode: Callable[[Sequence[np.ndarray]], list[jax.Array]],
) -> Iterator[VisualTokens | ImageFailure | None]:
    """Visual tokens [I * P, D] of the images of each prompt, None without images, in order.

    An image that several prompts have is encoded once, if no more than MAX_KEPT others come between.
    """
    uses = Counter(image_key(image) for images in prompts for image in images)
    encoded: Encoded = {}  # the least recently used is first
    groups = list(_groups(prompts))
    pool = ThreadPoolExecutor(READER_THREADS)
    try:
        reading: dict[str | int, Future[np.ndarray]] = {}
        for group, next_group in zip([[], *groups], [*groups, []], strict=True):
            read, needed = reading, _by_key(next_group)
            reading = {
                key: pool.submit(load_pixels, image)
                for key, image in needed.items()
                if key not in encoded and key not in read
            }
            encoded |= _encode(read, encode)
            for images in group:
                yield _visual_tokens(images, encoded)
                uses.subtract(map(image_key, images))
            _drop(encoded, uses, needed)
    finally:
        pool.shutdown(cancel_futures=True)


def check_images(
    prompts: Sequence[Images], open_image: Callable[[ImageSource], Any]
) -> Iterator[tuple[int, ImageFailure]]:
    """(number of a prompt, failure) of the images that cannot be opened.

    Files that are open already are not read, as they can be read only once.
    """
    numbered = [(i, j, image) for i, images in enumerate(prompts) for j, image in enumerate(images)]

    def failure(item: tuple[int, int, ImageSource]) -> tuple[int, ImageFailure] | None:
        i, j, image = item
        if hasattr(image, "read"):
            return None
        try:
            open_image(image)
        except UserError as e:
            return i, ImageFailure(j, len(prompts[i]) > 1, e)
        return None

    pool = ThreadPoolExecutor(READER_THREADS)
    try:
        yield from filter(None, pool.map(failure, numbered))
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(prompts: Sequence[Images]) -> Iterator[list[Images]]:
    """Consecutive prompts whose images fill a batch of the encoder."""
    group: list[Images] = []
    for images in prompts:
        group.append(images)
        if sum(map(len, group)) >= ENCODE_BATCH or len(group) >= MAX_GROUP:
            yield group
            group = []
    if group:
        yield group


def _by_key(group: Sequence[Images]) -> dict[str | int, ImageSource]:
    return {image_key(image): image for images in group for image in images}


def _encode(
    read: dict[str | int, Future[np.ndarray]],
    encode: Callable[[Sequence[np.ndarray]], list[jax.Array]],
) -> Encoded:
    encoded: Encoded = {}
    pixels: dict[str | int, np.ndarray] = {}
    for key, future in read.items():
        try:
            pixels[key] = future.result()
        except UserError as e:
            encoded[key] = e
    visual = encode(list(pixels.values()))
    return encoded | dict(zip(pixels, visual, strict=True))


def _visual_tokens(images: Images, encoded: Encoded) -> VisualTokens | ImageFailure | None:
    parts: list[jax.Array] = []
    for number, image in enumerate(images):
        tokens = encoded.pop(image_key(image))
        encoded[image_key(image)] = tokens  # the most recently used is last
        if isinstance(tokens, UserError):
            return ImageFailure(number, len(images) > 1, tokens)
        parts.append(tokens)
    return concatenate_visual(parts)


def _drop(encoded: Encoded, uses: Counter[str | int], needed: dict[str | int, ImageSource]) -> None:
    """Drop what no later prompt has, and the least recently used of more than MAX_KEPT."""
    for key in [key for key in encoded if uses[key] <= 0]:
        del encoded[key]
    others = [key for key in encoded if key not in needed]
    for key in others[: max(0, len(encoded) - MAX_KEPT)]:
        del encoded[key]
