"""Read files of captions, questions and conversations as a checked list of examples.

These layouts are recognized:

    DIR/            filter_cap.json and image/{image_id}.jpg or .png (MiniGPT-4's stage 2)
    FILE.json       a list of rows, or an object {"annotations": [{"image_id", "caption"}, ...]}
    FILE.jsonl      one row per line
    FILE.csv, .tsv  columns "image" and "caption", or "question" and "answer"
    FILE.parquet    the same columns, with the images inside; or a folder of such files
    DIR/            metadata.jsonl or metadata.csv with "file_name" and "text" or others of these keys
                    (imagefolder of Hugging Face's datasets)

A row has an image (a path relative to the file, a list of paths, or none) and one of "caption",
"question" with "answer", "conversations" [{"from": "human" | "gpt", "value": text}] as in LLaVA, or
"messages" [{"role": "user" | "assistant", "content": text or parts}] as in OpenAI's API. The first
turn may be a system message (from or role "system").
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_jax.data import conversations, parquet_rows, tables
from minigpt4_jax.data.annotations import expect_object, keys, kind, parse, read_text, text_of
from minigpt4_jax.data.skipped import check_missing_images
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT, IMAGE_TAG, with_images
from minigpt4_jax.processing.image_paths import (
    check_other_images,
    image_names,
    is_url,
    path_in_folder,
)
from minigpt4_jax.processing.images import ImageSource
from minigpt4_jax.storage.paths import parse_local_path
from minigpt4_jax.utils.text import shorten

STAGE2_FILE = "filter_cap.json"
_FOLDER_FILES = (STAGE2_FILE, "metadata.jsonl", "metadata.csv")
_ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", *tables.SUFFIXES)
_TEXT_KEYS = ("caption", "text", "question", "answer", "system")
MAX_CAPTION_WORDS = 50

DataPath = str | os.PathLike[str]


class Example(NamedTuple):
    """Images with text. The questions have an `<ImageHere>` for each image."""

    images: tuple[ImageSource, ...]  # mostly paths
    questions: tuple[str, ...]  # one per turn; (): the answer is a caption
    answers: tuple[str, ...]  # one per turn
    system: str = ""  # a system message before the first question


def read_sources(
    paths: DataPath | Sequence[DataPath], *, clean_captions: bool = False, max_broken: float = 0.0
) -> list[Example]:
    """Read and concatenate one or several datasets.

    clean_captions: apply `blip_caption` to captions, as stage 1 of the original does.
    max_broken: the share of rows whose images may be missing. Such rows are kept: training replaces and
    counts them like rows with damaged images.
    UserError: an invalid row (with file, line and key), an empty dataset, more missing images.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise UserError("data: no dataset is named; name a directory, a .json or a .jsonl file")
    examples = [
        example
        for path in paths
        for example in _read(parse_local_path("data", path), clean_captions)
    ]
    check_missing_images(
        f"data {', '.join(map(str, paths))}", [example.images for example in examples], max_broken
    )
    return examples


def blip_caption(caption: str) -> str:
    """Lower case, punctuation except commas and apostrophes replaced by spaces, at most 50 words
    (BlipCaptionProcessor.pre_caption of LAVIS)."""
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:MAX_CAPTION_WORDS])


def _read(path: Path, clean: bool) -> list[Example]:
    if path.is_dir():
        path = _file_in_folder(path)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"data {path}: there is no such file or directory")
    if path.is_dir() or path.suffix.lower() == parquet_rows.SUFFIX:
        examples = _parquet_examples(path, clean)
    else:
        examples = [_example(row, where, path.parent, clean) for where, row in _rows(path)]
    if not examples:
        raise UserError(f"data {path}: the dataset is empty")
    return examples


def _parquet_examples(path: Path, clean: bool) -> list[Example]:
    """The examples of a Parquet file, or of all in a folder."""
    examples: list[Example] = []
    for file in parquet_rows.parquet_files(path) if path.is_dir() else [path]:
        for where, row, data in parquet_rows.read_parquet(file):
            example = _example(row, where, file.parent, clean)
            examples.append(example if data is None else example._replace(images=(data,)))
    return examples


def _file_in_folder(folder: Path) -> Path:
    """The file with a folder's rows; the folder itself if it has Parquet files."""
    found = [name for name in _FOLDER_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"data {folder}: has {' and '.join(found)}; name the file that is meant")
    if found:
        return folder / found[0]
    if parquet_rows.parquet_files(folder):
        return folder
    below = sorted({str(p.parent) for n in _FOLDER_FILES for p in folder.glob(f"*/{n}")})
    below = below or sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in _ROW_SUFFIXES)
    hint = f"name one of those in it: {', '.join(below[:3])}" if below else (
        "or name a .json, .jsonl or .csv file"
    )  # fmt: skip
    raise UserError(
        f"data {folder}: has no {STAGE2_FILE}; expected that file with image/ beside it, metadata.jsonl "
        f"or metadata.csv with file_name, {hint}"
    )


# --- rows of a file --------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(location for messages, row) of every row of the file."""
    text = read_text(path)
    if path.suffix.lower() in tables.SUFFIXES:
        rows: Iterator[tuple[str, Any]] = tables.read_table(path, text)
    elif _has_lines(path, text):
        rows = _json_lines(path, text)
    else:
        rows = _json_file(path, text)
    for where, row in rows:
        yield where, expect_object(row, where)


