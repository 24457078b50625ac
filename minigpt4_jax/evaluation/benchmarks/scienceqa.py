"""ScienceQA, test split: multiple choice about school subjects, with and without an image."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import (
    expect_object,
    kind,
    parse,
    read_object,
    read_text,
    text_of,
    texts_of,
)
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import LLAVA, LLAVA_ZOO, row_result
from minigpt4_jax.evaluation.layout import find_file
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.predictions import texts

SPLITS = ("test", "val", "minival", "minitest", "train", "trainval")
LETTERS = "ABCDEFGHIJ"
WITH_IMAGE, TEXT_ONLY = "image", "text"


def read(data: Path, split: str) -> list[Row]:
    """problems.json: an object of {"question", "choices", "answer": index, "hint", "image", "split"} by id;
    pid_splits.json: the ids of each split. A file alone is problems.json."""
    split = split or "test"
    problems = find_file(data, ("problems.json",), "scienceqa")
    entries = {name: (where, row) for where, name, row in read_object(problems)}
    splits_file = problems.with_name("pid_splits.json")
    if splits_file.is_file():
        splits = expect_object(
            parse(f"data {splits_file}", read_text(splits_file)), f"data {splits_file}"
        )
        if split not in splits:
            raise UserError(f"--split={split}: {splits_file} has {', '.join(splits)}")
        ids = splits[split]
        if not isinstance(ids, list):
            raise UserError(f'data {splits_file}: "{split}" is {kind(ids)}; expected a list of ids')
        names = list(map(str, ids))
    else:
        names = [name for name, (_, row) in entries.items() if row.get("split", split) == split]
    if absent := [name for name in names if name not in entries]:
        raise UserError(f"data {splits_file}: problem {absent[0]} is not in {problems.name}")
    return [_row(name, *entries[name]) for name in names]


def _row(name: str, where: str, row: dict[str, Any]) -> Row:
    choices = texts_of(row, "choices", where)
    answer = row.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(LETTERS):
        raise UserError(f'{where}: "answer" is {answer!r}; expected the index of a choice')
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    hint = str(row.get("hint") or "").strip()
    question = " ".join(
        part
        for part in (f"[vqa] {hint}", text_of(row, "question", where), f"Options: {options}",
                     "Answer with the letter of the right option.")
        if part
    )  # fmt: skip
    images: tuple[str, ...] = ()
    if row.get("image"):
        place = f"{row.get('split', 'test')}/{name}/{row['image']}"
        images = (f"scienceqa/images/{place}", f"scienceqa/{place}")
    return Row(name, question, images, answer, tuple(choices), WITH_IMAGE if images else TEXT_ONLY)


# "B", "(b)", "B. cats", "The answer is B."; not "A cat"
_LETTER = re.compile(r"(?:.*answer is )?\(?([A-J])(?:[).:].*|)", re.IGNORECASE | re.DOTALL)


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """The index of the choice that an answer names by its text or its letter; None if by neither."""
    text = answer.strip()
    lowered = [choice.strip().lower() for choice in choices]
    for form in (text.lower(), text.lower().rstrip(".")):
        if form in lowered:
            return lowered.index(form)
    letter = _LETTER.fullmatch(text)
    index = LETTERS.index(letter[1].upper()) if letter else len(choices)
    return index if index < len(choices) else None


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """The share of right choices, of all questions and of those with and without an image."""
    given = texts(answers, "scienceqa")
    choices = [chosen(answer, row.candidates) for row, answer in zip(rows, given, strict=True)]
    right = [choice == row.truth for choice, row in zip(choices, rows, strict=True)]
    per_row = [
        row_result(
            row, answer, hit, choice=choice, truth=row.candidates[row.truth], group=row.group
        )
        for row, answer, hit, choice in zip(rows, given, right, choices, strict=True)
    ]
    groups = {
        f"{group}_accuracy": mean_percent(
            [hit for row, hit in zip(rows, right, strict=True) if row.group == group]
        )
        for group in dict.fromkeys(row.group for row in rows)
    }
    score = mean_percent(right)
    figures = {"accuracy": score, **groups, "unread": sum(choice is None for choice in choices)}
    return Result(score, figures, {}, per_row)


BENCHMARK = Benchmark(
    name="scienceqa", title="ScienceQA test", kind="choice", metric="accuracy", folder="scienceqa",
    files=tuple(DataFile((f"scienceqa/{name}",), "https://scienceqa.github.io")
                for name in ("problems.json", "pid_splits.json")),
    images=(DataFile(("scienceqa/images", "scienceqa/test"), "https://scienceqa.github.io"),),
    read=read, judge=judge,
    published=(Published(f"{LLAVA} (questions with an image)", 66.8, LLAVA_ZOO),),
)  # fmt: skip
