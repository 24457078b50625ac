"""COCO Caption and NoCaps: captions compared with those of people (the coco-caption metrics)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_jax.data.annotations import (
    expect_object,
    identity_of,
    objects_of,
    parse,
    read_text,
    text_of,
)  # fmt: skip
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import BLIP2_README, row_result
from minigpt4_jax.evaluation.layout import coco_paths, find_file
from minigpt4_jax.evaluation.metrics import meteor
from minigpt4_jax.evaluation.metrics.captions import caption_scores
from minigpt4_jax.evaluation.metrics.ptb_tokenizer import tokenize
from minigpt4_jax.evaluation.predictions import texts

COCO_FILES = {
    "test": ("coco_karpathy_test_gt.json", "ground_truth.json"),
    "val": ("coco_karpathy_val_gt.json",),
}
NOCAPS_FILES = {"val": ("nocaps_val_4500_captions.json",)}
# The original's question for captions (coco_caption.py)
PROMPT = "[caption] please describe this image?"


class _Image(NamedTuple):
    where: str
    file_name: str
    domain: str


def read(data: Path, split: str, *, name: str, files: Mapping[str, tuple[str, ...]]) -> list[Row]:
    """Ground truth in COCO's layout: {"images": [{"id"}], "annotations": [{"image_id", "caption"}]}."""
    split = split or next(iter(files))
    if split not in files:
        raise UserError(f"--split={split}: {name} has the splits {', '.join(files)}")
    path = find_file(data, files[split], name)
    where = f"data {path}"
    content = expect_object(parse(where, read_text(path)), where)
    images = _images(content, where)
    captions: dict[str | int, list[str]] = {image: [] for image in images}
    for annotation in objects_of(content, "annotations", where):
        image = identity_of(annotation, "image_id", where)
        if image not in captions:
            raise UserError(
                f"{where}: a caption is of image {image}, which is not among its images"
            )
        captions[image].append(text_of(annotation, "caption", where))
    if not captions:
        raise UserError(f"{where}: has no images")
    if bare := [image for image, of_image in captions.items() if not of_image]:
        raise UserError(f"{where}: {len(bare)} images have no captions ({bare[0]})")
    return [
        Row(
            image,
            PROMPT,
            _places(name, image, images[image]),
            captions[image],
            group=images[image].domain,
        )
        for image in captions
    ]


def _images(content: dict[str, Any], where: str) -> dict[str | int, _Image]:
    images: dict[str | int, _Image] = {}
    for entry in objects_of(content, "images", where):
        image = identity_of(entry, "id", where)
        if image in images:
            raise UserError(f"{where}: image {image} is there twice")
        images[image] = _Image(where, str(entry.get("file_name", "")), str(entry.get("domain", "")))
    return images


def _places(name: str, image: str | int, entry: _Image) -> tuple[str, ...]:
    if name == "nocaps":
        file = entry.file_name or f"{image}.jpg"
        return tuple(f"nocaps/{folder}{file}" for folder in ("val/", "images/", ""))
    if entry.file_name:
        bare = Path(entry.file_name).name
        return tuple(f"coco/{folder}/{bare}" for folder in ("val2014", "val2017", "train2014"))
    if not isinstance(image, int):
        raise UserError(
            f'{entry.where}: image {image!r} has no "file_name"; expected one, or a number as its id'
        )
    return coco_paths(image, "val2014", "val2017", "train2017")


def judge(rows: Sequence[Row], answers: Sequence[Answer], *, name: str) -> Result:
    """BLEU, METEOR (with Java), ROUGE-L and CIDEr. score: CIDEr in percent. Where images have a domain, as
    those of NoCaps, each domain is also scored alone."""
    given = texts(answers, name)
    overall, per_caption = _metrics(rows, given)
    per_row = [
        row_result(row, answer, per_caption["CIDEr"][i], truth=row.truth,
                   **{metric: values[i] for metric, values in per_caption.items()})
        for i, (row, answer) in enumerate(zip(rows, given, strict=True))
    ]  # fmt: skip
    extra: dict[str, Any] = {"metrics": overall}
    if note := meteor.missing():
        extra["note"] = note
    domains = list(dict.fromkeys(row.group for row in rows if row.group))
    if domains:
        extra["domains"] = {}
        for domain in domains:
            chosen = [i for i, row in enumerate(rows) if row.group == domain]
            extra["domains"][domain] = _metrics(
                [rows[i] for i in chosen], [given[i] for i in chosen]
            )[0]
    return Result(100 * float(overall["CIDEr"]), {}, {}, per_row, extra)


def _metrics(
    rows: Sequence[Row], captions: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(overall, of each caption), by metric."""
    flat = [reference for row in rows for reference in row.truth]
    tokenized = iter(tokenize(flat))
    references = [[next(tokenized) for _ in row.truth] for row in rows]
    tokens = tokenize(captions)
    overall, per_caption = caption_scores(tokens, references)
    if meteor.missing() is None:
        overall["METEOR"], per_caption["METEOR"] = meteor.meteor(tokens, references)
    return overall, per_caption


_BLIP2_PAPER = "BLIP-2 paper, arXiv 2301.12597"
BENCHMARKS = (
    Benchmark(
        name="coco_caption", title="COCO Caption, Karpathy test", kind="caption", metric="CIDEr",
        folder="coco_caption",
        files=(DataFile(("coco_caption/coco_karpathy_test_gt.json",),
                        "https://storage.googleapis.com/sfr-vision-language-research/datasets"),),
        images=(DataFile(("coco/val2014",), "http://images.cocodataset.org/zips/val2014.zip"),),
        read=partial(read, name="coco_caption", files=COCO_FILES),
        judge=partial(judge, name="coco_caption"), max_new_tokens=30,
        published=(Published("BLIP-2 OPT 2.7B (fine-tuned)", 145.8, _BLIP2_PAPER),
                   Published("BLIP-2 FlanT5 XL (fine-tuned)", 144.5, _BLIP2_PAPER)),
    ),
    Benchmark(
        name="nocaps", title="NoCaps val", kind="caption", metric="CIDEr", folder="nocaps",
        files=(DataFile(("nocaps/nocaps_val_4500_captions.json",), "https://nocaps.org/download"),),
        images=(DataFile(("nocaps/val", "nocaps/images", "nocaps"), "https://nocaps.org/download"),),
        read=partial(read, name="nocaps", files=NOCAPS_FILES), judge=partial(judge, name="nocaps"),
        max_new_tokens=30,
        published=(Published("BLIP-2 (zero-shot)", 121.6, BLIP2_README),),
    ),
)  # fmt: skip
