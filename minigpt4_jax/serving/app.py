"""The FastAPI application: the routes of the OpenAI-compatible API."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minigpt4_jax.errors import UserError
from minigpt4_jax.serving import answers, image_urls
from minigpt4_jax.serving.answers import ChatShape, Question, TextShape
from minigpt4_jax.serving.disconnects import EventStream, unless_client_leaves
from minigpt4_jax.serving.errors import RequestError, invalid
from minigpt4_jax.serving.gate import Gate
from minigpt4_jax.serving.images import RequestImage, decode_data_url
from minigpt4_jax.serving.messages import parse_messages
from minigpt4_jax.serving.metrics import ServerMetrics
from minigpt4_jax.serving.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RankRequest,
    Sampling,
)
from minigpt4_jax.serving.service import Sender, Service
from minigpt4_jax.utils.text import spelling_hint

log = logging.getLogger(__name__)
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions
RANK_GROUP = 8  # candidates scored between two steps of the running answers
DOWNLOAD_SECONDS, DOWNLOAD_THREADS = 20.0, 8
CLIENT_CLOSED = 499  # nginx' status for a client that left; nobody reads it


class Api:
    """The handlers of the routes."""

    def __init__(
        self,
        service: Service,
        metrics: ServerMetrics,
        *,
        allow_image_urls: bool = False,
        log_prompts: bool = False,
    ):
        self.service, self.metrics = service, metrics
        self._allow_image_urls, self._log_prompts = allow_image_urls, log_prompts
        self._created = int(time.time())
        # threads of their own: slow hosts must not keep others from being read
        self._downloads = ThreadPoolExecutor(DOWNLOAD_THREADS, thread_name_prefix="downloads")

    # --- answers ----------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._check_model(body.model)
        dialogue = parse_messages(body.messages)
        config = self.service.generation_config(body.options() | self._returned(body))
        images = await self._read_images(dialogue.urls)
        if body.boxes and not images:
            raise invalid("boxes are in pixels of an image, and there is none", "boxes")
        prompt = await self.service.chat_request(
            dialogue.turns, len(images), config, dialogue.system
        )
        self._log("prompt", dialogue.turns)
        num_top = body.top_logprobs or 0
        question = Question(
            [prompt], images, config, self._choices(body), num_top, self._sender(request)
        )
        shape = ChatShape(
            self.service, logprobs=bool(body.logprobs), num_top=num_top,
            box_size=images[-1].size if body.boxes else None,
        )  # fmt: skip
        return await self._respond(question, shape, body, request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        self._check_model(body.model)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        self._check_count("prompt", len(prompts), self.service.limits.choices)
        if body.images and len(prompts) != 1:
            raise invalid("images go with a single prompt", "images")
        options = {"max_new_tokens": COMPLETION_TOKENS} | body.options() | self._returned(body)
        config = self.service.generation_config(options)
        images = await self._read_images(
            [(url, f"images.{i}") for i, url in enumerate(body.images)]
        )
        made = [await self.service.request(text, len(images), config) for text in prompts]
        self._log("prompt", prompts)
        num_top = body.logprobs or 0
        question = Question(
            made, images, config, self._choices(body, len(made)), num_top, self._sender(request)
        )
        shape = TextShape(self.service, logprobs=body.logprobs is not None, num_top=num_top)
        return await self._respond(question, shape, body, request)

    async def _respond(
        self, question: Question, shape: answers.Shape, body: Sampling, request: Request
    ) -> Response:
        headers = _ignored(body)
        if question.num_top and (body.stream or question.config.num_beams > 1):
            raise invalid(
                "the most likely tokens (top_logprobs, logprobs of completions above 0) are only known for "
                "whole answers without beam search",
                "top_logprobs",
            )
        if not body.stream:
            whole = answers.answer(self.service, question, shape)
            content = await unless_client_leaves(request, whole)
            if content is None:
                return Response(status_code=CLIENT_CLOSED)
            self._log("answer", content["choices"])
            return JSONResponse(content, headers=headers)
        if question.config.num_beams > 1:
            raise invalid("a beam search decides at its end; set stream to false", "stream")
        choices = question.choices()
        jobs = self.service.start(choices, question.images, question.sender, streamed=True)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        events = answers.stream(self.service, question, shape, jobs, usage=with_usage)
        return EventStream(events, jobs, headers)

    def _returned(self, body: Sampling) -> dict[str, Any]:
        """The number of answers of a beam search, which finds them together."""
        beams = body.num_beams or 1
        return {"num_return_sequences": body.n or 1} if beams > 1 else {}

    def _choices(self, body: Sampling, prompts: int = 1) -> int:
        """The number of answers to each of some prompts; all must find a place in the queue together."""
        count, queue = body.n or 1, self.service.scheduler.queue.limit
        self._check_count("n", count, min(self.service.limits.choices, max(1, queue // prompts)))
        beams = body.num_beams or 1
        self._check_count("num_beams", beams, self.service.limits.choices)
        return 1 if beams > 1 else count

    # --- other routes -------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self._model_card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self._check_model(name)
        return self._model_card()

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.service.name, "object": "model", "created": self._created,
            "owned_by": "minigpt4_jax", "max_model_len": self.service.scheduler.config.context,
        }  # fmt: skip

    async def embed(self, body: EmbeddingRequest, request: Request) -> Response:
        """POST /v1/embeddings: the projected features of images."""
        self._check_model(body.model)
        urls = [body.input] if isinstance(body.input, str) else body.input
        images = await self._read_images([(url, f"input.{i}") for i, url in enumerate(urls)])
        if not images:
            raise invalid("input is empty; expected images as data URLs", "input")
        call = self.service.call(lambda visual: visual, images, self._sender(request))
        visual = await unless_client_leaves(request, call)
        if visual is None:
            return Response(status_code=CLIENT_CLOSED)
        data = [
            {"object": "embedding", "index": i, **_embedding(body, tokens)}
            for i, tokens in enumerate(visual)
        ]
        tokens = sum(len(tokens) for tokens in visual)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        content = {"object": "list", "data": data, "model": self.service.name, "usage": usage}
        return JSONResponse(content, headers=_ignored(body))

    async def rank(self, body: RankRequest, request: Request) -> Response:
        """POST /v1/rank: candidate answers, most likely first."""
        self._check_model(body.model)
        self._check_count("candidates", len(body.candidates), self.service.limits.candidates)
        images = await self._read_images(
            [(url, f"images.{i}") for i, url in enumerate(body.images)]
        )
        sender = self._sender(request)

        async def score() -> list[dict[str, Any]]:
            scored: list[dict[str, Any]] = []
            for start in range(0, len(body.candidates), RANK_GROUP):
                group = body.candidates[start : start + RANK_GROUP]
                function = partial(self._score, body, images, group)
                nll, lengths = await self.service.call(function, (), sender)
                scored += [
                    {
                        "index": start + i, "candidate": text, "nll": float(nll[i]),
                        "tokens": int(lengths[i]), "score": -float(nll[i]) / int(lengths[i]),
                    }
                    for i, text in enumerate(group)
                ]  # fmt: skip
            return sorted(scored, key=lambda entry: -entry["score"])

        results = await unless_client_leaves(request, score())
        if results is None:
            return Response(status_code=CLIENT_CLOSED)
        return JSONResponse(
            {"object": "list", "model": self.service.name, "results": results},
            headers=_ignored(body),
        )

    def _score(
        self, body: RankRequest, images: Sequence[RequestImage], candidates: Sequence[str], _: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        pixels = [image.input.pixels for image in images]
        count = len(candidates)
        try:
            return self.service.model.score(
                [pixels] * count, [body.question] * count, candidates, template=not body.raw
            )
        except UserError as e:
            raise invalid(str(e), "question") from None

    # --- parts of requests --------------------------------------------------------------------------

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.service.name:
            raise RequestError(
                404, f"the model {name!r} does not exist; this server has {self.service.name!r}",
                "model_not_found", param="model",
            )  # fmt: skip

    def _check_count(self, name: str, count: int, limit: int) -> None:
        if not 1 <= count <= limit:
            raise invalid(f"{name}: {count} of them; expected 1 to {limit}", name)

    async def _read_images(self, urls: Sequence[tuple[str, str]]) -> list[RequestImage]:
        if len(urls) > self.service.limits.images:
            limit = self.service.limits.images
            raise invalid(f"{len(urls)} images; at most {limit} are read", urls[-1][1])
        return [await self._read_image(url, where) for url, where in urls]

    async def _read_image(self, url: str, where: str) -> RequestImage:
        limits = self.service.limits
        if url[:5].lower() != "data:" and self._allow_image_urls:
            download = partial(
                image_urls.download, url, limits.image_bytes, DOWNLOAD_SECONDS, where
            )
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(self._downloads, download)
        elif url[:4].lower() == "http":
            raise invalid(
                "image URLs are not downloaded by this server (--allow-image-urls); send a data URL",
                where, "invalid_image_url",
            )  # fmt: skip
        else:
            data = decode_data_url(url, limits, where)
        return await self.service.read_image(data, where)

    def _sender(self, request: Request) -> Sender:
        host = request.client.host if request.client else ""
        return Sender(f"{getattr(request.state, 'key', '')} {host}", self.service.limits.seconds)

    def _log(self, what: str, value: Any) -> None:
        if self._log_prompts:
            log.info("%s: %s", what, json.dumps(value, ensure_ascii=False))


def _embedding(body: EmbeddingRequest, visual: np.ndarray) -> dict[str, Any]:
    """Visual tokens [P, D] as the request wants them."""
    vector = visual.mean(0) if body.pooling == "mean" else visual
    if body.encoding_format == "base64":
        embedding: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    else:
        embedding = vector.ravel().tolist()
    return {"embedding": embedding, "shape": list(vector.shape)}


def _ignored(body: Body) -> dict[str, str]:
    """A header that names the request's fields without effect."""
    return {"X-Ignored-Parameters": ", ".join(body.ignored)} if body.ignored else {}


