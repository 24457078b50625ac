"""The process of a server: uvicorn, start-up, signals."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.compile_ahead import ProgramCompiler
from minigpt4_jax.serving.connections import LimitedConnection
from minigpt4_jax.serving.service import Service
from minigpt4_jax.serving.warm_up import warm_up

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Ends normally after SIGTERM and SIGINT; uvicorn itself would raise the signal once more.

    Attributes:
        startup_error: why it cannot serve; None if it can.
    """

    startup_error: Exception | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for sock in server.sockets:
                log.info("listening on http://%s:%d", *sock.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for close in self.config.app.state.closing:  # type: ignore[union-attr]
            close()
        await super().shutdown(sockets)


def make_server(
    app: FastAPI,
    service: Service,
    host: str,
    port: int,
    *,
    shutdown_seconds: float = 30.0,
    compiled: bool = True,
    compiler: ProgramCompiler | None = None,
) -> Server:
    """A server whose `run` returns after SIGTERM or SIGINT, once everything has been answered.

    shutdown_seconds: for answering it. compiled: compile all programs after the start; until then
    /ready says no. compiler: of `warm_up.start_compiling`, if that has begun.
    """

    others = app.router.lifespan_context  # of what is mounted

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        warming = asyncio.create_task(_get_ready(server, app, service, compiled, compiler))
        async with others(app):
            yield
        warming.cancel()
        # uvicorn has waited for the open requests already
        await asyncio.to_thread(service.scheduler.stop, 0)

    app.router.lifespan_context = lifespan
    config = uvicorn.Config(
        app, host=host, port=port, http=LimitedConnection, log_config=None, access_log=False,
        server_header=False, timeout_graceful_shutdown=max(1, round(shutdown_seconds)),
    )  # fmt: skip
    server = Server(config)
    return server


async def _get_ready(
    server: Server,
    app: FastAPI,
    service: Service,
    compiled: bool,
    compiler: ProgramCompiler | None,
) -> None:
    if compiled:
        try:
            summary = await warm_up(service.scheduler, compiler)
        except Exception as error:
            server.startup_error, server.should_exit = error, True
            return
        log.info("ready: %s", summary)
    app.state.ready = True


def run(server: Server) -> None:
    """Run a server until a signal ends it.

    UserError: the address cannot be used. RequestError: a program cannot be compiled or run.
    """
    with contextlib.suppress(SystemExit):  # uvicorn has logged why
        server.run()
    if server.startup_error is not None:
        raise server.startup_error
    if not server.started:
        address = f"{server.config.host}:{server.config.port}"
        raise UserError(f"cannot listen on {address}; is another server running there?")
