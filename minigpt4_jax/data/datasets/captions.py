"""Captions: cc_sbu_align, coco_caption, textcaps_caption."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.data.annotations import identity_of, read_list, text_of
from minigpt4_jax.data.datasets.base import DatasetRow, Unused, choose, image_question
from minigpt4_jax.data.json_records import Example, blip_caption

# From the original's caption_datasets.py and text_caps.py, including trailing spaces.
CAPTION_PROMPTS = (
    "Briefly describe this image.",
    "Provide a concise depiction of this image.",
    "Present a short description of this image.",
    "Summarize this image in a few words.",
    "A short image caption:",
    "A short image description:",
    "A photo of ",
    "An image that shows ",
    "Write a short description for the image. ",
    "Write a description for the photo.",
    "Provide a description of what is presented in the photo.",
    "Briefly describe the content of the image.",
    "Can you briefly explain what you see in the image?",
    "Could you use a few words to describe what you perceive in the photo?",
    "Please provide a short depiction of the picture.",
    "Using language, provide a short account of the image.",
    "Use a few words to illustrate what is happening in the picture.",
)

_NO_CAPTION = Unused("without a caption")


def read_cc_sbu_align(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """filter_cap.json: {"annotations": [{"image_id", "caption"}]}, image/{image_id}.jpg
    (MiniGPT-4's dataset/README_2_STAGE.md, CCSBUAlignDataset)."""
    for file in files:
        for where, row in read_list(file, "annotations"):
            image, caption = identity_of(row, "image_id", where), text_of(row, "caption", where)
            yield DatasetRow(f"{image}.jpg", (caption,)) if caption.strip() else _NO_CAPTION


def make_described(
    images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator
) -> Example:
    """A caption without a question: the prompt of the batch is used."""
    return Example(images, (), (fields[0],))


def read_coco_caption(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """coco_karpathy_train.json of LAVIS: [{"caption", "image": "val2014/COCO_val2014_...jpg",
    "image_id"}], one row per caption. Rows with images of val2014 are excluded
    (COCOCaptionDataset)."""
    for file in files:
        for where, row in read_list(file, "annotations"):
            image, caption = text_of(row, "image", where), text_of(row, "caption", where)
            if "train" not in image:
                yield Unused("with an image that is not of train2014", fault=False)
            else:
                yield _captioned(image.split("/")[-1], caption)


def read_textcaps(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """TextCaps_0.1_train.json: {"data": [{"image_id", "caption_str"}]}, {image_id}.jpg
    (textvqa.org/textcaps/dataset, TextCapDataset)."""
    for file in files:
        for where, row in read_list(file, "data"):
            image, caption = identity_of(row, "image_id", where), text_of(row, "caption_str", where)
            yield _captioned(f"{image}.jpg", caption)


def _captioned(image: str, caption: str) -> DatasetRow | Unused:
    caption = blip_caption(caption)
    return DatasetRow(image, (caption,)) if caption else _NO_CAPTION


def make_captioned(
    images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator
) -> Example:
    question = image_question(images, f"[caption] {choose(CAPTION_PROMPTS, rng)}")
    return Example(images, (question,), (fields[0],))
