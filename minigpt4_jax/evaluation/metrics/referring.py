"""Referring expressions: read a box from an answer as the original does (eval_ref.py), and its IoU."""

import re
from collections.abc import Sequence
from typing import NamedTuple

RESOLUTION = 100.0  # coordinates of an answer are in hundredths of the image's sides
THRESHOLD = 0.5  # a hit has an IoU above it
# The original asks again up to 20 times, but takes anything in the fifth round.
ROUNDS = 5

_BOX = re.compile(r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}")  # \d: any Unicode digit
_INTEGER = re.compile(r"\d+")

Box = Sequence[float]  # x1, y1, x2, y2 in pixels


class Reading(NamedTuple):
    """The answer that counts for one expression.

    answer: without spaces; None if no answer was acceptable. round: 0 is the first question.
    """

    answer: str | None
    round: int | None


def clean(answer: str) -> str:
    """Without `<unk>` and spaces."""
    return answer.replace("<unk>", "").replace(" ", "").strip()


def is_acceptable(cleaned: str) -> bool:
    """Whether a cleaned answer begins with a box; what follows is not looked at."""
    return _BOX.match(cleaned) is not None


def read_answers(rounds: Sequence[str], *, resample: bool) -> Reading:
    """The answer that counts, from the answers of the first question and of the rounds of asking again.

    Without `resample` only the first answer can count. With it the first acceptable one counts, and that
    of the fifth round in any case.
    """
    for number, answer in enumerate(rounds[: ROUNDS + 1] if resample else rounds[:1]):
        cleaned = clean(answer)
        if is_acceptable(cleaned) or number == ROUNDS:
            return Reading(cleaned, number)
    return Reading(None, None)


def needs_another_round(rounds: Sequence[str]) -> bool:
    """Whether the original would ask again after these answers."""
    return len(rounds) <= ROUNDS and read_answers(rounds, resample=True).answer is None


def question_of_round(expression: str, number: int) -> str:
    """The question of a round; 0 is the first.

    The original puts the expression into a list and prints it, so that it is nested once more each
    round: `left man`, then `['left man']`, then `["['left man']"]`. That changes the greedy answer.
    """
    text = expression
    for _ in range(number):
        text = str([f"{QUESTION} {text}".replace(QUESTION, "").strip()])
    return f"{QUESTION} {text}"


QUESTION = "[refer] give me the location of"


def predicted_box(cleaned: str, width: float, height: float) -> tuple[float, ...] | None:
    """The box in pixels; None unless the answer has exactly four integers."""
    try:
        x1, y1, x2, y2 = (int(digits) for digits in _INTEGER.findall(cleaned))
        return (
            x1 / RESOLUTION * width, y1 / RESOLUTION * height,
            x2 / RESOLUTION * width, y2 / RESOLUTION * height,
        )  # fmt: skip
    except (ValueError, OverflowError):
        return None


def true_box(bbox: Sequence[float]) -> tuple[float, float, float, float]:
    """[x, y, width, height] of an annotation -> corners."""
    return bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]


def iou(a: Box, b: Box) -> float | None:
    """Intersection over union with one pixel added to every side, without clipping or reordering corners
    (computeIoU of eval_utils.py). None if the union is 0, where the original divides by zero."""
    x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    intersection = max(0, x2 - x1 + 1) * max(0, y2 - y1 + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    union = areas[0] + areas[1] - intersection
    return intersection / union if union else None
