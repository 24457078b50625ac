"""VQAv2, validation split: short questions about COCO images (visualqa.org)."""

from functools import partial
from pathlib import Path

from minigpt4_jax.evaluation.benchmark import Benchmark, DataFile, Published, Row
from minigpt4_jax.evaluation.benchmarks.common import BLIP2_README, no_split
from minigpt4_jax.evaluation.benchmarks.vqa_files import judge, read_questions_and_annotations
from minigpt4_jax.evaluation.layout import coco_paths

ANNOTATIONS = ("v2_mscoco_val2014_annotations.json", "annotations.json")
QUESTIONS = ("v2_OpenEnded_mscoco_val2014_questions.json", "questions.json")


def read(data: Path, split: str) -> list[Row]:
    """The questions and annotations of COCO val2014; the test splits have no public answers."""
    no_split("vqav2", split, "val")
    return read_questions_and_annotations(
        data, "vqav2", ANNOTATIONS, QUESTIONS,
        lambda image: coco_paths(image, "val2014", "val2017", "train2017"),
    )  # fmt: skip


BENCHMARK = Benchmark(
    name="vqav2", title="VQAv2 val", kind="text", metric="VQA accuracy", folder="vqav2",
    files=tuple(
        DataFile((f"vqav2/{name}",), "https://visualqa.org/download.html")
        for name in (ANNOTATIONS[0], QUESTIONS[0])
    ),
    images=(DataFile(("coco/val2014",), "http://images.cocodataset.org/zips/val2014.zip"),),
    read=read, judge=partial(judge, name="vqav2"),
    published=(Published("BLIP-2 (zero-shot)", 65.0, BLIP2_README),),
)  # fmt: skip
