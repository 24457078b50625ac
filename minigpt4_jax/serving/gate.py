"""The ASGI middleware in front of the API: keys, limits on requests that have not been read, logs."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving.errors import RequestError
from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.serving.metrics import Metrics

log = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/health", "/ready")  # without a key; / leads to the page, if there is one


class Gate:
    """Refuses requests without the key, too large, too slow or too many; reads bodies of /v1 whole."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, keys: Sequence[str] = (),
        unguarded: Sequence[str] = (),
    ):  # fmt: skip
        """keys: one of them must be sent; without any, everyone may ask. unguarded: beginnings of paths
        that need no key, such as a page with a login of its own."""
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys = [key.encode() for key in keys]
        self._unguarded = tuple(unguarded)
        self._open = 0  # requests to /v1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            if self._is_allowed(scope):
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
        finally:
            # paths that do not exist are counted together
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.responses.labels(path, str(status)).inc()
            seconds = time.monotonic() - begin
            log.info(
                "%s %s %r %d %.3f s", request_id, scope["method"], scope["path"], status, seconds
            )

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not self._is_allowed(scope):
                raise RequestError(401, "a valid API key is missing", "invalid_api_key")
            if not scope["path"].startswith("/v1/"):
                await self._app(scope, receive, send)
                return
            if self._open >= self._limits.open_requests:
                raise RequestError(
                    429, f"{self._open} requests are open already; try again later", "too_many_requests",
                    retry_after=2,
                )  # fmt: skip
        except RequestError as error:
            await _send_error(send, error)
            return
        self._open += 1
        try:
            body = await self._read(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
        except RequestError as error:
            await _send_error(send, error)
        finally:
            self._open -= 1

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
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise RequestError(
                408,
                f"the request did not arrive within {self._limits.body_seconds:.0f} s",
                "timeout",
            ) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"the request has more than {limit} bytes", "request_too_large")


async def _send_error(send: Send, error: RequestError) -> None:
    headers = [(b"content-type", b"application/json")]
    headers += [(name.encode(), value.encode()) for name, value in error.headers().items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
