"""What the browser sends of the page's components: question, picture, drawn box, settings."""

from collections.abc import Sequence
from typing import Any

from minigpt4_jax.serving.errors import invalid
from minigpt4_jax.serving.ui.answering import Settings
from minigpt4_jax.serving.ui.tasks import Box
from minigpt4_jax.utils.text import shorten

MAX_SEED_DIGITS = 18
BOX_KEYS = ("xmin", "ymin", "xmax", "ymax")  # of gradio_image_annotation


def question_of(box: Any) -> tuple[str, list[str]]:
    """Text and files of the question box."""
    box = box or {}
    return box.get("text") or "", [file["path"] for file in box.get("files") or []]


def picture_file(value: Any) -> str | None:
    """The file of the picture beside the chat."""
    file = value.get("image", value) if value else None
    return file["path"] if file else None


def drawn_box(value: Any) -> Box | None:
    """The box drawn into the picture, in its pixels."""
    boxes = value.get("boxes") if value else None
    if not boxes:
        return None
    scale = boxes[-1].get("scaleFactor") or 1
    return tuple(float(boxes[-1][key]) / scale for key in BOX_KEYS)  # type: ignore[return-value]


def settings_of(values: Sequence[Any]) -> Settings:
    """RequestError: a seed that is no whole number, or a very large one."""
    temperature, top_p, num_beams, max_new_tokens, seed = values
    seed = (seed or "").strip()
    if seed and not (seed.isdecimal() and len(seed) <= MAX_SEED_DIGITS):
        raise invalid(
            f"Seed {shorten(seed)!r}: expected a whole number of up to {MAX_SEED_DIGITS} digits, or nothing."
        )
    return Settings(
        float(temperature), float(top_p), int(num_beams), int(max_new_tokens),
        int(seed) if seed else None,
    )  # fmt: skip
