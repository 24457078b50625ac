"""/v1/chat/completions and /v1/completions: a request's answers, whole or as a stream of events."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from minigpt4_jax.inference.detokenize import TextStream
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.serving import responses
from minigpt4_jax.serving.errors import RequestError
from minigpt4_jax.serving.images import RequestImage
from minigpt4_jax.serving.jobs import Generation
from minigpt4_jax.serving.responses import DONE, Envelope, LogProbs, event
from minigpt4_jax.serving.service import Sender, Service, TopTokens


class Shape(Protocol):
    """How answers look in one of the two APIs."""

    kind: str  # the name of a whole response
    chunk_kind: str  # and of an event
    prefix: str  # of ids

    def whole(
        self, index: int, output: GenerationOutput, top: TopTokens | None = None
    ) -> dict[str, Any]:
        """A finished choice. top: the most likely tokens at each place."""
        ...

    def first(self, index: int) -> dict[str, Any] | None:
        """The first event of a choice."""
        ...

    def piece(self, index: int, text: str, completion: Completion, sent: int) -> dict[str, Any]:
        """An event with a piece of text. sent: characters of the answer's text, with this piece."""
        ...

    def last(self, index: int, output: GenerationOutput, sent: str) -> dict[str, Any]:
        """The event that says why a choice ended. sent: the text of its events."""
        ...


class ChatShape:
    """/v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self, service: Service, *, logprobs: bool, num_top: int, box_size: tuple[int, int] | None
    ):
        """num_top: most likely tokens at each place; box_size: of the image whose boxes are wanted."""
        self._tokenizer, self._logprobs = service.model.tokenizer, logprobs
        self._num_top, self._box_size = num_top, box_size
        self._of_choice: dict[int, LogProbs] = {}

    def _boxes(self, text: str) -> dict[str, Any]:
        return {} if self._box_size is None else {"boxes": responses.boxes(text, self._box_size)}

    def _log_probs(self, index: int, completion: Completion, sent: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return self._of_choice.setdefault(index, LogProbs(self._tokenizer)).chat(completion, sent)

    def whole(
        self, index: int, output: GenerationOutput, top: TopTokens | None = None
    ) -> dict[str, Any]:
        self._of_choice[index] = LogProbs(self._tokenizer, self._num_top, top)
        message = {"role": "assistant", "content": output.text, "refusal": None}
        logprobs = self._log_probs(index, _completion(output), len(output.text))
        return {
            "index": index, "message": message | self._boxes(output.text), "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }  # fmt: skip

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def first(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, completion: Completion, sent: int) -> dict[str, Any]:
        logprobs = self._log_probs(index, completion, sent)
        return self._chunk(index, {"content": text}) | {"logprobs": logprobs}

    def last(self, index: int, output: GenerationOutput, sent: str) -> dict[str, Any]:
        choice = self._chunk(index, self._boxes(output.text), output.finish_reason)
        return choice | _corrected(output, sent)


class TextShape:
    """/v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service: Service, *, logprobs: bool, num_top: int):
        self._tokenizer, self._logprobs = service.model.tokenizer, logprobs
        self._num_top = num_top
        self._of_choice: dict[int, LogProbs] = {}

    def _choice(
        self, index: int, text: str, reason: str | None, completion: Completion | None, sent: int
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and completion is not None:
            of_choice = self._of_choice.setdefault(index, LogProbs(self._tokenizer))
            logprobs = of_choice.legacy(completion, sent)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(
        self, index: int, output: GenerationOutput, top: TopTokens | None = None
    ) -> dict[str, Any]:
        self._of_choice[index] = LogProbs(self._tokenizer, self._num_top, top)
        text = output.text
        return self._choice(index, text, output.finish_reason, _completion(output), len(text))

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, text: str, completion: Completion, sent: int) -> dict[str, Any]:
        return self._choice(index, text, None, completion, sent)

    def last(self, index: int, output: GenerationOutput, sent: str) -> dict[str, Any]:
        choice = self._choice(index, "", output.finish_reason, None, 0)
        return choice | _corrected(output, sent)


def _corrected(output: GenerationOutput, sent: str) -> dict[str, Any]:
    """The answer's text, where it is not what was sent; see TextStream."""
    return {} if sent == output.text else {"generated_text": output.text}


def _completion(output: GenerationOutput) -> Completion:
    hit_stop = output.finish_reason == "stop"
    return Completion(output.ids, output.logprobs, hit_stop, output.score)


