"""Boxes drawn into an image: where they are, in which colours, with labels that can be read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4_jax.errors import UserError
from minigpt4_jax.visualization import boxes
from minigpt4_jax.visualization.boxes import PALETTE, colored_text, draw_boxes, phrase_colors

ANSWER = "I see <p>a cat</p> {<10><20><30><60>} and <p>dogs</p> {<50><50><70><80>}<delim>{<75><50><95><80>} ."


def gray(width=600, height=400):
    return np.full((height, width, 3), 128, np.uint8)


def pixels_of(picture, color):
    """Where a picture has a colour: (left, top, right, bottom) around it."""
    rows, columns = np.nonzero((np.asarray(picture) == color).all(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_a_phrase_has_one_colour_and_its_boxes_are_where_the_answer_says(monkeypatch):
    monkeypatch.setattr(boxes, "draw_labels", lambda *_: None)
    picture = draw_boxes(gray(), ANSWER)
    assert picture.size == (600, 400) and picture.mode == "RGB"
    assert pixels_of(picture, PALETTE[0]) == (60, 80, 180, 240)
    assert pixels_of(picture, PALETTE[1]) == (300, 200, 570, 320)  # both boxes
    array = np.asarray(picture)
    assert (array[200, 100] == 128).all()  # the inside is left as it is
    assert (array[240, 90] == PALETTE[0]).all() and (array[320, 500] == PALETTE[1]).all()
    assert (array[201:320, 425:449] == 128).all()  # nothing between the dogs


def test_the_same_phrase_again_has_the_same_colour():
    again = "<p>a</p> {<1><1><2><2>} <p>b</p> {<1><1><2><2>} <p>a</p> {<5><5><6><6>}"
    assert phrase_colors(again) == {"a": PALETTE[0], "b": PALETTE[1]}
    many = " ".join(f"<p>{i}</p> {{<1><1><2><2>}}" for i in range(17))
    colors = list(phrase_colors(many).values())
    assert len(set(colors)) == 16 and colors[16] == colors[0]


def test_a_bare_box_has_no_label():
    picture = np.asarray(draw_boxes(gray(), "{<10><20><30><60>}"))
    changed = (picture != 128).any(-1)
    assert not changed[:80].any() and not changed[83:239, 63:178].any() and changed[80, 60]


def test_text_has_its_phrases_coloured_as_their_boxes():
    assert colored_text(ANSWER) == [
        ("I see ", None), ("a cat", PALETTE[0]), (" and ", None), ("dogs", PALETTE[1]), (".", None)
    ]  # fmt: skip
    assert colored_text("<p>a</p>, no box") == [("a, no box", None)]


def test_a_label_is_not_drawn_over_objects():
    """Above a box and below it there is no room, so it is beside."""
    answer = "<p>a long name</p> {<30><0><60><50>} <p>x</p> {<20><52><70><100>}"
    picture = np.asarray(draw_boxes(gray(), answer))
    assert (picture[3:198, 183:358] == 128).all() and (picture[212:398, 123:418] == 128).all()
    assert pixels_of(picture[:200, 361:], PALETTE[0])[0] == 0


def test_a_label_can_be_read_on_any_color():
    """Black on an almost white background: a contrast of at least 10 to 1."""
    for color in ((0, 0, 0), (128, 128, 128), (255, 0, 255)):
        picture = np.asarray(draw_boxes(np.full((400, 600, 3), color, np.uint8), ANSWER))
        left, top, _, bottom = pixels_of(picture[:80], PALETTE[0])
        background = picture[(top + bottom) // 2, left + 14]
        assert background.min() >= 200
        assert (picture[top:bottom, left + 14 : left + 60].max(-1) < 90).any()


def test_small_images_are_enlarged_and_large_ones_keep_their_size():
    assert draw_boxes(gray(112, 56), ANSWER).size == (500, 250)
    assert draw_boxes(gray(1, 1000), ANSWER).size == (4, 4000)
    big = draw_boxes(gray(2000, 500), "{<10><20><30><60>}")
    assert big.size == (2000, 500)
    assert (np.asarray(big)[100:108, 300] == PALETTE[0]).all()  # a line as thick beside the image


hundredths = st.integers(0, 100)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.text(max_size=30), hundredths, hundredths)
def test_any_image_and_phrase_can_be_drawn(width, height, phrase, x, y):
    draw_boxes(gray(width, height), f"<p>{phrase}</p> {{<{x}><{y}><100><100>}}")


def test_no_boxes_is_an_error_with_the_answer():
    with pytest.raises(UserError, match=r"no boxes to draw: 'A cat\."):
        draw_boxes(gray(), "A cat.")


def test_a_picture_is_written_whole_or_not(tmp_path, monkeypatch):
    picture = Image.fromarray(gray(20, 10))
    boxes.save(picture, tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").size == (20, 10)
    for name, words in (("a.txt", "name of a picture"), ("no/a.png", "no directory")):
        with pytest.raises(UserError, match=words):
            boxes.save(picture, tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        boxes.save(picture, tmp_path / "folder.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "folder.png"]
