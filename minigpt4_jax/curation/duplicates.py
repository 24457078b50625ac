"""Near-duplicate images (perceptual hash) and texts (MinHash); the first of each group is kept."""

import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from minigpt4_jax.curation.filters import words_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import ImageSource, open_image

IMAGE_DISTANCE = 6  # of 64 bits
TEXT_SIMILARITY = 0.8
_THUMBNAIL = 8
_MAX_DIFFERENCE = 12.0  # mean difference of two thumbnails, of 255
_SHINGLE = 3  # words
_PERMUTATIONS = 128
_MARGIN = 0.25


class Fingerprint(NamedTuple):
    """What is compared of an image.

    A perceptual hash knows neither colours nor flat areas, so thumbnails are compared too.
    """

    bits: int  # 64
    thumbnail: np.ndarray  # [8, 8, 3] float32


def require(name: str, package: str) -> Any:
    """UserError: a package of the extra `curate` is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"near duplicates need the package {package}: pip install 'minigpt4_jax[curate]'"
        ) from None


def fingerprint(image: Image.Image) -> Fingerprint:
    bits = require("imagehash", "ImageHash").phash(image).hash.flatten()
    small = image.convert("RGB").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    value = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return Fingerprint(value, np.asarray(small, np.float32))


def fingerprints(
    sources: Sequence[ImageSource], *, exif: bool = True
) -> Iterator[Fingerprint | UserError]:
    """The fingerprint of each image, in order, or why it cannot be read. Images are read in threads."""
    require("imagehash", "ImageHash")

    def read(source: ImageSource) -> Fingerprint | UserError:
        try:
            return fingerprint(open_image(source, exif=exif))
        except UserError as e:
            return e

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(sources), 1024):
            yield from pool.map(read, sources[start : start + 1024])


def image_duplicates(
    prints: Sequence[Fingerprint | None], distance: int = IMAGE_DISTANCE
) -> dict[int, int]:
    """Index of an image -> index of an earlier one that it nearly equals and that is kept.

    distance: bits of the hash that may differ. None: not compared. Exact: two hashes that differ in at
    most d bits agree in one of d + 1 bands.
    """
    bands = [
        (64 * i // (distance + 1), 64 * (i + 1) // (distance + 1)) for i in range(distance + 1)
    ]
    kept: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in bands]
    duplicates: dict[int, int] = {}
    for index, image in enumerate(prints):
        if image is None:
            continue
        values = [(image.bits >> low) & ((1 << (high - low)) - 1) for low, high in bands]
        candidates = {
            other for table, value in zip(kept, values, strict=True) for other in table[value]
        }
        near = [other for other in sorted(candidates) if _is_near(image, prints[other], distance)]
        if near:
            duplicates[index] = near[0]
            continue
        for table, value in zip(kept, values, strict=True):
            table[value].append(index)
    return duplicates


def _is_near(a: Fingerprint, b: Fingerprint | None, distance: int) -> bool:
    assert b is not None
    differing = (a.bits ^ b.bits).bit_count()
    return (
        differing <= distance and float(np.abs(a.thumbnail - b.thumbnail).mean()) <= _MAX_DIFFERENCE
    )


# --- texts ------------------------------------------------------------------------------------


def text_duplicates(
    texts: Sequence[str],
    similarity: float = TEXT_SIMILARITY,
    progress: Callable[[], object] = lambda: None,
) -> dict[int, int]:
    """Index of a text -> index of an earlier one that it nearly equals and that is kept.

    similarity: the Jaccard index of their sequences of three words, from which texts count as equal.
    Candidates come from MinHash, with a margin so that hardly one is missed; their similarity is then
    computed exactly.
    """
    datasketch = require("datasketch", "datasketch")
    index = datasketch.MinHashLSH(threshold=max(0.1, similarity - _MARGIN), num_perm=_PERMUTATIONS)
    duplicates: dict[int, int] = {}
    shingles: dict[int, frozenset[str]] = {}
    for number, text in enumerate(texts):
        of_text = _shingles(text)
        sketch = datasketch.MinHash(num_perm=_PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in of_text])
        near = [
            other
            for other in sorted(index.query(sketch))
            if _jaccard(of_text, shingles[other]) >= similarity
        ]
        if near:
            duplicates[number] = near[0]
        else:
            index.insert(number, sketch)
            shingles[number] = of_text
        progress()
    return duplicates


def _shingles(text: str) -> frozenset[str]:
    words = words_of(text)
    return frozenset(
        " ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))
    )


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0
