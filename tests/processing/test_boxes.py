"""Boxes in text: what models write is read, and what is written is read back."""

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.boxes import (
    box_of_mask,
    format_box,
    format_boxes,
    iou,
    parse_boxes,
    spans,
)

A, B, C = (10.0, 20.0, 30.0, 40.0), (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 100.0)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{<10><20><30><40>}", [("", A)]),
        ("<p>a cat</p> {<10><20><30><40>}", [("a cat", A)]),
        ("<p> a cat </p>{<10><20><30><40>}<delim>{<1><2><3><4>}", [("a cat", A), ("a cat", B)]),
        (
            "there is <p>a cat</p> {<10><20><30><40>} and <p>dogs</p> {<1><2><3><4>}, {<5><6><7><100>}.",
            [("a cat", A), ("dogs", B), ("dogs", C)],
        ),
        ("{<10><20><30><40>}<delim>{<1><2><3><4>}", [("", A), ("", B)]),
        ("<p>a cat</p> sits at {<10><20><30><40>}", [("a cat", A)]),
        ("<p>a cat</p> {<10><20><30><40>} looks at {<1><2><3><4>}", [("a cat", A), ("", B)]),
    ],
)
def test_the_format_is_read(text, found):
    assert parse_boxes(text, 100, 100) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{<30><40><10><20>}", [("", A)]),  # corners in the wrong order
        ("{<10><40><30><20>}", [("", A)]),
        ("{<-5><20><30><140>}", [("", (0.0, 20.0, 30.0, 100.0))]),
        ("<10><20><30><40>", [("", A)]),  # no braces
        ("{<10><20><30><40>", [("", A)]),
        ("{ <10> <20>\n<30> < 40 > }", [("", A)]),
        ("{<10.7><20><30><40>}", [("", A)]),
        ("{10, 20, 30, 40}", [("", A)]),
        ("[10,20,30,40]", [("", A)]),
        ("The cup is at 10 20 30 40", [("", A)]),  # exactly four numbers and no phrase
        ("<p>a cat {<10><20><30><40>}", [("a cat", A)]),  # </p> is missing
        ("<p>no box <p>a cat</p> {<10><20><30><40>}", [("a cat", A)]),
        ("&lt;p&gt;a cat&lt;/p&gt; {&lt;10&gt;&lt;20&gt;&lt;30&gt;&lt;40&gt;}", [("a cat", A)]),
        ("<p>a cat</p> {<10><20><30><40>}<delim>{<1><2>", [("a cat", A)]),  # unfinished
        ("<p>a cat</p> {<10><20><30><4", []),
        ("<p>a cat</p> 10 20 30 40", []),  # numbers alone count only without phrases
        ("{1234}", []),
        ("4 of 5 cups, 3 of 7", [("", (3.0, 5.0, 4.0, 7.0))]),
        ("4 of 5 cups", []),
        ("", []),
    ],
)
def test_what_is_nearly_the_format_is_read_as_meant(text, found):
    assert parse_boxes(text, 100, 100) == found


def test_no_text_is_named():
    with pytest.raises(UserError, match="got NoneType; expected the text of an answer"):
        parse_boxes(None, 100, 100)


def test_boxes_are_in_pixels_of_the_image():
    assert parse_boxes("{<50><25><100><75>}", 640, 480) == [("", (320.0, 120.0, 640.0, 360.0))]


pieces = st.sampled_from(
    [
        "<p>",
        "</p>",
        "{",
        "}",
        "<",
        ">",
        "<delim>",
        "{<1><2><3><4>}",
        "<12>",
        " ",
        ",",
        "-",
        "[",
        "99",
    ]
) | st.text(string.printable, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces | st.text(max_size=8), max_size=40).map("".join))
def test_any_text_gives_boxes_within_the_image(text):
    for phrase, (x1, y1, x2, y2) in parse_boxes(text, 640, 480):
        assert isinstance(phrase, str)
        assert 0 <= x1 <= x2 <= 640 and 0 <= y1 <= y2 <= 480


