"""Hateful Memes, dev split: is a picture with its text hateful? (eval_vqa.py, block hm)"""

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

FILES = ("dev.jsonl", "dev_seen.jsonl")


def read(data: Path, split: str) -> list[Row]:
    """dev.jsonl: lines of {"img", "text", "label" 0 or 1}. Rows are named by number, from 0."""
    no_split("hm", split, "dev")
    rows = []
    for number, (where, row) in enumerate(read_rows(find_file(data, FILES, "hm"))):
        question = (  # spelling and missing tag are the original's
            f"This is an image writting '{text_of(row, 'text', where)}'. Is this image hateful? "
            "Answer yes or no. Answer:"
        )
        image = text_of(row, "img", where)
        places = (f"hm/{image}", f"hm/hm_images/{image}")
        rows.append(Row(number, question, places, "yes" if label_of(row, where) else "no"))
    return rows


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """original: accuracy of answers that are yes or no in any case, and nothing else. official: the first
    word counts; auroc is that of the two answers, the mean of both classes' recall."""
    given = texts(answers, "hm")
    labels = [row.truth for row in rows]
    right = [answer.lower().strip() == label for answer, label in zip(given, labels, strict=True)]
    readings = [yes_no.read_first_word(answer) for answer in given]
    tolerant = [reading == label for reading, label in zip(readings, labels, strict=True)]
    per_row = [
        row_result(row, answer, hit, official=100.0 * other, truth=label, reading=reading, label=label)
        for row, answer, hit, other, reading, label in zip(
            rows, given, right, tolerant, readings, labels, strict=True)
    ]  # fmt: skip
    score = mean_percent(right)
    official = {"accuracy": mean_percent(tolerant), "auroc": _auroc(readings, labels)}
    return Result(score, {"accuracy": score}, official, per_row)


def _auroc(readings: Sequence[str | None], labels: Sequence[str]) -> float | None:
    """Percent; an answer that cannot be read is half a yes. None with one class alone."""
    says = {"yes": 1.0, "no": 0.0, None: 0.5}
    values = {
        label: [says[r] for r, of in zip(readings, labels, strict=True) if of == label]
        for label in ("yes", "no")
    }
    if not (values["yes"] and values["no"]):
        return None
    wins = [(p > n) + (p == n) / 2 for p in values["yes"] for n in values["no"]]
    return mean_percent(wins)


BENCHMARK = Benchmark(
    name="hm", title="Hateful Memes dev", kind="yes_no", metric="accuracy", folder="hm",
    files=(DataFile(tuple(f"hm/{name}" for name in FILES), "https://hatefulmemeschallenge.com"),),
    images=(DataFile(("hm/img", "hm/hm_images"), "https://hatefulmemeschallenge.com"),),
    read=read, judge=judge,
    published=(of_paper(58.2), of_chat_model(59.5)),
)  # fmt: skip
