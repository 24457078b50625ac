"""A replica: a process with a model, its scheduler, and the application of the plain server."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI
from ray import serve
from starlette.types import Message, Scope

from minigpt4_jax.serving.service import Service
from minigpt4_jax.serving.warm_up import warm_up

log = logging.getLogger(__name__)
_AHEAD = 32  # messages of an answer that wait for a slow reader


class Replica:
    """A Ray Serve deployment: answers requests that the ingress passes on."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, load: Callable[[], tuple[FastAPI, Service]], compiled: bool
    ) -> None:
        """load: loads the model. compiled: compile all programs now; Ray sends no requests before that."""
        self._app, self._service = await asyncio.to_thread(load)
        self._service.scheduler.start()
        if compiled:
            log.info("ready: %s", await warm_up(self._service.scheduler))
        self._app.state.ready = True

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of the application's response to a request (ASGI).

        The request ends when the caller stops reading."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue(_AHEAD)
        request = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if request:
                return request.pop()
            return await asyncio.Future()  # the client leaves by cancelling this request

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()

    async def metrics(self) -> tuple[str, bytes]:
        """The name of this replica, and its metrics in Prometheus' format."""
        name = serve.get_replica_context().replica_id.unique_id
        return name, self._service.scheduler.metrics.text()

    async def accepting(self) -> bool:
        return self._service.scheduler.accepting

    def check_health(self) -> None:
        """Ray asks now and then; after an exception it replaces the replica."""
        if not self._service.scheduler.healthy:
            raise RuntimeError("the device does not work any more")

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            await asyncio.to_thread(self._service.scheduler.stop, 0)
