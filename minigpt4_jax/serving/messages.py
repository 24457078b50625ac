"""OpenAI's messages -> the turns of a dialogue, and the addresses of its images."""

from collections.abc import Sequence
from typing import NamedTuple

from minigpt4_jax.processing.chat_templates import IMAGE_SLOT, IMAGE_TAG, Turn, with_images
from minigpt4_jax.serving.errors import invalid
from minigpt4_jax.serving.protocol import ImagePart, Message, TextPart


class Dialogue(NamedTuple):
    """Messages as chat templates take them."""

    system: str | None  # None: the server's default
    turns: list[Turn]  # questions with an `<ImageHere>` for each image; the last answer is None
    urls: list[tuple[str, str]]  # (address of an image, where it stands in the request)


def parse_messages(messages: Sequence[Message]) -> Dialogue:
    """The dialogue of a request. RequestError: roles that do not take turns, an image that is not the
    user's, an empty question."""
    system, rest = _split_system(messages)
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []
    for n, message in enumerate(rest, len(messages) - len(rest)):
        expected = "assistant" if turns and turns[-1][1] is None else "user"
        where = f"messages.{n}"
        if message.role != expected:
            raise invalid(
                f"{where} is of role {message.role!r}; expected {expected!r}: a system message may come "
                "first, then user and assistant take turns",
                f"{where}.role",
            )
        if message.role == "assistant":
            # Image tags in answers are not the user's: they are removed.
            answer = _text(message, where).replace(IMAGE_TAG, "")
            turns[-1] = (turns[-1][0], answer)
        else:
            question, of_message = _question(message, where)
            turns.append((question, None))
            urls += of_message
    if not turns or turns[-1][1] is not None:
        raise invalid(
            "the last message is not the user's; there is no question to answer", "messages"
        )
    return Dialogue(system, turns, urls)


def _split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """(the system message, the messages after it)"""
    count = 0
    while count < len(messages) and messages[count].role in ("system", "developer"):
        count += 1
    texts = [_text(message, f"messages.{n}") for n, message in enumerate(messages[:count])]
    return ("\n".join(texts) if texts else None), messages[count:]


def _text(message: Message, where: str) -> str:
    """The text of a message that has no images."""
    if isinstance(message.content, str):
        return message.content
    if any(isinstance(part, ImagePart) for part in message.content):
        raise invalid(
            f"{where} has an image; only the messages of the user may", f"{where}.content"
        )
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _question(message: Message, where: str) -> tuple[str, list[tuple[str, str]]]:
    """(a question with `<ImageHere>` for its images, their addresses).

    Images stand before the text, as in training, unless there is text on both sides of one, or the
    text places them itself with `<ImageHere>`.
    """
    content = message.content
    parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
    urls = [
        (part.url, f"{where}.content.{i}.image_url")
        for i, part in enumerate(parts)
        if isinstance(part, ImagePart)
    ]
    is_text = [isinstance(part, TextPart) for part in parts]
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    if not text.strip():
        raise invalid(f"{where} has no text; expected a question", f"{where}.content")
    first, last = is_text.index(True), len(parts) - 1 - is_text[::-1].index(True)
    if all(is_text[first : last + 1]) or IMAGE_TAG in text:
        return with_images(text, len(urls)), urls
    words = [part.text if isinstance(part, TextPart) else IMAGE_SLOT for part in parts]
    return " ".join(words), urls
