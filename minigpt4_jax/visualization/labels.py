"""Labels of boxes: where they stand and how they look."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from minigpt4_jax.visualization.drawing import wrap_text
from minigpt4_jax.visualization.fonts import Font, load_font

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels

_LINES = 2  # of a label; what does not fit ends in "…"
_WIDTH = 0.4  # of the picture that a label may take, or as much as its box
_MARGIN = 3  # pixels beside the text
_MIN_SIZE = 6  # pixels of the smallest font
_LINE_HEIGHT = 1.4  # of a label with one line, in sizes of its font
_MAX_SHARE = 0.25  # of the picture: more labels get a smaller font,
_MIN_SCALE = 0.6  # but not smaller than this share of the size
_SCALES = (0.8, 0.6)  # smaller sizes, tried if labels cover objects
_TEXT, _BACKGROUND, _OPACITY = (0, 0, 0), (255, 255, 255), 0.85

# What a place costs, in pixels covered: another label is never covered if there is any other place.
_LABEL, _OTHER_BOX, _OWN_BOX, _FAR = 100.0, 2.0, 0.5, 1.5


class Label(NamedTuple):
    """A phrase, "" for none, the color of its boxes, and one of these."""

    phrase: str
    color: Color
    box: Rectangle


class _Text(NamedTuple):
    lines: list[str]
    width: int  # pixels, of the whole label
    height: int


def draw_labels(picture: Image.Image, labels: Sequence[Label], size: int, line: int) -> None:
    """Draw the labels of boxes whose lines are drawn already.

    size: of the font in pixels, smaller in a flat picture and among many labels; line: of the boxes.
    """
    boxes = [label.box for label in labels]
    labels = _without_repeats([label for label in labels if label.phrase])
    font = load_font(max(_MIN_SIZE, min(size, int(picture.height / _LINE_HEIGHT))))
    texts = [_layout(label, picture.width, font) for label in labels]
    smallest = max(_MIN_SIZE, font.size * _MIN_SCALE)
    share = sum(text.width * text.height for text in texts) / (picture.width * picture.height)
    if share > _MAX_SHARE:
        font = load_font(round(max(smallest, font.size * (_MAX_SHARE / share) ** 0.5)))
    fonts = [font, *(load_font(round(max(smallest, font.size * scale))) for scale in _SCALES)]
    found = _Arrangement(font, [], [], float("inf"))
    for font in fonts:  # a smaller one only if it covers much less
        tried = _arrange(labels, boxes, picture.size, font, line)
        if tried.covered < found.covered / 2:
            found = tried
        if not found.covered:
            break
    for label, text, where in zip(labels, found.texts, found.places, strict=True):
        if where is not None:  # None: a picture of a few pixels
            _draw_label(picture, where, text.lines, label.color, found.font)


class _Arrangement(NamedTuple):
    """Where labels stand in one size."""

    font: Font
    texts: list[_Text]
    places: list[Rectangle | None]
    covered: float  # pixels of objects and of other labels


def _arrange(
    labels: Sequence[Label],
    boxes: Sequence[Rectangle],
    image: tuple[int, int],
    font: Font,
    line: int,
) -> _Arrangement:
    texts = [_layout(label, image[0], font) for label in labels]
    places: list[Rectangle | None] = []
    covered = 0.0
    for label, text in zip(labels, texts, strict=True):
        taken = [place for place in places if place is not None]
        place = place_label((text.width, text.height), label.box, boxes, taken, image, line)
        places.append(place)
        if place is not None:
            own = overlap(place, label.box)
            covered += own if own > _MAX_SHARE * _area(label.box) else 0
            covered += sum(overlap(place, other) for other in _others(label.box, boxes))
            covered += sum(overlap(place, other) for other in taken)
    return _Arrangement(font, texts, places, covered)


def _without_repeats(labels: Sequence[Label]) -> list[Label]:
    """One label of a phrase is enough for two boxes in the same place."""
    kept: list[Label] = []
    for label in labels:
        same = [other for other in kept if other.phrase == label.phrase]
        if not any(_are_alike(label.box, other.box) for other in same):
            kept.append(label)
    return kept


def _layout(label: Label, picture_width: int, font: Font) -> _Text:
    """The phrase in lines, not much wider than its box."""
    beside = _stripe(font) + 2 * _MARGIN
    room = max(_WIDTH * picture_width, label.box[2] - label.box[0])
    lines = wrap_text(label.phrase, min(room, picture_width) - beside - 1, font, _LINES)
    width = math.ceil(max(font.length(line) for line in lines)) + beside
    return _Text(lines, width, len(lines) * font.height + 2)


def _stripe(font: Font) -> int:
    """Width of the stripe in the box's color at the left of a label, pixels."""
    return font.size * 2 // 3


