"""Datasets on disk: every layout is read, and an error is one line that says where."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4_jax.data.json_records import Example, blip_caption, read_sources
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT

pytestmark = pytest.mark.smoke


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    return tmp_path


def write_lines(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_stage2_layout(tmp_path):
    one, two = picture(tmp_path / "image" / "1.jpg"), picture(tmp_path / "image" / "two.png")
    (tmp_path / "filter_cap.json").write_text(json.dumps({"annotations": [
        {"image_id": 1, "caption": "A dog."}, {"image_id": "two", "caption": "Cats"},
    ]}))  # fmt: skip
    expected = [Example((one,), (), ("A dog.",)), Example((two,), (), ("Cats",))]
    assert read_sources(tmp_path) == expected
    assert read_sources([tmp_path / "filter_cap.json"]) == expected
    assert read_sources([tmp_path, str(tmp_path)]) == expected * 2


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_all_kinds_of_rows(folder, ending):
    rows = [
        {"image": "a.png", "caption": "A dog.", "box": [1, 2]},
        {"image": "a.png", "question": "What?", "answer": "a cat"},
        {"images": ["a.png", "b.png"], "question": "Which?", "answer": "both"},
        {"question": "Why?", "answer": "so"},
        {"image": "b.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"},
            {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "here"},
        ]},
    ]  # fmt: skip
    path = folder / f"rows.{ending}"
    lines = "\ufeff" + "\n\n".join(map(json.dumps, rows))
    path.write_text(json.dumps(rows) if ending == "json" else lines, encoding="utf-8")
    a, b = str(folder / "a.png"), str(folder / "b.png")
    assert read_sources(path) == [
        Example((a,), (), ("A dog.",)),
        Example((a,), (f"{IMAGE_SLOT} What?",), ("a cat",)),
        Example((a, b), (f"{IMAGE_SLOT}{IMAGE_SLOT} Which?",), ("both",)),
        Example((), ("Why?",), ("so",)),
        Example((b,), (f"{IMAGE_SLOT} What?", "Where?"), ("a cat", "here")),
    ]


@pytest.mark.parametrize(
    ("question", "placed"),
    [
        ("What?\n<image>", f"{IMAGE_SLOT} What?"),
        ("<image>", IMAGE_SLOT),
        (f"In {IMAGE_SLOT} what?", f"In {IMAGE_SLOT} what?"),
    ],
)
def test_where_the_image_goes(folder, question, placed):
    path = write_lines(folder, {"image": "a.png", "question": question, "answer": "x"})
    assert read_sources(path)[0].questions == (placed,)


def test_several_image_marks_stay_where_they_are(folder):
    row = {"image": ["a.png", "b.png"], "question": "<image>\nor <image>?", "answer": "x"}
    path = write_lines(folder, row)
    assert read_sources(path)[0].questions == (f"{IMAGE_SLOT}or {IMAGE_SLOT}?",)


def test_line_separators_inside_a_row(folder):
    """U+2028 is text in JSON: only \\n ends a row."""
    path = folder / "rows.jsonl"
    row = json.dumps({"image": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)
    path.write_text(row, encoding="utf-8")
    assert read_sources(path)[0].answers == ("one\u2028two",)


def test_a_number_is_a_text(folder):
    rows = [{"question": "how many?", "answer": n} for n in (0, 2.5)]
    assert [e.answers for e in read_sources(write_lines(folder, *rows))] == [("0",), ("2.5",)]
    with pytest.raises(UserError, match='line 1: "answer" is bool True; expected a string'):
        read_sources(write_lines(folder, {"question": "x", "answer": True}))


GOOD = {"image": "a.png", "caption": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"rows\.jsonl, line 2: is not JSON"),
        ("[1]", "line 2: a row is a list; expected an object"),
        ({"image": "a.png", "text": "x"}, r"line 2: has the keys 'image', 'text'; expected \"cap"),
        ({}, "line 2: has no keys"),
        ({"image": "a.png", "caption": "  "}, 'line 2: "caption" is empty'),
        ({"image": "a.png", "caption": ["x"]}, 'line 2: "caption" is a list; expected a string'),
        ({"image": 3, "caption": "x"}, 'line 2: "image" holds 3'),
        ({"image": "", "caption": "x"}, 'line 2: "image" holds'),
        ({"caption": "x"}, 'line 2: a caption needs an "image"'),
        ({"image": "a.png", "question": "x"}, 'line 2: .*"answer" is missing'),
        ({"question": "", "answer": "x"}, 'line 2: "question" is empty'),
        ({"question": f"{IMAGE_SLOT} x", "answer": "x"}, "1 image marks .* and 0 images"),
        ({"image": "a.png", "question": IMAGE_SLOT * 2, "answer": "x"}, "2 image marks .* and 1 im"),
        ({"image": "a.png", "conversations": []}, 'line 2: "conversations" needs'),
        ({"conversations": [{"from": "human", "value": "x"}]}, "a list of 1"),
        ({"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]},
         'turn 1 of "conversations": expected an object with "from": "human"'),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}]},
         'turn 2 of "conversations": "value" is empty'),
    ],
)  # fmt: skip
def test_wrong_rows(folder, row, message):
    with pytest.raises(UserError, match=message) as e:
        read_sources(write_lines(folder, GOOD, row))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON at line 1"),
        ("[]", "the dataset is empty"),
        ('{"annotations": []}', "the dataset is empty"),
        ('{"data": []}', "the keys 'data'; expected \"annotations\""),
        ('"x"', "holds a string; expected a list of rows"),
        ('{"annotations": [{"caption": "x"}]}', 'row 1: .*expected "image_id"'),
        ('{"annotations": [{"image_id": true, "caption": "x"}]}', 'row 1: .*expected "image_id"'),
        ('[{"image": "a.png", "caption": ""}]', 'row 1: "caption" is empty'),
    ],
)
def test_wrong_files(folder, text, message):
    path = folder / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_sources(path)


def test_missing_paths(tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        read_sources(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"has no filter_cap\.json"):
        read_sources(tmp_path)
    with pytest.raises(UserError, match="no dataset is named"):
        read_sources([])
    for nothing in ("\n \n", "[]", " [ ]\n"):
        (tmp_path / "empty.jsonl").write_text(nothing)
        with pytest.raises(UserError, match="is empty"):
            read_sources(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_sources(tmp_path / "binary.jsonl")


def test_missing_images_are_counted_and_named(folder):
    rows = [GOOD, *({"image": f"no{n}.png", "caption": "x"} for n in (1, 2, 3, 4, 4))]
    with pytest.raises(
        UserError, match=r"4 of 5 images are missing: .*no1\.png, .*no3\.png, \.\.\."
    ):
        read_sources(write_lines(folder, *rows))


def test_missing_stage2_image_is_named(tmp_path):
    (tmp_path / "filter_cap.json").write_text('{"annotations": [{"image_id": 7, "caption": "x"}]}')
    with pytest.raises(UserError, match=r"1 of 1 images are missing: .*7\.jpg"):
        read_sources(tmp_path)


def test_blip_caption():
    assert blip_caption('A "Dog", it\'s... (big)!\n*#:;~') == "a dog , it's big"
    assert blip_caption("w " * 60).split() == ["w"] * 50


def test_clean_captions(folder):
    rows = [{"image": "a.png", "caption": "A Dog!"}, {"question": "Q!", "answer": "A!"}]
    path = write_lines(folder, *rows)
    assert [e.answers for e in read_sources(path, clean_captions=True)] == [("a dog",), ("A!",)]
    assert read_sources(path)[0].answers == ("A Dog!",)
    path = write_lines(folder, {"image": "a.png", "caption": "..."})
    with pytest.raises(UserError, match="empty once its punctuation is removed"):
        read_sources(path, clean_captions=True)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "human", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    ["image", "images", "caption", "question", "answer", "conversations", "image_id", "annotations"]
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(keys, values, max_size=4), st.sampled_from(["json", "jsonl"]), st.booleans())
def test_odd_rows_raise_user_errors_only(tmp_path_factory, row, ending, listed):
    path = tmp_path_factory.getbasetemp() / f"odd.{ending}"
    path.write_text(json.dumps([row] if listed else row))
    try:
        (example,) = read_sources(path)
        assert example.answers
        assert not example.images
    except UserError as e:
        assert "odd." in str(e)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["json", "jsonl"]))
def test_random_files_raise_user_errors_only(tmp_path_factory, data, ending):
    path = tmp_path_factory.getbasetemp() / f"random.{ending}"
    path.write_bytes(data)
    with pytest.raises(UserError, match="random"):
        read_sources(path)


def conversation(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("images", "texts", "questions"),
    [
        (["1", "2"], ["<image>\nWhat?", "Red.", "<image>\nAnd this?", "Blue."],
         ["{} What?", "{} And this?"]),
        (["1"], ["Hello!", "Hi.", "What is it?\n<image>", "Red."], ["Hello!", "{} What is it?"]),
        (["1", "2", "3"], ["<image><image> Same?", "No.", "<image>And?", "Yes."],
         ["{}{} Same?", "{} And?"]),
        (["1"], ["What?", "Red.", "Sure?", "Yes."], ["{} What?", "Sure?"]),
        ([], ["What?", "Red."], ["What?"]),
    ],
)  # fmt: skip
def test_images_are_where_their_marks_are(tmp_path, images, texts, questions):
    row = {"image": images, "conversations": conversation(*texts)}
    path = write_rows_and_images(tmp_path, [row])
    (example,) = read_sources(path)
    assert list(example.questions) == [q.replace("{}", IMAGE_SLOT) for q in questions]


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (
            ["1"],
            ["<image>What?", "Red.", "<image>Sure?", "Yes."],
            "1 in question 1, 1 in question 2",
        ),
        (
            ["1", "2"],
            ["Hi", "Hi.", "<image>What?", "Red."],
            r"1 image marks .1 in question 2. and 2",
        ),
        ([], ["<image>What?", "Red."], "and 0 images"),
    ],
)
def test_marks_and_images_that_do_not_agree_name_the_row(tmp_path, images, texts, message):
    path = write_rows_and_images(
        tmp_path, [{"image": images, "conversations": conversation(*texts)}]
    )
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        read_sources(path)


def write_rows_and_images(folder, rows):
    """rows.jsonl, and every image that the rows name."""
    for name in {name for row in rows for name in row["image"]}:
        Image.new("RGB", (4, 4)).save(folder / name, "PNG")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"
