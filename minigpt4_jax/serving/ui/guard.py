"""The ASGI middleware in front of the page: Gradio would download files from addresses of other hosts."""

import asyncio
import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4_jax.serving.gate import replay

MAX_BYTES = 4 << 20  # of a page's JSON; files are uploaded by themselves
BODY_SECONDS = 60.0  # until it must have arrived
_SCHEMES = ("http:", "https:")


class PageGuard:
    """Refuses requests of a page that name a file by its address on another host.

    Gradio's `/file=ADDRESS` sends on what any public host answers, and so does a question with such a
    file. The page itself has no use for either.
    """

    def __init__(self, app: ASGIApp, *, path: str):
        """path: of the page, which has no slash at its end."""
        self._app, self._path = app, f"{path}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._path):
            await self._app(scope, receive, send)
            return
        _, _, file = scope["path"].partition("/file=")
        if file.lstrip().lower().startswith(_SCHEMES) or "/proxy=" in scope["path"]:
            await _refuse(403, "files of other hosts are not read", scope, receive, send)
            return
        kind = dict(scope["headers"]).get(b"content-type", b"")
        if scope["method"] != "POST" or kind.startswith(b"multipart/"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            await _refuse(408, "the request did not arrive in time", scope, receive, send)
            return
        if body is None:
            await _refuse(413, f"more than {MAX_BYTES} bytes", scope, receive, send)
        elif _names_other_host(body):
            await _refuse(403, "files of other hosts are not read", scope, receive, send)
        else:
            await self._app(scope, replay(body, receive), send)


async def _refuse(status: int, why: str, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"detail": why}, status)(scope, receive, send)


async def _read(receive: Receive) -> bytes | None:
    """The body; None if it is too large."""
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if len(body) > MAX_BYTES:
            return None
        if not message.get("more_body"):
            break
    return bytes(body)


def _names_other_host(body: bytes) -> bool:
    """Whether a JSON document has a file whose path is an address."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio refuses it
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.lstrip().lower().startswith(_SCHEMES):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
