"""The ingress: checks keys and limits as the plain server does, and passes requests on to replicas."""

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving.errors import RequestError
from minigpt4_jax.serving.gate import Gate
from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.serving.metrics import ServerMetrics
from minigpt4_jax.serving.ray.conversations import conversation_key

ATTEMPTS, PAUSE = 3, 0.5  # of passing a request on whose replica was lost; seconds between them
PROBE_SECONDS = 4.0  # for the replicas' answers to /ready and /metrics
# What a replica may know of a request; the rest of the scope belongs to the server here.
_SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
    "headers", "client", "server",
)  # fmt: skip
_LARGE = 1 << 20  # bytes of a body that is not parsed between two other requests


class Ingress:
    """A Ray Serve deployment with the routes of the plain server."""

    def __init__(
        self,
        replicas: Any,
        limits: Limits,
        keys: Sequence[str],
        hosts: Sequence[str] | None = None,
    ):
        """replicas: Ray's handle of them. keys, hosts: see `Gate`."""
        self._replicas = replicas
        self._metrics = ServerMetrics()
        self._gate = Gate(self._route, limits=limits, metrics=self._metrics, keys=keys, hosts=hosts)
        self._open, self._closing = 0, False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._gate

    async def drain(self, seconds: float) -> int:
        """Refuse new requests, and wait for those that run. Returns how many still do."""
        self._closing = True
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self._open

    # --- routes -----------------------------------------------------------------------------------

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["path"] == "/health":
            await Response()(scope, receive, send)
        elif scope["path"] == "/ready":
            status = 200 if await self._is_ready() else 503
            await Response(status_code=status)(scope, receive, send)
        elif scope["path"] == "/metrics":
            text = generate_latest(_Families(await self._read_metrics()))
            await Response(text, media_type="text/plain; version=0.0.4")(scope, receive, send)
        else:
            if self._closing:
                raise RequestError(503, "the server stops", "shutting_down")
            self._open += 1
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self._open -= 1

    async def _is_ready(self) -> bool:
        if self._closing:
            return False
        return any(answer is True for answer in await self._ask_all("accepting"))

    async def _read_metrics(self) -> list[tuple[str, str]]:
        """(a name, metrics in Prometheus' format) of the ingress, its responses, and of each replica."""
        texts = [("ingress", generate_latest(self._metrics.responses).decode())]
        for answer in await self._ask_all("metrics"):
            if isinstance(answer, tuple):
                texts.append((answer[0], answer[1].decode()))
        return texts

    async def _ask_all(self, method: str) -> list[Any]:
        """What each replica answers; exceptions for those that do not."""
        try:
            asked = self._replicas.broadcast(method)
            answers: list[Any] = await asked.results_async(
                timeout_s=PROBE_SECONDS, return_exceptions=True
            )
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return answers

    # --- requests for a replica ----------------------------------------------------------------------

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """RequestError: no replica can answer."""
        body = await _read(receive)
        key = await _key_of(body)
        known = {name: scope[name] for name in _SCOPE if name in scope}
        known["state"] = {k: v for k, v in scope.get("state", {}).items() if k == "key"}
        reply = _Reply(send)
        for attempt in range(ATTEMPTS):
            try:
                await self._stream(known, body, key, reply)
                return
            except BackPressureError:
                message = "too many requests wait already; try again later"
                raise RequestError(429, message, "queue_full", retry_after=2) from None
            except (RayActorError, DeploymentUnavailableError):
                if reply.started:
                    await reply.break_off()
                    return
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(PAUSE)
        raise RequestError(
            503, "no replica can answer; try again later", "unavailable", retry_after=5
        )

    async def _stream(self, scope: Scope, body: bytes, key: str, reply: "_Reply") -> None:
        """Send a replica's answer on as it comes."""
        handle = self._replicas.options(stream=True, method_name="answer", session_id=key)
        messages = handle.remote(scope, body)
        try:
            async for message in messages:
                await reply.send(message)
        except asyncio.CancelledError:  # the client has left
            messages.cancel()
            raise


class _Reply:
    """The response to a client, of a replica's messages."""

    def __init__(self, send: Send):
        self._send, self.started, self._is_stream = send, False, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # the gate here gives a name of its own
            headers = [(k, v) for k, v in message["headers"] if k != b"x-request-id"]
            message = {**message, "headers": headers}
            self.started = True
            self._is_stream = any(v.startswith(b"text/event-stream") for _, v in headers)
        await self._send(message)

    async def break_off(self) -> None:
        """Say in a stream that the rest is lost. Other responses break off."""
        error = RequestError(500, "the replica that wrote this answer was lost", "replica_lost")
        event = f"data: {json.dumps(error.body())}\n\n".encode() if self._is_stream else b""
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


async def _read(receive: Receive) -> bytes:
    """The body, which the gate has read and limited for routes that have one."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return body


async def _key_of(body: bytes) -> str:
    if len(body) < _LARGE:
        return conversation_key(body)
    return await asyncio.to_thread(conversation_key, body)


async def _lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


class _Families:
    """The metrics of several processes, with the label "replica"."""

    def __init__(self, texts: Sequence[tuple[str, str]]):
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for replica, text in self._texts:
            families: Iterable[Metric] = text_string_to_metric_families(text)
            for family in families:
                known = merged.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    known.add_sample(sample.name, labels, sample.value)
        return iter(merged.values())
