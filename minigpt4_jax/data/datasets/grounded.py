"""Flickr30k: descriptions with boxes, and the boxes of the objects in a caption or of a phrase.

The files are published by MiniGPT-v2, made from Flickr30k Entities. Boxes are in the model's format,
`{<x1><y1><x2><y2>}`; images are {image_id}.jpg (dataset/README_MINIGPTv2_FINETUNE.md, flickr.py).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.data.annotations import identity_of, read_list, text_of
from minigpt4_jax.data.datasets.base import DatasetRow, Unused, choose, image_question
from minigpt4_jax.data.json_records import Example

GROUNDING_PROMPTS = (
    "[grounding] please describe this image in details",
    "[grounding] describe this image as detailed as possible",
    "[grounding] summarize this image in details",
    "[grounding] give a thorough description of what you see in this image",
)


def read_grounded_caption(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """groundedcaption.json: [{"image_id", "grounded_caption": "<p>A man</p> {<1><2><3><4>} ..."}]."""
    for file in files:
        for where, row in read_list(file):
            yield _row(row, where, [text_of(row, "grounded_caption", where)])


def read_caption_to_boxes(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """captiontobbox.json: [{"image_id", "caption", "output": "<p>A man</p> {..}"}]."""
    for file in files:
        for where, row in read_list(file):
            texts = [text_of(row, "output", where), text_of(row, "caption", where)]
            yield _row(row, where, texts)


def read_phrase_to_boxes(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """phrasetobbox.json: [{"image_id", "phrase", "bbox": "{..}<delim>{..}"}]."""
    for file in files:
        for where, row in read_list(file):
            phrase, box = text_of(row, "phrase", where), text_of(row, "bbox", where)
            answer = f"<p>{phrase}</p> {box}" if box.strip() else ""
            yield _row(row, where, [answer, phrase])


def _row(row: dict[str, Any], where: str, texts: Sequence[str]) -> DatasetRow | Unused:
    """texts: the answer, then what to detect, if anything."""
    if not all(text.strip() for text in texts):
        return Unused("without a text or a box")
    return DatasetRow(f"{identity_of(row, 'image_id', where)}.jpg", tuple(texts))


def make_grounded(
    images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator
) -> Example:
    return Example(images, (image_question(images, choose(GROUNDING_PROMPTS, rng)),), (fields[0],))


def make_detected(
    images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator
) -> Example:
    answer, phrase = fields
    return Example(images, (image_question(images, f"[detection] {phrase}"),), (answer,))