# --- the application ---------------------------------------------------------------------------------


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    allow_image_urls: bool = False,
    log_prompts: bool = False,
    unguarded: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The application, ready for a server. The caller starts and stops the service's scheduler.

    keys: API keys, one of which every request must have. unguarded, hosts: see `Gate`.
    `app.state.ready` turns True when the programs are compiled. `app.state.closing`: functions called when
    the server begins to stop, to end connections that would last.
    """
    metrics = service.scheduler.metrics
    api = Api(service, metrics, allow_image_urls=allow_image_urls, log_prompts=log_prompts)
    # The documentation pages of FastAPI load scripts from elsewhere.
    app = FastAPI(title="minigpt4_jax", docs_url=None, redoc_url=None)
    app.state.ready = False
    app.state.closing = []
    app.post("/v1/chat/completions")(api.chat)
    app.post("/v1/completions")(api.complete)
    app.post("/v1/embeddings")(api.embed)
    app.post("/v1/rank")(api.rank)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{name:path}")(api.model)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if service.scheduler.healthy else 503)

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = app.state.ready and service.scheduler.accepting
        return Response(status_code=200 if is_ready else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    app.exception_handler(RequestError)(_request_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_internal_error)
    app.add_middleware(
        Gate, limits=service.limits, metrics=metrics, keys=keys, unguarded=unguarded, hosts=hosts
    )
    return app


async def _request_error(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _validation_error(_: Request, error: Any) -> Response:
    """The first of pydantic's errors."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = [*ChatRequest.model_fields, *CompletionRequest.model_fields]
        message = f"{where[-1]!r} is not a known field; {spelling_hint(where[-1], known)}"
    elif where:
        message = f"{'.'.join(where)}: {message}"
    return await _request_error(_, invalid(message, ".".join(where) or None))


async def _http_error(_: Request, error: Any) -> Response:
    return await _request_error(_, RequestError(error.status_code, str(error.detail)))


async def _internal_error(_: Request, error: Any) -> Response:
    log.error("internal error: %s", error, exc_info=error)
    return await _request_error(_, RequestError(500, "internal error", "internal_error"))
