"""Benchmarks during training (`config.eval`): scores to the log, the best model kept."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.answering import AnswerOptions
from minigpt4_jax.evaluation.results import write_scores
from minigpt4_jax.evaluation.run_task import run_task
from minigpt4_jax.evaluation.task import Task, open_tasks
from minigpt4_jax.training.config import EvalConfig, TrainConfig
from minigpt4_jax.training.logs import EVAL_PREFIX

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model

RESULTS = "eval"  # directory of the results, STEP/TASK/scores.json, below the workdir


def read_tasks(c: TrainConfig) -> list[Task]:
    """The benchmarks of a run; none if its configuration names none.

    UserError: an unknown one, files that are missing, a `best` that is none of them."""
    if not c.eval.benchmarks:
        return []
    try:
        tasks = open_tasks(c.eval.benchmarks, Path(c.eval.root), c.eval.splits, c.eval.limit)
    except UserError as e:
        raise UserError(f"config.eval: {str(e).replace('--data.root', 'root')}") from None
    names = [task.name for task in tasks]
    if c.eval.best and c.eval.best not in names:
        raise UserError(f"config.eval.best is {c.eval.best!r}: expected one of {', '.join(names)}")
    return tasks


class Benchmarks:
    """Runs the benchmarks of a run with a model."""

    def __init__(self, c: EvalConfig, tasks: list[Task]):
        self._options = AnswerOptions(batch_size=c.batch_size)
        self._tasks, self._best = tasks, c.best

    def scores(
        self, model: "Model", should_stop: Callable[[], bool]
    ) -> dict[str, dict[str, Any]] | None:
        """Name of a task -> its scores, as in scores.json. None if `should_stop`, which is called after
        each task, returns True."""
        found = {}
        for task in self._tasks:
            if should_stop():
                return None
            found[task.name] = self._run(model, task)
        return found

    def _run(self, model: "Model", task: Task) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="minigpt4_jax-") as folder:
            return run_task(model, task, Path(folder), self._options)

    def is_best(self, scores: dict[str, dict[str, Any]], earlier: Iterable[dict[str, Any]]) -> bool:
        """Whether these scores are better on the chosen benchmark than all earlier records of
        metrics.jsonl. False if none is chosen."""
        if not self._best:
            return False
        key = EVAL_PREFIX + self._best
        sign = 1 if scores[self._best]["higher_is_better"] else -1
        before = [sign * record[key] for record in earlier if key in record]
        return sign * float(scores[self._best]["score"]) > max(before, default=-float("inf"))


def write_results(directory: Path, step: int, scores: dict[str, dict[str, Any]]) -> None:
    """Write DIRECTORY/eval/STEP/TASK/scores.json. UserError: they cannot be written."""
    for name, of_task in scores.items():
        write_scores(directory / RESULTS / f"{step:06d}" / name, of_task)
