"""The part `soak` of serve.py."""

import argparse
import asyncio
import io
import json
import random
import time
from pathlib import Path
from typing import Any

from http_load import post
from PIL import Image
from serve_common import Server, make_rows

import minigpt4_jax
from minigpt4_jax.processing.chat_templates import chat_format, with_images

LEAVING: dict[str, dict[str, Any]] = {  # how clients leave -> options of `post`
    "left": {"leave_after": 2},
    "killed": {"leave_after": 2, "reset": True},
    "vanished": {"leave_after": 0, "reset": True},  # before the first token
}


def soak(args: argparse.Namespace, server: Server) -> None:
    """Answers for a while, with clients that leave in several ways and slow readers."""
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
    counts = dict.fromkeys(("answered", "wrong", "failed", *LEAVING), 0)
    memory: list[int] = []
    end = time.monotonic() + args.soak

    async def client() -> None:
        while time.monotonic() < end:
            n = rng.randrange(len(rows))
            leaving = rng.choice(list(LEAVING)) if rng.random() < 0.15 else None
            read_delay = 0.05 if rng.random() < 0.1 else 0.0
            options = LEAVING[leaving] if leaving else {}
            outcome = await post(server.port, n, bodies[n], read_delay=read_delay, **options)
            if leaving and outcome.error == "left":
                counts[leaving] += 1
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
