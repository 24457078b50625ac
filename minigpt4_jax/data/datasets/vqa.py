"""Questions with short answers: coco_vqa, ok_vqa, aok_vqa, gqa, ocrvqa."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.data.annotations import (
    first_character,
    identity_of,
    number_of,
    read_list,
    read_object,
    text_of,
    texts_of,
)
from minigpt4_jax.data.datasets.base import DatasetRow, Unused, choose, image_question
from minigpt4_jax.data.json_records import Example, blip_caption
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import fill_template

# The original's *_vqa_datasets.py, gqa_datasets.py, ocrvqa_dataset.py
VQA_PROMPTS = (
    "[vqa] {}",
    "[vqa] Based on the image, respond to this question with a short answer: {}",
)
OCRVQA_TRAIN = 1  # value of "split"


def _read_answered(files: Sequence[Path], answers: str) -> Iterator[DatasetRow | Unused]:
    for file in files:
        for where, row in read_list(file, "annotations"):
            question, texts = text_of(row, "question", where), texts_of(row, answers, where)
            yield _row(_coco_image(row, where), question, texts)


# vqa_train.json, vqa_val.json and okvqa_train.json of LAVIS:
# [{"question", "answer": [of ten people], "image": "train2014/COCO_train2014_...jpg"}]
read_vqa = partial(_read_answered, answers="answer")
# aokvqa_v1p0_train.json of LAVIS, the same with "direct_answers" (github.com/allenai/aokvqa)
read_aok_vqa = partial(_read_answered, answers="direct_answers")


def _coco_image(row: dict[str, Any], where: str) -> str:
    """The image's file name; the original A-OKVQA file has only its number."""
    if "image" in row or "image_id" not in row:
        return text_of(row, "image", where).split("/")[-1]
    return coco_train_image(identity_of(row, "image_id", where))


def coco_train_image(image_id: str | int) -> str:
    """The file name of an image of COCO's train2014."""
    return f"COCO_train2014_{image_id:0>12}.jpg"


def read_gqa(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """train_balanced_questions.json of LAVIS: [{"question", "answer", "image": "1.jpg"}], or the original
    file of the same name: {id: {"question", "answer", "imageId": "1"}}
    (cs.stanford.edu/people/dorarad/gqa/download.html)."""
    for file in files:
        for where, row in _gqa_rows(file):
            if "imageId" in row:
                image = f"{identity_of(row, 'imageId', where)}.jpg"
            else:
                image = text_of(row, "image", where)
            yield _row(image, text_of(row, "question", where), [text_of(row, "answer", where)])


def _gqa_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if first_character(file) == "{":
        return ((where, row) for where, _, row in read_object(file))
    return read_list(file)


def read_ocrvqa(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """dataset.json: {id: {"imageURL", "questions", "answers", "split": 1, 2 or 3}}, the image is
    {id} with the suffix of the URL (ocr-vqa.github.io, OCRVQADataset)."""
    for file in files:
        for where, name, book in read_object(file):
            questions, answers = (
                texts_of(book, "questions", where),
                texts_of(book, "answers", where),
            )
            if len(questions) != len(answers):
                raise UserError(
                    f'{where}: {len(questions)} "questions" and {len(answers)} "answers"; '
                    "expected the same number"
                )
            if number_of(book, "split", where) != OCRVQA_TRAIN:
                yield from [Unused("of another split", fault=False)] * len(questions)
                continue
            image = name + os.path.splitext(text_of(book, "imageURL", where))[1]
            for question, answer in zip(questions, answers, strict=True):
                yield _row(image, question, [answer])


def _row(image: str, question: str, answers: Sequence[str]) -> DatasetRow | Unused:
    """Texts are cleaned by blip_caption, as in the original; an answer given several times is in the list
    as often."""
    question = blip_caption(question)
    answers = [answer for answer in map(blip_caption, answers) if answer]
    if not question or not answers:
        return Unused("without a question or an answer")
    return DatasetRow(image, (question, answers))


def make_answered(
    images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator
) -> Example:
    """Draws one of the answers, in proportion to how often it was given."""
    question, answers = fields
    instruction = fill_template(choose(VQA_PROMPTS, rng), question)
    return Example(images, (image_question(images, instruction),), (choose(answers, rng),))
