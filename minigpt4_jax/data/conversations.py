"""Read the turns of a row: LLaVA's from/value, and role/content as in OpenAI's API."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from minigpt4_jax.data.annotations import kind
from minigpt4_jax.errors import UserError

KEYS = ("conversations", "messages")  # of a row, either with turns of both kinds
_MARK = "<image>"


class Turns(NamedTuple):
    """Questions with `<image>` marks, and answers.

    system: the message before them, "" for none. images: of the images that are parts of a question, in
    order: the path, or None for one that is listed in the row's "images"."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    images: tuple[str | None, ...]
    system: str = ""


def read_turns(turns: Any, key: str, where: str) -> Turns:
    """key: of the row, for messages. UserError: no alternating questions and answers, an empty text, a part
    that is neither text nor image, an image in a system message."""
    first = turns[0] if isinstance(turns, list) and turns else None
    system, offset = "", 1  # offset: of the turns' numbers in messages
    if isinstance(first, dict) and "system" in (first.get("from"), first.get("role")):
        system = _read_system(first, f'{where}, turn 1 of "{key}"')
        turns, offset = turns[1:], 2
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise UserError(
            f'{where}: "{key}" needs a list of question, answer, question, answer, ...; '
            f"it is {kind(turns)}" + (f" of {len(turns)}" if isinstance(turns, list) else "")
        )
    texts: list[str] = []
    images: list[str | None] = []
    for n, turn in enumerate(turns):
        text, turn_images = _read_turn(turn, n % 2, f'{where}, turn {n + offset} of "{key}"')
        texts.append(text)
        images += turn_images
    return Turns(tuple(texts[::2]), tuple(texts[1::2]), tuple(images), system)


def _read_system(turn: dict[str, Any], where: str) -> str:
    """The text of a system message; it may be empty."""
    content = turn.get("content", turn.get("value")) or ""
    images: list[str | None] = []
    if isinstance(content, list):
        content, images = _read_parts(content, where)
    if not isinstance(content, str):
        raise UserError(f"{where}: the system message is {kind(content)}; expected a string")
    if images or _MARK in content:
        raise UserError(f"{where}: the system message has images; expected text")
    return content if content.strip() else ""


def _read_turn(turn: Any, is_answer: int, where: str) -> tuple[str, list[str | None]]:
    """-> (text with `<image>` marks, the images of its parts)"""
    by_role = isinstance(turn, dict) and "role" in turn
    role_key, text_key = ("role", "content") if by_role else ("from", "value")
    speaker = (("user", "assistant") if by_role else ("human", "gpt"))[is_answer]
    if not isinstance(turn, dict) or turn.get(role_key) != speaker or text_key not in turn:
        got = f", got {turn[role_key]!r:.40}" if isinstance(turn, dict) and role_key in turn else ""
        raise UserError(
            f'{where}: expected an object with "{role_key}": "{speaker}" and "{text_key}"{got}'
        )
    content = turn[text_key]
    images: list[str | None] = []
    if by_role and isinstance(content, list):
        content, images = _read_parts(content, where)
    if not isinstance(content, str):
        raise UserError(f'{where}: "{text_key}" is {kind(content)}; expected a string')
    if not content.strip():
        raise UserError(f'{where}: "{text_key}" is empty')
    if is_answer and images:
        raise UserError(f"{where}: an answer has images; expected text")
    return content, images


def _read_parts(parts: Sequence[Any], where: str) -> tuple[str, list[str | None]]:
    pieces: list[str] = []
    images: list[str | None] = []
    for n, part in enumerate(parts, 1):
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif part_type in ("image", "image_url"):
            images.append(_image_path(part, f"{where}, part {n}"))
            pieces.append(_MARK)
        else:
            raise UserError(
                f'{where}, part {n}: expected {{"type": "text", "text": ...}} or {{"type": "image"}}, '
                f"got {part!r:.60}"
            )
    if len(images) == 1:  # a single image stands in front of its question
        pieces = [_MARK, *(piece for piece in pieces if piece != _MARK)]
    text = ""
    for piece in pieces:
        joined = not text or text[-1].isspace() or piece[:1].isspace()
        text += piece if joined or (piece == _MARK and text.endswith(_MARK)) else f" {piece}"
    return text, images


def _image_path(part: dict[str, Any], where: str) -> str | None:
    """The path in an image part; None: it is listed in the row's "images"."""
    value = next((part[k] for k in ("image", "path", "url", "image_url") if part.get(k)), None)
    if isinstance(value, dict):
        value = value.get("url") or value.get("path")
        if value is None:
            raise UserError(f"{where}: the image has no path")
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: the image is {kind(value)}; expected a path")
    if value.startswith(("http://", "https://", "data:")):
        raise UserError(
            f"{where}: the image is {value[:40]!r}; expected the path of a file: URLs are not read"
        )
    return value.removeprefix("file://")
