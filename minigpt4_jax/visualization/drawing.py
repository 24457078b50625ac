"""Fonts, text layout and atomic saving, for all pictures."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from PIL import ImageFont

from minigpt4_jax.storage.atomic import atomic_file, write_error

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def load_font(size: int) -> Font:
    """Pillow's own font, `size` pixels high."""
    return ImageFont.load_default(size)


def truncate_text(text: str, width: int, font: Font) -> str:
    """The text on one line, its end replaced by "…" if it is wider than `width` pixels."""
    text = re.sub(r"\s+", " ", text)[:200]
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text


def wrap_text(text: str, width: int, font: Font) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or inside one that is too long."""
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        for piece in textwrap.wrap(word, 30) or [""]:
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(piece)
    return lines


def save_picture(path: Path, write: Callable[[Path], None]) -> None:
    """Write a picture atomically: write(temporary_path). UserError: it cannot be written."""
    try:
        with atomic_file(path) as temporary:
            write(temporary)
    except (OSError, ValueError) as e:  # ValueError: Pillow can only read this format
        raise write_error(path, e) from e
