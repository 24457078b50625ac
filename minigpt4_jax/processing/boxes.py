"""Bounding boxes in text: parse and format `{<x1><y1><x2><y2>}`, in hundredths of width and height.

This is MiniGPT-v2's format (the original's demo_v2.py and RefCOCO datasets): boxes of one phrase are joined
by `<delim>`, a phrase precedes its boxes as `<p>..</p>`, and an answer that is only a box has no phrase.
Models deviate from it slightly; `parse_boxes` is tolerant.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import shorten

STEPS = 100  # coordinates are in hundredths of the image's side
DELIMITER = "<delim>"

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels: top left, bottom right

_NUMBER = r"(-?[0-9]+)(?:\.[0-9]*)?"
_FOUR = r"[<>, ]{1,5}".join([_NUMBER] * 4)
_MARK = re.compile(
    rf"(?P<open><p>)|(?P<close></p>)|{DELIMITER}"
    rf"|(?P<box>\{{? ?< ?{_FOUR} ?> ?\}}?|[{{\[(] ?{_FOUR} ?[}}\])])"
)
_INTEGER = re.compile(r"-?[0-9]+")
_JOINT = re.compile(r"[\s,;.&]*(?:and[\s,;]*)?")  # between boxes of one phrase


class Span(NamedTuple):
    """A part of an answer: a phrase with its boxes, text without boxes, or boxes without text."""

    text: str
    boxes: tuple[tuple[int, int, int, int], ...]  # in hundredths
    is_phrase: bool  # whether it was between <p> and </p>


def parse_boxes(text: str, width: float, height: float) -> list[tuple[str, Box]]:
    """(phrase, box in pixels) for every box in an answer, in order; "" for a box without phrase.

    width, height: of the image in pixels. Any text is accepted: swapped corners are reordered, numbers are
    clipped to 0..100, missing braces and brackets are tolerated, unfinished boxes are skipped. A text
    without `<p>` and with exactly four integers is one box. UserError: not text, a width or height that is
    not a number above 0.
    """
    width, height = _sides(width, height)
    return [(span.text, _pixels(box, width, height)) for span in spans(text) for box in span.boxes]


def spans(answer: str) -> list[Span]:
    """The parts of an answer in order: phrases, boxes without phrase, and the texts between them.

    UserError: not text.
    """
    if not isinstance(answer, str):
        raise UserError(f"answer: got {type(answer).__name__}; expected the text of an answer")
    text = re.sub(r"\s+", " ", html.unescape(answer))
    found = _spans(text)
    if "<p>" not in text and not any(span.boxes for span in found):
        numbers = _INTEGER.findall(text)
        if len(numbers) == 4:
            return [Span("", (_hundredths(numbers),), False)]
    return found


class _Part:
    """A Span that is being parsed."""

    def __init__(self, text: str, is_phrase: bool):
        self.text, self.is_phrase = text, is_phrase
        self.boxes: list[tuple[int, int, int, int]] = []


def _spans(text: str) -> list[Span]:
    """Parse mark by mark. A phrase's first box may follow after other words; further boxes of the same
    phrase must follow directly."""
    parts: list[_Part] = []
    phrase: str | None = None  # text since <p>; None outside of a phrase
    owner: _Part | None = None  # the part that gets the next box
    at = 0

    def add(text: str, is_phrase: bool) -> _Part:
        parts.append(_Part(text, is_phrase))
        return parts[-1]

    for mark in _MARK.finditer(text):
        between, at = text[at : mark.start()], mark.end()
        if phrase is not None:
            phrase += between
        elif between:
            add(between, False)
            if owner is not None and owner.boxes and not _JOINT.fullmatch(between):
                owner = None
        if phrase is not None and (mark["open"] or mark["close"] or mark["box"]):
            owner, phrase = add(phrase.strip(), True), None  # also if </p> is missing
        if mark["open"]:
            phrase, owner = "", None
        elif mark["box"]:
            owner = owner or add("", False)
            numbers = [n for n in mark.groups()[3:] if n is not None]  # of one of the two notations
            owner.boxes.append(_hundredths(numbers))
    if phrase is not None:
        add((phrase + text[at:]).strip(), True)
    elif text[at:]:
        add(text[at:], False)
    return [Span(part.text, tuple(part.boxes), part.is_phrase) for part in parts]


def _hundredths(numbers: Sequence[str]) -> tuple[int, int, int, int]:
    """Four numbers as text -> a box within the image, top left corner first."""
    # Nine digits suffice; int() refuses strings of thousands of digits.
    x1, y1, x2, y2 = (min(max(int(number[:9]), 0), STEPS) for number in numbers)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _sides(width: float, height: float) -> tuple[float, float]:
    """The sides of an image as floats. UserError: not numbers above 0."""
    given = (width, height)
    if any(isinstance(side, (str, bytes, bool)) for side in given):
        sides = (math.nan, math.nan)  # float() would read digits
    else:
        try:
            sides = float(width), float(height)
        except (TypeError, ValueError, OverflowError):
            sides = (math.nan, math.nan)
    if not all(math.isfinite(side) and side > 0 for side in sides):
        raise UserError(
            f"box: the image is {shorten(repr(width), 40)} x {shorten(repr(height), 40)}; expected width and "
            "height in pixels, numbers above 0"
        )
    return sides


def _pixels(box: tuple[int, int, int, int], width: float, height: float) -> Box:
    x1, y1, x2, y2 = box
    return x1 * width / STEPS, y1 * height / STEPS, x2 * width / STEPS, y2 * height / STEPS


def format_box(box: Sequence[float], width: float, height: float) -> str:
    """A box in pixels (x1, y1, x2, y2) in the model's format, such as `{<10><20><30><100>}`.

    Each number is floor(100 * coordinate / size). UserError: not four finite numbers, an image of size 0,
    corners in the wrong order, a box outside the image.
    """
    values = [float(v) for v in box]
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise UserError(f"box {tuple(box)}: expected four numbers x1, y1, x2, y2 in pixels")
    width, height = _sides(width, height)
    x1, y1, x2, y2 = values
    if x1 > x2 or y1 > y2:
        raise UserError(f"box {tuple(values)}: expected x1 <= x2 and y1 <= y2")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise UserError(
            f"box {tuple(values)} is not within the image of {width:g} x {height:g} pixels"
        )
    hundredths = (STEPS * x1 / width, STEPS * y1 / height, STEPS * x2 / width, STEPS * y2 / height)
    # 28.999999999999996 counts as 29, so that a parsed box is formatted as the same text.
    return "{" + "".join(f"<{int(value + 1e-9)}>" for value in hundredths) + "}"


def format_boxes(boxes: Sequence[Sequence[float]], width: float, height: float) -> str:
    """The boxes of one phrase, in pixels, joined by `<delim>`. UserError: as `format_box`."""
    return DELIMITER.join(format_box(box, width, height) for box in boxes)


def box_of_mask(mask: np.ndarray) -> Box:
    """The bounding box of the nonzero pixels of a mask [H, W] or [H, W, C], such as a user's sketch.

    UserError: all pixels are 0, or another shape."""
    if mask.ndim not in (2, 3):
        raise UserError(f"mask of shape {list(mask.shape)}: expected [H, W] or [H, W, channels]")
    marked = mask.reshape(*mask.shape[:2], -1) != 0
    rows, columns = (np.flatnonzero(marked.any(axis)) for axis in ((1, 2), (0, 2)))
    if not len(rows):
        raise UserError("mask: nothing is marked; all pixels are 0")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes in pixels, with one pixel added to every side, as in the
    original's evaluation (computeIoU of eval_utils.py)."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return float(common / (sum(areas) - common))
