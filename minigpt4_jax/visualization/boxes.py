"""Draws the boxes of an answer into its image, like the original's demo (demo_v2.py)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.boxes import Box, parse_boxes, spans
from minigpt4_jax.processing.images import ImageSource, open_image
from minigpt4_jax.utils.text import shorten
from minigpt4_jax.visualization.drawing import Font, load_font, save_picture, truncate_text

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

PALETTE: tuple[Color, ...] = (
    (230, 25, 25), (0, 130, 240), (20, 160, 50), (245, 130, 0), (150, 40, 200), (0, 175, 180),
    (225, 0, 150), (130, 150, 0), (90, 70, 255), (160, 90, 30), (0, 215, 110), (120, 120, 130),
    (250, 190, 0), (100, 0, 60), (0, 70, 110), (255, 120, 150),
)  # fmt: skip
MIN_WIDTH = 500  # pixels: smaller images are enlarged, so that labels can be read
LINE = 2  # width of a box's line in pixels; it and the font grow with images wider than MIN_WIDTH
FONT_SIZE = 15


class _Label(NamedTuple):
    phrase: str
    color: Color
    box: Rectangle


def draw_boxes(image: ImageSource, answer: str) -> Image.Image:
    """The image (RGB) with all boxes of the answer, each in its phrase's color and labelled with it.

    All boxes of a phrase have the same color. Labels have a half-transparent background. They are
    above their box if there is room, else where they do not cover each other. Images less than 500
    pixels wide are enlarged to that. UserError: the answer has no boxes, or as `open_image`.
    """
    picture = open_image(image)
    scale = max(1.0, MIN_WIDTH / picture.width)
    size = (round(picture.width * scale), max(1, round(picture.height * scale)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    found = parse_boxes(answer, *size)
    if not found:
        raise UserError(f"the answer has no boxes to draw: {shorten(answer)!r}")
    colors = phrase_colors(answer)
    unit = picture.width / MIN_WIDTH
    line = max(1, round(LINE * unit))
    labels = []
    draw = ImageDraw.Draw(picture)
    for phrase, box in found:
        corners = _pixel_box(box, size)
        draw.rectangle(corners, outline=colors[phrase], width=line)
        labels.append(_Label(phrase, colors[phrase], corners))
    _draw_labels(
        picture, [label for label in labels if label.phrase], round(FONT_SIZE * unit), line
    )
    return picture


def phrase_colors(answer: str) -> dict[str, Color]:
    """The colour of each phrase that has a box, in order; "" for boxes without one."""
    phrases = dict.fromkeys(phrase for phrase, _ in parse_boxes(answer, 1, 1))
    return {phrase: PALETTE[i % len(PALETTE)] for i, phrase in enumerate(phrases)}


def colored_text(answer: str) -> list[tuple[str, Color | None]]:
    """The answer as people read it, without boxes: pieces of text, a phrase with its boxes' colour."""
    colors = phrase_colors(answer)
    pieces: list[tuple[str, Color | None]] = []
    for span in spans(answer):
        if span.is_phrase:
            pieces.append((span.text, colors.get(span.text) if span.boxes else None))
        elif pieces and pieces[-1][1] is None and span.text:
            pieces[-1] = (pieces[-1][0] + span.text, None)
        elif span.text:
            pieces.append((span.text, None))
    # the boxes between leave spaces behind
    return [(re.sub(r" +(?=[ ,.;:!?])", "", t) if c is None else t, c) for t, c in pieces]


def _pixel_box(box: Box, size: tuple[int, int]) -> Rectangle:
    """A box as pixels of an image of this size, which it may reach the edge of."""
    x1, y1, x2, y2 = (int(v) for v in box)
    width, height = size
    return min(x1, width - 1), min(y1, height - 1), min(x2, width - 1), min(y2, height - 1)


def _draw_labels(picture: Image.Image, labels: list[_Label], letters: int, line: int) -> None:
    font = load_font(max(6, letters))
    placed: list[tuple[str, Rectangle]] = []
    for label in labels:
        text = truncate_text(label.phrase, picture.width - 2 * letters, font)
        size = (int(font.getlength(text)) + letters + 4, letters + 6)
        where = _place(label, size, picture.size, [box for _, box in placed], line)
        if where is None:
            continue
        if any(text == other and _overlap(where, box) for other, box in placed):
            continue  # one label is enough for two boxes in the same place
        _draw_label(picture, where, text, label.color, font)
        placed.append((text, where))


def _place(
    label: _Label,
    size: tuple[int, int],
    image: tuple[int, int],
    taken: list[Rectangle],
    line: int,
) -> Rectangle | None:
    """Where the label goes: the first place that is free, or else the one that covers least."""
    places = [
        (x, y, x + size[0], y + size[1]) for x, y in _candidates(label.box, size, image, line)
    ]
    if not places:  # an image of a few pixels
        return None
    covers = [sum(_overlap(place, other) for other in taken) for place in places]
    return places[covers.index(min(covers))]


def _candidates(
    box: Rectangle, size: tuple[int, int], image: tuple[int, int], line: int
) -> Iterator[tuple[int, int]]:
    """Left upper corners within the image: above the box, inside, below, then down and up from it."""
    x1, y1, x2, y2 = box
    width, height = size
    most = (image[0] - width, image[1] - height)
    if most[0] < 0 or most[1] < 0:
        return
    x = min(max(x1, 0), most[0])
    for at in ((x, y1 - height), (x, y1 + line), (x, y2 - line - height), (x, y2 + 1)):
        if 0 <= at[1] <= most[1]:
            yield at
    for step in range(1, image[1] // height + 1):
        for y in (y1 + step * height, y1 - (step + 1) * height):
            for left in (x, max(0, x1 - width), min(x2, most[0])):
                if 0 <= y <= most[1]:
                    yield left, y


def _overlap(a: Rectangle, b: Rectangle) -> int:
    """Pixels that two rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _draw_label(
    picture: Image.Image, where: Rectangle, text: str, color: Color, font: Font
) -> None:
    """A stripe in the color, then the phrase in black, on a half-transparent background."""
    x1, y1, x2, y2 = where
    letters = y2 - y1 - 6
    background = Image.new("RGB", (x2 - x1, y2 - y1), (255, 255, 255))
    background.paste(color, (0, 0, letters * 2 // 3, y2 - y1))
    picture.paste(Image.blend(picture.crop(where), background, 0.5), (x1, y1))
    at = (x1 + letters * 2 // 3 + 3, (y1 + y2) // 2)
    ImageDraw.Draw(picture).text(at, text, (0, 0, 0), font, anchor="lm")


def check_file(path: Path) -> None:
    """UserError unless a picture can be written there."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"{path}: expected the name of a picture, for instance boxes.png")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture atomically. UserError: as `check_file`, or the file cannot be written."""
    check_file(path)
    save_picture(path, picture.save)
