"""OK-VQA: questions that need knowledge beyond the image (eval_vqa.py, block okvqa)."""

from functools import partial
from pathlib import Path

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Benchmark, DataFile, Row
from minigpt4_jax.evaluation.benchmarks.common import of_chat_model, of_paper
from minigpt4_jax.evaluation.benchmarks.vqa_files import judge, read_questions_and_annotations
from minigpt4_jax.evaluation.layout import coco_paths

ANNOTATIONS = (
    "mscoco_val2014_annotations_clean.json", "mscoco_val2014_annotations.json", "annotations.json",
)  # fmt: skip
QUESTIONS = (
    "OpenEnded_mscoco_val2014_questions_clean.json", "OpenEnded_mscoco_val2014_questions.json",
    "okvqa_test_split.json",
    "questions.json",
)  # fmt: skip


def read(data: Path, split: str) -> list[Row]:
    """The annotations and questions of COCO val2014, as published or in the original's `_clean` form.
    Their images are in train2017 and val2017."""
    if split not in ("", "test", "val", "val2014"):
        raise UserError(f"--split={split}: okvqa has one split with answers, val2014 (test)")
    return read_questions_and_annotations(
        data, "okvqa", ANNOTATIONS, QUESTIONS,
        lambda image: coco_paths(image, "train2017", "val2017", "val2014"),
    )  # fmt: skip


BENCHMARK = Benchmark(
    name="okvqa", title="OK-VQA", kind="text", metric="VQA accuracy", folder="okvqa",
    files=(
        DataFile(tuple(f"okvqa/{name}" for name in ANNOTATIONS[:2]), "https://okvqa.allenai.org"),
        DataFile(tuple(f"okvqa/{name}" for name in QUESTIONS[:3]), "https://okvqa.allenai.org"),
    ),
    images=(
        DataFile(("coco/train2017", "coco/val2014"),
                 "http://images.cocodataset.org/zips/train2017.zip"),
        DataFile(("coco/val2017", "coco/val2014"),
                 "http://images.cocodataset.org/zips/val2017.zip"),
    ),
    read=read, judge=partial(judge, name="okvqa"),
    published=(of_paper(56.9), of_chat_model(55.9)),
)  # fmt: skip
