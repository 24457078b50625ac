"""The server under load, beside `batch` and beside a plain handler around transformers.

    python benchmarks/serve.py --model=DIR [--clients=1,8,32,128] [--parts=load,batch,peer,overload,soak]

Every request has an image of its own and a limit of 16 to 96 tokens, which it uses up, so that all sides do
the same work. Clients arrive as a Poisson process and then ask one question after another.

    load      tokens/s; seconds to the first token and between pieces at 50, 95, 99 %, and the longest gap
    batch     the rows of 32 clients by `Model.run_requests`, as `batch` does, in turns with the server
    peer      the same by FastAPI around `generate` of transformers, with the same weights (8 requests)
    overload  128 clients against a queue of 32: refused, timed out, and seconds to the first token
    soak      --soak seconds of 16 clients, with clients that leave and slow readers: every answer is
              compared with that of `Model.generate` for the same seed, and memory is watched

`--clients-of-batch` changes the 32. The server is a process of its own, `python -m minigpt4_jax.serve`.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import ROOT, Table, argument_parser, local_address, seconds
from http_load import (
    Outcome,
    closed_loop,
    first_token_seconds,
    gaps,
    percentiles,
    post,
    token_rate,
)
from PIL import Image

import minigpt4_jax
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.processing.chat_templates import chat_format, with_images

PARTS = ("load", "batch", "peer", "overload", "soak")
LENGTHS = (16, 24, 32, 48, 64, 96)  # tokens of an answer
PEER_REQUESTS = 8
COLUMNS = {
    "": (26, ""), "requests": (9, "d"), "tok/s": (9, ".1f"), "first 50": (10, ".3f"), "95": (8, ".3f"),
    "99": (8, ".3f"), "gap 50": (9, ".3f"), "95 %": (8, ".3f"), "99 %": (8, ".3f"), "longest": (9, ".3f"),
}  # fmt: skip


class Row(NamedTuple):
    """A question."""

    image: bytes  # a PNG file
    question: str
    max_tokens: int
    seed: int

    def body(self, **options: Any) -> dict[str, Any]:
        """The request for it."""
        url = "data:image/png;base64," + base64.b64encode(self.image).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.question},
        ]
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


def load(args: argparse.Namespace, server: Server, table: Table) -> None:
    for clients in args.clients:
        rows = make_rows(num_rows(args, clients), seed=clients)
        print_load(table, f"{clients} clients", measure(server, rows, clients, args.gap))


# --- beside it ------------------------------------------------------------------------------------------


def batch(args: argparse.Namespace, server: Server, table: Table) -> None:
    """The server and the engine of this process, one after another, on the same rows."""
    clients = args.clients_of_batch
    model = minigpt4_jax.load(args.model, args.dtype)
    rows = make_rows(num_rows(args, clients), seed=1000)
    template = chat_format(model.config, model.tokenizer)
    work = sum(row.max_tokens for row in rows)

    def answer_all() -> None:
        images = [[Image.open(io.BytesIO(row.image))] for row in rows]
        prompts = [template.render([(with_images(row.question, 1), None)]) for row in rows]
        requests = []
        for image, prompt, row in zip(images, prompts, rows, strict=True):
            config = GenerationConfig(max_new_tokens=row.max_tokens, min_new_tokens=row.max_tokens)
            requests += model.prepare_requests([image], [prompt], config)
        answered = sum(len(out.ids) for _, out in model.run_requests(requests, clients))
        assert answered == work, (answered, work)

    answer_all()
    ratios = []
    for number in range(args.rounds):
        alone = seconds(answer_all)
        # other images each time, or the server would have them already
        images = make_rows(len(rows), seed=2000 + number)
        fresh = [row._replace(image=new.image) for row, new in zip(rows, images, strict=True)]
        outcomes = measure(server, fresh, clients, 0.001)
        print_load(table, f"{clients} clients, beside batch", outcomes)
        table.row("  batch", len(rows), work / alone)
        ratios.append(token_rate(outcomes) / (work / alone))
    print(f"# server / batch: {statistics.median(ratios):.2f}", flush=True)


def peer(args: argparse.Namespace, server: Server, table: Table) -> None:
    clients = args.clients_of_batch
    port = int(local_address().rpartition(":")[2])
    script = ROOT / "benchmarks" / "serve_peer.py"
    process = subprocess.Popen(
        [sys.executable, str(script), f"--model={args.model}", f"--port={port}"]
    )
    try:
        _wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json"))
        rows = make_rows(PEER_REQUESTS + 1, seed=3000)
        bodies = [row.body(stream=False) for row in rows]
        asyncio.run(closed_loop(port, bodies[:1], 1, 0.001))
        outcomes = asyncio.run(closed_loop(port, bodies[1:], clients, 0.001))
    finally:
        process.terminate()
        process.wait()
    for outcome in outcomes:
        if outcome.status != 200:
            raise UserError(f"the peer: {outcome.error}")
        outcome.tokens = rows[outcome.row + 1].max_tokens
    ours = measure(server, make_rows(num_rows(args, clients), seed=3001), clients, 0.001)
    print_load(table, f"{clients} clients, beside peer", ours)
    table.row("  transformers", len(outcomes), token_rate(outcomes))
    print(f"# server / transformers: {token_rate(ours) / token_rate(outcomes):.1f}", flush=True)


def _wait_for(probe: Callable[[], object], limit: float = 300.0) -> None:
    end = time.monotonic() + limit
    while True:
        try:
            probe()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def overload(args: argparse.Namespace, table: Table) -> None:
    with serve(args, "--max-queue=32") as server:
        outcomes = measure(server, make_rows(256, seed=4000), 128, 0.001)
    admitted = [o for o in outcomes if o.status == 200]
    refused = sum(o.status == 429 for o in outcomes)
    print_load(table, "128 clients, queue of 32", admitted)
    others = len(outcomes) - len(admitted) - refused
    print(f"# refused with 429: {refused}, other failures: {others}", flush=True)


# --- soak -----------------------------------------------------------------------------------------------


def soak(args: argparse.Namespace, server: Server) -> None:
    """Answers for a while, with clients that leave and slow readers."""
    rows = make_rows(48, seed=5000)
    sampled = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    model = minigpt4_jax.load(args.model, args.dtype)
    template = chat_format(model.config, model.tokenizer)
    expected = []
    for row in rows:
        prompt = template.render([(with_images(row.question, 1), None)])
        options = sampled | {"seed": row.seed, "min_new_tokens": row.max_tokens}
        expected += model.generate(
            [Image.open(io.BytesIO(row.image))], [prompt], max_new_tokens=row.max_tokens, **options
        )
    bodies = [row.body(**sampled) for row in rows]
    rng = random.Random(0)
    counts = {"answered": 0, "wrong": 0, "left": 0, "failed": 0}
    memory: list[int] = []
    end = time.monotonic() + args.soak

    async def client() -> None:
        while time.monotonic() < end:
            n = rng.randrange(len(rows))
            kind = rng.random()
            outcome = await post(
                server.port, n, bodies[n],
                read_delay=0.05 if kind < 0.1 else 0.0, leave_after=2 if kind > 0.9 else 0,
            )  # fmt: skip
            if outcome.error == "left":
                counts["left"] += 1
            elif outcome.status != 200 or outcome.error:
                counts["failed"] += 1
            else:
                counts["answered"] += 1
                counts["wrong"] += outcome.text != expected[n]

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(_resident(server.process.pid))
            await asyncio.sleep(args.soak / 20)

    async def main() -> None:
        await asyncio.gather(watch(), *(client() for _ in range(16)))

    asyncio.run(main())
    half = memory[len(memory) // 2 :]
    print(f"# soak: {json.dumps(counts)}")
    print(
        f"# memory of the server: {memory[0] / 1e6:.0f} MB at the start, "
        f"{half[0] / 1e6:.0f} at half time, {half[-1] / 1e6:.0f} at the end",
        flush=True,
    )


def _resident(pid: int) -> int:
    fields = Path(f"/proc/{pid}/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) * 1024


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--clients", default="1,8,32,128")
    parser.add_argument("--clients-of-batch", type=int, default=32)
    parser.add_argument(
        "--requests", type=int, default=64, help="at least, for each number of clients"
    )
    parser.add_argument(
        "--gap", type=float, default=0.05, help="mean seconds between arriving clients"
    )
    parser.add_argument("--context", type=int, default=512, help="of the server")
    parser.add_argument("--rounds", type=int, default=3, help="of the server beside batch")
    parser.add_argument("--soak", type=float, default=600.0, help="seconds")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    args.clients = [int(n) for n in args.clients.split(",")]
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts: {', '.join(unknown)} unknown; known are {', '.join(PARTS)}")
    print(f"# {os.cpu_count()} processors, {args.model}", flush=True)
    table = Table(COLUMNS)
    with serve(args, "--max-queue=256") as server:
        for part, work in (("load", load), ("batch", batch), ("peer", peer)):
            if part in parts:
                work(args, server, table)
        if "soak" in parts:
            soak(args, server)
    if "overload" in parts:
        overload(args, table)


if __name__ == "__main__":
    run(main)
