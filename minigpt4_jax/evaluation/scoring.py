"""Scores of given answers, without a model: `evaluate score`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Benchmark, Result
from minigpt4_jax.evaluation.predictions import match, read_predictions


def score_file(benchmark: Benchmark, data: Path, predictions: Path, split: str = "") -> Result:
    """Score a file of predictions. UserError: files that are missing or do not fit together."""
    rows = benchmark.read(data, split)
    if not rows:
        raise UserError(f"--data={data}: {benchmark.name} has no rows there")
    answers = match(rows, read_predictions(predictions), f"predictions {predictions}")
    return benchmark.judge(rows, answers)


def as_json(benchmark: Benchmark, result: Result) -> Mapping[str, Any]:
    """The contents of the file that `evaluate score` writes."""
    return {
        "benchmark": benchmark.name,
        "metric": benchmark.metric,
        "score": result.score,
        "original": result.original,
        "official": result.official,
        **result.extra,
        "per_row": result.per_row,
    }
