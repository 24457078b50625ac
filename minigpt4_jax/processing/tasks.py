"""MiniGPT-v2's task prompts, as in the original's demo and evaluation.

    model.generate(["photo.jpg"], [tasks.refer("the red cup")], template=True)

Sources: demo_v2.py, eval_ref.py, eval_vqa.py and the caption datasets. Answers to refer, detection and
grounding have boxes: `boxes.parse_boxes` parses them, `visualization.boxes.draw_boxes` draws them.
"""

from collections.abc import Sequence

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.boxes import box_of_mask, format_box

TASKS = ("vqa", "caption", "grounding", "refer", "identify", "detection")
BARE_TASKS = ("caption", "grounding")  # about the whole image; they take no text


def refer(phrase: str) -> str:
    """Where is it? The answer is a box."""
    return f"[refer] give me the location of {_required_text('refer', phrase)}"


def vqa(question: str) -> str:
    """A question with a short answer."""
    text = _required_text("vqa", question)
    return f"[vqa] Based on the image, respond to this question with a short answer: {text}"


def caption() -> str:
    """A short description."""
    return "[caption] Briefly describe this image."


def grounding() -> str:
    """A description whose phrases have boxes: `<p>a cup</p> {<..>}`."""
    return "[grounding] describe this image in detail"


def detection(phrase: str) -> str:
    """Boxes of everything that a phrase or a caption names."""
    return f"[detection] {_required_text('detection', phrase)}"


def identify(box: Sequence[float], width: float, height: float) -> str:
    """What is in a box (x1, y1, x2, y2 in pixels)? width, height: of the image. UserError: as
    `boxes.format_box`."""
    return f"[identify] what is this {format_box(box, width, height)}"


def identify_mask(mask: np.ndarray) -> str:
    """What is in the marked region? mask [H, W] or [H, W, C], nonzero where marked, of the image's size.
    UserError: nothing is marked."""
    box = box_of_mask(mask)
    return identify(box, mask.shape[1], mask.shape[0])


def question(task: str, text: str, size: tuple[int, int]) -> str:
    """The prompt of a task by name.

    text: the phrase, the question, or for identify the box as `x1,y1,x2,y2` in pixels; "" for caption and
    grounding. size: (width, height) of the image. UserError: unknown task, unsuitable text, a wrong box."""
    if task not in TASKS:
        raise UserError(f"task {task!r} is not known; known are {', '.join(TASKS)}")
    if task in BARE_TASKS:
        if text.strip():
            raise UserError(f"{task} is about the whole image and takes no text; got {text!r}")
        return caption() if task == "caption" else grounding()
    if task == "identify":
        return identify(_numbers(text), *size)
    return {"refer": refer, "vqa": vqa, "detection": detection}[task](text)


def _required_text(task: str, text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{task}: the text is {text!r}; expected a phrase or a question")
    return text.strip()


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(
            f"identify: the box is {text!r}; expected x1,y1,x2,y2 in pixels, as in 10,20,90,80"
        ) from None
