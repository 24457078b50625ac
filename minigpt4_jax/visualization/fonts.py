"""Text in pictures: each character is drawn in the first font that has it.

DejaVu Sans, which comes with Matplotlib, has Latin, Greek, Cyrillic and symbols. The optional Noto fonts
(`pip install 'minigpt4_jax[fonts]'`) add Chinese, Japanese, Korean, Indic and other scripts, and emoji.
"""

import functools
import importlib.util
import itertools
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont

_log = logging.getLogger(__name__)

_PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
_REPLACEMENT = "?"  # drawn for a character that no font has
_REGULAR = 400  # weight; the Noto fonts are variable, and the thinnest is their default
_FACES_OF_CJK = ("JP", "KR", "SC")  # in the order of the file; they have the same characters
_KANA = re.compile(r"[\u3040-\u30ff]")


class Font:
    """Fonts of one size in pixels; they share a baseline."""

    def __init__(self, size: int):
        self.size = size
        ascent, descent = _open(_font_files()[0], size, 0).getmetrics()
        self.ascent, self.height = ascent, ascent + descent  # pixels

    def length(self, text: str) -> float:
        """Width of the text in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(
        self, draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, color: Any
    ) -> None:
        """Draw the text on one line, `at` its left upper corner. Logs the characters that no font has."""
        if missing := sorted({c for c in _normalize(text) if _is_missing(c)}):
            _report_missing("".join(missing))
        x, baseline = at[0], at[1] + self.ascent
        for font, run in self._runs(text):
            draw.text((x, baseline), run, color, font, anchor="ls")
            x += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """The text in pieces of one font each."""
        text = _normalize(text)
        face = _FACES_OF_CJK.index("JP" if _KANA.search(text) else "SC")
        for file, pieces in itertools.groupby(_files_of(text), key=lambda piece: piece[0]):
            yield _open(file, self.size, face), "".join(char for _, char in pieces)


@functools.cache
def load_font(size: int) -> Font:
    """The fonts of all pictures, `size` pixels high."""
    return Font(size)


def _normalize(text: str) -> str:
    """One line without control characters, accents joined with their letters."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(_plain(char) for char in text if unicodedata.category(char) != "Cc")


def _plain(char: str) -> str:
    """The character, or the letters that it is a variant of if no font has it, as of bold and script ones."""
    if _find_font(char) is not None or _is_invisible(char):
        return char
    plain = unicodedata.normalize("NFKC", char)
    return plain if all(_find_font(letter) is not None for letter in plain) else char


def _files_of(text: str) -> Iterator[tuple[Path, str]]:
    """(font file, character) of the normalized text. Marks stay in the font of the letter before."""
    before = _font_files()[0]
    for char in text:
        has_it = _find_font(char)
        if _joins(char) and _has(before, char):
            has_it = before
        elif has_it is None and _is_invisible(char):
            continue
        elif has_it is None:
            has_it, char = _font_files()[0], _REPLACEMENT
        before = has_it
        yield before, char


def _joins(char: str) -> bool:
    """Whether a character is part of the one before: combining marks, joiners, emoji variants."""
    return unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf", "Sk")


def _is_invisible(char: str) -> bool:
    """Format characters and variation selectors, which have no picture of their own."""
    return unicodedata.category(char) == "Cf" or 0xFE00 <= ord(char) <= 0xFE0F


def _is_missing(char: str) -> bool:
    return _find_font(char) is None and not _is_invisible(char)


# --- font files ----------------------------------------------------------------------------------


@functools.cache
def _font_files() -> tuple[Path, ...]:
    """DejaVu Sans, then the upright fonts of the optional packages that are installed."""
    import matplotlib  # heavy: only where text is drawn

    files = [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"]
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            found = sorted(Path(folder).glob("*.tt[cf]"))
            files += [file for file in found if "Italic" not in file.name]
    return tuple(files)


@functools.lru_cache(4096)
def _find_font(char: str) -> Path | None:
    """The first font that has the character."""
    return next((file for file in _font_files() if _has(file, char)), None)


def _has(file: Path, char: str) -> bool:
    return bool(_characters(file).get_char_index(ord(char)))


@functools.cache
def _characters(file: Path) -> Any:
    from matplotlib.ft2font import FT2Font  # Pillow does not tell which characters a font has

    return FT2Font(str(file))


@functools.lru_cache(256)
def _open(file: Path, size: int, face: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(file, size, face if file.suffix == ".ttc" else 0)
    if file != _font_files()[0]:
        font.set_variation_by_axes([_REGULAR])
    return font


@functools.cache  # once for the same characters
def _report_missing(characters: str) -> None:
    names = ", ".join(f"{char!r}" for char in characters[:8])
    more = f" and {len(characters) - 8} more" if len(characters) > 8 else ""
    advice = ""
    if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
        advice = (
            "; for Chinese, Japanese, Korean and other scripts, and for emoji, "
            "pip install 'minigpt4_jax[fonts]'"
        )
    _log.warning('pictures: no font has %s%s; drawn as "%s"%s', names, more, _REPLACEMENT, advice)
