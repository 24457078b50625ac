"""IconQA, multiple choice of texts: candidates are ranked by their loss (eval_vqa.py, block iconvqa)."""

from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.data.annotations import field_of, identity_of, kind, text_of, texts_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import (
    no_split,
    of_chat_model,
    of_paper,
    row_result,
    short_answer,
)  # fmt: skip
from minigpt4_jax.evaluation.layout import find_file, read_rows
from minigpt4_jax.evaluation.metrics.statistics import mean_percent

JOINT = "_"  # the original joins choices by it and splits them again
FILES = ("choose_text_val.json",)


def read(data: Path, split: str) -> list[Row]:
    """choose_text_val.json: a list of {"image_id", "question", "choices", "answer": index}. Rows are named
    by number, from 0."""
    no_split("iconvqa", split, "val")
    rows = []
    for number, (where, row) in enumerate(read_rows(find_file(data, FILES, "iconvqa"))):
        choices = texts_of(row, "choices", where)
        answer = field_of(row, "answer", where)
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise UserError(f'{where}: "answer" is {kind(answer)}; expected the index of a choice')
        image = f"{identity_of(row, 'image_id', where)}/image.png"
        folders = ("choose_txt/val/", "iconvqa_images/", "")
        places = tuple(f"iconvqa/{folder}{image}" for folder in folders)
        rows.append(
            Row(number, short_answer(text_of(row, "question", where)),
                places, answer,
                tuple(JOINT.join(choices).split(JOINT)))
        )  # fmt: skip
    return rows


def chosen(answer: Answer, candidates: Sequence[str], losses: str = "losses") -> int | None:
    """The index of the choice that an answer means: an index, the losses of all choices (the least wins,
    the first of equals), or the text of a choice in any case; None if it is none of them.

    losses: which of several kinds of losses counts, if the answer has them by name."""
    if isinstance(answer, dict):
        answer = answer.get(losses, [])
    if isinstance(answer, int):
        return answer if 0 <= answer < len(candidates) else None
    if isinstance(answer, str):
        wanted = answer.strip().lower()
        texts = [candidate.strip().lower() for candidate in candidates]
        return texts.index(wanted) if wanted in texts else None
    values = [loss for loss in answer if isinstance(loss, (int, float))]
    if len(values) < len(candidates):
        raise UserError(f"an answer has {len(values)} losses for {len(candidates)} choices")
    return values.index(min(values[: len(candidates)]))


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """The share of rows whose best candidate is the right one. original: ranked by the original's losses,
    whose divisor depends on the batch. official: by the mean loss of a candidate's tokens, if the answers
    have it."""
    choices = [chosen(answer, row.candidates) for row, answer in zip(rows, answers, strict=True)]
    right = [choice == row.truth for choice, row in zip(choices, rows, strict=True)]
    per_row = [
        row_result(
            row,
            answer,
            hit,
            choice=choice,
            chosen="" if choice is None else row.candidates[choice],
            truth=row.candidates[row.truth],
        )
        for row, answer, hit, choice in zip(rows, answers, right, choices, strict=True)
    ]
    score = mean_percent(right)
    official = {}
    if any(isinstance(answer, dict) for answer in answers):
        by_mean = [
            chosen(answer, row.candidates, "mean_losses") == row.truth
            for row, answer in zip(rows, answers, strict=True)
        ]
        official["accuracy"] = mean_percent(by_mean)
        for entry, hit in zip(per_row, by_mean, strict=True):
            entry["official"] = 100.0 * hit
    return Result(score, {"accuracy": score}, official, per_row)


BENCHMARK = Benchmark(
    name="iconvqa", title="IconQA val, text choices", kind="choice", metric="accuracy",
    folder="iconvqa",
    files=(DataFile(tuple(f"iconvqa/{name}" for name in FILES), "https://iconqa.github.io"),),
    images=(DataFile(("iconvqa/choose_txt/val", "iconvqa/iconvqa_images", "iconvqa"), "https://iconqa.github.io"),),
    read=read, judge=judge, ranked=True,
    published=(of_paper(47.7), of_chat_model(49.4)),
)  # fmt: skip
