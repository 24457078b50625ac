"""The answers to rows of `batch`: one model, with the options of the command line."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minigpt4_jax.cli import common
from minigpt4_jax.cli.batch_output import BatchRow
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates

if TYPE_CHECKING:
    from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput


def generation_config(args: argparse.Namespace) -> "GenerationConfig":
    """The options of the command line. UserError: out of range."""
    from minigpt4_jax.inference.generation_config import GenerationConfig

    return GenerationConfig(**common.given_options(args), extra_bos=args.extra_bos)


class Answerer:
    """Loads the model of a command line and answers rows with it."""

    def __init__(self, args: argparse.Namespace):
        """UserError: no such model, or wrong options."""
        config = generation_config(args)
        self._args = args
        self._model = common.load_model(args)
        self._template = chat_templates.chat_format(
            self._model.config, self._model.tokenizer, args.template
        )
        # The model's own template ends an answer with its end symbol.
        stop = self._template.stop if args.template else ()
        self._config = replace(config, stop=(*stop, *config.stop))

    def answer(self, rows: Sequence[BatchRow]) -> Iterator[tuple[BatchRow, dict[str, Any]]]:
        """Each row with what is written of its answer, as answers become complete; those with an error
        first. Row n is sampled with seed + n."""
        for row in rows:
            self._prepare(row)
        yield from ((row, {"error": row.error}) for row in rows if row.prompt is None)
        rows = [row for row in rows if row.prompt is not None]
        prompts = [row.prompt for row in rows if row.prompt is not None]
        batch_size = self._args.batch_size
        # A search sorts its prompts by length: in groups, so that answers are written soon.
        searched = any(prompt.request.beam_search.num_beams > 1 for prompt in prompts)
        group = batch_size if searched else max(1, len(prompts))
        for start in range(0, len(prompts), group):
            some = prompts[start : start + group]
            for i, answers in self._model.answer_prompts(some, batch_size, on_error="return"):
                yield rows[start + i], _result(answers)

    def _prepare(self, row: BatchRow) -> None:
        """Set the row's prompt, or its error."""
        if row.error is not None:
            return
        try:
            prompt = row.fields.get("prompt", row.fields.get("question"))
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"the prompt is {prompt!r}; expected text")
            if not self._args.raw:
                question = chat_templates.with_images(prompt, len(row.images))
                prompt = self._template.render(
                    [(question, None)], system=self._args.system, extra_bos=self._args.extra_bos
                )
            seed = self._config.seed_of_prompts(1)[0] + row.number
            config = replace(self._config, seed=seed)
            (prepared,) = self._model.prepare_prompts([list(row.images)], [prompt], config)
            if isinstance(prepared, UserError):
                raise prepared
            row.prompt = prepared
        except UserError as e:
            row.error = str(e)


def _result(outputs: Sequence["GenerationOutput"]) -> dict[str, Any]:
    """What is written of the answers to a row: lists where several were asked for."""
    if outputs[0].error is not None:
        return {"error": outputs[0].error}
    columns: dict[str, list[Any]] = {
        "response": [output.text for output in outputs],
        "finish_reason": [output.finish_reason for output in outputs],
        "tokens": [len(output.ids) for output in outputs],
    }
    return {name: v[0] if len(outputs) == 1 else v for name, v in columns.items()}
