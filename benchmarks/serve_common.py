"""Shared by the parts of serve.py: questions, a server, and what its clients measured."""

import argparse
import asyncio
import base64
import contextlib
import io
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from common import Table
from http_load import (
    Outcome,
    closed_loop,
    first_token_seconds,
    gaps,
    percentiles,
    token_rate,
)
from PIL import Image

from minigpt4_jax.errors import UserError

LENGTHS = (16, 24, 32, 48, 64, 96)  # tokens of an answer
COLUMNS = {
    "": (26, ""), "requests": (9, "d"), "tok/s": (9, ".1f"), "first 50": (10, ".3f"), "95": (8, ".3f"),
    "99": (8, ".3f"), "gap 50": (9, ".3f"), "95 %": (8, ".3f"), "99 %": (8, ".3f"), "longest": (9, ".3f"),
}  # fmt: skip


class Row(NamedTuple):
    """A question."""

    image: bytes  # a PNG file; empty: no image
    question: str
    max_tokens: int
    seed: int

    def body(self, **options: Any) -> dict[str, Any]:
        """The request for it."""
        url = "data:image/png;base64," + base64.b64encode(self.image).decode()
        image = [{"type": "image_url", "image_url": {"url": url}}] if self.image else []
        content = [*image, {"type": "text", "text": self.question}]
        return {
            "messages": [{"role": "user", "content": content}], "seed": self.seed,
            "max_tokens": self.max_tokens, "min_tokens": self.max_tokens, "temperature": 0,
            "repetition_penalty": 1.0, "stream": True, "stream_options": {"include_usage": True}, **options,
        }  # fmt: skip


def make_rows(count: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        limit = int(rng.choice(LENGTHS))
        rows.append(Row(file.getvalue(), f"Describe image {n} in detail.", limit, n))
    return rows


# --- the server -----------------------------------------------------------------------------------------


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int


@contextlib.contextmanager
def serve(args: argparse.Namespace, *options: str) -> Iterator[Server]:
    """A server that is ready."""
    command = [
        sys.executable, "-m", "minigpt4_jax.serve", f"--model={args.model}", "--port=0",
        f"--max-context={args.context}", *options,
    ]  # fmt: skip
    if args.dtype:
        command.append(f"--dtype={args.dtype}")
    if args.prefill_tokens:
        command.append(f"--prefill-tokens={args.prefill_tokens}")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = int(_read_until(process, r"listening on \S+:(\d+)"))
        print(f"# ready: {_read_until(process, r'ready: (.*)')}", flush=True)
        # the log must not fill the pipe
        threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
        yield Server(process, port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def _read_until(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(pattern, line):
            return match[1]
    raise UserError(f"the server ended: {''.join(lines)[-2000:]}")


def measure(server: Server, rows: Sequence[Row], clients: int, gap: float) -> list[Outcome]:
    bodies = [row.body() for row in rows]
    outcomes = asyncio.run(closed_loop(server.port, bodies, clients, gap))
    for outcome in outcomes:
        if outcome.status == 200 and outcome.tokens != rows[outcome.row].max_tokens:
            raise UserError(f"row {outcome.row}: {outcome.tokens} tokens, {outcome.error}")
    return outcomes


def print_load(table: Table, name: str, outcomes: Sequence[Outcome]) -> None:
    between = gaps(outcomes)
    table.row(
        name, len(outcomes), token_rate(outcomes), *percentiles(first_token_seconds(outcomes)),
        *percentiles(between), max(between, default=float("nan")),
    )  # fmt: skip


def num_rows(args: argparse.Namespace, clients: int) -> int:
    return max(args.requests, 2 * clients)
