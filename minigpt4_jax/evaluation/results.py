"""The results of a task: answers judged, and written as scores.json beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import expect_object, parse, read_text
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.answers import AnswerFile, Line, given_answer
from minigpt4_jax.evaluation.benchmark import Benchmark, Result, Row
from minigpt4_jax.evaluation.metrics.answer_form import answer_form
from minigpt4_jax.evaluation.metrics.statistics import bootstrap_interval, bootstrap_statistic
from minigpt4_jax.evaluation.task import Task
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

SCORES = "scores.json"


def lines_of(files: Sequence[AnswerFile], task: Task) -> list[list[Line]] | None:
    """The lines of each row, from the files of all processes; None if a row has none yet."""
    found = []
    for n in range(task.num_rows):
        lines = next((file.rounds(n) for file in files if (n, 0) in file.lines), None)
        if lines is None:
            return None
        found.append(lines)
    return found


def describe(
    benchmark: Benchmark, split: str, rows: Sequence[Row], result: Result
) -> dict[str, Any]:
    """What every file of scores has: the figures with their interval, published ones, and each row."""
    low, high = interval(benchmark, result.per_row)
    return {
        "benchmark": benchmark.name,
        "split": split,
        "title": f"{benchmark.title} {split}".strip(),
        "kind": benchmark.kind,
        "metric": benchmark.metric,
        "higher_is_better": benchmark.higher_is_better,
        "rows": len(rows),
        "score": result.score,
        "interval": [low, high],
        "original": result.original,
        "official": result.official,
        **result.extra,
        "published": [p._asdict() for p in benchmark.published if p.split in ("", split)],
        "per_row": [
            {**entry, "question": row.question}
            for entry, row in zip(result.per_row, rows, strict=True)
        ],
    }


def score_task(
    task: Task, lines: Sequence[Sequence[Line]], model: str, *, resample: bool
) -> dict[str, Any]:
    """The contents of scores.json."""
    rows = task.used_rows
    resample = resample and task.benchmark.kind == "box"
    answers = [given_answer(of_row, resample=resample) for of_row in lines]
    scores = describe(task.benchmark, task.split, rows, task.benchmark.judge(rows, answers))
    errors = []
    for entry, row, of_row in zip(scores["per_row"], rows, lines, strict=True):
        entry["image"] = str(task.image(row) or "")
        if "error" in of_row[-1]:
            entry["error"] = of_row[-1]["error"]
            errors.append({"id": row.id, "error": entry["error"]})
    form = answer_form([of_row[0] for of_row in lines], boxes=task.benchmark.kind == "box")
    return {
        "model": model, "of_rows": len(task.rows), **scores, "form": form, "errors": errors,
        "per_row": scores["per_row"],
    }  # fmt: skip


def interval(benchmark: Benchmark, per_row: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the score."""
    headline = benchmark.headline
    if headline is None:
        return bootstrap_interval([entry["score"] for entry in per_row])
    return bootstrap_statistic(lambda sample: headline([per_row[i] for i in sample]), len(per_row))


def write_scores(folder: Path, scores: Mapping[str, Any]) -> Path:
    """Write folder/scores.json, and the folder if there is none. UserError: it cannot be written."""
    path = folder / SCORES
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise write_error(path, e) from None
    write_json(path, scores)
    return path


def write_json(path: Path, value: Any) -> None:
    """UserError: the file cannot be written."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        write_text_atomically(path, text, errors="replace")
    except OSError as e:
        raise write_error(path, e) from None


def read_scores(path: Path) -> dict[str, Any]:
    """A file that `write_scores` or `evaluate score --json` wrote. UserError: another file."""
    where = f"results {path}"
    scores = expect_object(parse(where, read_text(path, "results")), where)
    needed = {"benchmark", "score", "title", "metric", "interval", "rows", "per_row"}
    if not (needed <= scores.keys() and _are_entries(scores["per_row"])):
        raise UserError(f"{where}: has no scores of a benchmark; expected a file of `evaluate`")
    return scores


def _are_entries(rows: Any) -> bool:
    """Whether they are entries of `Result.per_row`, and at least one."""
    return (
        isinstance(rows, list)
        and bool(rows)
        and all(isinstance(row, dict) and {"id", "answer", "score"} <= row.keys() for row in rows)
    )


def number_text(value: Any) -> str:
    """A figure as tables show it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def find_results(path: Path) -> dict[str, dict[str, Any]]:
    """The scores of a results folder by the name of their task, or of one file. UserError: none."""
    if path.is_file():
        scores = read_scores(path)
        return {task_name(scores): scores}
    found = [read_scores(file) for file in sorted(path.glob(f"*/{SCORES}"))]
    if (path / SCORES).is_file():
        found.insert(0, read_scores(path / SCORES))
    if not found:
        raise UserError(
            f"{path}: no results there; expected a folder of `evaluate`, or a scores.json"
        )
    return {task_name(scores): scores for scores in found}


def task_name(scores: Mapping[str, Any]) -> str:
    split = scores.get("split", "")
    return f"{scores['benchmark']}_{split}" if split else str(scores["benchmark"])
