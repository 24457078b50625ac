"""A conversation on the page: its turns, their images, and the answer that is being written."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minigpt4_jax.inference.transcript import embedded_image
from minigpt4_jax.processing.chat_templates import Turn, with_images
from minigpt4_jax.serving.images import RequestImage


@dataclass(frozen=True)
class PageImage:
    """An image of a conversation."""

    path: Path  # the file as it was uploaded; a copy if browsers would rotate it and the model does not
    read: RequestImage
    thumbnail: Path

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.read.size


@dataclass(frozen=True)
class PageTurn:
    """A question and the answer to it.

    Attributes:
        images: that came with the question.
        marked_question, marked_answer: pictures with the boxes of the question and of the answer.
        note: tokens, speed and seed of the answer.
        retries: how often it was answered again.
    """

    question: str
    images: tuple[PageImage, ...]
    answer: str = ""
    marked_question: Path | None = None
    marked_answer: Path | None = None
    note: str = ""
    retries: int = 0


@dataclass
class PageConversation:
    """The state of one open page; the server holds it, in memory.

    Attributes:
        turns: the history, oldest first.
        system: the system message; None is the template's.
        is_busy: whether an answer is being written.
        stop: ends it; None before it has begun.
        client: whose requests these are, for the scheduler's fair order; set when the page is opened.
    """

    turns: list[PageTurn] = field(default_factory=list)
    system: str | None = None
    is_busy: bool = False
    stop: Callable[[], Any] | None = None
    client: str = ""

    @property
    def images(self) -> list[PageImage]:
        """The images of all turns, oldest first."""
        return [image for turn in self.turns for image in turn.images]

    def has_image(self, image: PageImage) -> bool:
        """Whether an image with this content is in the conversation already."""
        digests = [known.read.input.digest for known in self.images]
        return image.read.input.digest in digests

    def prompt_turns(self) -> list[Turn]:
        """The dialogue for the template; the last answer is to be generated."""
        turns: list[Turn] = [
            (with_images(turn.question, len(turn.images)), turn.answer) for turn in self.turns
        ]
        return [*turns[:-1], (turns[-1][0], None)]

    def update_last(self, **changes: Any) -> None:
        """Replace fields of the last turn."""
        self.turns[-1] = replace(self.turns[-1], **changes)

    def document(self, model: str) -> dict[str, Any]:
        """The conversation as `chat --load` reads it, with its images inside."""
        turns = [
            {
                "question": turn.question,
                "images": [embedded_image(image.path.read_bytes()) for image in turn.images],
                "answer": turn.answer,
            }
            for turn in self.turns
        ]
        return {"model": model, "system": self.system, "turns": turns}
