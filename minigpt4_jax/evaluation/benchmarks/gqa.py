"""GQA, balanced test-dev: questions made from scene graphs (eval_vqa.py, block gqa)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import first_character, read_object, text_of
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import (
    MODEL_CHAT,
    PAPER,
    no_split,
    of_paper,
    row_result,
    short_answer,
)  # fmt: skip
from minigpt4_jax.evaluation.layout import find_file, is_json_lines, read_rows
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.metrics.vqa_normalizer import normalize
from minigpt4_jax.evaluation.predictions import texts

FILES = ("testdev_balanced_questions.json", "questions1.2/testdev_balanced_questions.json")


def read(data: Path, split: str) -> list[Row]:
    """A list of {"image", "question", "answer"} (LAVIS's form), or GQA's own object of {"imageId",
    "question", "answer"} by question id. Rows are named by number, from 0."""
    no_split("gqa", split, "testdev")
    rows = []
    for number, (where, row) in enumerate(_entries(find_file(data, FILES, "gqa"))):
        image = text_of(row, "image", where) if "image" in row else f"{row.get('imageId', '')}.jpg"
        question = short_answer(text_of(row, "question", where))
        rows.append(
            Row(
                number,
                question,
                (f"gqa/images/{image}", f"gqa/{image}"),
                text_of(row, "answer", where),
            )
        )
    return rows


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if first_character(path) == "{" and not is_json_lines(path):
        yield from ((where, row) for where, _, row in read_object(path))
    else:
        yield from read_rows(path)


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """original: the answer in lower case equals the label. official: both normalized as for VQA (LAVIS);
    exact_match compares them as they are, like GQA's own eval.py."""
    given = texts(answers, "gqa")
    pairs = list(zip(given, (row.truth for row in rows), strict=True))
    right = [answer.lower() == truth for answer, truth in pairs]
    normalized = [normalize(answer) == normalize(truth) for answer, truth in pairs]
    per_row = [
        row_result(row, answer, hit, official=100.0 * other, truth=row.truth)
        for row, answer, hit, other in zip(rows, given, right, normalized, strict=True)
    ]
    score = mean_percent(right)
    official = {
        "accuracy": mean_percent(normalized),
        "exact_match": mean_percent([answer == truth for answer, truth in pairs]),
    }
    return Result(score, {"accuracy": score}, official, per_row)


BENCHMARK = Benchmark(
    name="gqa", title="GQA test-dev balanced", kind="text", metric="exact match", folder="gqa",
    files=(DataFile(tuple(f"gqa/{name}" for name in FILES),
                    "https://cs.stanford.edu/people/dorarad/gqa/download.html"),),
    images=(DataFile(("gqa/images",), "https://cs.stanford.edu/people/dorarad/gqa/download.html"),),
    read=read, judge=judge,
    published=(
        of_paper(60.3), Published(MODEL_CHAT, 60.1, PAPER + ", later version"),
        Published("MiniGPT-4", 32.2, "arXiv 2304.10592"),
    ),
)  # fmt: skip
