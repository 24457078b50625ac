"""Questions and answers as the page shows them."""

import re

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.serving.ui import rendering
from minigpt4_jax.serving.ui.tasks import V2_SHORTCUTS, needs_box, with_box
from minigpt4_jax.visualization.boxes import PALETTE

GROUNDED = (
    "<p>a red cup</p> {<10><20><30><40>}<delim>{<50><20><60><40>} on <p>a table</p> {<0><30><99><99>}, "
    "beside <p>a red cup</p> {<70><20><80><40>}. <p>Nothing</p> else."
)


def spans(html):
    """(color, text) of the coloured parts."""
    found = re.findall(r'<span style="color:rgb\((.*?)\)[^>]*>(.*?)</span>', html)
    return [(tuple(map(int, color.split(", "))), text) for color, text in found]


def test_phrases_have_the_colours_of_their_boxes():
    html = rendering.answer_html(GROUNDED)
    # a repeated phrase keeps its colour; a phrase without a box has none
    assert spans(html) == [
        (PALETTE[0], "a red cup"), (PALETTE[1], "a table"), (PALETTE[0], "a red cup"),
    ]  # fmt: skip
    text = re.sub(r"<[^>]*>", "", html)
    assert text == "a red cup on a table, beside a red cup. Nothing else."


def test_an_answer_that_is_only_a_box():
    assert spans(rendering.answer_html("{<10><20><30><40>}")) == [
        (PALETTE[0], "▢ drawn in the picture")
    ]


@pytest.mark.parametrize("text", ["1 < 2 & <b>bold</b>", "<script>alert(1)</script>", "&lt;p&gt;"])
def test_other_text_is_shown_as_it_is(text):
    import html

    assert html.unescape(rendering.answer_html(text)) == text
    assert "<" not in rendering.answer_html(text)


def test_images_in_markdown_are_not_loaded():
    assert "![" not in rendering.answer_html("![x](http://example.org/x.png)")


@pytest.mark.parametrize(
    "answer", [GROUNDED, "It is {<1><2><3><4>} and <p>b</p> [5, 6, 7, 8] here"]
)
def test_no_mark_is_shown_while_it_is_written(answer):
    for length in range(len(answer) + 1):
        shown = re.sub(r"</?span[^>]*>", "", rendering.partial_html(answer[:length]))
        assert not re.search(r"[{}<>]|&lt;|p>|delim", shown), answer[:length]


def test_partial_text_grows_to_the_whole():
    text = "a (b) is less {or not} than 4, 5"
    assert rendering.partial_html(text) == text


def test_the_table_has_pixels():
    table = rendering.box_table(GROUNDED, (200, 50))
    rows = re.findall(r"<tr>(<td>.*?)</tr>", table)
    cells = [re.findall(r"<td>(?:<span.*?</span>)?(.*?)</td>", row) for row in rows]
    assert cells[0] == ["a red cup", "20", "10", "60", "20", "40 x 10"]
    assert [row[0] for row in cells] == ["a red cup", "a red cup", "a table", "a red cup"]
    assert "200 x 50" in table
    assert rendering.box_table("no box", (200, 50)) == ""


def test_the_picture_has_the_boxes_colours(tmp_path):
    source, out = tmp_path / "white.png", tmp_path / "marked.png"
    Image.new("RGB", (600, 400), "white").save(source)
    assert rendering.write_marked(source, GROUNDED, out, exif=True)
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (400, 600, 3)
    assert tuple(pixels[100, 60]) == PALETTE[0]  # the left side of the first box
    assert tuple(pixels[300, 0]) == PALETTE[1]
    assert not rendering.write_marked(source, "no box", out, exif=True)


def test_the_drawn_box_becomes_text():
    question = next(s.text for s in V2_SHORTCUTS if s.name == "Identify")
    assert needs_box(question)
    asked = with_box(question, (150, 20, 50, 80), (200, 100))
    assert asked == "[identify] what is this {<25><20><75><80>}"
    assert not needs_box(asked)
    assert rendering.question_html(asked) == "[identify] what is this ▢"
    assert with_box("[identify] and this", (-5, 0, 300, 100), (200, 100)).endswith(
        "this {<0><0><100><100>}"
    )
