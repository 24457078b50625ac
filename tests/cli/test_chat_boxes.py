"""python -m minigpt4_jax.chat: tasks by name, and the boxes of answers."""

from threading import current_thread, main_thread
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.chat_command import arguments, ask
from PIL import Image

from minigpt4_jax.cli import common
from minigpt4_jax.inference.conversation import Conversation
from minigpt4_jax.inference.model import Model
from minigpt4_jax.processing.tasks import caption
from minigpt4_jax.visualization.boxes import draw_boxes


@pytest.fixture
def answers_with(monkeypatch):
    """answers_with(text): every answer is this text; returns the questions that were asked."""

    def replace(text):
        questions = []

        def stream(self, request, *rest):
            yield text

        def answer(self, requests, **options):
            return [[SimpleNamespace(text=text, error=None)]]

        prepare = Conversation._prepare

        def record(self, text, *rest):
            if current_thread() is main_thread():  # another one plans what is compiled
                questions.append(text)
            return prepare(self, text, *rest)

        monkeypatch.setattr(Conversation, "_prepare", record)
        monkeypatch.setattr(Model, "stream_request", stream)
        monkeypatch.setattr(Model, "answer_requests", answer)
        return questions

    return replace


BOXES = "<p>a cup</p> {<10><20><50><60>}"


def test_the_boxes_of_an_answer_are_saved(chat_home, chat_command, answers_with, tmp_path):
    questions = answers_with(BOXES)
    out = tmp_path / "boxes.png"
    code, text, err = chat_command(
        *arguments(chat_home, "--task=refer", "--prompt=the cup", f"--save-image={out}")
    )
    assert (code, text, err) == (0, f"{BOXES}\n", f"wrote {out}\n")
    assert questions == ["[refer] give me the location of the cup"]
    drawn = draw_boxes(chat_home / "a.png", BOXES)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(drawn))


def test_a_task_by_name_needs_no_prompt_where_it_takes_none(chat_home, chat_command, answers_with):
    questions = answers_with("a cup")
    assert chat_command(*arguments(chat_home, "--task=caption"))[:2] == (0, "a cup\n")
    assert chat_command(*arguments(chat_home, "--task=identify", "--prompt=4,6,20,30"))[0] == 0
    # the image is 40 x 30 pixels
    assert questions == [caption(), "[identify] what is this {<10><20><50><100>}"]


def test_a_rotated_photo_is_asked_about_and_drawn_as_it_is_shown(
    chat_home, chat_command, answers_with, tmp_path
):
    questions = answers_with(BOXES)
    image = Image.open(chat_home / "a.png")  # 40 x 30
    exif = Image.Exif()
    exif[0x0112] = 6
    photo, shown = tmp_path / "photo.png", image.transpose(Image.Transpose.ROTATE_270)
    image.save(photo, exif=exif)
    task = ["--task=identify", "--prompt=3,8,15,40", f"--image={photo}"]
    for options, expected in (([], shown), (["--no-exif"], None)):
        out = tmp_path / f"{len(options)}.png"
        code, _, err = chat_command(*arguments(chat_home, *task, f"--save-image={out}", *options))
        if expected is None:  # 40 is beyond the height
            assert code == 2 and "not within the image of 40 x 30" in err
            continue
        assert code == 0, err
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(draw_boxes(expected, BOXES)))
    assert questions == ["[identify] what is this {<10><20><50><100>}"]


def test_an_answer_without_boxes_is_printed_and_nothing_is_saved(
    chat_home, chat_command, answers_with, tmp_path
):
    answers_with("A cup.")
    out = tmp_path / "boxes.png"
    code, text, err = chat_command(*ask(chat_home, f"--save-image={out}"))
    assert (code, text) == (2, "A cup.\n") and not out.exists()
    assert err == "error: the answer has no boxes to draw: 'A cup.'\n"


def test_boxes_are_saved_in_a_conversation(chat_piped, answers_with, tmp_path):
    answers_with(BOXES)
    out, other = tmp_path / "b.png", tmp_path / "other.png"
    other.write_text("mine")
    lines = f"/boxes {out}\n[refer] a cup\n/boxes {out}\nand now?\n/boxes {out}\n/boxes {other}\n/boxes\n"
    code, _, err = chat_piped(lines)
    assert code == 2 and Image.open(out).size == (500, 375) and other.read_text() == "mine"
    assert err.splitlines() == [
        "error: no question about an image has been answered yet; ask one first",
        f"wrote {out}",
        f"wrote {out}",  # a file of this session may be overwritten
        f"error: {other} exists already; choose another name",
        "error: /boxes needs one file, for instance /boxes boxes.png",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task=find", "--prompt=x"], "--task"),
        (["--task=refer"], "--task needs --prompt"),
        (["--task=caption", "--prompt=x"], "takes no text"),
        (["--task=identify", "--prompt=1,2,3,99"], "not within the image of 40 x 30"),
        (["--save-image=a.png"], "--save-image needs --prompt"),
        (["--save-image=a.txt", "--prompt=x"], "a.txt: expected the name of a picture"),
        (["--save-image=no/a.png", "--prompt=x"], "no directory no"),
    ],
)
def test_wrong_options_for_boxes_are_refused_before_the_model_is_loaded(
    chat_home, chat_command, monkeypatch, options, words
):
    monkeypatch.setattr(common, "load_model", None)
    code, out, err = chat_command(*arguments(chat_home, *options))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