@dataclass(frozen=True)
class Question:
    """What is to be answered.

    Attributes:
        requests: one for each prompt, all about the same images.
        config: the options they were made with.
        num_choices: answers to each of them.
        num_top: most likely tokens to return for each place of an answer.
    """

    requests: Sequence[Request]
    images: Sequence[RequestImage]
    config: GenerationConfig
    num_choices: int
    num_top: int
    sender: Sender

    def choices(self) -> list[Request]:
        """A request for each answer. Answers to one prompt have successive seeds."""
        return [
            replace(request, seed=request.seed + n)
            for request in self.requests
            for n in range(self.num_choices)
        ]


async def answer(service: Service, question: Question, shape: Shape) -> dict[str, Any]:
    """The whole response. RequestError: one of the answers failed."""
    envelope = Envelope(shape.kind, shape.prefix, service.name)
    if question.config.num_beams > 1:
        return await _search(service, question, shape, envelope)
    jobs = service.start(question.choices(), question.images, question.sender)
    tops: list[TopTokens | None] = [None] * len(jobs)
    try:
        completions = await asyncio.gather(*(job.result() for job in jobs))
        if question.num_top:
            tops = [
                await service.top_logprobs(job, completion.ids, question.sender)
                for job, completion in zip(jobs, completions, strict=True)
            ]
    finally:
        for job in jobs:
            job.cancel()
    outputs = [
        service.output(job.request, completion)
        for job, completion in zip(jobs, completions, strict=True)
    ]
    choices = [
        shape.whole(index, output, top)
        for index, (output, top) in enumerate(zip(outputs, tops, strict=True))
    ]
    return envelope(choices, usage=responses.usage_of(jobs, completions))


async def _search(
    service: Service, question: Question, shape: Shape, envelope: Envelope
) -> dict[str, Any]:
    outputs: list[GenerationOutput] = []
    for request in question.requests:
        outputs += await service.search(request, question.images, question.sender)
    choices = [shape.whole(index, output) for index, output in enumerate(outputs)]
    prompt_tokens = sum(len(request.tokens) for request in question.requests)
    completion_tokens = sum(len(output.ids) for output in outputs)
    return envelope(choices, usage=responses.usage(prompt_tokens, completion_tokens))


class _Update(NamedTuple):
    choice: int
    completion: Completion | None
    finished: bool
    error: Exception | None = None


async def stream(
    service: Service, question: Question, shape: Shape, jobs: Sequence[Generation], *, usage: bool
) -> AsyncIterator[str]:
    """The events of a stream. jobs: of the question's choices, started. usage: a last event has it."""
    envelope = Envelope(shape.chunk_kind, shape.prefix, service.name)
    texts = [TextStream(service.model.tokenizer, service.model.config, job.request) for job in jobs]
    for index in range(len(jobs)):
        if (choice := shape.first(index)) is not None:
            yield event(envelope([choice]))
    finished: list[Completion] = []
    try:
        async for index, completion, is_finished, error in _merged(jobs):
            if error is not None:
                raise error
            assert completion is not None
            text = texts[index]
            if piece := text.push(completion, is_finished):
                choice = shape.piece(index, piece, completion, len(text.text))
                yield event(envelope([choice]))
            if is_finished:
                output = service.output(jobs[index].request, completion)
                yield event(envelope([shape.last(index, output, text.text)]))
                finished.append(completion)
        if usage:
            yield event(envelope([], usage=responses.usage_of(jobs, finished)))
    except RequestError as error:  # the status has been sent already
        yield event(error.body())
    finally:
        for job in jobs:
            job.cancel()
    yield DONE


async def _merged(jobs: Sequence[Generation]) -> AsyncIterator[_Update]:
    """The updates of all jobs as they come."""
    # Bounded: with a slow reader, a job's newest state waits in the job.
    queue: asyncio.Queue[_Update] = asyncio.Queue(1)

    async def follow(index: int, job: Generation) -> None:
        try:
            async for completion, finished in job.updates():
                await queue.put(_Update(index, completion, finished))
        except RequestError as error:
            await queue.put(_Update(index, None, True, error))

    tasks = [asyncio.create_task(follow(index, job)) for index, job in enumerate(jobs)]
    try:
        remaining = len(tasks)
        while remaining:
            update = await queue.get()
            remaining -= update.finished
            yield update
    finally:
        for task in tasks:
            task.cancel()