def _has_lines(path: Path, text: str) -> bool:
    """Whether each line is a row. The content decides where it differs from what the name says."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        # the start of a list of rows, or an empty one
        return re.match(r"\s*\[\s*(\{|\]\s*$)", text) is None
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"data {path}, line {number}"
            yield where, parse(where, line)


def _json_file(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    value = parse(f"data {path}", text)
    stage2 = isinstance(value, dict)
    if stage2:
        if "annotations" not in value:
            raise UserError(
                f"data {path}: the object has {keys(value)}; "
                'expected "annotations", or a list of rows instead of the object'
            )
        value = value["annotations"]
    if not isinstance(value, list):
        raise UserError(f"data {path}: holds {kind(value)}; expected a list of rows")
    for number, row in enumerate(value, 1):
        where = f"data {path}, row {number}"
        if stage2 and isinstance(row, dict):
            row = _stage2_row(row, where, path.parent / "image")
        yield where, row


def _stage2_row(row: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """Replace "image_id" by the path of the image."""
    if "image" in row or "images" in row:
        return row
    number = row.get("image_id")
    if not isinstance(number, (str, int)) or isinstance(number, bool) or number == "":
        raise UserError(f'{where}: has {keys(row)}; expected "image_id" and "caption"')
    suffix = next((s for s in (".jpg", ".png") if (folder / f"{number}{s}").is_file()), ".jpg")
    return {**row, "image": os.path.join("image", f"{number}{suffix}")}


# --- one row ---------------------------------------------------------------------------------


def _example(row: dict[str, Any], where: str, folder: Path, clean: bool) -> Example:
    names = image_names(row, where)
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    system = ""
    turns = [key for key in conversations.KEYS if row.get(key) is not None]
    caption_key = "text" if "file_name" in row and "caption" not in row else "caption"
    texts = [*turns]
    texts += ["question"] if {"question", "answer"} & row.keys() else []
    texts += [caption_key] if row.get("caption") is not None else []
    if len(texts) > 1:
        raise UserError(f"{where}: has {' and '.join(map(repr, texts))}; expected one of them")
    if turns:
        conversation = conversations.read_turns(row[turns[0]], turns[0], where)
        system, questions, answers = (
            conversation.system, conversation.questions, conversation.answers
        )  # fmt: skip
        names = _merge_images(names, conversation.images, where)
    elif "question" in row or "answer" in row:
        questions = (_text(row, "question", where),)
        answers = (_text(row, "answer", where),)
    elif caption_key in row:
        caption = _text(row, caption_key, where)
        if not names:
            check_other_images(row, _TEXT_KEYS, where)
            raise UserError(f'{where}: a caption needs an "image"; text alone needs a "question"')
        if row.get("system"):
            raise UserError(
                f'{where}: a caption has no place for "system"; use "question" and "answer"'
            )
        if clean and not (caption := blip_caption(caption)):
            raise UserError(f'{where}: "{caption_key}" is empty once its punctuation is removed')
        return Example(tuple(_image_path(folder, name, where) for name in names), (), (caption,))
    else:
        raise UserError(
            f'{where}: has {keys(row)}; expected "caption", "question" and "answer", '
            '"conversations" or "messages"'
        )
    if not names:
        check_other_images(row, _TEXT_KEYS, where)
    images = tuple(_image_path(folder, name, where) for name in names)
    system = _system(row, system, where)
    return Example(images, _place_images(questions, len(images), where), answers, system)


def _system(row: dict[str, Any], of_turns: str, where: str) -> str:
    """The system message of a row: a turn, or the key "system". UserError: both, or not text."""
    value = row.get("system")
    if value is None or value == "":
        return of_turns
    text = text_of(row, "system", where)
    if of_turns and of_turns != text:
        raise UserError(
            f'{where}: has "system" and a turn with another system message; expected one'
        )
    return text if text.strip() else of_turns


def _image_path(folder: Path, name: str, where: str) -> str:
    """Where an image lies. UserError: at a URL."""
    path = path_in_folder(folder, name)
    if is_url(path):
        raise UserError(
            f"{where}: the image is {shorten(path, 60)!r}; expected the path of a file: URLs are not read"
        )
    return path


def _merge_images(listed: list[str], parts: Sequence[str | None], where: str) -> list[str]:
    """The images of a row: those in its parts, of which None is the next of the listed ones."""
    if all(part is None for part in parts):
        return listed
    if parts.count(None) != len(listed):
        raise UserError(
            f"{where}: {parts.count(None)} image parts without a path and {len(listed)} images in the "
            "row; expected the same number"
        )
    rest = iter(listed)
    return [next(rest) if part is None else part for part in parts]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    """A text that is not empty; a number, as answers to "how many" often are, is its digits."""
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    value = text_of(row, key, where)
    if not value.strip():
        raise UserError(f'{where}: "{key}" is empty')
    return value


def _place_images(questions: Sequence[str], images: int, where: str) -> tuple[str, ...]:
    """Replace LLaVA's `<image>` by `<Img><ImageHere></Img>` in every question.

    Several in one question keep their positions; a single one is moved to the question's front, as in the
    original's LLaVA datasets. Images without any mark go before the first question.
    UserError: another number of marks than of images.
    """
    placed = [_replace_marks(question) for question in questions]
    if not any(IMAGE_TAG in question for question in placed):
        placed[0] = with_images(placed[0], images)
    marks = [question.count(IMAGE_TAG) for question in placed]
    if sum(marks) != images:
        turns = ", ".join(f"{count} in question {n + 1}" for n, count in enumerate(marks) if count)
        raise UserError(
            f"{where}: {sum(marks)} image marks ({turns or 'none'}) and {images} images; "
            "write <image> once for each image"
        )
    return tuple(placed)


def _replace_marks(question: str) -> str:
    if IMAGE_TAG not in question and question.count("<image>") > 1:
        return re.sub(r"<image>\n?", IMAGE_SLOT, question)
    text = re.sub(r"\n?<image>\n?", "", question).strip()
    return with_images(text, 1) if text != question and "<image>" in question else question