@pytest.mark.parametrize(
    "text",
    ["{<1><2>" * 20_000, " " * 100_000 + "{", "<p>" * 30_000, "{<1><2><3><4>}" + "," * 100_000 + "x",
     "{<" + "9" * 5000 + "><1><2><3>}", "1 " * 100_000],
)  # fmt: skip
@pytest.mark.timeout(10)
def test_long_nonsense_is_read_in_no_time(text):
    parse_boxes(text, 10, 10)


whole = st.integers(0, 100)
boxes = st.tuples(whole, whole, whole, whole).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
sides = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(st.lists(boxes, min_size=1, max_size=4), sides, sides)
def test_what_is_read_is_written_as_the_same_text(hundredths, width, height):
    text = "<delim>".join("{" + "".join(f"<{v}>" for v in box) + "}" for box in hundredths)
    found = [box for _, box in parse_boxes(text, width, height)]
    assert format_boxes(found, width, height) == text


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.tuples(*[st.floats(0, 1)] * 4))
def test_a_box_is_written_as_the_whole_part_of_hundredths(width, height, shares):
    xs, ys = sorted(shares[:2]), sorted(shares[2:])
    box = (xs[0] * width, ys[0] * height, xs[1] * width, ys[1] * height)
    (found,) = parse_boxes(format_box(box, width, height), width, height)
    for sent, read, side in zip(box, found[1], (width, height) * 2, strict=True):
        assert read - 1e-6 <= sent < read + side / 100 + 1e-6


@pytest.mark.parametrize(
    ("box", "size", "words"),
    [
        ((1, 2, 3), (10, 10), "four numbers"),
        ((1, 2, float("nan"), 4), (10, 10), "four numbers"),
        ((5, 2, 3, 4), (10, 10), "x1 <= x2"),
        ((1, 2, 3, 11), (10, 10), "not within the image of 10 x 10"),
        ((0, 0, 0, 0), (0, 10), "0 x 10"),
        ((0, 0, 0, 0), ("640", 480), "'640' x 480.*width and height in pixels"),
    ],
)
def test_a_wrong_box_is_refused(box, size, words):
    with pytest.raises(UserError, match=words):
        format_box(box, *size)


@pytest.mark.parametrize(
    "size",
    [
        ("640", 480), (640, None), ([640], 480), (True, 480), (0, 480), (640, -1), (float("nan"), 480),
        (640, float("inf")), (10**400, 480),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", ["{<50><25><100><75>}", "no box"])
def test_a_wrong_size_is_refused_whether_there_are_boxes_or_not(text, size):
    with pytest.raises(UserError, match=r"the image is .* x .*; expected width and height") as e:
        parse_boxes(text, *size)
    assert len(str(e.value)) < 200 and "\n" not in str(e.value)


def test_a_size_may_be_any_number():
    for width, height in ((np.int64(640), np.float32(480)), (np.array(640), 480.0)):
        ((_, box),) = parse_boxes("{<50><25><100><75>}", width, height)
        assert box == (320.0, 120.0, 640.0, 360.0) and all(type(v) is float for v in box)


def test_a_sketch_becomes_the_box_around_it():
    mask = np.zeros((40, 100), np.uint8)
    mask[10:20, 30] = 255
    mask[15, 30:61] = 1
    assert box_of_mask(mask) == (30.0, 10.0, 61.0, 20.0)
    assert box_of_mask(np.stack([mask * 0, mask], -1)) == (30.0, 10.0, 61.0, 20.0)
    with pytest.raises(UserError, match="nothing is marked"):
        box_of_mask(mask * 0)
    with pytest.raises(UserError, match="shape"):
        box_of_mask(mask[0])


def test_overlap_counts_a_pixel_more_on_every_side():
    assert iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert iou((0, 0, 9, 9), (0, 0, 9, 4)) == 0.5  # 10 x 10 and 10 x 5 pixels
    assert iou((0, 0, 3, 3), (5, 5, 9, 9)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 1  # a box of one pixel


def test_spans_keep_the_text_between():
    found = spans("I see <p>a cat</p> {<1><2><3><4>} and <p>a dog</p>, no more")
    assert [(s.text, s.is_phrase) for s in found] == [
        ("I see ", False), ("a cat", True), (" ", False), (" and ", False), ("a dog", True),
        (", no more", False),
    ]  # fmt: skip
    assert [s.boxes for s in found if s.is_phrase] == [((1, 2, 3, 4),), ()]
