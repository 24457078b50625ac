"""CHAIR on COCO val2014: objects in descriptions that are not in the image, as MiniGPT-4 reports them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_jax.data.annotations import (
    expect_object,
    identity_of,
    integer_of,
    objects_of,
    parse,
    read_text,
    text_of,
)  # fmt: skip
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import MINIGPT4_PAPER, no_split, row_result
from minigpt4_jax.evaluation.layout import coco_paths, find_file
from minigpt4_jax.evaluation.metrics import chair
from minigpt4_jax.evaluation.metrics.ptb_tokenizer import tokenize
from minigpt4_jax.evaluation.predictions import texts

INSTANCES, CAPTIONS = "instances_val2014.json", "captions_val2014.json"
LONG = "Please describe this image as detailed as possible."
SHORT = "Please describe the image shortly and precisely, in less than 20 words."


class ChairTarget(NamedTuple):
    """The objects in an image: segmented ones, and those that people mention."""

    objects: frozenset[str]


def read(data: Path, split: str, *, name: str, prompt: str) -> list[Row]:
    """instances_val2014.json and captions_val2014.json of COCO. True objects are those of the
    segmentations and those in the captions of people."""
    no_split(name, split, "val")
    instances = _content(find_file(data, (INSTANCES,), name))
    captions = _content(find_file(data.parent if data.is_file() else data, (CAPTIONS,), name))
    where = f"data {data}, {INSTANCES}"
    names = {
        identity_of(category, "id", where): text_of(category, "name", where)
        for category in objects_of(instances, "categories", where)
    }
    true: dict[str | int, set[str]] = defaultdict(set)
    for annotation in objects_of(instances, "annotations", where):
        category = identity_of(annotation, "category_id", where)
        if category not in names:
            raise UserError(f"{where}: category {category} is not in its list of categories")
        true[identity_of(annotation, "image_id", where)].add(names[category])
    where_captions = f"data {data}, {CAPTIONS}"
    annotations = objects_of(captions, "annotations", where_captions)
    tokenized = tokenize([text_of(a, "caption", where_captions) for a in annotations])
    for annotation, tokens in zip(annotations, tokenized, strict=True):
        image = identity_of(annotation, "image_id", where_captions)
        true[image].update(chair.find_objects(tokens))
    images = [integer_of(image, "id", where) for image in objects_of(instances, "images", where)]
    return [
        Row(image, prompt, coco_paths(image, "val2014", "val2017", "train2017"),
            ChairTarget(frozenset(true[image])))
        for image in images
    ]  # fmt: skip


def _content(path: Path) -> dict[str, Any]:
    where = f"data {path}"
    return expect_object(parse(where, read_text(path)), where)


def judge(rows: Sequence[Row], answers: Sequence[Answer], *, name: str) -> Result:
    """score: CHAIRi, the share of mentioned objects that are not in the image; lower is better."""
    given = texts(answers, name)
    found = chair.mentions(given, [row.truth.objects for row in rows])
    per_row = [
        row_result(row, answer, bool(m.hallucinated), objects=m.objects, hallucinated=m.hallucinated,
                   truth=sorted(row.truth.objects))
        for row, answer, m in zip(rows, given, found, strict=True)
    ]  # fmt: skip
    words = [len(answer.split()) for answer in given]
    figures = {**chair.figures(found), "words": sum(words) / len(words)}
    return Result(100 * figures["CHAIRi"], figures, {}, per_row)


def headline(per_row: Sequence[Mapping[str, Any]]) -> float:
    """CHAIRi, in percent."""
    found = [chair.Mentions(entry["objects"], entry["hallucinated"]) for entry in per_row]
    return 100 * chair.figures(found)["CHAIRi"]


def _benchmark(name: str, title: str, prompt: str, tokens: int, published: float) -> Benchmark:
    source = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
    return Benchmark(
        name=name, title=title, kind="caption", metric="CHAIRi", folder="coco/annotations",
        files=tuple(DataFile((f"coco/annotations/{file}",), source) for file in (INSTANCES, CAPTIONS)),
        images=(DataFile(("coco/val2014",), "http://images.cocodataset.org/zips/val2014.zip"),),
        read=partial(read, name=name, prompt=prompt), judge=partial(judge, name=name),
        max_new_tokens=tokens, higher_is_better=False, headline=headline,
        published=(Published("MiniGPT-4", published, MINIGPT4_PAPER),),
    )  # fmt: skip


BENCHMARKS = (
    _benchmark("chair", "CHAIR, long descriptions", LONG, 300, 9.6),
    _benchmark("chair_short", "CHAIR, short descriptions", SHORT, 60, 7.2),
)
