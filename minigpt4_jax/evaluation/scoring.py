"""Scores of given answers, without a model: `evaluate score`."""

from pathlib import Path
from typing import Any

from minigpt4_jax.evaluation.benchmark import Benchmark
from minigpt4_jax.evaluation.layout import rows_of
from minigpt4_jax.evaluation.predictions import match, read_predictions
from minigpt4_jax.evaluation.results import describe


def score_file(
    benchmark: Benchmark, data: Path, predictions: Path, split: str = ""
) -> dict[str, Any]:
    """The scores of a file of predictions, as `results.describe` has them. UserError: files that are
    missing or do not fit together."""
    rows = rows_of(benchmark, data, split)
    answers = match(rows, read_predictions(predictions), f"predictions {predictions}")
    split = split or next(iter(benchmark.splits), "")
    return describe(benchmark, split, rows, benchmark.judge(rows, answers))
