"""Conversations as JSON: {"system": TEXT or null, "turns": [{"question", "images", "answer"}, ...]}.

Images are paths, or data URLs of files that are stored inside.
"""

import base64
import binascii
import json
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import ImageSource, open_image
from minigpt4_jax.utils.text import one_line

_PREFIX = "data:"


class TranscriptTurn(NamedTuple):
    """A question with its images, and the answer to it."""

    question: str
    images: tuple[ImageSource, ...]
    answer: str


class Transcript(NamedTuple):
    """A conversation read from a file."""

    system: str | None  # None: the template's
    turns: list[TranscriptTurn]


def embedded_image(data: bytes) -> str:
    """An image file as a data URL."""
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def read_transcript(path: Path, *, embedded_only: bool = False) -> Transcript:
    """The conversation in a file. UserError: it cannot be read, another format, an unreadable image.

    Relative paths of images count from the directory of the file, then from the current one.
    embedded_only: refuse paths, for files from others.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as a conversation ({one_line(e)})") from None
    return _parse(document, str(path), None if embedded_only else path.parent)


def _parse(document: Any, where: str, folder: Path | None) -> Transcript:
    """folder: that relative paths of images count from; None refuses paths."""
    turns = document.get("turns") if isinstance(document, dict) else None
    if not isinstance(turns, list):
        raise UserError(f'{where}: expected {{"system": ..., "turns": [...]}}, as /save writes it')
    system = document.get("system")
    if not isinstance(system, str | None):
        raise UserError(f"{where}: system is {type(system).__name__}; expected text or null")
    parsed = [_turn(turn, f"{where}: turn {n}", folder) for n, turn in enumerate(turns)]
    return Transcript(system, parsed)


def _turn(turn: Any, where: str, folder: Path | None) -> TranscriptTurn:
    fields = turn if isinstance(turn, dict) else {}
    question, answer = fields.get("question"), fields.get("answer")
    images = fields.get("images", [])
    if not (isinstance(question, str) and isinstance(answer, str) and isinstance(images, list)):
        raise UserError(f'{where}: expected {{"question": TEXT, "images": [...], "answer": TEXT}}')
    if not question.strip():
        raise UserError(f"{where}: the question is empty")
    return TranscriptTurn(question, tuple(_image(i, where, folder) for i in images), answer)


def _image(image: Any, where: str, folder: Path | None) -> ImageSource:
    if not isinstance(image, str):
        raise UserError(
            f"{where}: an image is {type(image).__name__}; expected a path or a data URL"
        )
    source: ImageSource = image
    if image.startswith(_PREFIX):
        try:
            source = base64.b64decode(image.partition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"{where}: an image inside is not base64") from None
    elif folder is None:
        raise UserError(f"{where}: an image is a path; expected the image inside, as a data URL")
    elif (folder / image).exists():
        source = str(folder / image)
    try:
        open_image(source)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    return source
