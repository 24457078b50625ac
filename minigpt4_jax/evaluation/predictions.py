"""Answers from anywhere: a JSON lines file of {"id", "answer"}, put in the order of a benchmark's rows."""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import (
    expect_object,
    field_of,
    identity_of,
    kind,
    parse,
    read_text,
)
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Row, RowId
from minigpt4_jax.utils.text import shorten

NAMED = 3  # ids that a message names


def read_predictions(path: Path) -> list[tuple[RowId, Answer]]:
    """(id, answer) of each line. UserError: not a JSON object per line, other fields, or no lines."""
    text = read_text(path, "predictions")
    if text.lstrip().startswith("["):
        raise UserError(
            f'predictions {path}: is one JSON list; expected JSON lines, {{"id": ..., "answer": ...}} each'
        )
    predictions = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"predictions {path}, line {number}"
        row = expect_object(parse(where, line), where)
        predictions.append((identity_of(row, "id", where), _answer(row, where)))
    if not predictions:
        raise UserError(
            f'predictions {path}: is empty; expected a line {{"id": ..., "answer": ...}} for each row'
        )
    return predictions


def _answer(row: dict[str, Any], where: str) -> Answer:
    value: Any = field_of(row, "answer", where)
    entries = value if isinstance(value, list) and value else [value]
    is_number = all(map(_is_number, entries))
    if not (all(isinstance(v, str) for v in entries) or is_number) or isinstance(value, float):
        raise UserError(
            f'{where}: "answer" is {kind(value)}; expected text, or a list of texts for the rounds of '
            "resampling, or for multiple choice the index of a choice or a list of losses"
        )
    answer: Answer = value
    return answer


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def match(
    rows: Sequence[Row], predictions: Sequence[tuple[RowId, Answer]], source: str
) -> list[Answer]:
    """The answer to each row. Rows with equal ids (expressions about one object) take the answers with
    that id in order.

    source: for messages. UserError: rows without an answer, more answers than rows for an id, or ids
    that no row has; the message names some of each."""
    wanted = Counter(str(row.id) for row in rows)
    given = Counter(str(name) for name, _ in predictions)
    problems = [
        _some([name for name in wanted if given[name] < wanted[name]], "without an answer"),
        _some([name for name in wanted if given[name] > wanted[name]], "answered more than once"),
        _some([name for name in given if name not in wanted], "not in the data"),
    ]
    if found := [problem for problem in problems if problem]:
        raise UserError(
            f"{source}: of {len(rows)} rows and {len(predictions)} answers, {'; '.join(found)}"
        )
    answers: dict[str, deque[Answer]] = defaultdict(deque)
    for name, answer in predictions:
        answers[str(name)].append(answer)
    return [answers[str(row.id)].popleft() for row in rows]


def _some(names: Iterable[str], what: str) -> str:
    names = list(names)
    if not names:
        return ""
    shown = ", ".join(shorten(name, 40) for name in names[:NAMED])
    number = "1 id is" if len(names) == 1 else f"{len(names)} ids are"
    return f"{number} {what} ({shown}{', ...' if len(names) > NAMED else ''})"


def texts(answers: Sequence[Answer], benchmark: str) -> list[str]:
    """The answers as texts. UserError: an answer of another kind."""
    for answer in answers:
        if not isinstance(answer, str):
            raise UserError(f"{benchmark}: an answer is {kind(answer)}; expected text")
    return [answer for answer in answers if isinstance(answer, str)]
