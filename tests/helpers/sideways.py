"""A photo that is stored on its side: its EXIF orientation says how a viewer turns it."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 24)  # as stored: width, height


def write_photo(path: Path) -> Path:
    """Noise with a black left half, stored with EXIF orientation 6."""
    pixels = np.random.default_rng(0).integers(100, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[:, : SIZE[0] // 2] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def stored(path: Path) -> Image.Image:
    """The photo's pixels without its EXIF fields."""
    with Image.open(path) as opened:
        return Image.fromarray(np.asarray(opened.convert("RGB")))


def upright(path: Path) -> Image.Image:
    """The photo as a viewer shows it."""
    return stored(path).transpose(Image.Transpose.ROTATE_270)
