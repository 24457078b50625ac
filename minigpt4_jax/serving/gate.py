"""The ASGI middleware in front of the API: keys, limits on requests that have not been read, logs."""

import asyncio
import hmac
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving.errors import RequestError, timed_out
from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.serving.metrics import ServerMetrics
from minigpt4_jax.utils.text import shorten

log = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/health", "/ready")  # without a key; / leads to the page, if there is one
READING_SECONDS = 30.0  # for a client to read the rest of its answer when its time is over


class Gate:
    """Refuses requests without the key, too large, too slow or too many; reads bodies of /v1 whole."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: ServerMetrics, keys: Sequence[str] = (),
        unguarded: Sequence[str] = (), hosts: Sequence[str] | None = None,
    ):  # fmt: skip
        """keys: one of them must be sent; without any, everyone may ask. unguarded: beginnings of paths
        that need no key, such as a page with a login of its own. hosts: names of this server beside
        localhost and addresses; other names are refused. None: every name is accepted."""
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys = [key.encode() for key in keys]
        self._unguarded = tuple(unguarded)
        self._hosts = None if hosts is None else {"localhost", *map(str.lower, hosts)}
        self._open = 0  # requests to /v1
        self._held = 0  # bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            if self._is_for_us(scope) and self._is_allowed(scope):
                await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        begin, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._answer(scope, receive, send_and_note)
        except RequestError as error:
            if not status:
                await _send_error(send_and_note, error)
        finally:
            # paths that do not exist are counted together
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.responses.labels(path, str(status)).inc()
            seconds = time.monotonic() - begin
            path = shorten(scope["path"], 200)
            log.info("%s %s %r %d %.3f s", request_id, scope["method"], path, status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_for_us(scope):
            raise RequestError(
                403, f"{shorten(_host_name(scope))!r} is not a name of this server, which is for this "
                "machine only; start it with --allowed-host, or with a key", "unknown_host",
            )  # fmt: skip
        if not self._is_allowed(scope):
            raise RequestError(401, "a valid API key is missing", "invalid_api_key")
        if not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        if self._open >= self._limits.open_requests:
            raise _too_many(f"{self._open} requests are open already")
        self._open += 1
        body = None
        try:
            body = await self._read(scope, receive)
            if body is not None:
                await self._run(scope, replay(body, receive), send)
        finally:
            self._open -= 1
            self._held -= len(body or b"")

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and end it if its client reads too slowly."""
        seconds = self._limits.seconds
        try:
            async with asyncio.timeout(seconds + READING_SECONDS) as limit:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not limit.expired():
                raise
            raise timed_out(seconds) from None

    def _is_for_us(self, scope: Scope) -> bool:
        """Whether a request names this server. A web page can give its own name the address of this
        machine (DNS rebinding), and then ask the server as if it had come from it."""
        if self._hosts is None:
            return True
        name = _host_name(scope)
        return name in self._hosts or _is_address(name)

    def _is_allowed(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if not self._keys or path in OPEN_PATHS or path.startswith(self._unguarded):
            return True
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # every key is compared, so that the time says nothing about them
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            return False
        scope.setdefault("state", {})["key"] = matches.index(True)  # for the fair order
        return True

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body of a request; None if the client has left."""
        limit = self._limits.body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        is_complete = False
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while not is_complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._held += len(message.get("body", b""))
                    if len(body) > limit:
                        raise _too_large(limit)
                    if self._held > self._limits.open_bytes:
                        raise _too_many(f"the open requests have {self._held} bytes already")
                    is_complete = not message.get("more_body")
            return bytes(body)
        except TimeoutError:
            raise RequestError(
                408,
                f"the request did not arrive within {self._limits.body_seconds:.0f} s",
                "timeout",
            ) from None
        finally:
            if not is_complete:
                self._held -= len(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"the request has more than {limit} bytes", "request_too_large")


def _too_many(what: str) -> RequestError:
    return RequestError(429, f"{what}; try again later", "too_many_requests", retry_after=2)


def _host_name(scope: Scope) -> str:
    """The host of a request without its port."""
    given: str = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    if given.startswith("["):
        return given[1:].partition("]")[0]
    return given.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _send_error(send: Send, error: RequestError) -> None:
    headers = [(b"content-type", b"application/json")]
    headers += [(name.encode(), value.encode()) for name, value in error.headers().items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
