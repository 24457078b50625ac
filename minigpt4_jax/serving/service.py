"""What the HTTP interface and the web page have in common: dialogues and options -> running answers."""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.model import Model
from minigpt4_jax.inference.requests import NUM_STOPS, STOP_WIDTH, Completion, Request
from minigpt4_jax.processing.chat_templates import ChatFormat, Turn, chat_format
from minigpt4_jax.serving.errors import RequestError, invalid
from minigpt4_jax.serving.images import ImageReader, RequestImage
from minigpt4_jax.serving.jobs import DeviceCall, Generation
from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.serving.scheduler import Scheduler

T = TypeVar("T")
TopTokens: TypeAlias = tuple[np.ndarray, np.ndarray]
# excluded by beam search
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
)  # fmt: skip
MAX_CHARACTERS_PER_TOKEN = 100  # a longer prompt is refused before it is tokenized


@dataclass(frozen=True)
class Sender:
    """Who asks, for the fair order, and how long the answer may take."""

    client: str = ""
    timeout: float = 300.0


class Service:
    """A model that answers the requests of many clients.

    Attributes:
        model, scheduler: the model, and what runs it.
        name: the model's name in the API.
        template: the chat format of dialogues.
        system: the default system message; None is the template's.
        defaults: the options of requests that do not set them.
        limits: of one request.
        images: reads the images of requests.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        name: str,
        *,
        template: str | None = None,
        system: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ):
        """UserError: an unknown template, or defaults out of range."""
        self.model, self.scheduler, self.name = model, scheduler, name
        self.template: ChatFormat = chat_format(model.config, model.tokenizer, template)
        # The model's own template ends an answer with its end symbol.
        self._stop = self.template.stop if template else ()
        self.system, self.defaults = system, dict(defaults or {})
        self.limits = limits or Limits()
        self.images = ImageReader(model.config.vision.image_size, self.limits, exif=model.exif)
        GenerationConfig(**self.defaults)

    # --- options ----------------------------------------------------------------------------------

    def generation_config(self, options: Mapping[str, Any]) -> GenerationConfig:
        """The server's defaults with the options of a request. RequestError: out of range."""
        defaults = self.defaults
        if options.get("num_beams", 1) != 1:  # beam search does not sample
            defaults = {name: v for name, v in defaults.items() if name not in SAMPLING}
        merged = {"seed": secrets.randbelow(1 << 31)} | defaults | dict(options)
        if "max_new_tokens" not in options:
            limit = self.scheduler.config.max_new_tokens
            merged["max_new_tokens"] = min(limit, merged.get("max_new_tokens", limit))
        return _checked(lambda: GenerationConfig(**merged))

    # --- requests ---------------------------------------------------------------------------------

    async def read_image(self, data: bytes, param: str | None = None) -> RequestImage:
        """An image file, read in a thread. RequestError: not readable, or too large."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.images.threads, self.images.read, data, param)

    async def chat_request(
        self,
        turns: Sequence[Turn],
        num_images: int,
        config: GenerationConfig,
        system: str | None = None,
    ) -> Request:
        """The request of a dialogue, without visual tokens.

        turns: questions with an `<ImageHere>` for each image; the last answer is None. system: None is
        the server's default. RequestError: the dialogue is too long, or the template refuses it.
        """
        system = self.system if system is None else system
        config = replace(config, stop=(*self._stop, *config.stop))

        def prompt() -> str:
            return self.template.render(turns, system=system, extra_bos=config.extra_bos)

        return await self.request(prompt, num_images, config)

    async def request(
        self, prompt: str | Callable[[], str], num_images: int, config: GenerationConfig
    ) -> Request:
        """The request of a complete prompt with an `<ImageHere>` for each image, as `Model.generate`."""

        def prepare() -> Request:
            text = prompt() if callable(prompt) else prompt
            self._check_characters(text)
            images: list[Any] = [None] * num_images
            (request,) = self.model.prepare_requests([images], [text], config, [None])
            return _fit_stop_sequences(request)

        request = await asyncio.to_thread(_checked, prepare)
        self.scheduler.check_length(len(request.tokens), request.max_new_tokens)
        return request

    def _check_characters(self, text: str) -> None:
        limit = self.scheduler.config.context
        if len(text) > MAX_CHARACTERS_PER_TOKEN * limit:
            raise invalid(
                f"a prompt of {len(text)} characters exceeds the context of {limit} tokens",
                "messages", "context_length_exceeded",
            )  # fmt: skip

    def start(
        self,
        requests: Sequence[Request],
        images: Sequence[RequestImage],
        sender: Sender,
        *,
        streamed: bool = False,
    ) -> list[Generation]:
        """Queue requests that share their images. RequestError: the queue is full."""
        jobs = [
            Generation(
                request, [image.input for image in images],
                client=sender.client, timeout=sender.timeout, streamed=streamed,
            )
            for request in requests
        ]  # fmt: skip
        self.scheduler.submit(*jobs)
        return jobs

    async def search(
        self, request: Request, images: Sequence[RequestImage], sender: Sender
    ) -> list[GenerationOutput]:
        """The answers of a beam search, best first. Other answers wait while it runs."""

        def search(visual: list[np.ndarray]) -> list[GenerationOutput]:
            slots = sum(token == IMAGE for token in request.tokens)
            joined = np.concatenate(visual) if visual else None
            used = None if joined is None else joined[len(joined) - slots :]
            (outputs,) = self.model.answer_requests([replace(request, visual=used)])
            return outputs

        outputs: list[GenerationOutput] = await self.call(search, images, sender)
        for output in outputs:
            _raise_generation_error(output)
        return outputs

    async def call(
        self,
        function: Callable[[list[np.ndarray]], Any],
        images: Sequence[RequestImage],
        sender: Sender,
    ) -> Any:
        """The result of a function of the images' visual tokens, called by the scheduler's thread."""
        call = DeviceCall(
            function, [image.input for image in images],
            client=sender.client, timeout=sender.timeout,
        )  # fmt: skip
        self.scheduler.submit(call)
        return await call.result()

    async def top_logprobs(self, job: Generation, ids: Sequence[int], sender: Sender) -> TopTokens:
        """The most likely tokens at each place of a finished answer: (ids, log-probabilities) [N, 20]."""
        if not ids:
            return np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
        top: TopTokens = await self.call(
            lambda _: self.model.top_logprobs(job.request, ids), (), sender
        )
        return top

    def output(self, request: Request, completion: Completion) -> GenerationOutput:
        """The finished answer. RequestError: the model's numbers were not finite."""
        output = self.model.output(request, completion)
        _raise_generation_error(output)
        return output


def _fit_stop_sequences(request: Request) -> Request:
    """Stop sequences as the arrays hold them; `stop_check` finds those that are longer.

    UserError: too many of them."""
    sequences = [ids for ids in request.stop_sequences if len(ids) <= STOP_WIDTH]
    if len(sequences) > NUM_STOPS:
        raise UserError(
            f"stop: {len(sequences)} sequences of tokens end the answer, with those of stop_token_ids and "
            f"the model's own; expected at most {NUM_STOPS}"
        )
    return replace(request, stop_sequences=sequences)


def _raise_generation_error(output: GenerationOutput) -> None:
    if output.error is not None:
        raise RequestError(500, output.error, "nonfinite_logits")


def _checked(function: Callable[[], T]) -> T:
    """The function's result. RequestError: it raised a UserError."""
    try:
        return function()
    except UserError as e:
        message = str(e).removeprefix("prompt 0: ")
        raise invalid(message, _param(message)) from None


_PARAMS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_ids": "stop_token_ids",
}


def _param(message: str) -> str | None:
    """The field that a message of GenerationConfig is about."""
    name = message.split()[0]
    known = GenerationConfig.__dataclass_fields__
    return _PARAMS.get(name, name) if name in known else None
