"""One task in one call: its rows answered by a model, and scored."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.evaluation.answering import AnswerOptions, answer_task
from minigpt4_jax.evaluation.answers import AnswerFile
from minigpt4_jax.evaluation.results import lines_of, score_task
from minigpt4_jax.evaluation.task import Task

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model

ANSWERS = "answers.jsonl"


def run_task(
    model: "Model", task: Task, folder: Path, options: AnswerOptions, *, name: str = "",
    progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The scores of a model on a task, as scores.json has them. Answers are written to
    folder/answers.jsonl; those of the same model that are there already are not asked again.

    name: of the model. UserError: the file cannot be written, or is of something else."""
    settings = {"model": name, **options.recorded(task)}
    file = AnswerFile(folder / ANSWERS, task.rows, settings, retry_errors=False)
    with file:
        answer_task(model, task, file, options, progress=progress)
    lines = lines_of([file], task)
    assert lines is not None, "every row is answered or has an error"
    return score_task(task, lines, name, resample=options.resample)
