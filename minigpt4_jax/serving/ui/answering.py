"""Answers a question of the page with the server's scheduler, piece by piece."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from minigpt4_jax.inference.detokenize import TextStream
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.serving.errors import RequestError, invalid
from minigpt4_jax.serving.images import RequestImage
from minigpt4_jax.serving.jobs import Generation
from minigpt4_jax.serving.service import SAMPLING, Sender, Service
from minigpt4_jax.serving.ui.conversation import PageConversation

INTERVAL = 0.1  # seconds between two updates of a page


@dataclass(frozen=True)
class Settings:
    """What the page's settings say about an answer. seed: None is another one for each answer."""

    temperature: float
    top_p: float
    num_beams: int
    max_new_tokens: int
    seed: int | None

    def options(self) -> dict[str, Any]:
        """Options of `Service.generation_config`."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        if self.num_beams > 1:  # beam search does not sample
            values = {name: value for name, value in values.items() if name not in SAMPLING}
        return values


class AnswerStopped(RequestError):
    """The user has stopped the answer."""

    def __init__(self) -> None:
        super().__init__(499, "stopped", "stopped")


@dataclass(frozen=True)
class Update:
    """An answer so far. note: tokens, speed and seed, once it is finished."""

    text: str
    note: str = ""


async def answer(
    service: Service, conversation: PageConversation, settings: Settings
) -> AsyncIterator[Update]:
    """Answer the last turn of a conversation. RequestError: it cannot be answered."""
    if settings.num_beams > service.limits.choices:
        raise invalid(f"Beams: {settings.num_beams}; at most {service.limits.choices}.")
    config = service.generation_config(settings.options())
    images = [image.read for image in conversation.images]
    request = await service.chat_request(
        conversation.prompt_turns(), len(images), config, conversation.system
    )
    sender = Sender(conversation.client, service.limits.seconds)
    if config.num_beams > 1:
        yield await _search(service, conversation, request, images, sender)
        return
    (job,) = service.start([request], images, sender, streamed=True)

    def stop() -> None:
        job.cancel()
        job.fail(AnswerStopped())

    conversation.stop = stop
    try:
        async for update in _stream(service, job, config):
            yield update
    finally:
        conversation.stop = None
        job.cancel()


async def _stream(
    service: Service, job: Generation, config: GenerationConfig
) -> AsyncIterator[Update]:
    stream = TextStream(service.model.tokenizer, service.model.config, job.request)
    shown = 0.0
    try:
        async for completion, finished in job.updates():
            piece = stream.push(completion, finished)
            if finished:
                output = service.output(job.request, completion)
                yield Update(output.text, _note(job, config, output.finish_reason))
            elif piece and time.monotonic() - shown > INTERVAL:
                shown = time.monotonic()
                yield Update(stream.text)
    except AnswerStopped:
        yield Update(stream.text.strip(), _note(job, config, "stopped"))


async def _search(
    service: Service,
    conversation: PageConversation,
    request: Request,
    images: list[RequestImage],
    sender: Sender,
) -> Update:
    begin = time.monotonic()
    search = asyncio.ensure_future(service.search(request, images, sender))
    conversation.stop = search.cancel
    try:
        outputs = await search
    except asyncio.CancelledError:
        if search.cancelled() and conversation.stop is not None and not _is_cancelled():
            return Update("", "stopped")
        raise
    finally:
        search.cancel()
        conversation.stop = None
    seconds = time.monotonic() - begin
    ids = len(outputs[0].ids)
    return Update(outputs[0].text, f"{ids} tokens in {seconds:.1f} s · beam search")


def _is_cancelled() -> bool:
    """Whether the page itself is gone, not only the search stopped."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _note(job: Generation, config: GenerationConfig, reason: str) -> str:
    """Tokens, speed, time to the first token and seed of an answer."""
    parts = [f"{job.num_tokens} tokens"]
    end = job.finished or time.monotonic()
    if job.first_token is not None:
        if job.num_tokens > 1 and end > job.first_token:
            parts.append(f"{(job.num_tokens - 1) / (end - job.first_token):.1f} tokens/s")
        parts.append(f"first token after {job.first_token - job.submitted:.2f} s")
    if config.temperature > 0:
        parts.append(f"seed {config.seed}")
    ended = {"stopped": "stopped", "length": "cut at the length in the settings"}.get(reason)
    return " · ".join([*parts, *([ended] if ended else [])])
