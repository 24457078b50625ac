"""VizWiz-VQA: questions of blind people about their photographs (eval_vqa.py, block vizwiz)."""

from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.data.annotations import objects_of, text_of
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import (
    no_split,
    of_chat_model,
    of_paper,
    require_answers,
    row_result,
)  # fmt: skip
from minigpt4_jax.evaluation.layout import find_file, read_rows
from minigpt4_jax.evaluation.metrics import vqa_accuracy
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.predictions import texts

JOINT = "_"  # the original joins a row's answers by it and splits them again


def read(data: Path, split: str) -> list[Row]:
    """val.json: a list of {"image", "question", "answers": ten of {"answer"}}. Rows are named by number,
    from 0."""
    no_split("vizwiz", split, "val")
    rows = []
    for number, (where, row) in enumerate(read_rows(find_file(data, ("val.json",), "vizwiz"))):
        answers = [text_of(answer, "answer", where) for answer in objects_of(row, "answers", where)]
        require_answers(answers, where)
        question = (
            f"[vqa] The question is '{text_of(row, 'question', where)}' Based on the image, answer the "
            "question with a single word or phrase. and reply 'unanswerable' when the provided "
            "information is insufficient"
        )
        image = text_of(row, "image", where)
        places = tuple(f"vizwiz/{folder}{image}" for folder in ("val/", "vizwiz_images/", ""))
        rows.append(Row(number, question, places, answers))
    return rows


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """original: min(equal answers / 3, 1), in lower case without a normalizer. official: the challenge's
    VQA accuracy."""
    given = texts(answers, "vizwiz")
    scores = [_original(row.truth, answer) for row, answer in zip(rows, given, strict=True)]
    official = [
        vqa_accuracy.official(
            answer, [{"answer": a, "answer_id": i} for i, a in enumerate(row.truth)]
        )
        for row, answer in zip(rows, given, strict=True)
    ]
    per_row = [
        row_result(row, answer, score, official=100 * of, truth=max(row.truth, key=row.truth.count))
        for row, answer, score, of in zip(rows, given, scores, official, strict=True)
    ]
    score = mean_percent(scores)
    return Result(score, {"accuracy": score}, {"vqa_accuracy": mean_percent(official)}, per_row)


def _original(truth: Sequence[str], answer: str) -> float:
    parts = JOINT.join(truth).split(JOINT)
    return min(sum(part.lower() == answer.lower() for part in parts) / 3.0, 1.0)


BENCHMARK = Benchmark(
    name="vizwiz", title="VizWiz-VQA val", kind="text", metric="accuracy", folder="vizwiz",
    files=(DataFile(("vizwiz/val.json",), "https://vizwiz.org/tasks-and-datasets/vqa"),),
    images=(DataFile(("vizwiz/val", "vizwiz/vizwiz_images"), "https://vizwiz.org/tasks-and-datasets/vqa"),),
    read=read, judge=judge,
    published=(of_paper(32.9), of_chat_model(42.4)),
)  # fmt: skip
