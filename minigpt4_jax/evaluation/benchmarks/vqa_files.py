"""Files of the VQA API: questions and annotations, which OK-VQA and VQAv2 share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import identity_of, integer_of, text_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import row_result, short_answer, vqa_question
from minigpt4_jax.evaluation.layout import find_file, read_rows
from minigpt4_jax.evaluation.metrics import vqa_accuracy
from minigpt4_jax.evaluation.predictions import texts


def read_questions_and_annotations(
    data: Path,
    name: str,
    annotations: Sequence[str],
    questions: Sequence[str],
    images: Callable[[int], tuple[str, ...]],
) -> list[Row]:
    """The rows of an annotation file with their questions.

    data: the folder, or the annotation file alone, which suffices for scoring. annotations, questions:
    names of the files. images: places of an image by its id. UserError: files that are missing, or that
    do not belong together."""
    path = find_file(data, annotations, name)
    asked = {} if data.is_file() else _questions(find_file(data, questions, name))
    rows = []
    for where, row in read_rows(path, "annotations"):
        question = vqa_question(row, where)
        image = integer_of(row, "image_id", where)
        if not data.is_file() and question.id not in asked:
            raise UserError(f"{where}: question {question.id} is not in the question file")
        text = short_answer(asked.get(question.id, ""))
        rows.append(Row(question.id, text, images(image), question))
    return rows


def _questions(path: Path) -> dict[str | int, str]:
    return {
        identity_of(row, "question_id", where): text_of(row, "question", where)
        for where, row in read_rows(path, "questions")
    }


def original_answer(answer: str) -> str:
    """What the original's script keeps of an answer for OK-VQA."""
    return answer.lower().replace("<unk>", "").strip()


def judge(rows: Sequence[Row], answers: Sequence[Answer], *, name: str) -> Result:
    """VQA accuracy. original: of answers as the original's script writes them, in lower case.
    official: of the answers as they are. lavis: by the evaluation in LAVIS."""
    given = texts(answers, name)
    kept = [original_answer(answer) for answer in given]
    questions = [row.truth for row in rows]
    original = vqa_accuracy.table(questions, kept, vqa_accuracy.official)
    exact = [
        vqa_accuracy.official(answer, question.answers)
        for answer, question in zip(kept, questions, strict=True)
    ]
    per_row = [
        row_result(row, answer, accuracy, truth=_most_common(row.truth.answers))
        for row, answer, accuracy in zip(rows, given, exact, strict=True)
    ]
    return Result(
        original["overall"], original, vqa_accuracy.table(questions, given, vqa_accuracy.official),
        per_row, {"lavis": vqa_accuracy.table(questions, given, vqa_accuracy.lavis)},
    )  # fmt: skip


def _most_common(answers: Sequence[Mapping[str, Any]]) -> str:
    values = [answer["answer"] for answer in answers]
    most: str = max(values, key=values.count)
    return most
