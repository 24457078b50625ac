"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg from words to box and from box to words, and the
regions of Visual Genome."""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.data.annotations import (
    expect_object,
    field_of,
    identity_of,
    kind,
    number_of,
    objects_of,
    parse,
    read_list,
    read_text,
    text_of,
)
from minigpt4_jax.data.datasets.base import DatasetRow, Unused, choose, image_question
from minigpt4_jax.data.datasets.vqa import coco_train_image
from minigpt4_jax.data.json_records import Example, blip_caption
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.boxes import format_box
from minigpt4_jax.processing.chat_templates import fill_template

# The original's coco_dataset.py and vg_dataset.py
REFER_PROMPTS = (
    "[refer] {}",
    "[refer] give me the location of {}",
    "[refer] where is {} ?",
    "[refer] from this image, tell me the location of {}",
    "[refer] the location of {} is",
    "[refer] could you tell me the location for {} ?",
    "[refer] where can I locate the {} ?",
)
IDENTIFY_PROMPTS = (
    "[identify] {}",
    "[identify] what object is in this location {}",
    "[identify] identify the object present at this location {}",
    "[identify] what is it in {}",
    "[identify] describe this object in {}",
    "[identify] this {} is",
    "[identify] the object in {} is",
)
MAX_REGION = 16_384  # pixels; the original uses only smaller regions, as OFA did

_NO_BOX = Unused("with an empty box or one outside its image")
_NO_WORDS = Unused("without words")


# --- RefCOCO ---------------------------------------------------------------------------------


def read_refcoco(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """instances.json as COCO's (images with width and height, annotations with bbox x, y, width,
    height) and refs(unc).p or refs(umd).p, a pickled list of {"ref_id", "image_id", "ann_id", "split",
    "sentences": [{"raw", ...}]}; one row per object, one sentence is drawn (github.com/lichengunc/refer,
    ReferCOCODataset)."""
    if len(files) != 2:
        raise UserError(
            f"data {files[0]}: expected two files, instances.json and refs(...).p, or their folder"
        )
    instances = expect_object(parse(f"data {files[0]}", read_text(files[0])), f"data {files[0]}")
    sizes = {}
    for where, image in _numbered_objects(instances, "images", files[0]):
        size = number_of(image, "width", where), number_of(image, "height", where)
        sizes[field_of(image, "id", where)] = size
    boxes = {}
    for where, annotation in _numbered_objects(instances, "annotations", files[0]):
        boxes[field_of(annotation, "id", where)] = _box(annotation, where)
    for number, ref in enumerate(_read_refs(files[1]), 1):
        where = f"data {files[1]}, row {number}"
        yield _ref_row(expect_object(ref, where), where, sizes, boxes)


def _numbered_objects(
    values: dict[str, Any], key: str, file: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, value in enumerate(objects_of(values, key, f"data {file}"), 1):
        yield f'data {file}, row {number} of "{key}"', value


def _box(annotation: dict[str, Any], where: str) -> list[float]:
    box = field_of(annotation, "bbox", where)
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        raise UserError(f'{where}: "bbox" is {kind(box)}; expected x, y, width, height')
    return box


def _ref_row(
    ref: dict[str, Any],
    where: str,
    sizes: dict[Any, tuple[float, float]],
    boxes: dict[Any, list[float]],
) -> DatasetRow | Unused:
    if text_of(ref, "split", where) != "train":
        return Unused("of another split", fault=False)
    image_id, object_id = identity_of(ref, "image_id", where), identity_of(ref, "ann_id", where)
    if image_id not in sizes or object_id not in boxes:
        return Unused("whose image or box is not in instances.json")
    phrases = [blip_caption(text_of(s, "raw", where)) for s in objects_of(ref, "sentences", where)]
    phrases = [phrase for phrase in phrases if phrase]
    return _row(coco_train_image(image_id), phrases, boxes[object_id], sizes[image_id])


class _DataUnpickler(pickle.Unpickler):
    """Reads only containers, numbers and strings. Code in a pickle is looked up by name, and no name is
    found here (docs.python.org/3/library/pickle.html, "Restricting Globals").

    convert/formats/pickles.py reads checkpoints without pickle's own machine, in Python. It is too slow for
    these files: 38 s instead of 4 for 50,000 references."""

    def find_class(self, module: str, name: str) -> Any:
        raise _CodeInPickle(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an external object")


class _CodeInPickle(Exception):
    """The name that a pickle wants to call."""


def _read_refs(file: Path) -> list[Any]:
    """The list in a refs(...).p. UserError for anything else; no code in the file is run."""
    try:
        with file.open("rb") as stream:
            refs = _DataUnpickler(stream, encoding="latin-1").load()  # written by Python 2
    except OSError as e:
        raise UserError(f"data {file}: cannot be read ({e.strerror})") from None
    except _CodeInPickle as e:
        raise UserError(
            f"data {file}: asks to run {e}, which does not belong in a list of references; nothing was "
            "run. Use the file that the dataset's authors publish"
        ) from None
    except Exception as e:  # a damaged pickle may raise anything
        raise UserError(f"data {file}: is not a pickle or is damaged ({e})") from None
    if not isinstance(refs, list):
        raise UserError(f"data {file}: holds {kind(refs)}; expected a list of references")
    return refs


# --- Visual Genome ---------------------------------------------------------------------------


def read_refvg(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """region_descriptions.json: [{"id", "regions": [{"phrase", "x", "y", "width", "height"}]}], and
    image_data.json: [{"image_id", "width", "height", "url": ".../VG_100K_2/1.jpg"}]; the image is
    the last two parts of the URL (homes.cs.washington.edu/~ranjay/visualgenome/api.html,
    ReferVisualGenomeDataset)."""
    if len(files) != 2:
        raise UserError(
            f"data {files[0]}: expected two files, region_descriptions.json and image_data.json, "
            "or their folder"
        )
    images = {}
    for where, row in read_list(files[1]):
        size = number_of(row, "width", where), number_of(row, "height", where)
        name = "/".join(text_of(row, "url", where).split("/")[-2:])
        images[_image_id(row, where)] = name, size
    for where, row in read_list(files[0]):
        image = images.get(_image_id(row, where))
        for region in objects_of(row, "regions", where):
            yield _region_row(region, where, image)


def _image_id(row: dict[str, Any], where: str) -> str | int:
    return identity_of(row, "id" if "id" in row else "image_id", where)


def _region_row(
    region: dict[str, Any], where: str, image: tuple[str, tuple[float, float]] | None
) -> DatasetRow | Unused:
    x, y, width, height = (number_of(region, key, where) for key in ("x", "y", "width", "height"))
    if width * height >= MAX_REGION:
        return Unused(f"of {MAX_REGION} pixels or more", fault=False)
    if image is None:
        return Unused("whose image is not in image_data.json")
    phrase = blip_caption(text_of(region, "phrase", where))
    return _row(image[0], [phrase] if phrase else [], [x, y, width, height], image[1])


# --- both ------------------------------------------------------------------------------------


def _row(
    image: str, phrases: list[str], box: Sequence[float], size: tuple[float, float]
) -> DatasetRow | Unused:
    """box: x, y, width, height in pixels; clipped to the image."""
    x, y, width, height = box
    x1, x2 = (min(max(v, 0), size[0]) for v in (x, x + width))
    y1, y2 = (min(max(v, 0), size[1]) for v in (y, y + height))
    if not (x1 < x2 and y1 < y2):
        return _NO_BOX
    return DatasetRow(image, (phrases, (x1, y1, x2, y2), size)) if phrases else _NO_WORDS


def make_refer(images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator) -> Example:
    """From words to box."""
    phrases, box, size = fields
    question = fill_template(choose(REFER_PROMPTS, rng), choose(phrases, rng))
    return Example(images, (image_question(images, question),), (format_box(box, *size),))


def make_identify(
    images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator
) -> Example:
    """From box to words."""
    phrases, box, size = fields
    question = fill_template(choose(IDENTIFY_PROMPTS, rng), format_box(box, *size))
    return Example(images, (image_question(images, question),), (choose(phrases, rng),))
