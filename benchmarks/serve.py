"""The server under load, beside `batch` and beside a plain handler around transformers.

    python benchmarks/serve.py --model=DIR [--clients=1,8,32,128] [--parts=load,batch,...]

Every request has an image of its own and a limit of 16 to 96 tokens, which it uses up, so that all sides do
the same work. Clients arrive as a Poisson process and then ask one question after another.

    load      tokens/s; seconds to the first token and between pieces at 50, 95, 99 %, and the longest gap
    batch     the rows of 32 clients by `Model.run_requests`, as `batch` does, in turns with the server
    peer      the same by FastAPI around `generate` of transformers, with the same weights (8 requests)
    prefill   seven answers while a prompt is processed that fills the context (--context, but for 8 tokens):
              the seconds between the pieces of the answers, and the longest; its own seconds to the first
              token. Beside it the same answers once the prompt has left
    overload  128 clients against a queue of 32: refused, timed out, and seconds to the first token
    soak      --soak seconds of 16 clients, of which some read slowly and some leave: connections closed or
              reset in mid-stream, or reset before the first token. Every answer is compared with that of
              `Model.generate` for the same seed, and memory is watched

A prompt is processed in pieces of the server's --prefill-tokens; --context should hold several of them.
`--clients-of-batch` changes the 32. The server is a process of its own, `python -m minigpt4_jax.serve`.
"""

import argparse
import asyncio
import io
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

from common import ROOT, Table, argument_parser, local_address, seconds
from http_load import closed_loop, token_rate
from PIL import Image
from serve_common import COLUMNS, Server, make_rows, measure, num_rows, print_load, serve
from serve_prefill import prefill
from serve_soak import soak

import minigpt4_jax
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.processing.chat_templates import chat_format, with_images

PARTS = ("load", "batch", "peer", "prefill", "overload", "soak")
PEER_REQUESTS = 8


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
    refused = [o for o in outcomes if o.status == 429]
    print_load(table, "128 clients, queue of 32", admitted)
    others = len(outcomes) - len(admitted) - len(refused)
    print(
        f"# refused with 429: {len(refused)}, of them with Retry-After: "
        f"{sum(bool(o.retry_after) for o in refused)}, other failures: {others}",
        flush=True,
    )


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
    parser.add_argument("--prefill-tokens", type=int, help="of the server: pieces of a prompt")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the server beside batch, and long prompts"
    )
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
        for part, work in (
            ("load", load), ("batch", batch), ("peer", peer), ("prefill", prefill),
        ):  # fmt: skip
            if part in parts:
                work(args, server, table)
        if "soak" in parts:
            soak(args, server)
    if "overload" in parts:
        overload(args, table)


if __name__ == "__main__":
    run(main)
