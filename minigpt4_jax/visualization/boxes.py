"""Draws the boxes of an answer into its image, like the original's demo (demo_v2.py)."""

import re
from pathlib import Path

from PIL import Image, ImageDraw

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.boxes import Box, parse_boxes, spans
from minigpt4_jax.processing.images import ImageSource, open_image
from minigpt4_jax.utils.text import shorten
from minigpt4_jax.visualization.drawing import save_picture
from minigpt4_jax.visualization.labels import Color, Label, Rectangle, draw_labels

PALETTE: tuple[Color, ...] = (
    (230, 25, 25), (0, 130, 240), (20, 160, 50), (245, 130, 0), (150, 40, 200), (0, 175, 180),
    (225, 0, 150), (130, 150, 0), (90, 70, 255), (160, 90, 30), (0, 215, 110), (120, 120, 130),
    (250, 190, 0), (100, 0, 60), (0, 70, 110), (255, 120, 150),
)  # fmt: skip
MIN_WIDTH = 500  # pixels: smaller images are enlarged, so that labels can be read,
MAX_HEIGHT = 4000  # but not to more than this height
# Pixels in an image MIN_WIDTH wide; both grow with the image.
LINE_WIDTH = 2
FONT_SIZE = 15


def draw_boxes(image: ImageSource, answer: str) -> Image.Image:
    """The image (RGB) with the boxes of the answer, labelled with their phrases.

    All boxes of a phrase have the same color. A label is above its box if there is room, otherwise
    where it covers as little as possible of other labels and boxes (labels.py). Images less than 500
    pixels wide are enlarged to that. UserError: the answer has no boxes, or as `open_image`.
    """
    picture = open_image(image)
    scale = max(1.0, min(MIN_WIDTH / picture.width, MAX_HEIGHT / picture.height))
    size = (round(picture.width * scale), max(1, round(picture.height * scale)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    found = parse_boxes(answer, *size)
    if not found:
        raise UserError(f"the answer has no boxes to draw: {shorten(answer)!r}")
    colors = phrase_colors(answer)
    unit = picture.width / MIN_WIDTH
    line_width = max(1, round(LINE_WIDTH * unit))
    labels = []
    draw = ImageDraw.Draw(picture)
    for phrase, box in found:
        corners = _pixel_box(box, size)
        draw.rectangle(corners, outline=colors[phrase], width=line_width)
        labels.append(Label(phrase, colors[phrase], corners))
    draw_labels(picture, labels, round(FONT_SIZE * unit), line_width)
    return picture


def phrase_colors(answer: str) -> dict[str, Color]:
    """The colour of each phrase that has a box, in order; "" for boxes without one."""
    phrases = dict.fromkeys(phrase for phrase, _ in parse_boxes(answer, 1, 1))
    return {phrase: PALETTE[i % len(PALETTE)] for i, phrase in enumerate(phrases)}


def colored_text(answer: str) -> list[tuple[str, Color | None]]:
    """The answer without its boxes, in pieces: (text, color of its boxes or None)."""
    colors = phrase_colors(answer)
    pieces: list[tuple[str, Color | None]] = []
    for span in spans(answer):
        if span.is_phrase:
            pieces.append((span.text, colors.get(span.text) if span.boxes else None))
        elif pieces and pieces[-1][1] is None and span.text:
            pieces[-1] = (pieces[-1][0] + span.text, None)
        elif span.text:
            pieces.append((span.text, None))
    # spaces before punctuation, where a box was
    return [(re.sub(r" +(?=[ ,.;:!?])", "", t) if c is None else t, c) for t, c in pieces]


def _pixel_box(box: Box, size: tuple[int, int]) -> Rectangle:
    """A box in whole pixels within an image of this size."""
    x1, y1, x2, y2 = (int(v) for v in box)
    width, height = size
    return min(x1, width - 1), min(y1, height - 1), min(x2, width - 1), min(y2, height - 1)


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
