"""The datasets that MiniGPT-4 and MiniGPT-v2 were trained on, read from their published files.

open_dataset("coco_vqa", "vqav2", "coco/images")
"""

import difflib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minigpt4_jax.data.datasets import captions, dialogues, grounded, referring, vqa
from minigpt4_jax.data.datasets.base import Dataset, Layout
from minigpt4_jax.errors import UserError

AnyPath = str | os.PathLike[str]

_vqa = partial(Layout, make=vqa.make_answered)
_detection = partial(Layout, make=grounded.make_detected)
_dialogue = partial(Layout, make=dialogues.make_dialogue)
_refer = partial(Layout, read=referring.read_refcoco, make=referring.make_refer)
_identify = partial(Layout, read=referring.read_refcoco, make=referring.make_identify)

_REFCOCO = ("refcoco/instances.json", "refcoco/refs(unc).p")
_REFCOCOP = ("refcoco+/instances.json", "refcoco+/refs(unc).p")
_REFCOCOG = ("refcocog/instances.json", "refcocog/refs(umd).p")

DATASETS: dict[str, Layout] = {
    "cc_sbu_align": Layout(
        ("filter_cap.json",), captions.read_cc_sbu_align, captions.make_described, images="image"
    ),
    "coco_caption": Layout(
        ("coco_karpathy_train.json",), captions.read_coco_caption, captions.make_captioned
    ),
    "textcaps_caption": Layout(
        ("TextCaps_0.1_train.json",), captions.read_textcaps, captions.make_captioned,
        images="train_images",
    ),
    "coco_vqa": _vqa(("vqa_train.json", "vqa_val.json"), vqa.read_vqa),
    "ok_vqa": _vqa(("okvqa_train.json",), vqa.read_vqa),
    "aok_vqa": _vqa(("aokvqa_v1p0_train.json",), vqa.read_aok_vqa),
    "gqa": _vqa(("train_balanced_questions.json",), vqa.read_gqa, images="images"),
    "ocrvqa": _vqa(("dataset.json",), vqa.read_ocrvqa, images="images"),
    "refcoco": _refer(_REFCOCO),
    "refcocop": _refer(_REFCOCOP),
    "refcocog": _refer(_REFCOCOG),
    "invrefcoco": _identify(_REFCOCO),
    "invrefcocop": _identify(_REFCOCOP),
    "invrefcocog": _identify(_REFCOCOG),
    "refvg": Layout(
        ("region_descriptions.json", "image_data.json"),
        referring.read_refvg, referring.make_refer, images="",
    ),
    "flickr_grounded_caption": Layout(
        ("groundedcaption.json",), grounded.read_grounded_caption, grounded.make_grounded,
        images="images",
    ),
    "flickr_CaptionToPhrase": _detection(
        ("captiontobbox.json",), grounded.read_caption_to_boxes, images="images"
    ),
    "flickr_ObjectToPhrase": _detection(
        ("phrasetobbox.json",), grounded.read_phrase_to_boxes, images="images"
    ),
    "llava_detail": _dialogue(("detail_23k.json",), dialogues.read_question),
    "llava_reason": _dialogue(("complex_reasoning_77k.json",), dialogues.read_question),
    "llava_conversation": _dialogue(("conversation_58k.json",), dialogues.read_conversation),
    "multitask_conversation": _dialogue(
        ("multi_task_conversation.json",), dialogues.read_conversation
    ),
    "unnatural_instruction": _dialogue(
        ("filtered_unnatural_instruction.json",), dialogues.read_unnatural_instruction
    ),
}  # fmt: skip


def open_dataset(
    name: str,
    annotations: AnyPath | Sequence[AnyPath],
    images: AnyPath | None = None,
    *,
    check_images: bool = True,
    max_broken: float = 1.0,
) -> Dataset:
    """Open a published dataset.

    name: one of DATASETS. annotations: the folder with its files under their published names, or the
    files themselves, in the order of DATASETS[name].files. images: its image folder (COCO's train2014
    for the datasets about COCO); None: where the images are published together with the annotations.
    check_images: drop rows whose image is missing now, by listing the folders; False: a missing image is
    an error when it is read. max_broken: the share of the rows that may lack their image.
    UserError: an unknown name, a missing file or folder, an invalid row (with file, row and key), more
    missing images, no usable row.
    """
    layout = _layout(name)
    paths = [annotations] if isinstance(annotations, (str, os.PathLike)) else list(annotations)
    files = [Path(path) for path in paths]
    if not files or not all(map(str, paths)):
        raise UserError(f"data {name}: no annotations are named; expected {_expected(layout)}")
    folder = files[0].parent
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        files = [folder / file for file in layout.files]
    for file in files:
        if not file.is_file():
            raise UserError(f"data {name}: there is no file {file}; expected {_expected(layout)}")
    image_folder = _image_folder(name, layout, folder, images)
    return Dataset(name, layout, files, image_folder, check_images, max_broken)


def _layout(name: str) -> Layout:
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"data {name}: no such dataset; {hint}known are {', '.join(DATASETS)}")


def _expected(layout: Layout) -> str:
    return f"a folder with {' and '.join(layout.files)}, or such files"


def _image_folder(name: str, layout: Layout, folder: Path, images: AnyPath | None) -> Path | None:
    if images is None and layout.images is None:
        return None  # text only; otherwise an error at the first row with an image
    path = Path(images) if images is not None else folder / (layout.images or "")
    if not path.is_dir():
        raise UserError(f"data {name}: there is no image folder {path}; name it as `images`")
    return path
