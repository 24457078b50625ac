"""Where the labels of boxes stand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4_jax.visualization import labels
from minigpt4_jax.visualization.fonts import load_font
from minigpt4_jax.visualization.labels import Label, _layout, draw_labels, overlap, place_label

IMAGE = (600, 400)
SIZE = (100, 20)
RED = (230, 25, 25)


@pytest.mark.parametrize(
    ("box", "where"),
    [
        ((200, 100, 300, 200), (200, 80)),  # above
        ((200, 10, 300, 200), (200, 201)),  # below
        ((560, 100, 599, 200), (500, 80)),  # moved into the image
        ((100, 10, 200, 395), (201, 10)),  # at the right
        ((480, 10, 599, 395), (380, 10)),  # at the left
        ((10, 10, 590, 395), (10, 12)),  # inside
    ],
)
def test_the_first_place_with_room(box, where):
    assert place_label(SIZE, box, [box], [], IMAGE, 2)[:2] == where


def test_other_boxes_are_not_covered_but_those_around_may_be():
    box, above = (200, 100, 300, 200), (150, 20, 400, 98)
    assert place_label(SIZE, box, [box, above], [], IMAGE, 2)[:2] == (200, 201)
    around = (100, 50, 500, 300)
    assert place_label(SIZE, box, [box, around], [], IMAGE, 2)[:2] == (200, 80)


def test_a_label_would_rather_be_away_than_hide_a_small_object():
    box = (200, 100, 260, 120)
    wall = [(0, 0, 600, 99), (0, 121, 600, 140), (0, 100, 199, 120), (261, 100, 600, 120)]
    place = place_label(SIZE, box, [box, *wall], [], IMAGE, 2)
    assert not any(overlap(place, other) for other in [box, *wall])


def test_a_label_larger_than_the_image_has_no_place():
    assert place_label((20, 20), (0, 0, 5, 5), [], [], (19, 40), 2) is None


hundredths = st.integers(0, 100)
some = st.lists(
    st.tuples(st.sampled_from([40, 80, 170]), *[hundredths] * 4), min_size=1, max_size=8
)


@settings(max_examples=30, deadline=None)
@given(some)
def test_labels_stay_in_the_image_and_do_not_cover_each_other(found):
    boxes = [
        (6 * min(a, c), 4 * min(b, d), 6 * max(a, c), 4 * max(b, d)) for _, a, b, c, d in found
    ]
    placed = []
    for (width, *_), box in zip(found, boxes, strict=True):
        place = place_label((width, 20), box, boxes, placed, IMAGE, 2)
        assert min(place[:2]) >= 0 and place[2] <= 600 and place[3] <= 400
        assert sum(overlap(place, other) for other in placed) == 0
        placed.append(place)


def test_a_long_phrase_is_wrapped_and_shortened():
    font = load_font(15)
    phrase = "the man in the blue jacket who is standing beside the car with a dog and a cat"
    text = _layout(Label(phrase, RED, (0, 0, 50, 50)), 600, font)
    assert len(text.lines) == 2 and text.lines[1].endswith("…") and text.width <= 240
    wide = _layout(Label(phrase, RED, (0, 0, 590, 50)), 600, font)
    assert wide.width > 500


def drawn_labels(labels, size=15, image=IMAGE):
    """Rows of the picture that have a label's color."""
    picture = Image.new("RGB", image, (128, 128, 128))
    draw_labels(picture, labels, size, 2)
    return (np.asarray(picture) == RED).all(-1)


def test_one_label_is_enough_for_a_phrase_in_one_place():
    dog = Label("dog", RED, (100, 100, 200, 200))
    once = drawn_labels([dog])
    assert (drawn_labels([dog, Label("dog", RED, (103, 100, 203, 200))]) == once).all()
    apart = drawn_labels([dog, Label("dog", RED, (150, 100, 250, 200))])
    assert apart.sum() > once.sum()


def test_many_labels_are_smaller():
    boxes = [(x, y, x + 20, y + 20) for x in range(0, 600, 60) for y in range(0, 400, 60)]
    many = drawn_labels([Label("a number", RED, box) for box in boxes])
    stripes = np.diff(np.flatnonzero(np.diff(many[:60].any(1).astype(int))))
    assert stripes.min() < drawn_labels([Label("a number", RED, boxes[0])]).any(1).sum()


def test_a_label_stands_between_two_objects_that_both_corners_would_cover():
    box, left, right = (200, 100, 260, 200), (0, 60, 190, 220), (320, 60, 599, 220)
    place = place_label((110, 20), box, [box, left, right], [], IMAGE, 2)
    assert place[:2] == (200, 80)
    place = place_label((125, 20), box, [box, left, right], [], IMAGE, 2)
    assert not any(overlap(place, other) for other in (box, left, right))
    assert overlap((place[0], 0, place[2], 1), (200, 0, 261, 1))  # at the box still


def test_labels_are_smaller_where_they_would_cover_objects(monkeypatch):
    drawn = []
    monkeypatch.setattr(labels, "_draw_label", lambda _, where, *rest: drawn.append(where))
    grid = [
        (30 + x, 24 + y, 119 + x, 99 + y) for x in range(0, 570, 114) for y in range(0, 376, 94)
    ]
    draw_labels(
        Image.new("RGB", IMAGE),
        [Label(f"person {i:02}", RED, b) for i, b in enumerate(grid)],
        20,
        2,
    )
    assert len(drawn) == len(grid)
    assert not any(overlap(place, box) for place in drawn for box in grid)
