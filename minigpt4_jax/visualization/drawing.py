"""Text layout and atomic saving, for all pictures."""

import re
from collections.abc import Callable
from pathlib import Path

from minigpt4_jax.storage.atomic import atomic_file, write_error
from minigpt4_jax.visualization.fonts import Font

_ELLIPSIS = "…"
# Chinese, Japanese and Korean text may be broken after every character, but not before punctuation.
_CJK = r"\u2e80-\u2fff\u3003-\u9fff\uac00-\ud7af\uf900-\ufaff"
_CJK_STOPS = r"\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f\u300d\u300f\u3011\uff09"
_PARTS = re.compile(rf"\s+|[{_CJK}][{_CJK_STOPS}]*|[^\s{_CJK}]+")
_MOST = 2000  # characters of a text that are looked at


def truncate_text(text: str, width: float, font: Font) -> str:
    """The text on one line, its end replaced by "…" if it is wider than `width` pixels."""
    text = " ".join(text[:_MOST].split())
    return text if font.length(text) <= width else _cut(text, width, font)


def wrap_text(text: str, width: float, font: Font, max_lines: int | None = None) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or inside one that is too long.

    The last of `max_lines` ends in "…" if there is more text.
    """
    lines = [""]
    for part in _PARTS.findall(text.strip()[:_MOST]):
        if part.isspace():
            part = " "
        if font.length(lines[-1] + part.rstrip()) <= width:
            lines[-1] += part
            continue
        if lines[-1].strip():
            lines.append("")
        while part and font.length(part) > width:  # a word that is too long
            head = _head(part, width, font)
            lines[-1:] = [head, ""]
            part = part[len(head) :]
        lines[-1] = part.lstrip()
    lines = [line.rstrip() for line in lines]
    if lines[-1] == "" and len(lines) > 1:
        lines.pop()
    if max_lines is not None and len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] = _cut(lines[-1], width, font)
    return lines


def _cut(text: str, width: float, font: Font) -> str:
    """The text's beginning and "…", as much as fits."""
    return _head(text, width - font.length(_ELLIPSIS), font).rstrip() + _ELLIPSIS


def _head(text: str, width: float, font: Font) -> str:
    """The longest beginning of the text that fits, at least one character."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.length(text[:middle]) <= width else (low, middle - 1)
    return text[:low]


def save_picture(path: Path, write: Callable[[Path], None]) -> None:
    """Write a picture atomically: write(temporary_path). UserError: it cannot be written."""
    try:
        with atomic_file(path) as temporary:
            write(temporary)
    except (OSError, ValueError) as e:  # ValueError: Pillow can only read this format
        raise write_error(path, e) from e
