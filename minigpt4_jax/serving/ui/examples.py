"""Examples on the page: images with questions, from a file or of the two demonstrations."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minigpt4_jax.checkpoint.model_directory import read_config
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.utils.text import one_line

MAX_EXAMPLES = 8


class PageExample(NamedTuple):
    """An image and a question about it."""

    image: Path
    question: str


def read_examples(path: Path) -> list[PageExample]:
    """The rows {"image", "question"} of a JSONL file. UserError: other rows, an unreadable image.

    Relative paths count from the directory of the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--examples={path}: cannot be read ({one_line(e)})") from None
    return [
        _example(line, f"{path}:{n}", path.parent)
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]


def _example(line: str, where: str, folder: Path) -> PageExample:
    try:
        row = json.loads(line)
        image, question = row["image"], row["question"]
        if not (isinstance(image, str) and isinstance(question, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{where}: expected {{"image": FILE, "question": TEXT}}') from None
    open_image(folder / image)
    return PageExample(folder / image, question)


def demonstration_examples(model_dir: str) -> list[PageExample]:
    """The examples of the demonstration that made a model; none if it is not of one."""
    folder = Path(model_dir).resolve()
    split = folder.parent.parent / "shapes" / "heldout"  # WORKDIR/STAGE/model, WORKDIR/shapes
    if not (split / "scenes.jsonl").is_file():
        return []
    return shapes_examples(split, read_config(folder).variant)


def shapes_examples(split: Path, variant: str) -> list[PageExample]:
    """Examples about the images of a split of the dataset `shapes`."""
    from minigpt4_jax.shapes.dataset import read_scenes
    from minigpt4_jax.shapes.tasks import task_questions

    scenes = read_scenes(split)
    if variant != "minigpt-v2":
        return [
            PageExample(path, "Describe this image in detail.") for path, _ in scenes[:MAX_EXAMPLES]
        ]
    wanted = ("grounding", "refer", "vqa", "detection", "identify", "caption")
    examples = []
    for i, (path, scene) in enumerate(scenes[:MAX_EXAMPLES]):
        questions = [
            q.question for q in task_questions(scene, np.random.default_rng(i))
            if q.task == wanted[i % len(wanted)]
        ]  # fmt: skip
        examples.append(PageExample(path, questions[0]))
    return examples
