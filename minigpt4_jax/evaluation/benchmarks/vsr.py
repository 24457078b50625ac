"""VSR, zero-shot test split: is a statement about positions true? (eval_vqa.py, block vsr)"""

from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.data.annotations import text_of
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import (
    label_of,
    no_split,
    of_chat_model,
    of_paper,
    row_result,
)  # fmt: skip
from minigpt4_jax.evaluation.layout import find_file, read_rows
from minigpt4_jax.evaluation.metrics import yes_no
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.predictions import texts

FILES = ("test.jsonl", "test.json", "vsr.json")
IMAGES = ("vsr/images", "vsr/vsr_images", "coco/train2017", "coco/val2017")


def read(data: Path, split: str) -> list[Row]:
    """test.jsonl of cambridgeltl/vsr_zeroshot, or the same rows as a JSON list: {"image", "caption",
    "label" 0 or 1}. Rows are named by number, from 0."""
    no_split("vsr", split, "test")
    rows = []
    for number, (where, row) in enumerate(read_rows(find_file(data, FILES, "vsr"))):
        statement = text_of(row, "caption", where)
        question = f"[vqa] Based on the image, is this statement true or false? {statement}"
        image = text_of(row, "image", where)
        images = tuple(f"{folder}/{image}" for folder in IMAGES)
        rows.append(Row(number, question, images, "true" if label_of(row, where) else "false"))
    return rows


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """original: the answer equals true or false in any case, so that yes is wrong. official: the first
    word counts, and yes is true."""
    given = texts(answers, "vsr")
    right = [answer.lower() == row.truth for answer, row in zip(given, rows, strict=True)]
    readings = [yes_no.read_first_word(answer) for answer in given]
    labels = ["yes" if row.truth == "true" else "no" for row in rows]
    tolerant = [reading == label for reading, label in zip(readings, labels, strict=True)]
    per_row = [
        row_result(row, answer, hit, official=100.0 * other, truth=row.truth, reading=reading,
                   label=label)
        for row, answer, hit, other, reading, label in zip(
            rows, given, right, tolerant, readings, labels, strict=True)
    ]  # fmt: skip
    score = mean_percent(right)
    return Result(score, {"accuracy": score}, {"accuracy": mean_percent(tolerant)}, per_row)


BENCHMARK = Benchmark(
    name="vsr", title="VSR zero-shot test", kind="yes_no", metric="accuracy", folder="vsr",
    files=(DataFile(tuple(f"vsr/{name}" for name in FILES),
                    "https://huggingface.co/datasets/cambridgeltl/vsr_zeroshot"),),
    images=(DataFile(IMAGES[:3],
                     "https://github.com/cambridgeltl/visual-spatial-reasoning"),),
    read=read, judge=judge,
    published=(of_paper(60.6), of_chat_model(63.3)),
)  # fmt: skip
