"""A-OKVQA, validation split: questions that need knowledge, with direct answers and four choices."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minigpt4_jax.data.annotations import identity_of, integer_of, text_of, texts_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import (
    MINIGPT4_PAPER,
    no_split,
    require_answers,
    row_result,
    short_answer,
)  # fmt: skip
from minigpt4_jax.evaluation.layout import coco_paths, find_file, read_rows
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.metrics.vqa_accuracy import raw_matches
from minigpt4_jax.evaluation.predictions import texts

FILES = ("aokvqa_v1p0_val.json", "aokvqa.json")


class AokvqaTarget(NamedTuple):
    """answers: of people. choice: the text of the right choice; None without choices. difficult: left out
    of the official direct answers."""

    answers: list[str]
    choice: str | None
    difficult: bool


def read(data: Path, split: str) -> list[Row]:
    """aokvqa_v1p0_val.json: a list of {"question_id", "image_id", "question", "direct_answers", "choices",
    "correct_choice_idx", "difficult_direct_answer"}; direct answers alone suffice."""
    no_split("aokvqa", split, "val")
    rows = []
    for where, row in read_rows(find_file(data, FILES, "aokvqa")):
        answers = texts_of(row, "direct_answers", where)
        require_answers(answers, where, "direct_answers")
        choice, index = None, row.get("correct_choice_idx")
        if "choices" in row:
            choices = texts_of(row, "choices", where)
            if not isinstance(index, int) or not 0 <= index < len(choices):
                raise UserError(
                    f'{where}: "correct_choice_idx" is {index!r}; expected the index of a choice'
                )
            choice = choices[index]
        target = AokvqaTarget(answers, choice, bool(row.get("difficult_direct_answer", False)))
        image = integer_of(row, "image_id", where) if "image_id" in row else 0
        images = coco_paths(image, "val2017", "train2017", "val2014")
        question = short_answer(text_of(row, "question", where) if "question" in row else "")
        rows.append(Row(identity_of(row, "question_id", where), question, images, target))
    return rows


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """original: LAVIS's min(1, equal direct answers / 3) of raw texts. official: the same without
    questions that are marked difficult, and the share of answers that are the right choice."""
    given = texts(answers, "aokvqa")
    scores = [
        raw_matches(answer, row.truth.answers) for row, answer in zip(rows, given, strict=True)
    ]
    direct = [score for row, score in zip(rows, scores, strict=True) if not row.truth.difficult]
    choices = [
        answer.strip().lower() == row.truth.choice.strip().lower()
        for row, answer in zip(rows, given, strict=True)
        if row.truth.choice is not None
    ]
    per_row = [
        row_result(
            row,
            answer,
            score,
            truth=max(row.truth.answers, key=row.truth.answers.count, default=""),
        )
        for row, answer, score in zip(rows, given, scores, strict=True)
    ]
    score = mean_percent(scores)
    official = {
        "direct_answer": mean_percent(direct) if direct else None,
        "multiple_choice": mean_percent(choices) if choices else None,
    }
    return Result(score, {"accuracy": score}, official, per_row)


BENCHMARK = Benchmark(
    name="aokvqa", title="A-OKVQA val", kind="text", metric="direct-answer accuracy", folder="aokvqa",
    files=(DataFile((f"aokvqa/{FILES[0]}",), "https://allenai.org/project/a-okvqa"),),
    images=(DataFile(("coco/val2017",), "http://images.cocodataset.org/zips/val2017.zip"),),
    read=read, judge=judge,
    published=(Published("MiniGPT-4 (multiple choice)", 58.2, MINIGPT4_PAPER),),
)  # fmt: skip
