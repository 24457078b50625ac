"""GQA, balanced test-dev: questions made from scene graphs (eval_vqa.py, block gqa)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import expect_object, first_character, read_object, text_of
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import (
    LLAVA,
    LLAVA_ZOO,
    MINIGPT4_PAPER,
    no_split,
    of_chat_model,
    of_paper,
    row_result,
    short_answer,
)  # fmt: skip
from minigpt4_jax.evaluation.layout import find_file, is_json_lines, read_rows
from minigpt4_jax.evaluation.metrics import gqa
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.metrics.vqa_normalizer import normalize
from minigpt4_jax.evaluation.predictions import texts

FILES = ("testdev_balanced_questions.json", "questions1.2/testdev_balanced_questions.json")


def read(data: Path, split: str) -> list[Row]:
    """A list of {"image", "question", "answer"} (LAVIS's form), or GQA's own object of {"imageId",
    "question", "answer", "types", "groups", "isBalanced"} by question id. Rows are named by number,
    from 0."""
    no_split("gqa", split, "testdev")
    rows = []
    for number, (where, row) in enumerate(_entries(find_file(data, FILES, "gqa"))):
        own = "imageId" in row
        image = f"{text_of(row, 'imageId', where)}.jpg" if own else text_of(row, "image", where)
        places = tuple(f"gqa/{folder}{image}" for folder in ("images/", "gqa_images/", ""))
        question = short_answer(text_of(row, "question", where))
        rows.append(Row(number, question, places, _target(row, where)))
    return rows


def _target(row: dict[str, Any], where: str) -> gqa.GqaQuestion:
    types, groups = (
        expect_object(row.get(key) or {}, f'{where}, "{key}"') for key in ("types", "groups")
    )
    structural, semantic = (str(types.get(key) or "") for key in ("structural", "semantic"))
    group = str(groups["global"]) if groups.get("global") else None
    balanced = bool(row.get("isBalanced", True))
    return gqa.GqaQuestion(text_of(row, "answer", where), balanced, structural, semantic, group)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if first_character(path) == "{" and not is_json_lines(path):
        yield from ((where, row) for where, _, row in read_object(path))
    else:
        yield from read_rows(path)


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """original: the answer in lower case equals the label. official: accuracy with both normalized as for
    VQA (LAVIS), and the figures of GQA's own eval.py, which compares them as they are."""
    given = texts(answers, "gqa")
    questions: list[gqa.GqaQuestion] = [row.truth for row in rows]
    pairs = list(zip(given, (question.answer for question in questions), strict=True))
    right = [answer.lower() == truth for answer, truth in pairs]
    normalized = [normalize(answer) == normalize(truth) for answer, truth in pairs]
    per_row = [
        row_result(row, answer, hit, official=100.0 * other, truth=row.truth.answer)
        for row, answer, hit, other in zip(rows, given, right, normalized, strict=True)
    ]
    score = mean_percent(right)
    official = {"accuracy": mean_percent(normalized), **gqa.figures(questions, given)}
    return Result(score, {"accuracy": score}, official, per_row)


BENCHMARK = Benchmark(
    name="gqa", title="GQA test-dev balanced", kind="text", metric="exact match", folder="gqa",
    files=(DataFile(tuple(f"gqa/{name}" for name in FILES),
                    "https://cs.stanford.edu/people/dorarad/gqa/download.html"),),
    images=(DataFile(("gqa/images", "gqa/gqa_images"), "https://cs.stanford.edu/people/dorarad/gqa/download.html"),),
    read=read, judge=judge,
    published=(
        of_paper(60.3), of_chat_model(58.8),
        Published("MiniGPT-4", 32.2, MINIGPT4_PAPER), Published(LLAVA, 62.0, LLAVA_ZOO),
    ),
)  # fmt: skip
