"""Requests whose client closes the connection: their work is cancelled."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from minigpt4_jax.serving.jobs import Work

T = TypeVar("T")


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T | None:
    """The result of the work; None, and the work is cancelled, if the client closes the connection."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            return None
        raise
    finally:
        watcher.cancel()
        task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events about some work, which is cancelled when the response ends early, even before
    its first event."""

    def __init__(
        self, events: AsyncIterator[str], work: Sequence[Work], headers: Mapping[str, str]
    ):
        self._work = work
        fixed = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers={**fixed, **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for work in self._work:
                work.cancel()
