"""MiniGPT-v2's task identifiers: questions as the original's demo and evaluation write them.

    model.generate(["photo.jpg"], [tasks.refer("the red cup")], template=True)

(demo_v2.py, eval_ref.py and eval_vqa.py, and the captions' readers.) Answers to refer, detection and
grounding have boxes, which `boxes.parse_boxes` reads and `drawing.draw_boxes` shows.
"""

from collections.abc import Sequence

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.boxes import box_of_mask, format_box

TASKS = ("vqa", "caption", "grounding", "refer", "identify", "detection")
BARE_TASKS = ("caption", "grounding")  # ask about the whole image: nothing is to be said


def refer(phrase: str) -> str:
    """Where is it? Answered by a box."""
    return f"[refer] give me the location of {_said('refer', phrase)}"


def vqa(question: str) -> str:
    """A question with a short answer."""
    said = _said("vqa", question)
    return f"[vqa] Based on the image, respond to this question with a short answer: {said}"


def caption() -> str:
    """A short description."""
    return "[caption] Briefly describe this image."


def grounding() -> str:
    """A description whose phrases have boxes: `<p>a cup</p> {<..>}`."""
    return "[grounding] describe this image in detail"


def detection(phrase: str) -> str:
    """All that a phrase or a caption names, with boxes."""
    return f"[detection] {_said('detection', phrase)}"


def identify(box: Sequence[float], width: float, height: float) -> str:
    """What is in a box (x1, y1, x2, y2 in pixels of an image width x height)? UserError: as
    `boxes.format_box`."""
    return f"[identify] what is this {format_box(box, width, height)}"


def identify_mask(mask: np.ndarray) -> str:
    """What is in the place a user has marked? mask [H, W] or [H, W, channels], of the image's height
    and width, not 0 where it is marked. UserError: nothing is marked."""
    box = box_of_mask(mask)
    return identify(box, mask.shape[1], mask.shape[0])


def question(task: str, text: str, size: tuple[int, int]) -> str:
    """The question of a task by its name. text: the phrase, the question, or for identify the box as
    `x1,y1,x2,y2` in pixels; "" for caption and grounding. size: the image's width and height.
    UserError: unknown task, text that it does not take, a wrong box."""
    if task not in TASKS:
        raise UserError(f"task {task!r} is not known; known are {', '.join(TASKS)}")
    if task in BARE_TASKS:
        if text.strip():
            raise UserError(f"{task} is about the whole image and takes no text; got {text!r}")
        return caption() if task == "caption" else grounding()
    if task == "identify":
        return identify(_numbers(text), *size)
    return {"refer": refer, "vqa": vqa, "detection": detection}[task](text)


def _said(task: str, text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{task}: the text is {text!r}; expected what it is about")
    return text.strip()


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(
            f"identify: the box is {text!r}; expected x1,y1,x2,y2 in pixels, as in 10,20,90,80"
        ) from None
