"""Answers the rows of a task with a model: continuous batching, images read ahead, results as they come."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.answers import AnswerFile
from minigpt4_jax.evaluation.benchmark import Row
from minigpt4_jax.evaluation.metrics import referring
from minigpt4_jax.evaluation.ranking import RANKED_BATCH, rank_rows
from minigpt4_jax.evaluation.task import Task
from minigpt4_jax.processing.chat_templates import ChatFormat, chat_format, with_images

if TYPE_CHECKING:
    from minigpt4_jax.inference.generation_config import GenerationOutput
    from minigpt4_jax.inference.model import Model


@dataclass(frozen=True)
class AnswerOptions:
    """How rows are answered.

    Attributes:
        batch_size: rows decoded together.
        resample: ask again for referring expressions without a box, as the original's `--resample`.
        template: chat template, by default the model's own.
        system: replaces the template's system message.
        extra_bos: as `GenerationConfig.extra_bos`.
        shard: (i, n): this process answers every n-th row, from i on.
    """

    batch_size: int = 32
    resample: bool = False
    template: str | None = None
    system: str | None = None
    extra_bos: bool = True
    shard: tuple[int, int] = (0, 1)

    def recorded(self, task: Task) -> dict[str, Any]:
        """What answers of a task depend on, besides the model."""
        return {
            "benchmark": task.benchmark.name,
            "split": task.split,
            "questions": task.fingerprint,
            "max_new_tokens": task.benchmark.max_new_tokens,
            "template": self.template,
            "system": self.system,
            "extra_bos": self.extra_bos,
        }


def answer_task(
    model: "Model", task: Task, file: AnswerFile, options: AnswerOptions, *, progress: bool = True
) -> None:
    """Answer the rows of a task that are not in its file yet. UserError: the file cannot be written."""
    with _progress_bar(task, file, options, progress) as bar:
        if task.benchmark.ranked:
            _rank(model, task, file, options, bar)
            return
        _ask(model, task, file, options, bar, 0, _remaining(task, file, options))
        if _resamples(task, options):
            for number in range(1, referring.ROUNDS + 1):
                again = [n for n in _own_rows(task, options) if _asks_again(file, n, number)]
                bar.total += len(again)
                _ask(model, task, file, options, bar, number, again)


def is_complete(task: Task, file: AnswerFile, options: AnswerOptions) -> bool:
    """Whether this process has answered all its rows, with `resample` in all rounds."""
    rows = _own_rows(task, options)
    return not _remaining(task, file, options) and not (
        _resamples(task, options) and any(_asks_again(file, n, len(file.rounds(n))) for n in rows)
    )


def _resamples(task: Task, options: AnswerOptions) -> bool:
    return options.resample and task.benchmark.kind == "box"


def _own_rows(task: Task, options: AnswerOptions) -> range | list[int]:
    i, n = options.shard
    if task.benchmark.ranked:  # whole batches
        return [r for r in range(task.num_rows) if r // RANKED_BATCH % n == i]
    return range(i, task.num_rows, n)


def _remaining(task: Task, file: AnswerFile, options: AnswerOptions) -> list[int]:
    return [n for n in _own_rows(task, options) if (n, 0) not in file.lines]


def _asks_again(file: AnswerFile, n: int, number: int) -> bool:
    """Whether a row gets the question of a round: no answer so far is acceptable."""
    lines = file.rounds(n)
    if len(lines) != number or any("error" in line for line in lines):
        return False
    return referring.needs_another_round([line["answer"] for line in lines])


def _progress_bar(
    task: Task, file: AnswerFile, options: AnswerOptions, progress: bool
) -> "tqdm[Any]":
    total = len(_own_rows(task, options))
    return tqdm(
        total=total, initial=total - len(_remaining(task, file, options)), unit="row",
        desc=task.name, disable=not progress, mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )  # fmt: skip


def _ask(
    model: "Model", task: Task, file: AnswerFile, options: AnswerOptions, bar: "tqdm[Any]",
    round: int, numbers: Sequence[int],
) -> None:  # fmt: skip
    """Ask the question of a round about these rows."""
    from minigpt4_jax.inference.generation_config import GenerationConfig

    if not numbers:
        return
    chat = chat_format(model.config, model.tokenizer, options.template)
    stop = chat.stop if options.template else ()  # the model's own template ends at its end symbol
    config = GenerationConfig(
        max_new_tokens=task.benchmark.max_new_tokens, stop=stop, extra_bos=options.extra_bos
    )
    numbers = _by_image(task, numbers)
    rows = [task.rows[n] for n in numbers]
    images = [task.image(row) for row in rows]
    prompts = [_prompt(row, round, chat, options) for row in rows]
    prepared = model.prepare_prompts(images, prompts, config)
    for i, (answer,) in model.answer_prompts(prepared, options.batch_size, on_error="return"):
        file.add(numbers[i], _values(answer), round)
        bar.update()


def _by_image(task: Task, numbers: Sequence[int]) -> list[int]:
    """The rows in an order in which those of an image follow each other: it is encoded once, and its part
    of the prompt is processed once."""
    first: dict[tuple[str, ...], int] = {}
    for n in numbers:
        first.setdefault(tuple(task.rows[n].images), n)
    return sorted(numbers, key=lambda n: (first[tuple(task.rows[n].images)], n))


def _prompt(row: Row, round: int, chat: ChatFormat, options: AnswerOptions) -> str:
    question = row.question
    if round:
        question = referring.question_of_round(row.truth.expression, round)
    turn = (with_images(question, 1 if row.images else 0), None)
    return chat.render([turn], system=options.system, extra_bos=options.extra_bos)


def _values(answer: "GenerationOutput") -> Mapping[str, Any]:
    if answer.error is not None:
        return {"error": answer.error}
    return {
        "answer": answer.text, "finish_reason": answer.finish_reason, "tokens": len(answer.ids),
    }  # fmt: skip


def _rank(
    model: "Model", task: Task, file: AnswerFile, options: AnswerOptions, bar: "tqdm[Any]"
) -> None:
    remaining = set(_remaining(task, file, options))
    for start in range(0, task.num_rows, RANKED_BATCH):
        batch = range(start, min(start + RANKED_BATCH, task.num_rows))
        if not remaining & set(batch):
            continue
        rows = [task.rows[n] for n in batch]
        ranked = rank_rows(model, rows, [task.image(row) for row in rows])
        for n, answer in zip(batch, ranked, strict=True):
            if n in remaining:
                failed = isinstance(answer, UserError)
                file.add(n, {"error": str(answer)} if failed else {"answer": answer})
                bar.update()
