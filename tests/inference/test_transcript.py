"""Conversations as JSON files."""

import json

import pytest
from PIL import Image

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.transcript import embedded_image, read_transcript


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def write(tmp_path, document):
    path = tmp_path / "conversation.json"
    path.write_text(json.dumps(document))
    return path


def test_paths_and_images_inside(tmp_path, picture):
    data = picture.read_bytes()
    turns = [
        {"question": "what?", "images": ["a.png", embedded_image(data)], "answer": "red"},
        {"question": "why?", "images": [], "answer": ""},
    ]
    system, read = read_transcript(write(tmp_path, {"system": None, "turns": turns}))
    assert system is None
    assert read == [("what?", (str(picture), data), "red"), ("why?", (), "")]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], r'expected \{"system"'),
        ({"turns": [{"question": "x"}]}, "turn 0: expected"),
        ({"turns": [{"question": " ", "answer": ""}]}, "turn 0: the question is empty"),
        ({"turns": [{"question": "x", "answer": "", "images": ["b.png"]}]}, "turn 0: .*b.png"),
        ({"turns": [{"question": "x", "answer": "", "images": ["data:,!"]}]}, "not base64"),
        ({"turns": [], "system": 3}, "system is int"),
    ],
)
def test_other_files_are_refused(tmp_path, document, words):
    with pytest.raises(UserError, match=words):
        read_transcript(write(tmp_path, document))


def test_files_of_others_may_not_name_paths(tmp_path, picture):
    turns = [{"question": "what?", "images": [str(picture)], "answer": ""}]
    with pytest.raises(UserError, match="expected the image inside"):
        read_transcript(write(tmp_path, {"turns": turns}), embedded_only=True)