def place_label(
    size: tuple[int, int],
    box: Rectangle,
    boxes: Sequence[Rectangle],
    taken: Sequence[Rectangle],
    image: tuple[int, int],
    line: int,
) -> Rectangle | None:
    """Where a label of this size stands: the place that costs least, the first among equals.

    It stands at its box, outside of it if there is room, and covers as little as possible of other
    boxes; away from its box only where it would hide an object. Never over other labels (`taken`) if
    there is another place. None: the label is larger than the image.
    """
    others = _others(box, boxes)
    whole = (box[0], box[1], box[2] + 1, box[3] + 1)  # with its last row and column
    best, lowest = None, float("inf")
    for x, y, steps in _candidates(box, size, image, line, others):
        away = _FAR * size[0] * size[1] * (steps > 0) + steps
        if lowest <= away:
            break  # so are all that follow
        place = (x, y, x + size[0], y + size[1])
        own = overlap(place, whole)
        cost = away + _LABEL * sum(overlap(place, label) for label in taken)
        cost += _OTHER_BOX * sum(overlap(place, other) for other in others)
        cost += own * (_OWN_BOX + own / _area(whole))
        if cost < lowest:
            best, lowest = place, cost
    return best


def _others(box: Rectangle, boxes: Sequence[Rectangle]) -> list[Rectangle]:
    """The boxes of other objects, without those around this one."""
    return [other for other in boxes if other != box and not _contains(other, box)]


def _candidates(
    box: Rectangle,
    size: tuple[int, int],
    image: tuple[int, int],
    line: int,
    others: Sequence[Rectangle],
) -> Iterator[tuple[int, int, int]]:
    """(left, top, steps from the box) of places within the image: above the box, below, beside, above and
    below between other boxes, inside, then line by line away from it."""
    x1, y1, x2, y2 = box
    width, height = size
    right, bottom = image[0] - width, image[1] - height
    if right < 0 or bottom < 0:
        return
    columns = [min(max(x, 0), right) for x in (x1, x2 + 1 - width)]
    rows = [min(max(y, 0), bottom) for y in (y1, y2 + 1 - height)]
    places = [(x, y, 0) for y in (y1 - height, y2 + 1) for x in columns]
    places += [(x, y, 0) for x in (x2 + 1, x1 - width) for y in rows]
    between = [(x1 + x2 + 1 - width) // 2]
    between += [x for other in others for x in (other[2] + 1, other[0] - width)]
    between = [x for x in between if x1 - width < x <= x2]  # still at the box
    places += [(x, y, 0) for y in (y1 - height, y2 + 1) for x in between]
    places += [(x, y, 0) for y in (y1 + line, y2 + 1 - line - height) for x in columns]
    for steps in range(1, image[1] // height + 1):
        for y in (y1 - (steps + 1) * height, y2 + 1 + steps * height, y1 + steps * height):
            places += [(x, y, steps) for x in (*columns, x2 + 1, x1 - width)]
    for x, y, steps in places:
        if 0 <= x <= right and 0 <= y <= bottom:
            yield x, y, steps


def overlap(a: Rectangle, b: Rectangle) -> int:
    """Pixels that two rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _area(box: Rectangle) -> int:
    return overlap(box, box)


def _are_alike(a: Rectangle, b: Rectangle) -> bool:
    shared = overlap(a, b)
    return a == b or shared >= 0.8 * (_area(a) + _area(b) - shared) > 0


def _contains(outer: Rectangle, inner: Rectangle) -> bool:
    return overlap(outer, inner) == _area(inner)


def _draw_label(
    picture: Image.Image, where: Rectangle, lines: Sequence[str], color: Color, font: Font
) -> None:
    """A stripe and a frame in the color, and the text in black on an almost white background."""
    x1, y1, x2, y2 = where
    stripe = _stripe(font)
    background = Image.new("RGB", (x2 - x1, y2 - y1), _BACKGROUND)
    picture.paste(Image.blend(picture.crop(where), background, _OPACITY), (x1, y1))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=color)
    draw.rectangle((x1, y1, x1 + stripe - 1, y2 - 1), fill=color)
    for i, text in enumerate(lines):
        font.draw(draw, (x1 + stripe + _MARGIN, y1 + 1 + i * font.height), text, _TEXT)
