"""Boxes in text, both ways: `{<x1><y1><x2><y2>}`, whole hundredths of the image's width and height.

MiniGPT-v2 writes an answer's boxes so (the original's demo_v2.py and its RefCOCO
readers): several boxes of one phrase are joined by `<delim>`, a phrase stands before its boxes as
`<p>..</p>`, and an answer that is a box and nothing else has no phrase. Models write it nearly so;
`parse_boxes` reads what they mean.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minigpt4_jax.errors import UserError

STEPS = 100  # of a side of the image
DELIMITER = "<delim>"

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels, the left upper corner first

_NUMBER = r"(-?[0-9]+)(?:\.[0-9]*)?"
_FOUR = r"[<>, ]{1,5}".join([_NUMBER] * 4)
_MARK = re.compile(
    rf"(?P<open><p>)|(?P<close></p>)|{DELIMITER}"
    rf"|(?P<box>\{{? ?< ?{_FOUR} ?> ?\}}?|[{{\[(] ?{_FOUR} ?[}}\])])"
)
_INTEGER = re.compile(r"-?[0-9]+")
_JOINT = re.compile(r"[\s,;.&]*(?:and[\s,;]*)?")  # between boxes of one phrase


class Span(NamedTuple):
    """A part of an answer: a phrase between <p> and </p> with its boxes in hundredths, text without
    boxes, or boxes without text."""

    text: str
    boxes: tuple[tuple[int, int, int, int], ...]
    is_phrase: bool


def parse_boxes(text: str, width: float, height: float) -> list[tuple[str, Box]]:
    """(phrase, box in pixels) of every box in an answer, in order; the phrase of a bare box is "".

    width, height: of the image the boxes are about. Never raises: corners in the wrong order are
    exchanged, numbers beyond 0 to 100 moved to the nearest, missing braces and brackets overlooked,
    unfinished boxes left out. Exactly four whole numbers in a text without `<p>` are one box.
    """
    return [(span.text, _pixels(box, width, height)) for span in spans(text) for box in span.boxes]


def spans(answer: str) -> list[Span]:
    """The parts of an answer in order: phrases and bare boxes, and the texts between them."""
    text = re.sub(r"\s+", " ", html.unescape(answer))
    found = _spans(text)
    if "<p>" not in text and not any(span.boxes for span in found):
        numbers = _INTEGER.findall(text)
        if len(numbers) == 4:
            return [Span("", (_hundredths(numbers),), False)]
    return found


class _Part:
    """A Span while it is read."""

    def __init__(self, text: str, is_phrase: bool):
        self.text, self.is_phrase = text, is_phrase
        self.boxes: list[tuple[int, int, int, int]] = []


def _spans(text: str) -> list[Span]:
    """Walks from mark to mark. A box belongs to the phrase before it, also with words between them;
    after the first, only with the next box close behind."""
    parts: list[_Part] = []
    phrase: str | None = None  # read since <p>; None: none is open
    owner: _Part | None = None  # of the next box
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
            owner, phrase = add(phrase.strip(), True), None  # also where </p> is missing
        if mark["open"]:
            phrase, owner = "", None
        elif mark["box"]:
            owner = owner or add("", False)
            numbers = [n for n in mark.groups()[3:] if n is not None]  # of one of two spellings
            owner.boxes.append(_hundredths(numbers))
    if phrase is not None:
        add((phrase + text[at:]).strip(), True)
    elif text[at:]:
        add(text[at:], False)
    return [Span(part.text, tuple(part.boxes), part.is_phrase) for part in parts]


def _hundredths(numbers: Sequence[str]) -> tuple[int, int, int, int]:
    """Four written numbers as a box within the image, its left upper corner first."""
    # The first digits tell enough: int() refuses thousands of them.
    x1, y1, x2, y2 = (min(max(int(number[:9]), 0), STEPS) for number in numbers)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _pixels(box: tuple[int, int, int, int], width: float, height: float) -> Box:
    x1, y1, x2, y2 = box
    return x1 * width / STEPS, y1 * height / STEPS, x2 * width / STEPS, y2 * height / STEPS


def format_box(box: Sequence[float], width: float, height: float) -> str:
    """A box in pixels (x1, y1, x2, y2) as a model reads it: `{<10><20><30><100>}`.

    Each number is the whole part of 100 * coordinate / size. UserError: not four finite numbers, an
    image without size, corners in the wrong order, a box outside of the image.
    """
    values = [float(v) for v in box]
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise UserError(f"box {tuple(box)}: expected four numbers x1, y1, x2, y2 in pixels")
    if width <= 0 or height <= 0:
        raise UserError(f"box: the image is {width} x {height}; expected sides above 0")
    x1, y1, x2, y2 = values
    if x1 > x2 or y1 > y2:
        raise UserError(f"box {tuple(values)}: expected x1 <= x2 and y1 <= y2")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise UserError(f"box {tuple(values)} is not within the image of {width} x {height} pixels")
    shares = (STEPS * x1 / width, STEPS * y1 / height, STEPS * x2 / width, STEPS * y2 / height)
    # 28.999999999999996 is 29: what was read from a text is written as the same text
    return "{" + "".join(f"<{int(share + 1e-9)}>" for share in shares) + "}"


def format_boxes(boxes: Sequence[Sequence[float]], width: float, height: float) -> str:
    """The boxes of one phrase, in pixels, as one text."""
    return DELIMITER.join(format_box(box, width, height) for box in boxes)


def box_of_mask(mask: np.ndarray) -> Box:
    """The box around what is not 0 in a mask [H, W] or [H, W, channels], as a user sketches it.
    UserError: nothing is marked, or another shape."""
    if mask.ndim not in (2, 3):
        raise UserError(f"mask of shape {list(mask.shape)}: expected [H, W] or [H, W, channels]")
    marked = mask.reshape(*mask.shape[:2], -1) != 0
    rows, columns = (np.flatnonzero(marked.any(axis)) for axis in ((1, 2), (0, 2)))
    if not len(rows):
        raise UserError("mask: nothing is marked in it; every pixel is 0")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Overlap of two boxes in pixels over their union, a pixel added to every side, as the original's
    evaluation counts (computeIoU of eval_utils.py)."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return float(common / (sum(areas) - common))
