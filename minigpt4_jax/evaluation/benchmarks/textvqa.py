"""TextVQA, validation split: questions about text in images (textvqa.org)."""

from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.data.annotations import identity_of, text_of, texts_of
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import (
    LLAVA,
    LLAVA_ZOO,
    no_split,
    require_answers,
    row_result,
    short_answer,
)  # fmt: skip
from minigpt4_jax.evaluation.layout import find_file, read_rows
from minigpt4_jax.evaluation.metrics import vqa_accuracy
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.predictions import texts

FILES = ("TextVQA_0.5.1_val.json",)


def read(data: Path, split: str) -> list[Row]:
    """TextVQA_0.5.1_val.json: {"data": [{"question_id", "image_id", "question", "answers": ten texts}]}."""
    no_split("textvqa", split, "val")
    rows = []
    for where, row in read_rows(find_file(data, FILES, "textvqa"), "data"):
        image = f"{text_of(row, 'image_id', where)}.jpg"
        question = short_answer(text_of(row, "question", where))
        answers = [
            {"answer": answer, "answer_id": i}
            for i, answer in enumerate(texts_of(row, "answers", where))
        ]
        require_answers(answers, where)
        places = (f"textvqa/train_images/{image}", f"textvqa/{image}")
        rows.append(Row(identity_of(row, "question_id", where), question, places, answers))
    return rows


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """original: VQA accuracy as for OK-VQA. official: the challenge's, which normalizes every answer."""
    given = texts(answers, "textvqa")
    scores = [vqa_accuracy.official(a, row.truth) for row, a in zip(rows, given, strict=True)]
    official = [
        vqa_accuracy.always_normalized(a, row.truth) for row, a in zip(rows, given, strict=True)
    ]
    per_row = [
        row_result(row, answer, score, official=100 * of, truth=_most_common(row))
        for row, answer, score, of in zip(rows, given, scores, official, strict=True)
    ]
    score = mean_percent(scores)
    return Result(score, {"accuracy": score}, {"accuracy": mean_percent(official)}, per_row)


def _most_common(row: Row) -> str:
    values = [answer["answer"] for answer in row.truth]
    most: str = max(values, key=values.count)
    return most


BENCHMARK = Benchmark(
    name="textvqa", title="TextVQA val", kind="text", metric="VQA accuracy", folder="textvqa",
    files=(DataFile((f"textvqa/{FILES[0]}",), "https://textvqa.org/dataset"),),
    images=(DataFile(("textvqa/train_images",), "https://textvqa.org/dataset"),),
    read=read, judge=judge,
    published=(Published(f"{LLAVA} (OCR tokens in the question)", 58.2, LLAVA_ZOO),),
)  # fmt: skip
