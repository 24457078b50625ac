"""Clients of a chat server, for serve.py: requests over plain sockets, and when their tokens arrive."""

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Outcome:
    """What became of one request. Times are time.perf_counter()."""

    row: int
    sent: float
    status: int = 0
    retry_after: str = ""  # seconds, of a refused request
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)  # of the pieces of a streamed answer
    ended: float = 0.0
    error: str = ""


async def post(
    port: int,
    row: int,
    body: dict[str, Any],
    *,
    read_delay: float = 0.0,
    leave_after: int | None = None,
    reset: bool = False,
    begun: asyncio.Event | None = None,
) -> Outcome:
    """One request to /v1/chat/completions. If it is left, the outcome's error is "left".

    Args:
        read_delay: seconds before each piece is read, as of a slow reader.
        leave_after: close the connection after so many pieces; 0: as soon as the request is sent.
        reset: break the connection (RST) instead of closing it, as when a client's machine fails.
        begun: set at the first piece.
    """
    outcome = Outcome(row, time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    data = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    try:
        await writer.drain()
        if leave_after == 0:
            outcome.error = "left"
            return outcome
        outcome.status = int((await reader.readline()).split()[1])
        while header := (await reader.readline()).decode().strip():
            name, _, value = header.partition(":")
            if name.lower() == "retry-after":
                outcome.retry_after = value.strip()
        if outcome.status != 200 or not body.get("stream"):
            answer = await reader.read()
            outcome.error = "" if outcome.status == 200 else answer.decode(errors="replace")[:200]
        else:
            async for _ in _pieces(reader, outcome):
                if begun is not None:
                    begun.set()
                if len(outcome.arrivals) == leave_after:
                    outcome.error = "left"
                    break
                await asyncio.sleep(read_delay)
    except (OSError, asyncio.IncompleteReadError) as e:
        outcome.error = repr(e)
    finally:
        outcome.ended = time.perf_counter()
        await _close(writer, reset=reset)
    return outcome


async def _close(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset:  # closing a socket that does not linger sends RST
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _pieces(reader: asyncio.StreamReader, outcome: Outcome) -> AsyncIterator[str]:
    """The pieces of a streamed answer, also noted in the outcome."""
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            outcome.error = event["error"]["message"]
        elif not event["choices"]:
            outcome.tokens = event["usage"]["completion_tokens"]
            outcome.prompt_tokens = event["usage"]["prompt_tokens"]
        else:
            choice = event["choices"][0]
            if piece := choice["delta"].get("content"):
                outcome.text += piece
                outcome.arrivals.append(time.perf_counter())
                yield piece
            outcome.text = choice.get("generated_text", outcome.text)


async def closed_loop(
    port: int, bodies: Sequence[dict[str, Any]], clients: int, gap: float, seed: int = 0
) -> list[Outcome]:
    """Clients that arrive as a Poisson process, `gap` seconds apart on average, and then take one
    request after another from `bodies` until there is none left."""
    waiting = iter(enumerate(bodies))
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(gap, clients))

    async def client(delay: float) -> list[Outcome]:
        await asyncio.sleep(delay)
        return [await post(port, row, body) for row, body in waiting]

    found = await asyncio.gather(*(client(delay) for delay in arrivals))
    return [outcome for of_client in found for outcome in of_client]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """At 50, 95 and 99 %; NaN without values."""
    if not len(values):
        return (float("nan"),) * 3
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return float(p50), float(p95), float(p99)


def token_rate(outcomes: Sequence[Outcome]) -> float:
    """Tokens a second, from the first request to the last answer."""
    seconds = max(o.ended for o in outcomes) - min(o.sent for o in outcomes)
    return sum(o.tokens for o in outcomes) / seconds


def first_token_seconds(outcomes: Sequence[Outcome]) -> list[float]:
    """From the request to the first piece of its answer."""
    return [o.arrivals[0] - o.sent for o in outcomes if o.arrivals]


def gaps(outcomes: Sequence[Outcome]) -> list[float]:
    """Seconds between two pieces of an answer, of all answers together."""
    return [gap for o in outcomes for gap in np.diff(o.arrivals).tolist()]
