"""Task identifiers as the original writes them."""

import numpy as np
import pytest

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import tasks


@pytest.mark.smoke
def test_questions_are_the_originals():
    assert tasks.refer("the red cup") == "[refer] give me the location of the red cup"
    assert tasks.vqa(" What is it? ") == (
        "[vqa] Based on the image, respond to this question with a short answer: What is it?"
    )
    assert tasks.detection("sofa") == "[detection] sofa"
    assert tasks.grounding() == "[grounding] describe this image in detail"
    assert tasks.caption() == "[caption] Briefly describe this image."
    # the demo's example, an image of 200 x 1000 pixels
    assert tasks.identify((8, 500, 60, 650), 200, 1000) == (
        "[identify] what is this {<4><50><30><65>}"
    )


def test_a_sketch_asks_for_what_is_under_it():
    mask = np.zeros((1000, 200, 4), np.uint8)
    mask[500:650, 8:60, 3] = 9
    assert tasks.identify_mask(mask) == "[identify] what is this {<4><50><30><65>}"


def test_tasks_by_name():
    size = (200, 1000)
    assert tasks.question("identify", "8,500 , 60,650", size) == tasks.identify_mask(
        np.pad(np.ones((150, 52)), ((500, 350), (8, 140)))
    )
    assert tasks.question("refer", "a cup", size) == tasks.refer("a cup")
    assert tasks.question("caption", "", size) == tasks.caption()
    assert {tasks.question(t, "1,2,3,4" if t == "identify" else "" if t in tasks.BARE_TASKS else "a",
            size).split()[0] for t in tasks.TASKS} == {f"[{t}]" for t in tasks.TASKS}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [
        ("find", "a cup", "'find' is not known; known are vqa"),
        ("caption", "a cup", "takes no text"),
        ("refer", " ", "refer: the text is ' '"),
        ("identify", "the cup", "x1,y1,x2,y2 in pixels"),
        ("identify", "1,2,3", "four numbers"),
        ("identify", "1,2,3,4000", "not within the image"),
    ],
)
def test_what_a_task_does_not_take_is_refused(task, text, words):
    with pytest.raises(UserError, match=words):
        tasks.question(task, text, (200, 1000))
