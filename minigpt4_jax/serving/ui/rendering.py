"""Questions and answers as the page shows them: text as HTML, boxes as pictures and a table."""

import html
import re
from pathlib import Path

from PIL import Image

from minigpt4_jax.processing.boxes import DELIMITER, parse_boxes
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.visualization.boxes import colored_text, draw_boxes, phrase_colors
from minigpt4_jax.visualization.labels import Color

BOX_SIGN = "▢"  # stands for the box that the user drew, in the text of a question
SHOWN_SIDE = 1600  # pixels of the longer side of a picture with boxes
THUMBNAIL_SIDE = 512  # and of a picture beside a question
BOX_IN_QUESTION = re.compile(r"\{(?:<\d+>){4}\}")
# The beginning of a mark at the end of a text that is still being written.
_UNFINISHED = re.compile(
    rf"(?:<|</|<p|</p|{'|'.join(DELIMITER[:n] for n in range(2, 7))}|[{{\[(<][-0-9.<>, ]*)$"
)


def answer_html(answer: str) -> str:
    """A finished answer: phrases in the colours of their boxes, without coordinates and marks."""
    if not _has_marks(answer):
        return escape(answer)
    pieces = [_span(text, color) if color else escape(text) for text, color in colored_text(answer)]
    shown = "".join(pieces).strip()
    colors = phrase_colors(answer)
    if not shown and "" in colors:  # an answer that is only a box
        return _span(f"{BOX_SIGN} drawn in the picture", colors[""])
    return shown


def partial_html(text: str) -> str:
    """An answer that is still being written; a mark at its end that is not complete is left out."""
    text = _UNFINISHED.sub("", text)
    # four numbers alone are a box only once the answer is finished
    return answer_html(text) if "<p>" in text or BOX_IN_QUESTION.search(text) else escape(text)


def question_html(question: str) -> str:
    """A question; a box in it is shown as a sign."""
    return escape(BOX_IN_QUESTION.sub(BOX_SIGN, question))


def escape(text: str) -> str:
    """Text whose characters are shown as they are. Markdown in it is rendered, but for its images, which
    the browser would ask other hosts for."""
    return html.escape(text, quote=False).replace("![", "!&#91;")


def box_table(answer: str, size: tuple[int, int]) -> str:
    """An HTML table of an answer's boxes in pixels of an image (width, height); "" without any."""
    found = parse_boxes(answer, *size)
    if not found:
        return ""
    colors = phrase_colors(answer)
    rows = "".join(
        f"<tr><td>{_swatch(colors[phrase])}{html.escape(phrase) or 'box'}</td>"
        + "".join(f"<td>{value:.0f}</td>" for value in box)
        + f"<td>{box[2] - box[0]:.0f} x {box[3] - box[1]:.0f}</td></tr>"
        for phrase, box in found
    )
    head = "".join(f"<th>{name}</th>" for name in ("phrase", "x1", "y1", "x2", "y2", "size"))
    caption = f"<caption>Pixels of the image, {size[0]} x {size[1]}</caption>"
    return (
        f"<table class='boxes'>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def write_marked(image: Path, text: str, out: Path, *, exif: bool) -> bool:
    """Write a PNG of an image with the boxes of a text; False if it has none."""
    if not parse_boxes(text, 1, 1):
        return False
    draw_boxes(_smaller(image, SHOWN_SIDE, exif=exif), text).save(out)
    return True


def write_thumbnail(image: Path, out: Path, *, exif: bool) -> None:
    """Write a small JPEG of an image."""
    _smaller(image, THUMBNAIL_SIDE, exif=exif).save(out, quality=88)


def _smaller(image: Path, side: int, *, exif: bool) -> Image.Image:
    picture = open_image(image, exif=exif)
    picture.thumbnail((side, side))
    return picture


def _has_marks(answer: str) -> bool:
    return "<p>" in answer or "</p>" in answer or bool(parse_boxes(answer, 1, 1))


def _span(text: str, color: Color) -> str:
    return f'<span style="color:rgb{color};font-weight:600">{escape(text)}</span>'


def _swatch(color: Color) -> str:
    return f"<span class='swatch' style='background:rgb{color}'></span>"
