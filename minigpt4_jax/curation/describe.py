"""Descriptions of images in two turns, as MiniGPT-4's stage-1 model wrote the data of stage 2.

The model describes an image; if the description is short, it is asked to continue, and both parts are joined
(MiniGPT-4 paper, section 3.2). Images are read ahead in threads and encoded in groups; first and second turns
share one running batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_TAG, ChatFormat, Turn, with_images
from minigpt4_jax.processing.images import ImageSource, load_pixels

if TYPE_CHECKING:  # imports JAX, which mistakes in the options need not wait for
    from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.inference.requests import Request

# The instruction is from the paper, the continuation and its limit from the authors' script.
PROMPT = "Describe this image in detail. Give as many details as possible. Say everything you see."
CONTINUE_PROMPT = "Continue"
CONTINUE_BELOW = 80  # tokens
IMAGE_GROUP = 8  # images encoded together
READER_THREADS = 8
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


class Task(NamedTuple):
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

    task: Task
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
        (request,) = self._model.prepare_requests([["image"]], [prompt], self._config, [None])
        return request

    # --- the running batch ------------------------------------------------------------------------

    def run(self, tasks: Sequence[Task], batch_size: int) -> Iterator[tuple[Task, Description]]:
        """Yield each task with its description as it is finished.

        Tasks of the same image should be next to each other: it is then encoded once.
        """
        waiting: deque[_Row] = deque()  # second turns
        finished: deque[tuple[Task, Description]] = deque()  # images that cannot be read
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
        finished: deque[tuple[Task, Description]],
        sized_for: "list[Request]",
        batch_size: int,
    ) -> Iterator[tuple[Task, Description]]:
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
            return Description(error=str(e).removeprefix("prompt 0: "))
        seed = row.request.seed + _SECOND_TURN
        return _Row(row.task, replace(request, visual=row.request.visual, seed=seed), output)

    # --- images ---------------------------------------------------------------------------------

    def _first_turns(
        self, tasks: Sequence[Task], failed: deque[tuple[Task, Description]]
    ) -> Iterator[_Row]:
        """The first turn of each task whose image can be read; the others go to `failed`."""
        groups = _group_by_image(tasks)
        with ThreadPoolExecutor(READER_THREADS) as pool:
            try:
                reading: deque[tuple[list[Task], Future[np.ndarray]]] = deque()
                while True:
                    for group in islice(groups, 2 * IMAGE_GROUP - len(reading)):
                        reading.append((group, pool.submit(self._load, group[0].image)))
                    if not reading:
                        return
                    some = [reading.popleft() for _ in range(min(IMAGE_GROUP, len(reading)))]
                    yield from self._encode(some, failed)
            finally:
                pool.shutdown(cancel_futures=True)

    def _load(self, image: ImageSource) -> np.ndarray:
        size = self._model.config.vision.image_size
        return load_pixels(image, size, exif=self._model.exif)

    def _encode(
        self,
        groups: Sequence[tuple[list[Task], Future[np.ndarray]]],
        failed: deque[tuple[Task, Description]],
    ) -> Iterator[_Row]:
        readable: list[list[Task]] = []
        pixels: list[np.ndarray] = []
        for group, future in groups:
            try:
                pixels.append(future.result())
                readable.append(group)
            except UserError as e:
                failed.extend((task, Description(error=str(e))) for task in group)
        visual = self._model.encode_pixels(pixels)
        for group, tokens in zip(readable, visual, strict=True):
            for task in group:
                seed = self._first.seed + task.number
                yield _Row(task, replace(self._first, visual=tokens, seed=seed))


def _group_by_image(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    group: list[Task] = []
    for task in tasks:
        if group and task.image != group[0].image:
            yield group
            group = []
        group.append(task)
    if group:
        yield group
