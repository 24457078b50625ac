"""Descriptions of images in two turns, as MiniGPT-4's stage-1 model wrote the data of stage 2.

The model describes an image; if the description is short, it is asked to continue, and both parts are joined
(MiniGPT-4 paper, section 3.2). First and second turns share one running batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_TAG, ChatFormat, Turn, with_images
from minigpt4_jax.processing.images import ImageSource

if TYPE_CHECKING:  # imports JAX, which mistakes in the options need not wait for
    from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.inference.requests import Request

# The instruction is from the paper, the continuation and its limit from the authors' script.
PROMPT = "Describe this image in detail. Give as many details as possible. Say everything you see."
CONTINUE_PROMPT = "Continue"
CONTINUE_BELOW = 80  # tokens
_SECOND_TURN = 1 << 31  # added to the seed, so that both turns draw other numbers
_MARGIN = 16  # tokens by which a prompt may exceed the sum of its parts


@dataclass(frozen=True)
class Instructions:
    """What the model is asked. continue_below: tokens of the first answer; 0: one turn only."""

    prompt: str = PROMPT
    continue_prompt: str = CONTINUE_PROMPT
    continue_below: int = CONTINUE_BELOW
    system: str | None = None


class RawPrompts:
    """A ChatFormat of complete prompts, which are used as they are; for one turn."""

    system = ""
    stop: tuple[str, ...] = ()

    def render(
        self, turns: Sequence[Turn], *, system: str | None = None, extra_bos: bool = True
    ) -> str:
        ((question, _),) = turns
        return question


class DescribeTask(NamedTuple):
    """A description to write. number: of the row, which is added to the seed."""

    number: int
    image: ImageSource


@dataclass(frozen=True)
class Description:
    """The answers of one or two turns, or the error why there are none."""

    outputs: "tuple[GenerationOutput, ...]" = ()
    error: str | None = None

    @property
    def text(self) -> str:
        """Both answers, joined by a space."""
        return " ".join(output.text for output in self.outputs if output.text)


class _Row(NamedTuple):
    """A request in the running batch."""

    task: DescribeTask
    request: "Request"
    first: "GenerationOutput | None" = None  # the answer of the first turn, in a second one


class Describer:
    """Describes images with a model."""

    def __init__(
        self,
        model: "Model",
        template: ChatFormat,
        instructions: Instructions,
        config: "GenerationConfig",
    ):
        """config: of each turn; beam search is not supported. UserError: a prompt that does not fit."""
        self._model, self._template = model, template
        self._instructions, self._config = instructions, config
        self._first = self._prompt_request([(self._question, None)])
        self._sized_for = [self._first, replace(self._first, tokens=self._longest_tokens())]

    @property
    def _question(self) -> str:
        return with_images(self._instructions.prompt, 1)

    def _longest_tokens(self) -> list[int]:
        """The tokens of a second turn after a first answer of nearly `continue_below` tokens."""
        if not self._instructions.continue_below:
            return list(self._first.tokens)
        empty = self._prompt_request(self._second_turn(""))
        longest = len(empty.tokens) + self._instructions.continue_below + _MARGIN
        return [*empty.tokens, *[0] * (longest - len(empty.tokens))]

    def _second_turn(self, answer: str) -> list[Turn]:
        # an image tag in an answer is not an image
        answer = answer.replace(IMAGE_TAG, "")
        return [(self._question, answer), (self._instructions.continue_prompt, None)]

    def _prompt_request(self, turns: Sequence[Turn]) -> "Request":
        """A request of one image, still without visual tokens."""
        prompt = self._template.render(
            turns, system=self._instructions.system, extra_bos=self._config.extra_bos
        )
        # the image is only counted
        try:
            (request,) = self._model.prepare_requests([["image"]], [prompt], self._config, [None])
        except UserError as e:
            raise UserError(str(e).removeprefix("prompt 0: ")) from None
        return request

    # --- the running batch ------------------------------------------------------------------------

    def run(
        self, tasks: Sequence[DescribeTask], batch_size: int
    ) -> Iterator[tuple[DescribeTask, Description]]:
        """Yield each task with its description as it is finished.

        Tasks of the same image should be next to each other: it is then encoded once.
        """
        waiting: deque[_Row] = deque()  # second turns
        finished: deque[tuple[DescribeTask, Description]] = deque()  # images that cannot be read
        first_turns = self._first_turns(tasks, finished)
        longest = len(self._sized_for[1].tokens)

        def rows() -> Iterator[_Row]:
            while True:
                if waiting and len(waiting[0].request.tokens) <= longest:
                    yield waiting.popleft()
                elif (row := next(first_turns, None)) is not None:
                    yield row
                else:
                    return

        yield from self._answer(rows(), waiting, finished, self._sized_for, batch_size)
        while waiting:  # second turns of the last images
            rest = list(waiting)
            waiting.clear()
            sized_for = [*self._sized_for, *(row.request for row in rest)]
            yield from self._answer(iter(rest), waiting, finished, sized_for, batch_size)
        yield from finished

    def _answer(
        self,
        rows: Iterator[_Row],
        waiting: deque[_Row],
        finished: deque[tuple[DescribeTask, Description]],
        sized_for: "list[Request]",
        batch_size: int,
    ) -> Iterator[tuple[DescribeTask, Description]]:
        taken: dict[int, _Row] = {}

        def requests() -> "Iterator[Request]":
            for number, row in enumerate(rows):
                taken[number] = row
                yield row.request

        for index, output in self._model.run_requests(requests(), batch_size, sized_for=sized_for):
            row = taken.pop(index)
            second = self._continuation(row, output)
            if isinstance(second, _Row):
                waiting.append(second)
            else:
                yield row.task, second
            while finished:
                yield finished.popleft()

    def _continuation(self, row: _Row, output: "GenerationOutput") -> _Row | Description:
        """The second turn after a short answer, or the whole description."""
        if output.error is not None:
            return Description(error=output.error)
        if row.first is not None:
            return Description((row.first, output))
        tokens = len(self._model.tokenizer.encode(output.text))
        if tokens >= self._instructions.continue_below:
            return Description((output,))
        try:
            request = self._prompt_request(self._second_turn(output.text))
        except UserError as e:
            return Description(error=str(e))
        seed = row.request.seed + _SECOND_TURN
        return _Row(row.task, replace(request, visual=row.request.visual, seed=seed), output)

    # --- images ---------------------------------------------------------------------------------

    def _first_turns(
        self, tasks: Sequence[DescribeTask], failed: deque[tuple[DescribeTask, Description]]
    ) -> Iterator[_Row]:
        """The first turn of each task whose image can be read; the others go to `failed`."""
        from minigpt4_jax.inference.encode_ahead import ImageFailure

        encoded = self._model.encode_ahead([[task.image] for task in tasks])
        for task, visual in zip(tasks, encoded, strict=True):
            if isinstance(visual, ImageFailure):
                failed.append((task, Description(error=visual.message())))
            else:
                seed = self._first.seed + task.number
                yield _Row(task, replace(self._first, visual=visual, seed=seed))
