"""The page's task buttons: MiniGPT-v2's shortcuts, and beginnings for the other models."""

from typing import NamedTuple

from minigpt4_jax.processing.boxes import format_box


class Shortcut(NamedTuple):
    """A button: what it puts into the question, and how to go on."""

    name: str
    text: str
    hint: str


# demo_v2.py's six shortcuts
V2_SHORTCUTS = (
    Shortcut("No tag", "", "Ask anything about the image."),
    Shortcut("Grounding", "[grounding] describe this image in detail",
             "A description whose phrases get boxes. Send it as it is."),
    Shortcut("Refer", "[refer] ", "Name a thing, for instance “the red cup”; the answer is its box."),
    Shortcut("Detection", "[detection] ",
             "Name kinds of things, or paste a description; all of them get boxes."),
    Shortcut("Identify", "[identify] what is this ",
             "Draw a box on the picture: press and drag. Then send."),
    Shortcut("VQA", "[vqa] ", "Ask a question that has a short answer."),
)  # fmt: skip
V1_SHORTCUTS = (
    Shortcut("Describe", "Describe this image in detail.", "Send it as it is."),
    Shortcut("Take a look", "Take a look at this image and describe what you notice.",
             "Send it as it is."),
    Shortcut("What is it about?", "Could you describe the contents of this image for me?",
             "Send it as it is."),
)  # fmt: skip
# BLIP-2's models continue a text after the image
BLIP2_SHORTCUTS = (
    Shortcut("Caption", "a photo of", "Send it as it is; the model goes on."),
    Shortcut("Question", "Question:  Answer:", "Write the question between the two words."),
)
IDENTIFY = "[identify]"

Box = tuple[float, float, float, float]


def shortcuts(variant: str) -> tuple[Shortcut, ...]:
    """The buttons of a model's page."""
    if variant.startswith("blip2-"):
        return BLIP2_SHORTCUTS
    return V2_SHORTCUTS if variant == "minigpt-v2" else V1_SHORTCUTS


def needs_box(question: str) -> bool:
    """Whether a question asks about a box and has none."""
    return IDENTIFY in question and "{" not in question


def with_box(question: str, box: Box, size: tuple[int, int]) -> str:
    """The question with the box that the user drew; the original appends it without a space.

    box: x1, y1, x2, y2 in pixels of an image (width, height); what is outside of it is cut off."""
    x1, x2 = sorted(min(max(v, 0.0), float(size[0])) for v in (box[0], box[2]))
    y1, y2 = sorted(min(max(v, 0.0), float(size[1])) for v in (box[1], box[3]))
    separator = "" if question.endswith(" ") else " "
    return question + separator + format_box((x1, y1, x2, y2), *size)
